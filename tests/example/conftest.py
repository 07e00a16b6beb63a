"""Tiny data and models, and the fine-tuning script run on them: as a user runs it, or in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ernie.config import ErnieConfig
from propeller import cli

CHARACTERS = "这家酒店的服务价格非常好差"
WORDS = ("the", "hotel", "is", "good", "bad")
VOCABULARY = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *sorted(set(CHARACTERS)), *WORDS)
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}

# The command of the older README, with other paths and sizes. Options that the tests add come last.
COMMAND = r"""
$PYTHON $EXAMPLE \
    --data_dir ${TASK_DATA_PATH}/chnsenticorp/  \
    --warm_start_from ${WARM_START_FROM} \
    --vocab_file ${MODEL_PATH}/vocab.txt \
    --max_seqlen 32 \
    --run_config '{
        "model_dir": "output",
        "max_steps": '$((10 * 96 / 32))',
        "save_steps": 100,
        "log_steps": 10,
        "max_ckpt": 1,
        "skip_steps": 0,
        "eval_steps": 100
    }' \
    --hparam ${MODEL_PATH}/ernie_config.json \
    --hparam '{ # model definition
        "sent_type_vocab_size": None,    # default term in official config
        "use_task_id": False,
        "task_id": 0,
        }' \
    --hparam '{ # learn
      "warmup_proportion":  0.1,
      "weight_decay": 0.01,
      "use_fp16": 0,
      "learning_rate": 0.01,
      "num_label": 2,
      "batch_size": 32
    }' "$@"
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run of the script ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def review(rng: random.Random, *, length: int = 6) -> tuple[str, str]:
    """A label and a text that tells it."""
    label = rng.choice("01")
    text = "".join(rng.choices(CHARACTERS[:-2], k=rng.randint(1, length))) + ("好" if label == "1" else "差")
    return label, text + rng.choice(["", " the hotel", " Hotel is"])


def reviews(count: int, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return [review(rng) for _ in range(count)]


def write_lines(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return path


def make_data(folder: Path, **sizes: int) -> Path:
    """Files as ChnSentiCorp's: a header `label<TAB>text_a`, then rows."""
    for seed, (name, size) in enumerate(sizes.items()):
        rows = (f"{label}\t{text}" for label, text in reviews(size, seed))
        write_lines(folder / f"{name}.tsv", "label\ttext_a", *rows)
    return folder


@pytest.fixture(scope="session")
def write():
    """`write(path, *lines)` makes a text file, and its folder."""
    return write_lines


@pytest.fixture(scope="session")
def texts():
    """`texts(count, seed)` gives pairs of label and text."""
    return reviews


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """Data, a vocabulary and a pretrained folder; nothing in it is changed."""
    from ernie.modeling import ErnieModel
    from ernie.tokenizing import load_tokenizer
    from propeller.paddle.runtime import paddle

    folder = tmp_path_factory.mktemp("workplace")
    make_data(folder / "data" / "chnsenticorp", train=96, dev=24, test=16)
    vocab = write_lines(folder / "vocab.txt", *VOCABULARY)
    paddle.seed(7)
    config = ErnieConfig(vocab_size=len(VOCABULARY), hidden_dropout_prob=0.0, initializer_range=0.2, **SIZES)
    ErnieModel(config).save_pretrained(folder / "model", tokenizer=load_tokenizer(None, vocab_file=vocab))
    return folder


@pytest.fixture(scope="session")
def environment(root, workplace):
    """The environment of a user who has the checkout on his path."""
    return {
        **os.environ,
        "PYTHONPATH": str(root),
        "PYTHONUNBUFFERED": "",
        "XDG_CACHE_HOME": str(workplace / "cache"),
        "PYTHON": sys.executable,
        "EXAMPLE": str(root / "example" / "finetune_classifier.py"),
        "TASK_DATA_PATH": str(workplace / "data"),
        "MODEL_PATH": str(workplace / "model"),
        "WARM_START_FROM": str(workplace / "model"),
    }


@pytest.fixture(scope="session")
def shell(environment):
    """`shell(script, *args, cwd=, **environment)` runs a bash script to its end."""

    def run(script, *args, cwd, stdin=None, **more):
        done = subprocess.run(
            ["bash", "-c", script, "bash", *map(str, args)],
            input=stdin,
            cwd=cwd,
            env={**environment, **more},
            capture_output=True,
            timeout=120,
        )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture(scope="session")
def older_command(shell):
    """`older_command(*flags, cwd=, **environment)` runs the older README's command."""
    return functools.partial(shell, COMMAND)


@pytest.fixture(scope="session")
def trained(older_command, workplace):
    """That command, run once: its result, and the folder it ran in."""
    folder = workplace / "run"
    folder.mkdir()
    return older_command("--dev_predictions", "predictions/dev.jsonl", cwd=folder), folder


@pytest.fixture(scope="session")
def bundle(trained):
    """The folder that `trained` exported."""
    return trained[1] / "output" / "best" / "inference"


@pytest.fixture(scope="session")
def script(root):
    """The script as a module."""
    path = root / "example" / "finetune_classifier.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(script, monkeypatch, tmp_path):
    """`call(*flags, stdin=b"")` runs the script in this process, which has Paddle loaded already."""

    def run(*flags, stdin=b""):
        (tmp_path / "stdin").write_bytes(stdin)
        out, err = io.StringIO(), io.StringIO()
        loggers = [logging.getLogger(name) for name in ("propeller", "ernie")]
        before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
        try:
            with (
                monkeypatch.context() as patch,
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                open(tmp_path / "stdin", encoding="utf-8") as lines,
                pytest.raises(SystemExit) as stop,
            ):
                patch.setattr(sys, "argv", ["finetune_classifier.py", *map(str, flags)])
                patch.setattr(sys, "stdin", lines)
                cli.run(script.main)
        finally:
            for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
                logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate
        return Result(stop.value.code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def finetune(call, workplace, tmp_path):
    """`finetune(*flags, run_config=, hparam=)` trains for two steps, on the workplace's data by default."""

    def run(*flags, run_config=None, hparam=None):
        config = {"model_dir": str(tmp_path / "output"), "max_steps": 2, **(run_config or {})}
        hparams = {**SIZES, "learning_rate": 0.01, "batch_size": 8, **(hparam or {})}
        data = () if "--train_set" in flags else ("--data_dir", workplace / "data" / "chnsenticorp")
        return call(
            *data, "--vocab_file", workplace / "vocab.txt", "--max_seqlen", 32,
            "--cache_dir", tmp_path / "cache", "--run_config", json.dumps(config),
            "--hparam", json.dumps(hparams), *flags,
        )  # fmt: skip

    return run

"""What the tests of the recipes share: task data in its original form, tiny models, and a recipe's call."""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from ernie.commands import tune
from ernie.tasks.arguments import argument_parser
from propeller.config import parse_hparam, parse_runconfig
from propeller.types import HParams, RunConfig

CHARACTERS = "这家酒店的服务价格非常好差京沪"
WORDS = ("the", "hotel", "is", "good", "bad", "it")
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")


def chinese(rng: random.Random, size: int = 8) -> str:
    return "".join(rng.choices(CHARACTERS, k=size))


def english(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=5)).capitalize() + ' "now .'


def write(path: Path, *rows: tuple[Any, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), "utf-8")


def squad(rng: random.Random) -> dict[str, Any]:
    """As CMRC2018 and DRCD are published."""
    paragraphs = []
    for number in range(4):
        context = chinese(rng, 40)
        answers = [{"id": "1", "text": context[5:8], "answer_start": 5}]
        question = {"id": f"{number}_QUERY_0", "question": chinese(rng) + "？", "answers": answers}
        paragraphs.append({"id": str(number), "context": context, "qas": [question]})
    return {"version": "v1.0", "data": [{"id": "1", "title": "酒店", "paragraphs": paragraphs}]}


def make_chinese_data(folder: Path) -> None:
    rng = random.Random(0)
    for name in ("train", "dev", "test"):
        tables = {
            "chnsenticorp": [("label", "text_a"), *((n % 2, chinese(rng)) for n in range(12))],
            "lcqmc": [(chinese(rng), chinese(rng), n % 2) for n in range(12)],
            "bq": [("text_a", "text_b", "label"), *((chinese(rng), chinese(rng), n % 2) for n in range(12))],
            "thuc": [("label", "text_a"), *((n % 10, chinese(rng)) for n in range(20))],
            "nlpcc-dbqa": [
                ("qid", "text_a", "text_b", "label"),
                *((n // 3, "酒店" * (1 + n // 3), chinese(rng), int(n % 3 == 1)) for n in range(12)),
            ],
        }
        tags = "B-PER I-PER B-ORG I-ORG B-LOC I-LOC O O".split()
        tables["msra_ner"] = [
            ("text_a", "label"),
            *(("\x02".join(chinese(rng)), "\x02".join(tags)) for _ in range(6)),
        ]
        for task, rows in tables.items():
            write(folder / task / f"{name}.tsv", *rows)
        for path in (f"cmrc2018/cmrc2018_{name}.json", f"drcd/{name}.json"):
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(json.dumps(squad(rng), ensure_ascii=False), "utf-8")
    labels = ["O", *(f"{part}-{kind}" for kind in ("PER", "ORG", "LOC") for part in "BI")]
    numbered = json.dumps({label: number for number, label in enumerate(labels)})
    (folder / "msra_ner/label_map.json").write_text(numbered)

    pairs = itertools.cycle(["neutral", "entailment", "contradictory"])
    train = ((chinese(rng), chinese(rng), next(pairs)) for _ in range(12))
    write(folder / "xnli/multinli.train.zh.tsv", ("premise", "hypo", "label"), *train)
    for name in ("dev", "test"):
        found = [
            (language, label, "", chinese(rng), chinese(rng), number)
            for number, label in enumerate(("neutral", "contradiction", "entailment"))
            for language in ("ar", "zh")
        ]
        head = ("language", "gold_label", "sentence1_parse", "sentence1", "sentence2", "promptID")
        write(folder / f"xnli/xnli.{name}.tsv", head, *found)


def make_glue(folder: Path) -> None:
    """As it is downloaded, but for columns that nobody reads."""
    rng = random.Random(1)

    def make(
        task: str, head: tuple[str, ...], labels: tuple[Any, ...], names=("train", "dev", "test")
    ) -> None:
        for name in names:
            last = -1 if name.startswith("test") else len(head)  # test sets have no label, the last column
            rows = [
                (number, *(english(rng) for _ in head[1:-1]), labels[number % len(labels)])[:last]
                for number in range(12)
            ]
            write(folder / task / f"{name}.tsv", head[:last], *rows)

    for name in ("train", "dev"):
        write(folder / f"CoLA/{name}.tsv", *(("gj04", n % 2, "*" * (n % 2), english(rng)) for n in range(12)))
        write(
            folder / f"SST-2/{name}.tsv", ("sentence", "label"), *((english(rng), n % 2) for n in range(12))
        )
    for task in ("CoLA", "SST-2"):
        write(folder / f"{task}/test.tsv", ("index", "sentence"), *((n, english(rng)) for n in range(3)))
    for name in ("train", "dev", "test"):
        rows = [(n % 2, n, n + 1, english(rng), english(rng)) for n in range(12)]
        write(
            folder / f"MRPC/{name}.tsv", ("\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"), *rows
        )
    make("STS-B", ("index", "sentence1", "sentence2", "score"), ("5.000", "0.0", "2.75"))
    make("QQP", ("id", "question1", "question2", "is_duplicate"), (0, 1))
    make("QNLI", ("index", "question", "sentence", "label"), ("entailment", "not_entailment"))
    make("RTE", ("index", "sentence1", "sentence2", "label"), ("entailment", "not_entailment"))
    make("WNLI", ("index", "sentence1", "sentence2", "label"), (0, 1))
    sets = ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")
    make(
        "MNLI",
        ("index", "sentence1", "sentence2", "gold_label"),
        ("neutral", "entailment", "contradiction"),
        sets,
    )


@pytest.fixture(scope="session")
def task_data(tmp_path_factory, root):
    """Folders of task data: `zh`, and `en`, which the preprocessing made of downloaded files."""
    folder = tmp_path_factory.mktemp("task data")
    make_chinese_data(folder / "zh")
    make_glue(folder / "glue")
    command = ["sh", root / "script/en_glue/preprocess/cvt.sh", folder / "glue", folder / "en"]
    subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, check=True, timeout=60)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A tiny model as it is saved (`saved`), and as ERNIE tiny in the older layout (`older`)."""
    from ernie.config import ErnieConfig
    from ernie.modeling import ErnieModel
    from ernie.tokenizing import load_tokenizer
    from propeller.paddle.runtime import paddle

    folder = tmp_path_factory.mktemp("models")
    rng, model = random.Random(2), io.BytesIO()
    lines = (" ".join([chinese(rng, 2), chinese(rng, 1), rng.choice(WORDS)]) for _ in range(200))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=60, minloglevel=3, hard_vocab_limit=False
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = processor.id_to_piece(list(range(3, processor.get_piece_size())))
    vocabulary = list(dict.fromkeys([*SPECIAL, *CHARACTERS, *WORDS, *pieces]))
    vocab = folder / "older" / "vocab.txt"
    vocab.parent.mkdir()
    vocab.write_text("\n".join(vocabulary) + "\n", "utf-8")

    paddle.seed(3)
    config = ErnieConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=512,
    )  # fmt: skip
    network = ErnieModel(config)
    network.save_pretrained(folder / "saved", tokenizer=load_tokenizer(None, vocab_file=vocab))
    network.save_pretrained(folder / "older" / "params")
    (folder / "older/ernie_config.json").write_text(json.dumps(config.to_dict()))
    (folder / "older/subword").mkdir()
    (folder / "older/subword/spm_cased_simp_sampled.model").write_bytes(model.getvalue())
    with open(folder / "older/subword/dict.wordseg.pickle", "wb") as file:
        pickle.dump({"酒店": 1, "服务": 2}, file)
    return folder


@dataclasses.dataclass(frozen=True)
class Call:
    """How a recipe called Python.

    Attributes:
        tune: the flags of `ernie tune`; None without it.
        example: the script.
        args: its flags, and in `rest` those of its task.
    """

    tune: argparse.Namespace | None
    example: str
    args: argparse.Namespace
    rest: list[str]

    @classmethod
    def of(cls, argv: list[str]) -> Call:
        tuned = None
        if argv[0] == "-m":
            assert argv[1:3] == ["ernie.commands.main", "tune"]
            parser = argparse.ArgumentParser()
            tune.add_arguments(parser)
            tuned = parser.parse_args(argv[3:])
            argv = tuned.command[1:]  # after Python
        args, rest = argument_parser("").parse_known_args(argv[1:])
        return cls(tuned, argv[0], args, rest)

    @property
    def hparams(self) -> HParams:
        return parse_hparam(self.args)

    @property
    def run_config(self) -> RunConfig:
        return parse_runconfig(self.args)

    def flag(self, name: str) -> str:
        """The value of a flag of the task."""
        return self.rest[self.rest.index(name) + 1]


@pytest.fixture
def start(root, task_data, models, tmp_path):
    """`start(recipe, *flags, **environment)` runs a recipe to its end; a variable that is None is not set."""

    def run(recipe, *flags, cwd=tmp_path, **environment):
        language = "en" if recipe.startswith("en_glue") else "zh"
        variables = {
            **os.environ,
            "PYTHON": sys.executable,
            "TASK_DATA_PATH": str(task_data / language),
            "MODEL_PATH": str(models / ("older" if "tiny" in recipe else "saved")),
            "OUTPUT_DIR": str(tmp_path / "output"),
            **environment,
        }
        return subprocess.run(
            ["sh", root / "script" / recipe, *map(str, flags)],
            cwd=cwd,
            env={name: str(value) for name, value in variables.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=200,
        )

    return run


@pytest.fixture
def call(start, tmp_path):
    """`call(recipe, *flags, **environment)` tells how a recipe calls Python."""
    python = tmp_path / "a python"
    python.write_text(
        f"#!{sys.executable} -IS\n"
        "import json, os, sys\n"
        "if sys.argv[1] == '-c':\n"
        "    os.execv(sys.executable, sys.argv)\n"
        "print(json.dumps(sys.argv[1:]))\n"
    )
    python.chmod(0o755)

    def run(recipe, *flags, **environment):
        done = start(recipe, *flags, **{"PYTHON": python, **environment})
        assert done.returncode == 0, done.stderr
        return Call.of(json.loads(done.stdout))

    return run

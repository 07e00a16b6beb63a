"""The recipes of `script/zh_task` and `script/en_glue`: the published settings, and that they run.

Most tests put a program in Python's place that prints what it was called with. The runs for real take the
task data in its original form, a tiny model and two steps.
"""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from ernie.commands import tune
from ernie.tasks.arguments import argument_parser
from propeller.bundle import read_bundle
from propeller.config import parse_hparam, parse_runconfig
from propeller.launch import num_ranks
from propeller.types import HParams, RunConfig

CHINESE = """
| task | max_seqlen | epochs | batch x cards, base | batch x cards, large | lr base | lr large | labels |
|---|---|---|---|---|---|---|---|
| ChnSentiCorp | 256 | 10 | 24 x 1 | 24 x 1 | 5e-5 | 1e-5 | 2 |
| LCQMC | 128 | 3 | 32 x 1 | 32 x 1 | 2e-5 | 5e-6 | 2 |
| BQ | 128 | 3 | 64 x 1 | 64 x 1 | 3e-5 | 1.5e-5 | 2 |
| XNLI | 512 | 3 | 8192 tokens x 8 | 8192 tokens x 8 | 1e-4 | 4e-5 | 3 |
| NLPCC-DBQA | 512 | 3 | 8 x 8 | 8 x 8 | 2e-5 | 1e-5 | 2 |
| THUC | 512 | 3 | 8 x 1 | 8 x 1 | 3e-5 | 1.5e-5 | 10 |
| MSRA-NER | 256 | 6 | 16 x 1 | 16 x 1 | 5e-5 | 1e-5 | 7 |
| CMRC2018 | 512 (stride 128) | 2 | 16 x 4 | 8 x 8 | 3e-5 | 3e-5 | |
| DRCD | 512 (stride 128) | 2 | 16 x 4 | 8 x 8 | 5e-5 | 3e-5 | |
"""
GLUE = """
| task | base: batch / epochs / lr | large: batch / epochs / lr | cards |
|---|---|---|---|
| CoLA | 64 / 3 / 3e-5 | 32 / 5 / 3e-5 | 1 |
| SST-2 | 32 / 4 / 2e-5 | 8 / 4 / 2e-5 | 8 |
| MRPC | 16 / 4 / 3e-5 | 8 / 4 / 3e-5 | 2 |
| STS-B | 16 / 3 / 5e-5 | 16 / 3 / 5e-5 | 8 |
| QQP | 32 / 3 / 3e-5 | 32 / 3 / 5e-5 | 8 |
| MNLI | 64 / 3 / 3e-5 | 32 / 3 / 3e-5 | 8 |
| QNLI | 32 / 4 / 2e-5 | 32 / 4 / 2e-5 | 8 |
| RTE | 4 / 4 / 2e-5 | 16 / 5 / 3e-5 | 1 |
| WNLI | 8 / 4 / 2e-5 | 8 / 4 / 2e-5 | 1 |
"""
NAMES = {"BQ": "bq", "NLPCC-DBQA": "dbqa", "ChnSentiCorp": "ChnSentiCorp"}
TINY = ("ChnSentiCorp", "LCQMC", "XNLI", "NLPCC-DBQA", "MSRA-NER")  # no settings of its own: those of base
EXAMPLES = {"dbqa": "ranker", "msra_ner": "ner", "cmrc2018": "mrc", "drcd": "mrc"}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is published: `batch_size` and `cards` apart; `stride` and `labels` where they are."""

    path: str
    max_seqlen: int
    num_epochs: int
    batch_size: int
    cards: int
    learning_rate: float
    weight_decay: float
    warmup_proportion: float
    labels: int | None = None
    stride: int | None = None
    in_tokens: bool = False
    seeds: tuple[int, ...] = ()

    @property
    def task(self) -> str:
        """As the recipe is called."""
        path = Path(self.path)
        return path.parent.name if self.seeds else path.stem.removeprefix("run_")

    @property
    def example(self) -> str:
        return f"finetune_{EXAMPLES.get(self.task, 'classifier')}.py"

    def check(self, hparams: HParams) -> None:
        """The resolved hyper-parameters are the published ones, in a step of as many cards."""
        expected = {
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size * self.cards,
            "num_epochs": self.num_epochs,
            "weight_decay": self.weight_decay,
            "warmup_proportion": self.warmup_proportion,
            "lr_schedule": "linear",
            "in_tokens": self.in_tokens,
        }
        assert {"in_tokens": False, **{key: hparams[key] for key in expected if key in hparams}} == expected


def rows_of(table: str) -> Iterator[list[str]]:
    for line in table.strip().splitlines()[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def recipes() -> Iterator[Recipe]:
    for task, length, epochs, base, large, lr_base, lr_large, labels in rows_of(CHINESE):
        name = NAMES.get(task, task.lower().replace("-", "_"))
        seqlen, _, stride = length.removesuffix(")").partition(" (stride ")
        for size, batch, rate in (
            ("base", base, lr_base),
            ("large", large, lr_large),
            ("tiny", base, lr_base),
        ):
            if size == "tiny" and task not in TINY:
                continue
            count, cards = batch.split(" x ")
            yield Recipe(
                f"zh_task/ernie_{size}/run_{name}.sh",
                int(seqlen),
                int(epochs),
                int(count.removesuffix(" tokens")),
                int(cards),
                float(rate),
                weight_decay=0.0 if task == "LCQMC" else 0.01,
                warmup_proportion=0.0,
                labels=int(labels) if labels else None,
                stride=int(stride) if stride else None,
                in_tokens="tokens" in count,
            )
    for task, base, large, cards in rows_of(GLUE):
        for size, settings in (("base", base), ("large", large)):
            count, epochs, rate = settings.split(" / ")
            yield Recipe(
                f"en_glue/ernie_{size}/{task}/task.sh",
                512 if task == "WNLI" else 128,
                int(epochs),
                int(count),
                int(cards),
                float(rate),
                weight_decay=0.0,
                warmup_proportion=0.1,
                seeds=(1,) if task == "QQP" else (1, 2, 3, 4, 5),
            )


RECIPES = {recipe.path: recipe for recipe in recipes()}
# One of each kind; the others are run for real with the marker `slow`.
QUICK = (
    "zh_task/ernie_tiny/run_ChnSentiCorp.sh",
    "zh_task/ernie_base/run_msra_ner.sh",
    "zh_task/ernie_base/run_dbqa.sh",
    "zh_task/ernie_large/run_cmrc2018.sh",
    "en_glue/ernie_base/QQP/task.sh",
)

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


@pytest.fixture(scope="module")
def task_data(tmp_path_factory, root):
    """Folders of task data: `zh`, and `en`, which the preprocessing made of downloaded files."""
    folder = tmp_path_factory.mktemp("task data")
    make_chinese_data(folder / "zh")
    make_glue(folder / "glue")
    command = ["sh", root / "script/en_glue/preprocess/cvt.sh", folder / "glue", folder / "en"]
    subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, check=True, timeout=60)
    return folder


@pytest.fixture(scope="module")
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


def test_there_is_a_recipe_for_each_published_setting_and_no_other(root):
    found = {str(path.relative_to(root / "script")) for path in root.glob("script/zh_task/**/*.sh")}
    found |= {str(path.relative_to(root / "script")) for path in root.glob("script/en_glue/ernie_*/**/*.sh")}
    assert found == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.path)
def test_settings_are_the_published_ones(call, root, task_data, tmp_path, recipe):
    found = call(recipe.path)
    assert found.example == str(root / "example" / recipe.example)
    recipe.check(found.hparams)
    assert found.args.max_seqlen == recipe.max_seqlen
    assert found.run_config.micro_batches == recipe.cards, "one process takes the place of all cards"
    assert found.args.nproc is None
    if recipe.stride is not None:
        assert found.flag("--doc_stride") == str(recipe.stride)
    if recipe.seeds:
        assert found.tune.seeds == list(recipe.seeds)
        assert found.tune.output_dir == str(tmp_path / "output")
        assert found.flag("--task") == recipe.task
    else:
        assert found.tune is None
        assert found.run_config.model_dir == str(tmp_path / "output")
        assert found.hparams.get("num_label") in (None, recipe.labels)


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, marks=() if path in QUICK else pytest.mark.slow, id=path)
        for path, recipe in RECIPES.items()
    ],
)
def test_runs(start, tmp_path, recipe):
    done = start(recipe.path, "--run_config", '{"max_steps": 2}', SEEDS="1" if recipe.seeds else None)
    output = tmp_path / "output"
    logs = "".join(path.read_text("utf-8") for path in output.rglob("log.txt"))
    assert done.returncode == 0, done.stderr + logs
    (run_file,) = output.rglob("run.json")
    run = json.loads(run_file.read_text("utf-8"))
    recipe.check(HParams(run["hparams"]))
    assert run["run_config"]["max_steps"] == 2 and run["run_config"]["seed"] == (1 if recipe.seeds else 0)
    assert run["hparams"]["step_batch_size"] == recipe.batch_size * recipe.cards

    bundle = read_bundle(output / ("best" if recipe.seeds else "best/inference"))
    settings = bundle.metadata["processor"]["settings"]
    assert settings["max_seqlen"] == recipe.max_seqlen
    assert recipe.stride in (None, settings.get("doc_stride"))
    if recipe.labels and recipe.task != "dbqa":
        assert len(settings["labels"]) == recipe.labels
    if recipe.seeds:
        (row,) = done.stdout.splitlines()[1:]
        mean, deviation, best, each = row.split("\t")
        assert deviation == "0" and mean == best == each
        assert list(run_file.parent.glob("best/submission/*.tsv")) or recipe.task == "MRPC"


class TestWhatIsMissing:
    """Each is named, by a message with one line, and Python is not started."""

    @pytest.fixture
    def error(self, start, tmp_path):
        def run(recipe, *flags, **environment):
            (tmp_path / "python").write_text("#!/bin/sh\necho started\n")
            (tmp_path / "python").chmod(0o755)
            done = start(recipe, *flags, **{"PYTHON": tmp_path / "python", **environment})
            assert (done.returncode, done.stdout) == (2, "")
            (line,) = done.stderr.splitlines()
            return line

        return run

    @pytest.mark.parametrize("value", [None, ""])
    @pytest.mark.parametrize("name", ["TASK_DATA_PATH", "MODEL_PATH"])
    @pytest.mark.parametrize("recipe", ["zh_task/ernie_base/run_drcd.sh", "en_glue/ernie_base/CoLA/task.sh"])
    def test_a_variable(self, error, recipe, name, value):
        assert error(recipe, **{name: value}).startswith(f"error: {name} is not set. Name the folder of the ")

    @pytest.mark.parametrize("name", ["TASK_DATA_PATH", "MODEL_PATH"])
    def test_a_folder(self, error, name):
        line = error("zh_task/ernie_base/run_lcqmc.sh", **{name: "/no where"})
        assert line.startswith(f"error: {name} is /no where, which is no folder; expected the folder of the ")

    @pytest.mark.parametrize(
        ("recipe", "files", "missing"),
        [
            ("zh_task/ernie_base/run_ChnSentiCorp.sh", [], "chnsenticorp"),
            ("zh_task/ernie_base/run_msra_ner.sh", ["msra_ner/dev.tsv"], "msra_ner/train.tsv or "),
            ("zh_task/ernie_base/run_msra_ner.sh", ["msra_ner/train.tsv.gz"], "msra_ner/dev.tsv or "),
            (
                "zh_task/ernie_large/run_cmrc2018.sh",
                ["cmrc2018/train.json"],
                "cmrc2018/dev.json or cmrc2018/cmrc2018_dev.json or ",
            ),
            ("zh_task/ernie_base/run_drcd.sh", ["drcd/train.json", "drcd/dev.json"], "drcd/test.json or "),
            ("en_glue/ernie_large/MNLI/task.sh", ["MNLI/train.tsv"], "MNLI/dev.tsv or "),
        ],
    )
    def test_data(self, error, tmp_path, recipe, files, missing):
        folder = tmp_path / "data"
        folder.mkdir()
        for name in files:
            write(folder / name)
        line = error(recipe, TASK_DATA_PATH=f"{folder}/")
        assert line.startswith(f"error: TASK_DATA_PATH is {folder}, in which there is no {missing}")

    @pytest.mark.parametrize(
        ("recipe", "files", "missing"),
        [
            ("zh_task/ernie_base/run_bq.sh", ["weights"], "ernie_config.json or config.json or "),
            ("zh_task/ernie_base/run_bq.sh", ["params/weights"], "vocab.txt."),
            ("zh_task/ernie_base/run_bq.sh", ["params/weights", "vocab.txt"], "ernie_config.json."),
            (
                "zh_task/ernie_tiny/run_lcqmc.sh",
                ["params/weights", "vocab.txt", "ernie_config.json"],
                "subword/spm_cased_simp_sampled.model or ",
            ),
        ],
    )
    def test_parts_of_the_model(self, error, tmp_path, recipe, files, missing):
        for name in files:
            write(tmp_path / "model" / name)
        line = error(recipe, MODEL_PATH=tmp_path / "model")
        assert line.startswith(f"error: MODEL_PATH is {tmp_path}/model, in which there is no {missing}")

    def test_python(self, error):
        assert "there is no /no/python here" in error("zh_task/ernie_base/run_bq.sh", PYTHON="/no/python")

    @pytest.mark.parametrize("number", ["0", "08", "two", "-1", "1.5"])
    def test_a_number_of_cards(self, error, number):
        expected = f"error: NPROC, or --nproc, is '{number}'; expected a number of cards, or auto."
        assert error("zh_task/ernie_base/run_bq.sh", NPROC=number) == expected
        assert error("zh_task/ernie_base/run_bq.sh", "--nproc", number) == expected


class TestFlags:
    def test_the_users_win(self, call, tmp_path):
        flags = ["--run_config", '{"max_steps": 2}', "--hparam", '{"learning_rate": 1.0}', "--max_seqlen", 64]
        found = call("zh_task/ernie_base/run_ChnSentiCorp.sh", *flags)
        assert found.run_config.max_steps == 2 and found.run_config.eval_steps == 100
        assert found.hparams.learning_rate == 1.0 and found.hparams.batch_size == 24
        assert found.args.max_seqlen == 64

    def test_they_reach_each_seed(self, call):
        found = call("en_glue/ernie_base/RTE/task.sh", "--hparam", '{"batch_size": 5}', SEEDS="7,8")
        assert found.tune.seeds == [7, 8]
        assert found.hparams.batch_size == 5

    def test_seeds_for_a_chinese_task(self, call, tmp_path):
        found = call("zh_task/ernie_base/run_lcqmc.sh", SEEDS="1,2")
        assert found.tune.seeds == [1, 2] and found.tune.output_dir == str(tmp_path / "output")

    def test_any_folder_and_any_name_will_do(self, call, task_data, tmp_path):
        """Folders are the caller's, relative ones too."""
        (tmp_path / 'an "odd" \\ name, isn\'t it? $HOME').symlink_to(task_data / "zh")
        (name,) = (path.name for path in tmp_path.iterdir() if path.is_symlink())
        found = call("zh_task/ernie_base/run_msra_ner.sh", TASK_DATA_PATH=name, OUTPUT_DIR=f"out {name}")
        assert found.args.data_dir == f"{name}/msra_ner"
        assert found.run_config.model_dir == f"out {name}"

    @pytest.mark.parametrize(
        ("recipe", "folder"),
        [
            ("zh_task/ernie_large/run_drcd.sh", "output/zh_task/ernie_large/run_drcd"),
            ("en_glue/ernie_base/STS-B/task.sh", "output/en_glue/ernie_base/STS-B"),
        ],
    )
    def test_each_has_a_folder_of_its_own(self, call, recipe, folder):
        found = call(recipe, OUTPUT_DIR=None)
        assert folder == (found.tune.output_dir if found.tune else found.run_config.model_dir)


class TestCards:
    @pytest.mark.parametrize(
        ("recipe", "nproc", "parts"),
        [
            ("zh_task/ernie_base/run_cmrc2018.sh", 4, 1),
            ("zh_task/ernie_base/run_cmrc2018.sh", 2, 2),
            ("zh_task/ernie_large/run_cmrc2018.sh", 3, 3),
            ("zh_task/ernie_base/run_msra_ner.sh", 8, 1),
            ("zh_task/ernie_base/run_xnli.sh", 8, 1),
            ("en_glue/ernie_base/MRPC/task.sh", 2, 1),
        ],
    )
    def test_the_batch_of_a_step_stays(self, call, recipe, nproc, parts):
        flags = [(["--nproc", nproc], {}), ([f"--nproc={nproc}"], {"NPROC": "5"}), ([], {"NPROC": nproc})]
        for words, environment in flags:
            found = call(recipe, *words, **environment)
            RECIPES[recipe].check(found.hparams)
            assert found.args.nproc == str(nproc) and found.run_config.micro_batches == parts

    def test_auto_takes_what_there_is(self, call):
        found = call("zh_task/ernie_base/run_dbqa.sh", NPROC="auto")
        ranks = num_ranks("auto")
        assert found.args.nproc == (None if ranks == 1 else str(ranks))
        assert found.run_config.micro_batches == -(-8 // ranks)


class TestModels:
    def test_a_folder_as_it_is(self, call, models):
        found = call("zh_task/ernie_base/run_thuc.sh", MODEL_PATH=models / "saved")
        assert found.args.warm_start_from == str(models / "saved")
        assert found.args.vocab_file is None

    def test_a_folder_of_hugging_face(self, call, root):
        folder = root / "tests" / "data" / "bert_tiny"
        assert call("en_glue/ernie_base/CoLA/task.sh", MODEL_PATH=folder).args.warm_start_from == str(folder)

    def test_the_older_layout(self, call, models):
        found = call("zh_task/ernie_base/run_thuc.sh", MODEL_PATH=models / "older")
        assert found.args.warm_start_from == str(models / "older/params")
        assert found.args.vocab_file == str(models / "older/vocab.txt")
        assert found.hparams.hidden_size == 8, "from ernie_config.json"
        assert found.hparams.learning_rate == 3e-5

    def test_word_pieces_of_ernie_tiny(self, call, models):
        found = call("zh_task/ernie_tiny/run_dbqa.sh")
        subword = models / "older" / "subword"
        assert found.args.sentence_piece_model == str(subword / "spm_cased_simp_sampled.model")
        assert found.args.word_dict == str(subword / "dict.wordseg.pickle")

    def test_names_of_ernie_tiny_label_single_characters(self, call):
        found = call("zh_task/ernie_tiny/run_msra_ner.sh")
        assert found.args.sentence_piece_model is None
        assert found.flag("--use_sentence_piece_vocab") == "true"

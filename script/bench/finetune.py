"""Repeat the runs of `peer_transformers.py` with propeller, and compare.

    python script/bench/finetune.py --task sst2 --data GLUE --peer peer/sst2_d0 --out own/sst2_d0 \\
        --dropout 0 --steps 50
    python script/bench/finetune.py --compare --peer 'peer/sst2_seed*' --out 'own/sst2_seed*'

A run starts from the weights in the peer's `init/`, sees the batches of its `batches.json` in their
order under the same schedule, and writes `losses.json` and `result.json` in the peer's form.
`--compare` prints the largest difference of the losses, mean accuracies with their standard errors, and
speeds.
"""

from __future__ import annotations

import argparse
import functools
import glob
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

import propeller.paddle as propeller
from ernie.pretrained import load_pretrained_config, load_pretrained_state
from ernie.tasks.classification import ClassificationProcessor, file_columns, label_column
from ernie.tasks.models import ClassificationModel
from ernie.tokenizing import load_tokenizer
from propeller import cli
from propeller.data import Dataset, pad_batch

TASKS: dict[str, dict[str, Any]] = {
    "sst2": {"folder": "SST-2", "train": "train.tsv.gz", "pair": False, "rows": 10_000},
    "mrpc": {"folder": "MRPC", "train": "train.tsv", "pair": True, "rows": None},
}
LEARNING_RATE, WARMUP, WEIGHT_DECAY, MAX_SEQLEN = 5e-5, 0.1, 0.01, 128


class StepLosses(propeller.Hook):
    """Keeps the loss of every step, and when the steps ended."""

    name = "step_losses"

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.examples: list[int] = []

    def step_begin(self, state: propeller.RunState) -> None:
        self._began = time.perf_counter()

    def step_end(self, state: propeller.RunState, result: propeller.StepResult) -> None:
        self.losses.append(result.loss)
        self.examples.append(result.num_examples)
        self.seconds.append(time.perf_counter() - self._began)


def initial_tensors(init: str | Path) -> dict[str, np.ndarray]:
    """The peer's first weights, of encoder and classifier, under our names."""
    _, encoder = load_pretrained_state(init)
    head = safetensors.numpy.load_file(Path(init) / "model.safetensors")
    return {
        **{f"encoder.{name}": array for name, array in encoder.items()},
        "head.classifier.weight": head["classifier.weight"].T.copy(),
        "head.classifier.bias": head["classifier.bias"],
    }


def run(task_name: str, data: Path, peer: Path, out: Path, dropout: float, steps: int | None) -> None:
    """Repeats one run of the peer."""
    task = TASKS[task_name]
    init, batches = peer / "init", json.loads((peer / "batches.json").read_text())
    processor = ClassificationProcessor(
        load_tokenizer(init), ["0", "1"], max_seqlen=MAX_SEQLEN, pair=task["pair"]
    )
    columns = file_columns(label_column(processor.labels), pair=task["pair"])
    folder = data / task["folder"]
    train = processor.prepare(list(itertools.islice(columns.read(folder / task["train"]), task["rows"])))
    dev = Dataset.from_list(processor.prepare(list(columns.read(folder / "dev.tsv"))))
    ordered = Dataset.from_list(batches).map(
        lambda rows: pad_batch([train[row] for row in rows], pad_values=processor.pad_values)
    )

    config = load_pretrained_config(init)
    hparams = {
        **config.to_dict(),
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    total = len(batches)
    losses = StepLosses()
    learner = propeller.Learner(
        functools.partial(
            ClassificationModel, config=type(config).from_dict(hparams), processor=processor
        ),
        propeller.RunConfig(
            model_dir=str(out),
            max_steps=total,
            run_steps=steps,
            eval_steps=10**9,
            save_steps=10**9,
            log_steps=25,
            seed=int(json.loads((peer / "result.json").read_text())["seed"]),
        ),
        {
            "learning_rate": LEARNING_RATE,
            "warmup_proportion": (math.ceil(WARMUP * total) + 0.5) / total,  # rounds down to the peer's steps
            "weight_decay": WEIGHT_DECAY,
        },
        propeller.WarmStartSetting(source=lambda: initial_tensors(init)),
    )
    learner.train(ordered.buffered(8), hooks=[losses])
    result = learner.evaluate(dev.bucket(batch_size=32, pad_values=processor.pad_values))
    result["examples_per_s"] = sum(losses.examples) / sum(losses.seconds)
    (out / "losses.json").write_text(json.dumps({"losses": losses.losses}))
    (out / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


def compare(peer: str, out: str) -> None:
    """Prints both sides' figures for all folders that match."""
    folders = [Path(name) for name in sorted(glob.glob(peer))]
    pairs = [(folder, Path(out.replace("*", folder.name.rpartition("seed")[2]))) for folder in folders]
    for theirs, ours in pairs:
        a, b = (np.array(json.loads((side / "losses.json").read_text())["losses"]) for side in (theirs, ours))
        steps = min(len(a), len(b))
        print(f"{ours.name}: largest difference of {steps} losses: {np.abs(a[:steps] - b[:steps]).max():.2e}")
    for name, side in (("transformers", 0), ("propeller", 1)):
        results = [json.loads((pair[side] / "result.json").read_text()) for pair in pairs]
        accuracies = np.array([result["acc" if side else "dev_acc"] for result in results])
        error = accuracies.std(ddof=1) / math.sqrt(len(accuracies)) if len(accuracies) > 1 else math.nan
        speeds = [result.get("examples_per_s", math.nan) for result in results]
        print(
            f"{name}: accuracy {accuracies.mean():.4f} (standard error {error:.4f}), "
            f"{np.mean(speeds):.1f} examples/s"
        )


def main() -> None:
    """Parses the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=sorted(TASKS))
    parser.add_argument("--data", type=Path, help="the GLUE folder")
    parser.add_argument("--peer", required=True, help="folder of the peer (with --compare: a pattern)")
    parser.add_argument("--out", required=True, help="where to write (with --compare: alike)")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args()
    cli.setup_logging()
    if args.compare:
        compare(args.peer, args.out)
    else:
        run(args.task, args.data, Path(args.peer), Path(args.out), args.dropout, args.steps)


if __name__ == "__main__":
    main()

"""Repeat the runs of `peer_transformers.py` with propeller, and compare.

    python script/bench/finetune.py --task sst2 --data GLUE --peer peer/sst2_d0 --out own/sst2_d0 \\
        --dropout 0 --steps 50
    python script/bench/finetune.py --compare --peer 'peer/sst2_seed*' --out 'own/sst2_seed*'

A run reads the task's files itself and refuses to begin where its model inputs are not the peer's. It starts
from the weights in the peer's `init/`, sees the batches of its `batches.json` in their order under the
same schedule, and writes `losses.json` and `result.json` in the peer's form. `--compare` prints the largest
difference of the losses, mean dev metrics with their standard errors, and speeds.
"""

from __future__ import annotations

import argparse
import functools
import glob
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from finetune_tasks import TASKS, check_features, initial_tensors, make_work, peer_metrics

import propeller.paddle as propeller
from ernie.pretrained import load_pretrained_config
from ernie.tokenizing import load_tokenizer
from propeller import cli
from propeller.data import Dataset, pad_batch

WARMUP, WEIGHT_DECAY = 0.1, 0.01
WARM_STEPS = 5  # not timed
METRICS = ("acc", "f1", "mcc", "pearson", "spearman", "mrr", "map", "em", "best_f1")


class StepLosses(propeller.Hook):
    """Keeps the loss of every step, and when the steps ended."""

    name = "step_losses"

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.ends: list[float] = []
        self.examples: list[int] = []

    def step_end(self, state: propeller.RunState, result: propeller.StepResult) -> None:
        self.losses.append(result.loss)
        self.examples.append(result.num_examples)
        self.ends.append(time.perf_counter())

    def examples_per_s(self) -> float:
        """Speed after the first `WARM_STEPS` steps."""
        return sum(self.examples[WARM_STEPS:]) / (self.ends[-1] - self.ends[WARM_STEPS - 1])


def run(task: str, data: Path, peer: Path, out: Path, dropout: float, steps: int | None) -> None:
    """Repeats one run of the peer."""
    init, batches = peer / "init", json.loads((peer / "batches.json").read_text())
    work = make_work(task, load_tokenizer(init), data, peer)
    check_features(work, peer)
    pad_values = work.processor.pad_values
    ordered = Dataset.from_list(batches).map(
        lambda rows: pad_batch([work.train[row] for row in rows], pad_values=pad_values)
    )
    theirs = json.loads((peer / "result.json").read_text())
    config = load_pretrained_config(init)
    hparams = {
        **config.to_dict(),
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    total = len(batches)
    losses = StepLosses()
    learner = propeller.Learner(
        functools.partial(work.model, config=type(config).from_dict(hparams), processor=work.processor),
        propeller.RunConfig(
            model_dir=str(out),
            max_steps=total,
            run_steps=steps,
            eval_steps=10**9,
            save_steps=10**9,
            log_steps=25,
            seed=int(theirs["seed"]),
        ),
        {
            "learning_rate": theirs["settings"]["learning_rate"],
            "warmup_proportion": (math.ceil(WARMUP * total) + 0.5) / total,  # rounds down to the peer's steps
            "weight_decay": WEIGHT_DECAY,
        },
        # The peer's `BertForQuestionAnswering` has no pooler; here it is there, and has no part in the loss.
        propeller.WarmStartSetting(
            source=lambda: initial_tensors(init), new=("encoder.pooler.*",) if task == "squad" else ()
        ),
    )
    learner.train(ordered.buffered(8), hooks=[losses])
    result: dict[str, Any] = {"examples_per_s": losses.examples_per_s()}
    if steps is None:
        dev = Dataset.from_list(work.dev).bucket(batch_size=32, pad_values=pad_values, key="input_ids")
        result |= {"metrics": learner.evaluate(dev), "peer_metrics": peer_metrics(work, peer)}
    (out / "losses.json").write_text(json.dumps({"losses": losses.losses, "step_ends": losses.ends}))
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
    own = [json.loads((ours / "result.json").read_text()) for _, ours in pairs]
    speeds = [
        [json.loads((theirs / "result.json").read_text())["examples_per_s"] for theirs, _ in pairs],
        [result["examples_per_s"] for result in own],
    ]
    for name in METRICS:
        if name in own[0].get("peer_metrics", ()):
            values = ([result[side][name] for result in own] for side in ("peer_metrics", "metrics"))
            compare_metric(name, *map(np.array, values))
    theirs, ours = map(np.mean, speeds)
    print(f"examples/s: transformers {theirs:.1f}, propeller {ours:.1f}, ratio {ours / theirs:.2f}")


def compare_metric(name: str, theirs: np.ndarray, ours: np.ndarray) -> None:
    """Prints both means with their standard errors, and how many of the difference's they lie apart."""
    if len(ours) < 2:
        print(f"{name}: transformers {theirs[0]:.4f}, propeller {ours[0]:.4f}, one run each")
        return
    errors = [side.std(ddof=1) / math.sqrt(len(side)) for side in (theirs, ours)]
    apart = ours.mean() - theirs.mean()
    print(
        f"{name}: transformers {theirs.mean():.4f} (standard error {errors[0]:.4f}), propeller "
        f"{ours.mean():.4f} ({errors[1]:.4f}), {apart / math.hypot(*errors):+.1f} standard errors apart"
    )


def main() -> None:
    """Parses the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--data", type=Path, help="the folder with the task's files")
    parser.add_argument("--peer", required=True, help="folder of the peer (with --compare: a pattern)")
    parser.add_argument("--out", required=True, help="where to write (with --compare: alike)")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args()
    if args.steps is not None and args.steps <= WARM_STEPS:
        parser.error(f"--steps {args.steps}: expected more than {WARM_STEPS}, which are not timed")
    if not args.compare and (args.task is None or args.data is None):
        parser.error("--task and --data are needed, or --compare")
    cli.setup_logging()
    if args.compare:
        compare(args.peer, args.out)
    else:
        run(args.task, args.data, Path(args.peer), Path(args.out), args.dropout, args.steps)


if __name__ == "__main__":
    main()

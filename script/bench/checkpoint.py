"""How much of training goes into saving checkpoints, and what a save is made of.

    python script/bench/checkpoint.py --folder output

Trains an ERNIE-base classifier (random weights, 100 M parameters, AdamW) on random ids, with a few saves on
the way. A save is all between the end of a step and the checkpoint that is whole on disk: the check of the
weights, the files, their sha256, the syncs, and the removal of the oldest.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import propeller.paddle as propeller
from ernie.config import ErnieConfig
from ernie.modeling import ClassificationHead, ErnieModel
from propeller import atomic
from propeller.data import Dataset
from propeller.paddle import optimization
from propeller.paddle.runtime import paddle
from propeller.paddle.train import checkpoint

VOCAB_SIZE = 18_000
WARMUP_STEPS = 2
STEPS_BETWEEN_SAVES = 2
# What the share is asked for: one save in so many steps.
SAVE_STEPS = 100


class Classifier(propeller.Model):
    """ERNIE-base with a head of two labels."""

    inputs = (propeller.ArraySpec("input_ids", "int64", ("batch", "seq_len")),)

    def __init__(self, hparams: propeller.HParams, mode: propeller.RunMode, run_config: propeller.RunConfig):
        super().__init__(hparams, mode, run_config)
        config = ErnieConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=512,
        )
        self.encoder = ErnieModel(config)
        self.head = ClassificationHead(config, 2)

    def forward(self, features: dict[str, paddle.Tensor]) -> paddle.Tensor:
        """Returns logits `[batch, 2]`."""
        return self.head(self.encoder(features["input_ids"]).pooled)

    def loss(self, predictions: paddle.Tensor, labels: paddle.Tensor) -> tuple[paddle.Tensor, int]:
        """Summed cross entropy, and the examples."""
        return paddle.nn.functional.cross_entropy(predictions, labels, reduction="sum"), len(labels)

    def optimizer(self) -> paddle.optimizer.Optimizer:
        """AdamW at a constant rate."""
        return optimization.adamw(self, learning_rate=5e-5, max_steps=None, schedule="constant")


class Clock(propeller.Hook):
    """Seconds of each step and of each save."""

    name = "clock"

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.saves: list[float] = []
        self.bytes = 0

    def step_begin(self, state: propeller.RunState) -> None:
        self._began = time.perf_counter()

    def step_end(self, state: propeller.RunState, result: propeller.StepResult) -> None:
        self._ended = time.perf_counter()
        self.steps.append(self._ended - self._began)

    def checkpoint_saved(self, state: propeller.RunState, path: Path) -> None:
        self.saves.append(time.perf_counter() - self._ended)
        self.bytes = sum(file.stat().st_size for file in path.iterdir())


@contextlib.contextmanager
def timed(module: Any, name: str, seconds: dict[str, float], part: str) -> Iterator[None]:
    """Adds up under `part` what calls of `module.name` take within the block."""
    function: Callable[..., Any] = getattr(module, name)

    def measured(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - began

    setattr(module, name, measured)
    try:
        yield
    finally:
        setattr(module, name, function)


def batches(batch_size: int, seqlen: int) -> Dataset:
    """Random ids, all of the full length."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, VOCAB_SIZE, (4 * batch_size, seqlen), dtype=np.int64)
    examples = [{"input_ids": row, "label": number % 2} for number, row in enumerate(ids)]
    return Dataset.from_list(examples).repeat().padded_batch(batch_size)


def measure(args: argparse.Namespace, model_dir: str) -> None:
    """Trains and prints the figures."""
    clock, parts = Clock(), dict[str, float]()
    config = propeller.RunConfig(
        model_dir=model_dir,
        run_steps=WARMUP_STEPS + STEPS_BETWEEN_SAVES * args.saves,
        save_steps=STEPS_BETWEEN_SAVES,
        skip_steps=WARMUP_STEPS + 1,
        max_ckpt=2,
    )
    learner = propeller.Learner(Classifier, config)
    with (
        timed(checkpoint.safetensors.paddle, "save_file", parts, "write"),
        timed(atomic, "sha256", parts, "sha256"),
        timed(os, "fsync", parts, "sync"),
    ):
        learner.train(batches(args.batch_size, args.seqlen), hooks=[clock])
    steps = clock.steps[WARMUP_STEPS:]
    step, save = statistics.median(steps), statistics.median(clock.saves)
    parameters = sum(parameter.size for parameter in learner.model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {clock.bytes / 1e6:.0f} MB a checkpoint")
    print(f"a step of {args.batch_size} x {args.seqlen} tokens: {step:.2f} s (median of {len(steps)})")
    print(f"saves: {', '.join(f'{seconds:.2f}' for seconds in clock.saves)} s")
    parts["rest"] = sum(clock.saves) - sum(parts.values())
    for part, seconds in parts.items():
        print(f"  {part:8} {seconds / len(clock.saves):6.2f} s a save")
    share = save / (save + SAVE_STEPS * step)
    print(f"one save in {SAVE_STEPS} steps: {share:.2%} of wall time")


def main() -> None:
    """Parses the flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("output"), help="on the disk to be measured")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--saves", type=int, default=3)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="checkpoint_bench.", dir=args.folder) as folder:
        measure(args, folder)


if __name__ == "__main__":
    main()

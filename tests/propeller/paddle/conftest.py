"""A small model on small data, learnt in a second."""

from __future__ import annotations

import numpy as np
import pytest

import propeller.paddle as propeller
from propeller.data import Dataset
from propeller.metrics import Acc
from propeller.paddle import optimization
from propeller.paddle.runtime import paddle


class Bags(propeller.Model):
    """Classifies a bag of words; the label is whether there are more even than odd ids."""

    inputs = (propeller.ArraySpec("input_ids", "int64", ("batch", "seq_len")),)

    def __init__(self, hparams, mode, run_config):
        super().__init__(hparams, mode, run_config)
        self.table = paddle.nn.Embedding(50, 16, padding_idx=0)
        self.norm = paddle.nn.LayerNorm(16)
        self.dropout = paddle.nn.Dropout(hparams.get("dropout", 0.0))
        self.out = paddle.nn.Linear(16, 2)

    def forward(self, features):
        return {"logits": self.out(self.dropout(self.norm(self.table(features["input_ids"]).sum(1))))}

    def loss(self, predictions, labels):
        loss = paddle.nn.functional.cross_entropy(predictions["logits"], labels, reduction="sum")
        propeller.summary.scalar("loss_sum", loss)
        return loss * self.hparams.get("loss_scale", 1.0), len(labels)

    def optimizer(self):
        return optimization.adamw(
            self, learning_rate=self.hparams.get("learning_rate", 0.01), max_steps=self.run_config.max_steps
        )

    def metrics(self):
        return {"acc": Acc()}


@pytest.fixture
def toy():
    """The model class."""
    return Bags


def examples(count: int, seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        ids = rng.integers(1, 50, size=rng.integers(3, 12), dtype=np.int64)
        rows.append({"id": f"row {number}", "input_ids": ids, "label": int((ids % 2 == 0).mean() > 0.5)})
    return rows


@pytest.fixture
def train_data() -> Dataset:
    return Dataset.from_list(examples(256, seed=1)).shuffle().repeat().padded_batch(16)


@pytest.fixture
def dev_data() -> Dataset:
    return Dataset.from_list(examples(100, seed=2)).padded_batch(32)


@pytest.fixture
def run_config(tmp_path):
    def make(**changes):
        values = {"model_dir": str(tmp_path / "run"), "max_steps": 60, "eval_steps": 20, "save_steps": 20, "log_steps": 10}
        return propeller.RunConfig(**{**values, **changes})

    return make

"""Runs of several ranks: the same result as one, whatever the batches and however a run ends in between."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest

SIZES = [2, 3]
# Largest difference of a weight; the sums of float32 gradients are made in another order.
NEAR = 1e-6

# Each is compared with one rank that takes its batches whole: the part of its name before " in ".
VARIANTS = {
    "padded": {},
    "padded in 2": {"config": {"micro_batches": 2}},
    "padded in 4": {"config": {"micro_batches": 4}},
    "mean loss": {"hparams": {"loss": "mean"}},
    "mean loss in 4": {"hparams": {"loss": "mean"}, "config": {"micro_batches": 4}},
    "tokens": {"data": {"kind": "tokens"}, "hparams": {"loss": "words"}},
    "tokens in 2": {
        "data": {"kind": "tokens"}, "hparams": {"loss": "words"}, "config": {"micro_batches": 2}
    },
    "bucket": {"data": {"kind": "bucket"}, "hparams": {"loss": "words"}},
    "bucket in 4": {
        "data": {"kind": "bucket"}, "hparams": {"loss": "words"}, "config": {"micro_batches": 4}
    },
    "uneven": {"data": {"kind": "uneven", "count": 41}},
    "uneven in 4": {"data": {"kind": "uneven", "count": 41}, "config": {"micro_batches": 4}},
    "one row": {"data": {"kind": "uneven", "count": 33}},
    "one row in 2": {"data": {"kind": "uneven", "count": 33}, "config": {"micro_batches": 2}},
    "weighted": {"data": {"kind": "in order"}, "hparams": {"loss": "weighted"}},
    "weighted in 2": {
        "data": {"kind": "in order"}, "hparams": {"loss": "weighted"}, "config": {"micro_batches": 2}
    },
    "fgm": {"fgm": True},
    "fgm in 2": {"fgm": True, "config": {"micro_batches": 2}},
    "fgm, one row": {"fgm": True, "data": {"kind": "uneven", "count": 33}},
    "frozen": {"hparams": {"freeze": True}},
    "partly used": {"data": {"kind": "in order"}, "hparams": {"odd": True}},
    "average": {"config": {"ema_decay": 0.9}},
    "average in 2": {"config": {"ema_decay": 0.9, "micro_batches": 2}},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(fork_ranks, tmp_path_factory):
    """What all variants gave: rank 0's folder, the results and logs of all ranks, by number of ranks."""
    folder = tmp_path_factory.mktemp("trained")
    found = {}
    for size in (1, *SIZES):
        own = folder / f"of {size}"
        with fork_ranks(folder / f"logs of {size}", size, "train_all", folder=str(own), variants=VARIANTS) as ranks:
            found[size] = (own, ranks.results(), [ranks.log(rank) for rank in range(size)])
    return found


def difference(first, second):
    assert first.keys() == second.keys()
    return {name: float(np.abs(first[name] - second[name]).max()) for name in first}


class TestAsOneRank:
    @pytest.mark.parametrize("size", [1, *SIZES])
    @pytest.mark.parametrize("name", VARIANTS)
    def test_the_weights(self, trained, size, name):
        alone = trained[1][1][0][name.partition(" in ")[0]]
        for found in trained[size][1]:
            differences = difference(alone["weights"], found[name]["weights"])
            print(name, size, max(differences.values()), np.abs(np.array(alone["losses"])-np.array(found[name]["losses"])).max() if found[name]["losses"] else 0)
            assert max(differences.values()) < NEAR, differences

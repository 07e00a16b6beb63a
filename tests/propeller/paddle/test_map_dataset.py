"""MapDataset and IterDataset in a Learner, with a resume, and MapDataset in Paddle's own DataLoader."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import propeller.paddle as propeller
from propeller.data import Dict, IterDataset, MapDataset, Pad, Stack
from propeller.paddle.runtime import paddle

BATCHIFY = Dict({"input_ids": Pad(pad_val=0), "label": Stack(dtype="int64")})


def as_lists(rows):
    """Examples as a tokenizer of PaddleNLP gives them: without arrays."""
    return [{"input_ids": row["input_ids"].tolist(), "label": row["label"]} for row in rows]


@pytest.fixture
def batches(examples):
    """Training batches of each kind of dataset."""
    rows = examples(96, seed=1)

    def make(kind):
        if kind == "map":
            dataset = MapDataset(rows).map(as_lists, batched=True).shuffle()
        else:
            dataset = IterDataset(lambda: iter(rows)).map(as_lists, batched=True, batch_size=10).shuffle(20)
        return dataset.batch(8, BATCHIFY.as_dict).repeat()

    return make


@pytest.mark.parametrize("kind", ["map", "iter"])
def test_a_learner_goes_on_where_it_stopped(kind, batches, toy, run_config, weights_of):
    def train(config):
        learner = propeller.Learner(toy, config, {"learning_rate": 0.01})
        learner.train(batches(kind))
        return weights_of(learner.model)

    straight, resumed = (run_config(name, max_steps=17, save_steps=100) for name in ("straight", "resumed"))
    whole = train(straight)
    train(dataclasses.replace(resumed, run_steps=10))
    parts = train(resumed)
    assert whole.keys() == parts.keys()
    for name, weight in whole.items():
        np.testing.assert_array_equal(weight, parts[name], err_msg=name)


def test_a_data_loader(examples):
    rows = examples(10, seed=1)
    dataset = MapDataset(rows).map(as_lists, batched=True)
    sampler = paddle.io.BatchSampler(dataset, batch_size=4, shuffle=True)
    loader = paddle.io.DataLoader(dataset, batch_sampler=sampler, collate_fn=BATCHIFY)
    found = []
    for input_ids, label in loader:
        assert input_ids.dtype == label.dtype == paddle.int64
        assert input_ids.shape[0] == label.shape[0]
        found += [[index for index in ids if index] for ids in input_ids.tolist()]
    assert sorted(found) == sorted(row["input_ids"].tolist() for row in rows)


def test_datasets_of_paddle():
    class Squares(paddle.io.Dataset):
        def __getitem__(self, index):
            return index**2

        def __len__(self):
            return 4

    class Stream(paddle.io.IterableDataset):
        def __iter__(self):
            return iter(range(4))

    assert list(MapDataset(Squares()).map(lambda item: item + 1)) == [1, 2, 5, 10]
    assert list(IterDataset(Stream()).filter(lambda item: item % 2)) == [1, 3]
    assert np.array_equal(Pad()([paddle.to_tensor([1, 2]), paddle.to_tensor([3])]), [[1, 2], [3, 0]])

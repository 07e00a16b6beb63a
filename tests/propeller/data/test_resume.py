"""Resuming: after any item, a pipeline goes on from that item's position as if it had never stopped."""

from __future__ import annotations

import gzip
import itertools
import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propeller.data import Dataset, RecordWriter
from propeller.data.node import Context
from propeller.data.sources import ListSource
from propeller.data.transforms import Shuffle
from propeller.errors import ConfigError, DataError

LONGEST_RUN = 36
NUM_EXAMPLES = 11


def example(index):
    return {"id": index, "ids": np.arange(index * 7 % 5 + 1)}


def parsed(line):
    return example(int(line))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Makes datasets of the same examples out of every kind of source."""
    folder = tmp_path_factory.mktemp("sources")
    lines = [f"{index}\n" for index in range(NUM_EXAMPLES)]
    (folder / "plain.txt").write_text("".join(lines))
    (folder / "first.txt").write_text("".join(lines[:4]))
    (folder / "rest.txt.gz").write_bytes(gzip.compress("".join(lines[4:]).encode()))
    with RecordWriter(folder / "records") as writer:
        for index in range(NUM_EXAMPLES):
            writer.write(example(index))
    return {
        "list": Dataset.from_list([example(index) for index in range(NUM_EXAMPLES)]),
        "records": Dataset.from_record_file(folder / "records"),
        "file": Dataset.from_file(folder / "plain.txt").map(parsed),
        "files": Dataset.from_file([folder / "first.txt", folder / "rest.txt.gz"]).map(parsed),
        "generator": Dataset.from_generator_func(lambda: map(example, range(NUM_EXAMPLES))),
    }


def shuffled(dataset):
    try:
        return dataset.shuffle()
    except ConfigError:
        return dataset.shuffle(4)


TRANSFORMS = {
    "map": lambda dataset: dataset.map(lambda item: {**item, "double": item["id"] * 2}),
    "filter": lambda dataset: dataset.filter(lambda item: item["id"] % 3),
    "shuffle": shuffled,
    "pool shuffle": lambda dataset: dataset.shuffle(5, seed=3),
    "repeat": lambda dataset: dataset.repeat(2),
    "endless": lambda dataset: dataset.repeat(),
    "shard": lambda dataset: dataset.shard(2, 1),
    "take": lambda dataset: dataset.take(7),
    "buffered": lambda dataset: dataset.buffered(2),
    "interleave": lambda dataset: Dataset.from_list([dataset, shuffled(dataset), dataset.take(3)]).interleave(
        cycle_length=2, block_length=2
    ),
    "nested": lambda dataset: dataset.take(5).interleave(
        lambda item: Dataset.from_list([item] * (item["id"] % 4)), cycle_length=3
    ),
}
BATCHES = {
    "none": lambda dataset: dataset,
    "padded": lambda dataset: dataset.padded_batch(3, drop_remainder=True),
    "tokens": lambda dataset: dataset.token_batch(9),
    "bucket": lambda dataset: dataset.bucket(batch_size=2, pool_size=5),
    "token bucket": lambda dataset: dataset.bucket(max_tokens=10, pool_size=6, pad_to_multiple=2),
}
AFTER = {
    "none": lambda dataset: dataset,
    "repeat": lambda dataset: dataset.repeat(3),
    "buffered": lambda dataset: dataset.buffered(1),
    "shuffled": lambda dataset: dataset.shuffle(3),
}


def plain(item):
    """An item as something that compares with ==."""
    return {name: np.asarray(value).tolist() for name, value in item.items()}


def run(dataset, position=None, *, seed, count=LONGEST_RUN):
    entries = itertools.islice(dataset.iterate(position, seed=seed), count)
    return [(plain(item), json.dumps(after)) for item, after in entries]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    source=st.sampled_from(["list", "records", "file", "files", "generator"]),
    transforms=st.lists(st.sampled_from(sorted(TRANSFORMS)), max_size=4),
    batch=st.sampled_from(sorted(BATCHES)),
    after=st.sampled_from(sorted(AFTER)),
    seed=st.integers(0, 3),
)
def test_every_position_resumes_exactly(sources, source, transforms, batch, after, seed):
    dataset = sources[source]
    for name in transforms:
        dataset = TRANSFORMS[name](dataset)
    dataset = AFTER[after](BATCHES[batch](dataset))
    try:
        whole = run(dataset, seed=seed)
    except DataError as error:  # the transforms before a repeat() left nothing
        assert "repeat() got no example" in str(error)
        return
    for k, (_, position) in enumerate(whole):
        rest = run(dataset, json.loads(position), seed=seed, count=LONGEST_RUN - k - 1)
        assert rest == whole[k + 1 :]


def test_resume_goes_on_across_epochs_that_differ(sources):
    dataset = sources["records"].shuffle().repeat().bucket(batch_size=4, pool_size=8).buffered(2)
    whole = run(dataset, seed=5, count=40)
    ids = list(itertools.chain.from_iterable(item["id"] for item, _ in whole))
    epochs = [ids[start : start + NUM_EXAMPLES] for start in range(0, 33, NUM_EXAMPLES)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert run(dataset, json.loads(whole[17][1]), seed=5, count=22) == whole[18:]


def test_seed_and_epoch_decide_alone(sources):
    for name in ("list", "generator"):
        dataset = shuffled(sources[name]).repeat(2)
        first = run(dataset, seed=1)
        assert first == run(dataset, seed=1)
        assert first != run(dataset, seed=2)
        ids = [item["id"] for item, _ in first]
        assert ids[:NUM_EXAMPLES] != ids[NUM_EXAMPLES:]
        assert sorted(ids[:NUM_EXAMPLES]) == sorted(ids[NUM_EXAMPLES:]) == list(range(NUM_EXAMPLES))


def test_repeats_within_repeats_give_every_pass_an_epoch_of_its_own(sources):
    dataset = sources["list"].shuffle().repeat(2).repeat(2)
    ids = [item["id"] for item in dataset]
    passes = {tuple(ids[start : start + NUM_EXAMPLES]) for start in range(0, len(ids), NUM_EXAMPLES)}
    assert len(passes) == 4


@pytest.mark.parametrize(
    "batch", [lambda d: d, lambda d: d.padded_batch(4), lambda d: d.bucket(batch_size=4)]
)
def test_epoch_of_a_position(sources, batch):
    dataset = batch(sources["file"].take(8).repeat(3).buffered(1))
    entries = list(dataset.iterate())
    epochs = [dataset.epoch(json.loads(json.dumps(position))) for _, position in entries]
    assert epochs[-1] in (0, 2)  # a pool may begin in the first epoch and hold all three
    assert epochs == sorted(epochs)
    assert dataset.epoch(None) == 0


def test_iterations_in_other_threads_change_no_permutation():
    node = Shuffle(ListSource(range(64)), 0)
    order = node._order(Context(0)).tolist()

    class Interrupted(Context):
        """While two of it are compared, another iteration asks for its own permutation."""

        def __eq__(self, other):
            node._order(Context(0, epoch=1))
            return True

    assert node._order(Interrupted(0)).tolist() == order


@pytest.mark.parametrize(
    "pool",
    [
        lambda d: d.bucket(batch_size=2, pool_size=4),
        lambda d: d.shuffle(4),
        lambda d: d.map(list, batched=True, batch_size=4),
    ],
    ids=["bucket", "shuffle", "chunks"],
)
def test_a_pool_that_begins_an_epoch_is_of_that(sources, pool):
    dataset = pool(sources["list"].take(4).repeat(3))
    found = [dataset.epoch(json.loads(json.dumps(position))) for _, position in dataset.iterate()]
    assert found == sorted([0, 1, 2] * (len(found) // 3))


def test_indexed_sources_and_plain_files_jump(sources, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "propeller")
    converted = []
    dataset = sources["file"].map(lambda item: converted.append(item["id"]) or item)
    positions = [position for _, position in dataset.iterate()]
    converted.clear()
    assert [item["id"] for item, _ in dataset.iterate(positions[7])] == [8, 9, 10]
    assert converted == [8, 9, 10]
    run(sources["records"], 5, seed=0)
    assert not caplog.records


@pytest.mark.parametrize("name, position", [("generator", 5), ("files", [1, 4, 2])])
def test_streams_replay_and_say_so_once(sources, caplog, name, position):
    caplog.set_level(logging.INFO, "propeller")
    rest = [item["id"] for item, _ in sources[name].iterate(position)]
    assert rest == list(range(11 - len(rest), 11))
    assert len(rest) < 11
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "replaying" in record.getMessage()


@pytest.mark.parametrize("position", ["x", -1, [0], [0, 1, 2, 3, 4], {"a": 1}, 1.5])
def test_a_position_of_another_pipeline_is_an_error(sources, position):
    for dataset in (sources["list"], sources["file"], sources["list"].repeat(), sources["list"].shuffle(3)):
        with pytest.raises(DataError, match="another pipeline"):
            list(dataset.iterate(position))


def test_a_position_beyond_data_that_shrank_is_an_error():
    with pytest.raises(DataError, match="beyond the 3 examples"):
        list(Dataset.from_list([1, 2, 3]).iterate(4))

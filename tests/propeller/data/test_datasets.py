"""MapDataset and IterDataset: what PaddleNLP's documentation shows, over whatever data, with positions."""

from __future__ import annotations

import functools
import itertools
import json

import numpy as np
import pytest

from propeller.data import Dataset, Dict, IterDataset, MapDataset, Pad, Stack, difference
from propeller.errors import ConfigError, DataError


class Indexed:
    """As a `paddle.io.Dataset`: a length and an index, no iteration."""

    def __init__(self, items):
        self.items = items

    def __getitem__(self, index):
        return self.items[index]

    def __len__(self):
        return len(self.items)


class Columns:
    """As a `datasets.Dataset` of Hugging Face: columns; a row by an int, a column by a name."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        assert type(key) is int
        return {name: values[key] for name, values in self.columns.items()}

    def __iter__(self):
        return (self[index] for index in range(len(self)))


class Stream:
    """As a `paddle.io.IterableDataset`, which has a length and an index, only to refuse them."""

    def __iter__(self):
        return iter(range(5))

    def __len__(self):
        raise RuntimeError("no length")

    def __getitem__(self, index):
        raise RuntimeError("no index")


class Frame:
    """As a data frame of pandas: the index means columns."""

    iloc = None

    def __len__(self):
        return 2

    def __getitem__(self, name):
        return {"text": ["a", "b"]}[name]

    def to_dict(self, orient):
        assert orient == "records"
        return [{"text": "a"}, {"text": "b"}]


COLUMNS = {"text": ["a", "bc", "def"], "label": [0, 1, 0]}
ROWS = [{"text": text, "label": label} for text, label in zip(*COLUMNS.values(), strict=True)]


@pytest.mark.parametrize(
    ("data", "items"),
    [
        ([1, 2, 3], [1, 2, 3]),
        (("a", "b"), ["a", "b"]),
        (range(3), [0, 1, 2]),
        (np.arange(3), [0, 1, 2]),
        (Indexed([5, 6]), [5, 6]),
        (Columns(**COLUMNS), ROWS),
        (Frame(), [{"text": "a"}, {"text": "b"}]),
        (Dataset.from_list([1, 2]).map(str), ["1", "2"]),
        (MapDataset([1, 2]), [1, 2]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_map_dataset_takes_what_has_a_length_and_an_index(data, items):
    dataset = MapDataset(data)
    assert len(dataset) == len(items)
    assert [dataset[index] for index in range(len(items))] == list(dataset) == items
    assert dataset[-1] == dataset[np.int64(len(items) - 1)] == items[-1]
    assert list(IterDataset(data)) == items
    with pytest.raises(IndexError):
        dataset[len(items)]
    with pytest.raises(TypeError):
        dataset["text"]


def test_iter_dataset_takes_what_can_be_iterated():
    assert list(IterDataset(Stream())) == [0, 1, 2, 3, 4]
    assert list(IterDataset({1: "a"}.values())) == ["a"]
    again = IterDataset(lambda: (character for character in "abc"))
    assert list(again) == list(again) == ["a", "b", "c"]
    once = IterDataset(character for character in "abc")
    assert list(once) == ["a", "b", "c"]
    with pytest.raises(DataError, match="made of a generator, which can be gone through only once"):
        list(once)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MapDataset(Stream()), "MapDataset() got Stream, which has no length or no index"),
        (lambda: MapDataset(iter([1])), "got list_iterator"),
        (lambda: MapDataset({"train": [1], "test": [2]}), "a dict with 'train', 'test'; expected one of its"),
        (lambda: MapDataset("train.tsv"), "'train.tsv'; from_file() reads a file"),
        (lambda: IterDataset(3), "the data are 3; expected a sequence, an iterable or a function"),
        (lambda: IterDataset([1]).shard(2, 2), "index 2 of 2 shards"),
        (lambda: MapDataset([1]).shard(2, -1, contiguous=True), "index -1 of 2 shards"),
        (lambda: MapDataset([1]).map(list, batched=True, batch_size=0), "batch_size is 0"),
        (lambda: Dataset.from_list([1]).map(list, batched=True, batch_size=0), "batch_size is 0"),
        (lambda: Dataset.from_list([1]).batch(0, list), "batch_size is 0"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


def test_map_changes_the_dataset_and_returns_it():
    calls = []
    dataset = MapDataset([1, 2, 3], label_list=["no", "yes"])
    assert dataset.map(lambda item: calls.append(item) or item * 2) is dataset
    assert calls == []
    assert dataset[1] == 4
    assert dataset[1] == 4
    assert calls == [2, 2]
    assert dataset.map(fn=lambda item: calls.append(item) or item + 1, lazy=False) is dataset
    del calls[:]
    assert list(dataset) == [3, 5, 7]
    assert calls == []
    assert dataset.label_list == ["no", "yes"]
    assert MapDataset([1]).label_list is None


def test_batched_map_gets_all_examples_and_may_change_their_number():
    calls = []

    def doubled(examples):
        calls.append(examples)
        return [part for example in examples for part in (example, -example)]

    dataset = MapDataset([1, 2, 3])
    assert dataset.map(doubled, batched=True, num_workers=2) is dataset
    assert len(dataset) == 6
    assert list(dataset) == [1, -1, 2, -2, 3, -3]
    assert calls == [[1, 2, 3]]
    MapDataset([1, 2, 3]).map(doubled, batched=True, batch_size=2)
    assert calls[1:] == [[1, 2], [3]]


def test_the_chain_of_the_guide():
    """`map` with a function of an example and of many give the same; then batches by name."""

    def encode(text):
        return [ord(character) for character in text]

    def convert_example(example, pad):
        return {"input_ids": encode(example["text"]), "label": [example["label"] + pad]}

    def convert_examples(examples, pad):
        return [convert_example(example, pad) for example in examples]

    one, many = MapDataset(Columns(**COLUMNS)), MapDataset(Columns(**COLUMNS))
    one.map(functools.partial(convert_example, pad=0))
    many.map(functools.partial(convert_examples, pad=0), batched=True)
    assert one[0] == many[0] == {"input_ids": [97], "label": [0]}
    assert list(one) == list(many)
    batchify = Dict({"input_ids": Pad(), "label": Stack(dtype="int64")})
    input_ids, label = batchify([one[index] for index in range(3)])
    assert input_ids.tolist() == [[97, 0, 0], [98, 99, 0], [100, 101, 102]]
    assert label.tolist() == [[0], [1], [0]]


def test_filter_sees_what_map_has_made():
    dataset = MapDataset(range(10)).map(lambda item: item * 2)
    assert dataset.filter(lambda item: item % 4 == 0, num_workers=0) is dataset
    assert list(dataset) == [dataset[index] for index in range(len(dataset))] == [0, 4, 8, 12, 16]
    assert list(dataset.filter(lambda item: item > 100)) == []
    stream = IterDataset(range(10)).map(lambda item: item * 2)
    assert stream.filter(lambda item: item % 4 == 0) is stream
    assert list(stream) == [0, 4, 8, 12, 16]


@pytest.mark.parametrize(
    ("contiguous", "parts"),
    [
        (False, [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]),
        (True, [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]),
    ],
)
def test_shard(contiguous, parts):
    for index, part in enumerate(parts):
        dataset = MapDataset(range(10))
        assert dataset.shard(3, index, contiguous) is dataset
        assert list(dataset) == part
        assert dataset[-1] == part[-1]
        assert list(dataset.map(str)) == list(map(str, part))
        assert contiguous or list(IterDataset(Stream).shard(3, index)) == list(range(5))[index::3]


def test_shard_by_rank(monkeypatch):
    assert list(MapDataset(range(4)).shard()) == [0, 1, 2, 3]
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    assert list(MapDataset(range(5)).shard()) == list(IterDataset(range(5)).shard()) == [1, 3]
    assert list(MapDataset(range(5)).shard(num_shards=3, contiguous=True)) == [2, 3]


def test_what_a_dataset_has_leaves_it_as_it_is():
    dataset = MapDataset(range(6))
    taken = dataset.take(2)
    assert type(taken) is type(dataset.shuffle()) is Dataset
    assert taken.map(str) is not taken
    nested = MapDataset([[1, 2], [3]])
    assert list(nested.interleave(Dataset.from_list, cycle_length=1)) == [1, 2, 3]
    assert list(nested) == [[1, 2], [3]]


# Positions


def pairs(examples):
    return [part for example in examples for part in (example, example + 0.5)]


def none_of_some(examples):
    return [example for example in examples if example not in (3, 4, 5)]


PIPELINES = {
    "map dataset": lambda: MapDataset(range(10)).map(lambda item: item * 2),
    "filtered": lambda: MapDataset(range(20)).filter(lambda item: item % 2).map(str),
    "contiguous shard": lambda: MapDataset(range(20)).shard(2, 1, contiguous=True),
    "filtered and shuffled": lambda: MapDataset(range(20)).filter(lambda item: item % 2).shuffle().repeat(2),
    "iter dataset": lambda: IterDataset(Stream()).map(lambda item: item * 2),
    "chunks": lambda: Dataset.from_list(range(7)).map(pairs, batched=True, batch_size=3),
    "empty chunks": lambda: Dataset.from_list(range(9)).map(none_of_some, batched=True, batch_size=3),
    "chunks of a stream": lambda: IterDataset(Stream()).map(pairs, batched=True, batch_size=2),
    "chunks after epochs": lambda: Dataset.from_list(range(5)).shuffle().repeat(2).map(pairs, batched=True),
    "batches": lambda: MapDataset(range(10)).shuffle().batch(3, sorted),
    "whole batches": lambda: MapDataset(range(10)).batch(3, sorted, drop_remainder=True).repeat(2),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_resume_goes_on_from_any_position(name):
    dataset = PIPELINES[name]()
    entries = list(dataset.iterate(seed=3))
    assert entries
    for done, (_, position) in enumerate(entries, 1):
        position = json.loads(json.dumps(position))
        rest = [item for item, _ in dataset.iterate(position, seed=3)]
        assert rest == [item for item, _ in entries[done:]]
    assert difference(dataset.signature(), PIPELINES[name]().signature()) is None


def test_what_chunks_and_batches_give():
    assert list(PIPELINES["empty chunks"]()) == [0, 1, 2, 6, 7, 8]
    assert list(PIPELINES["chunks"]()) == [index / 2 for index in range(14)]
    batches = MapDataset(range(10)).batch(4, sum)
    assert list(batches) == [6, 22, 17]
    assert len(batches) == 3
    whole = MapDataset(range(10)).batch(4, sum, drop_remainder=True)
    assert list(whole) == [6, 22]
    assert len(whole) == 2
    entries = Dataset.from_list("ab").repeat(2).map(list, batched=True, batch_size=1)
    assert [entries.epoch(position) for _, position in entries.iterate()] == [0, 0, 1, 1]


def test_a_change_is_seen_in_the_signature():
    def signature(count, size, modulus):
        dataset = MapDataset(range(count)).filter(lambda item: item % modulus == 0)
        return dataset.map(pairs, batched=True).batch(size, sum).signature()

    assert difference(signature(9, 2, 2), signature(9, 2, 2)) is None
    assert "batch_size 2 -> 3" in difference(signature(9, 2, 2), signature(9, 3, 2))
    assert "items 10 -> 6" in difference(signature(9, 2, 2), signature(9, 2, 3))


# Errors


@pytest.mark.parametrize(
    "make",
    [
        lambda path: MapDataset(list(Dataset.from_file(path))).map(int).shuffle(),
        lambda path: IterDataset(Dataset.from_file(path)).map(int),
    ],
)
def test_an_error_names_the_function(tmp_path, make):
    path = tmp_path / "lines"
    path.write_text("1\n2\nx\n")
    with pytest.raises(DataError, match="int raised ValueError: invalid literal"):
        list(make(path))


def test_an_error_in_a_chunk_names_the_line(tmp_path):
    path = tmp_path / "lines"
    path.write_text("1\n2\nx\n4\n")

    def numbers(lines):
        return [int(line) for line in lines]

    with pytest.raises(DataError, match=r"lines:3: .*numbers raised ValueError"):
        list(IterDataset(Dataset.from_file(path)).map(numbers, batched=True))

    def summed(lines):
        if len(lines) > 1:
            raise ValueError("too many")
        return lines

    for failing in (lambda d: d.map(summed, batched=True), lambda d: d.batch(4, summed)):
        where = r"lines:1: .*summed raised ValueError: too many \(here, or further on up to .*lines:4\)$"
        with pytest.raises(DataError, match=where):
            list(failing(Dataset.from_file(path)))
    with pytest.raises(DataError, match=r"lines:3: .*numbers raised ValueError"):
        list(Dataset.from_file(path).batch(2, numbers))
    with pytest.raises(DataError, match="numbers raised ValueError"):
        MapDataset(["x"]).map(numbers, batched=True)


@pytest.mark.parametrize("result", [{"input_ids": [[1]]}, None, "text", 3])
def test_a_batched_function_returns_a_list(result):
    with pytest.raises(DataError, match="expected a list of examples, as it is mapped with batched=True"):
        MapDataset([1]).map(lambda examples: result, batched=True)
    with pytest.raises(DataError, match="expected a list of examples"):
        list(Dataset.from_list([1]).map(lambda examples: result, batched=True))


def test_an_error_behind_a_filter_names_the_item():
    dataset = MapDataset(["1", "x", "y"]).filter(str.isalpha).map(int)
    with pytest.raises(DataError, match="<list>:2: int raised"):
        dataset[0]
    with pytest.raises(DataError, match="<list>:3: int raised"):
        list(itertools.islice(dataset.iterate(1), 1))

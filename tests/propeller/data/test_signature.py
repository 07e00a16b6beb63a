"""Signatures of pipelines: equal where the items and their order are, and what they say where not."""

from __future__ import annotations

import functools
import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from propeller.data import Dataset, FeatureColumns, LabelColumn, RawColumn, RecordWriter, difference
from propeller.data import signature as signature_module
from propeller.errors import DataError

ITEMS = [{"ids": np.arange(n + 1), "label": n, "text": f"词{n}"} for n in range(20)]


def entry(dataset):
    """The last step of a signature."""
    return dataset.signature()[-1]


def write_records(path, items, **metadata):
    with RecordWriter(path) as writer:
        for item in items:
            writer.write(item)
        writer.metadata.update(metadata)
    return path


def base(**changes):
    settings = {"batch_size": 4, "pool_size": 8, "key": "ids", "pad_values": {"ids": 1}, **changes}
    return Dataset.from_list(ITEMS).shuffle().bucket(**settings).repeat()


def keep(item, limit=3, **more):
    return item["label"] > limit


class Keep:
    def __call__(self, item):
        return True


class Tokenizer:
    def __init__(self, fingerprint):
        self.fingerprint = fingerprint

    def prepare(self, item):
        return item


# What belongs to it


def test_every_step_is_in_it_but_reading_ahead():
    dataset = Dataset.from_list(ITEMS).map(keep).filter(keep).shuffle(8, seed=3).shard(2, 1).take(5)
    dataset = dataset.interleave(lambda item: Dataset.from_list([item]), cycle_length=2, block_length=3)
    dataset = dataset.buffered(4).padded_batch(2, drop_remainder=True).repeat(3)
    kinds = [step["kind"] for step in dataset.signature()]
    expected = ["list", "map", "filter", "shuffle", "shard", "take", "map", "interleave", "padded_batch"]
    assert kinds == [*expected, "repeat"]
    assert dataset.buffered(7).signature() == dataset.signature()


def test_it_survives_a_trip_through_json():
    values = {"ids": np.int64(7), "weights": float("nan")}
    signature = base(pad_values=values).signature()
    assert json.loads(json.dumps(signature)) == signature
    assert difference(signature, json.loads(json.dumps(signature))) is None
    assert [type(value) for value in signature[2]["pad_values"].values()] == [int, str]


def test_it_is_the_same_in_another_process(root):
    code = (
        "import functools, json, numpy as np; from propeller.data import Dataset\n"
        "def keep(item, limit): return True\n"
        "items = [{'ids': np.arange(n), 'text': str(n)} for n in range(9)]\n"
        "dataset = Dataset.from_list(items).filter(functools.partial(keep, limit=3)).map(lambda item: item)\n"
        "print(json.dumps(dataset.map(len).map(object()).signature()))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in "12"
    }  # fmt: skip
    assert len(found) == 1
    assert b"0x" not in found.pop()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (base(batch_size=2), "bucket: batch_size 4 -> 2"),
        (base(pool_size=16), "bucket: pool_size 8 -> 16"),
        (base(batch_size=None, max_tokens=64), "bucket: batch_size 4 -> None, max_tokens None -> 64"),
        (base(key=None), "bucket: key 'ids' -> None"),
        (base(pad_values={"ids": 2}), "bucket: pad_values.ids 1 -> 2"),
        (base(pad_values={}), "bucket: pad_values.ids 1 -> None"),
        (base(pad_to_multiple=8), "bucket: pad_to_multiple 1 -> 8"),
        (Dataset.from_list(ITEMS).shuffle(seed=1).bucket(
            batch_size=4, pool_size=8, key="ids", pad_values={"ids": 1}).repeat(2),
         "shuffle: seed 0 -> 1; repeat: n None -> 2"),
        (Dataset.from_list(ITEMS).bucket(batch_size=4),
         "the steps of the pipeline: list, shuffle, bucket, repeat -> list, bucket"),
    ],
)  # fmt: skip
def test_settings_of_a_training_pipeline(changed, said):
    assert difference(base().signature(), changed.signature()) == said
    assert difference(changed.signature(), changed.signature()) is None


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (lambda d: d.shuffle(8), lambda d: d.shuffle(9), "shuffle: buffer_size 8 -> 9"),
        (lambda d: d.shuffle(8), lambda d: d.shuffle(), "shuffle: buffer_size 8 -> None"),
        (lambda d: d.shard(2, 0), lambda d: d.shard(2, 1), "shard: index 0 -> 1"),
        (lambda d: d.shard(2, 0), lambda d: d.shard(3, 0), "shard: num_shards 2 -> 3"),
        (lambda d: d.take(2), lambda d: d.take(3), "take: n 2 -> 3"),
        (lambda d: d.padded_batch(2), lambda d: d.padded_batch(2, drop_remainder=True),
         "padded_batch: drop_remainder False -> True"),
        (lambda d: d.padded_batch(2), lambda d: d.padded_batch(3), "padded_batch: batch_size 2 -> 3"),
        (lambda d: d.token_batch(50), lambda d: d.token_batch(60, key="ids"),
         "token_batch: key None -> 'ids', max_tokens 50 -> 60"),
        (lambda d: d.interleave(keep, cycle_length=1), lambda d: d.interleave(keep, cycle_length=2),
         "interleave: cycle_length 1 -> 2"),
        (lambda d: d.interleave(keep, cycle_length=1), lambda d: d.interleave(len, cycle_length=1),
         "map: function 'keep' -> 'len'"),
        (lambda d: d.interleave(keep, cycle_length=1),
         lambda d: d.interleave(keep, cycle_length=1, block_length=2), "interleave: block_length 1 -> 2"),
    ],
)  # fmt: skip
def test_settings_of_each_step(one, other, said):
    dataset = Dataset.from_list(ITEMS)
    assert difference(one(dataset).signature(), other(dataset).signature()) == said


def test_to_pad_with_zero_is_the_default():
    assert base(pad_values={"ids": 1, "label": 0}).signature() == base().signature()


# Functions


@pytest.mark.parametrize(
    ("func", "name"),
    [
        (keep, "keep"),
        (Keep(), "Keep"),
        (len, "len"),
        (np.abs, "absolute"),
        (str.upper, "str.upper"),
        (functools.partial(keep, limit=4), "partial(keep, limit=4)"),
        (functools.partial(keep, 4, mode="train", deep=functools.partial(len), data=Keep()),
         "partial(keep, 4, data=Keep, deep=partial(len), mode='train')"),
        (functools.partial(keep, path="/me/vocab.txt", other=[1]), "partial(keep, other=list, path=str)"),
        (functools.lru_cache(keep), "keep"),
    ],
)  # fmt: skip
def test_functions_go_by_their_names(func, name):
    assert entry(Dataset.from_list(ITEMS).map(func)) == {"kind": "map", "function": name}


def test_a_lambda_has_no_address():
    name = entry(Dataset.from_list(ITEMS).filter(lambda item: True))["function"]
    assert name == "test_a_lambda_has_no_address.<locals>.<lambda>"


def test_a_fingerprint_counts():
    one, same, other = (
        entry(Dataset.from_list(ITEMS).map(Tokenizer(text).prepare))["function"] for text in "aab"
    )
    assert one == same != other
    assert one.startswith("Tokenizer.prepare ")


def test_a_generator_is_its_name_alone():
    def numbers():
        raise AssertionError("must not be called")

    signature = Dataset.from_generator_func(numbers).signature()
    assert signature == [
        {"kind": "generator", "function": "test_a_generator_is_its_name_alone.<locals>.numbers"}
    ]


# Lists


def test_a_list_is_its_items():
    signature = Dataset.from_list(ITEMS).signature()
    assert signature == Dataset.from_list([dict(item) for item in ITEMS]).signature()
    assert signature[0]["items"] == 20
    for changed in (
        ITEMS[::-1],
        [*ITEMS[:-1], {**ITEMS[-1], "label": 0}],
        [*ITEMS[:-1], {**ITEMS[-1], "text": "词"}],
        [*ITEMS[:-1], {**ITEMS[-1], "ids": ITEMS[-1]["ids"].astype(np.int32)}],
        [*ITEMS[:-1], {**ITEMS[-1], "ids": ITEMS[-1]["ids"][None]}],
    ):
        said = difference(signature, Dataset.from_list(changed).signature())
        assert said.startswith(f"list: sha256 {signature[0]['sha256'][:12]}.. -> ")


def test_values_do_not_run_into_one_another():
    lists = [["ab"], ["a", "b"], [b"ab"], [["a"], "b"], [["a", "b"]], [{"a": "b"}], [1], [1.0], [True], ["1"]]
    lists += [[None], [np.int64(1)], [np.array([1])], [np.array([[1]])], [()], [[]], [{}]]
    digests = [entry(Dataset.from_list(items))["sha256"] for items in lists]
    assert None not in digests
    assert len(set(digests)) == len(lists) - 1, "a tuple is a list to JSON"


@pytest.mark.parametrize(
    "items",
    [[object()], [{"a": {1, 2}}], [np.array([{}], object)], range(3)],
    ids=["object", "set", "array-of-objects", "no-list"],
)
def test_other_items_are_only_counted(items):
    assert entry(Dataset.from_list(items)) == {"kind": "list", "items": len(items), "sha256": None}


def test_a_list_of_datasets_is_their_signatures():
    def interleaved(count):
        return Dataset.from_list([Dataset.from_list(ITEMS[:count])] * 2).interleave(cycle_length=2)

    assert interleaved(3).signature() == interleaved(3).signature()
    assert difference(interleaved(3).signature(), interleaved(4).signature()).startswith("list: sha256 ")


def test_of_a_long_list_evenly_spaced_items_count(monkeypatch):
    monkeypatch.setattr(signature_module, "_ITEMS_READ", 5)
    items = list(range(20))
    signature = Dataset.from_list(items).signature()
    assert Dataset.from_list([*items[:4], "x", *items[5:]]).signature() != signature
    assert Dataset.from_list([*items[:3], "x", *items[4:]]).signature() == signature
    assert Dataset.from_list([]).signature()[0]["items"] == 0


# Record files


def test_records_are_their_content(tmp_path):
    one = Dataset.from_record_file(write_records(tmp_path / "a.rec", ITEMS, origins=[("/a", 1, 20)]))
    (tmp_path / "moved").mkdir()
    other = Dataset.from_record_file(write_records(tmp_path / "moved/b.rec", ITEMS, origins=[("/b", 2, 20)]))
    assert one.signature() == other.signature()
    assert str(tmp_path) not in json.dumps(one.signature())
    assert entry(one)["examples"] == 20
    fewer = Dataset.from_record_file(write_records(tmp_path / "c.rec", ITEMS[:-1]))
    assert difference(one.signature(), fewer.signature()).startswith("records: examples 20 -> 19, sha256 ")
    swapped = Dataset.from_record_file(write_records(tmp_path / "d.rec", [ITEMS[1], ITEMS[0], *ITEMS[2:]]))
    assert difference(one.signature(), swapped.signature()).startswith("records: sha256 ")


def test_the_cache_of_another_folder_gives_the_same(tmp_path):
    columns = FeatureColumns([RawColumn("text"), LabelColumn("label")])

    def built(name, rows):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.tsv").write_text(rows, "utf-8")
        return columns.build_dataset("train", data_dir=tmp_path / name, cache_dir=tmp_path / "cache")

    signature = built("here", "a\t0\nb\t1\n").signature()
    assert built("there", "a\t0\nb\t1\n").signature() == signature
    assert difference(signature, built("other", "a\t0\nb\t0\n").signature()).startswith("records: sha256 ")


# Text files


def test_files_are_their_bytes(tmp_path):
    for name, text in (("a", "one\n"), ("b", "two\n"), ("c", "one\n"), ("d", "three\n")):
        (tmp_path / name).write_text(text)
    (tmp_path / "e.gz").write_bytes(gzip.compress(b"one\n", mtime=0))

    def signature(names, **options):
        return Dataset.from_file([tmp_path / name for name in names], **options).signature()

    assert signature("ab") == signature("cb")
    assert str(tmp_path) not in json.dumps(signature("ab"))
    assert difference(signature("ab"), signature("ad")).startswith(
        "files: files[2].bytes 4 -> 6, files[2].sha256 27dd8ed44a83.. -> f6936912184"
    )
    assert difference(signature("ab"), signature("ba")).startswith("files: files[1].sha256 ")
    assert "files[2].bytes 4 -> None" in difference(signature("ab"), signature("a"))
    assert difference(signature("a"), signature("a", skip_header=1)) == "files: skip_header 0 -> 1"
    assert entry(Dataset.from_file(tmp_path / "e.gz"))["files"][0]["bytes"] == 24
    many = difference(signature("abab"), signature("baba" + "ab"))
    assert many.count(" -> ") == 5 and many.endswith(", and 3 more")


def test_a_file_is_read_again_when_it_changes(tmp_path):
    path = tmp_path / "a"
    path.write_text("one\n")
    before = Dataset.from_file(path).signature()
    path.write_text("two\n")
    os.utime(path, ns=(1, 1))
    assert Dataset.from_file(path).signature() != before


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    found = entry(Dataset.from_file(tmp_path / "pipe", gz=False))
    assert found["files"] == [{"bytes": None, "sha256": None}]


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"missing: cannot be read: No such file"):
        Dataset.from_file(tmp_path / "missing").signature()


def test_rows_know_their_columns(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("x\t1\ty\n")
    columns = [RawColumn("text_a"), LabelColumn("label")]

    def read(**options):
        return FeatureColumns(columns, **options).read(path).signature()

    one, other = read(file_columns=["text_a", "label", "_"]), read(file_columns=["_", "label", "text_a"])
    assert one == read(file_columns=["text_a", "label", "_"])
    assert difference(one, other).startswith("columns: cells[1][1] 'text_a' -> None")


# What another release may have written


@pytest.mark.parametrize("old", [[], ["other"], [{"items": 3}], [None]])
def test_signatures_of_another_form_are_told_apart(old):
    new = Dataset.from_list([1]).signature()
    assert difference(old, new).startswith("the steps of the pipeline: ")
    assert difference(old, old) is None

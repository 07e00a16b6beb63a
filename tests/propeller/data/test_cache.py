"""`build_dataset`: which files are read, when the cache is built anew, and what happens when it cannot be."""

from __future__ import annotations

import gzip
import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from propeller.data import FeatureColumns, LabelColumn, RawColumn, TextColumn, default_folder, prepare_files
from propeller.errors import ConfigError, DataError

LINES = [f"text {index}\t{index % 2}" for index in range(7)]


def columns(label=None, **options):
    return FeatureColumns([RawColumn("text_a"), label or LabelColumn("label")], **options)


def write(path, lines=LINES):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def texts(dataset):
    return [example["text_a"] for example in dataset]


def caches(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".records"))


EXPECTED = [f"text {index}" for index in range(7)]


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


# Which files


@pytest.mark.parametrize(
    "files, data_dir",
    [
        (["train.tsv"], ""),
        (["train.tsv", "dev.tsv"], ""),
        (["train.tsv.gz"], ""),
        (["train"], ""),
        (["anything"], "anything"),
        (["train/b", "train/a.gz", "train/.hidden", "train/_SUCCESS", "train/sub/c"], ""),
        (["parts/part-1", "parts/part-0"], "parts"),
        (["train/part-0"], "train"),
    ],
)
def test_places_where_data_may_lie(tmp_path, cache_dir, files, data_dir):
    wanted = sorted(name for name in files if name.split("/")[-1][0] not in "._" and "sub" not in name)
    wanted = [name for name in wanted if "dev" not in name]
    for name in files:
        lines = LINES
        if name in wanted:
            share = -(-len(LINES) // len(wanted))
            lines = LINES[wanted.index(name) * share :][:share]
        write(tmp_path / "data" / name, lines)
    dataset = columns().build_dataset("train", data_dir=tmp_path / "data" / data_dir, cache_dir=cache_dir)
    assert texts(dataset) == EXPECTED
    assert len(dataset) == 7
    assert dataset[3] == {"text_a": "text 3", "label": 1}


def test_files_are_named_one_by_one(tmp_path, cache_dir):
    paths = [write(tmp_path / "x", LINES[:3]), write(tmp_path / "a", LINES[3:])]
    assert texts(columns().build_dataset("train", files=paths, cache_dir=cache_dir)) == EXPECTED
    assert texts(columns().build_dataset("train", files=str(paths[0]), cache_dir=cache_dir)) == EXPECTED[:3]


def test_places_that_do_not_tell(tmp_path, cache_dir):
    def build(**options):
        return columns().build_dataset("train", cache_dir=cache_dir, **options)

    with pytest.raises(DataError, match="nowhere: there is no such file or folder"):
        build(data_dir=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: the folder holds no file"):
        build(data_dir=tmp_path / "empty")
    write(tmp_path / "data" / "dev.tsv")
    with pytest.raises(DataError, match=r"there is no train, train.tsv or train.tsv.gz; found dev.tsv"):
        build(data_dir=tmp_path / "data")
    write(tmp_path / "data" / "train.tsv")
    write(tmp_path / "data" / "train" / "part")
    with pytest.raises(ConfigError, match="holds train and train.tsv; expected one"):
        build(data_dir=tmp_path / "data")
    for options in ({}, {"data_dir": tmp_path, "files": [tmp_path]}):
        with pytest.raises(ConfigError, match="expected one of the two"):
            build(**options)
    with pytest.raises(ConfigError, match="the data set .* has an empty list of files"):
        build(files=[])


def test_parts_must_have_the_same_columns(tmp_path, cache_dir):
    write(tmp_path / "train" / "0", ["text_a\tlabel", *LINES])
    write(tmp_path / "train" / "1", ["text_a", "no label"])
    table = columns(LabelColumn("label", optional=True))
    with pytest.raises(
        DataError, match=r"1:2: an example has \['text_a'\], those before it \['label', 'text_a'\]"
    ):
        table.build_dataset("train", data_dir=tmp_path, cache_dir=cache_dir)
    assert caches(cache_dir) == []


def test_each_part_may_have_its_own_header(tmp_path, cache_dir):
    write(tmp_path / "train" / "0", ["label\ttext_a", "1\ta"])
    write(tmp_path / "train" / "1", ["text_a\tlabel", "b\t0"])
    dataset = columns().build_dataset("train", data_dir=tmp_path, cache_dir=cache_dir)
    assert list(dataset) == [{"text_a": "a", "label": 1}, {"text_a": "b", "label": 0}]


# What it gives


def test_shuffle_and_repeat(tmp_path, cache_dir):
    path = write(tmp_path / "train.tsv")
    dataset = columns().build_dataset("train", data_dir=path, shuffle=True, repeat=True, cache_dir=cache_dir)
    twice = texts(dataset.take(14))
    assert sorted(twice[:7]) == sorted(twice[7:]) == EXPECTED
    assert twice[:7] != twice[7:]
    other = columns().build_dataset("train", data_dir=path, shuffle=True, seed=1, cache_dir=cache_dir)
    assert texts(other) != twice[:7]


def test_prepare_gets_chunks_and_its_results_are_kept(tmp_path, cache_dir, monkeypatch):
    monkeypatch.setattr("propeller.data.cache._CHUNK", 3)
    path = write(tmp_path / "train.tsv")
    sizes = []

    def prepare(rows):
        sizes.append(len(rows))
        return [{"ids": np.arange(len(row["text_a"])), "label": row["label"]} for row in rows]

    def build():
        return columns().build_dataset(
            "x", data_dir=path, prepare=prepare, prepare_key="1", cache_dir=cache_dir
        )

    first, again = list(build()), list(build())
    assert sizes == [3, 3, 1]
    assert [example["ids"].tolist() for example in first] == [list(range(6))] * 7
    np.testing.assert_equal(again, first)


@pytest.mark.parametrize("split", [1, 2])
def test_later_errors_name_the_line_of_the_source(tmp_path, cache_dir, split):
    write(tmp_path / "train" / "0", ["text_a\tlabel", *LINES[:4]])
    second = write(tmp_path / "train" / "1", ["text_a\tlabel", *LINES[4:]])
    dataset = columns().build_dataset(
        "train", data_dir=tmp_path, prepare=lambda rows: rows * split, prepare_key="x", cache_dir=cache_dir
    )
    origin = f"{second}:3" if split == 1 else f"{next(cache_dir.glob('*.records'))}:10"
    with pytest.raises(DataError, match=f"^{origin}: .*ZeroDivisionError"):
        list(dataset.map(lambda example: 1 / (example["text_a"] != "text 5")))


def test_prepare_may_give_more_or_fewer_examples(tmp_path, cache_dir):
    path = write(tmp_path / "train.tsv")

    def twice_the_odd(rows):
        return [row for row in rows if row["label"] for _ in range(2)]

    dataset = columns().build_dataset("x", data_dir=path, prepare=twice_the_odd, cache_dir=cache_dir)
    assert texts(dataset) == [f"text {index}" for index in (1, 1, 3, 3, 5, 5)]
    with pytest.raises(DataError, match=r"train\.tsv: there is no example in it"):
        columns().build_dataset("x", data_dir=path, prepare=lambda rows: [], cache_dir=cache_dir)


@pytest.mark.parametrize("one_each", [True, False])
@pytest.mark.parametrize(
    "prepare, message",
    [
        (
            lambda rows: [{"x": 1 / int(row["text_a"] != "text 4")} for row in rows],
            "raised ZeroDivisionError",
        ),
        (lambda rows: [{"x": None if row["text_a"] == "text 4" else 1} for row in rows], "'x' is NoneType"),
        (lambda rows: [3 if row["text_a"] == "text 4" else row for row in rows], "an example is int"),
        (
            lambda rows: [row | {"x": 1} if row["text_a"] == "text 4" else row for row in rows],
            r"an example has \['label', 'text_a', 'x'\], those before it \['label', 'text_a'\]",
        ),
    ],
)
def test_a_prepare_that_fails_names_the_line(tmp_path, cache_dir, prepare, message, one_each):
    path = write(tmp_path / "train.tsv", ["text_a\tlabel", *LINES])

    def prepared(rows):
        return prepare([row for row in rows if one_each or row["text_a"] != "text 1"])

    with pytest.raises(DataError, match=rf"train\.tsv:6: .*{message}"):
        columns().build_dataset("x", data_dir=path, prepare=prepared, prepare_key="1", cache_dir=cache_dir)
    assert caches(cache_dir) == []


def test_a_prepare_that_fails_on_a_chunk_alone_names_its_lines(tmp_path, cache_dir):
    def prepare(rows):
        if len(rows) > 1:
            raise MemoryError("too many")
        return rows

    where = r"train\.tsv:1: .*MemoryError: too many \(here, or further on up to .*train\.tsv:7\)$"
    with pytest.raises(DataError, match=where):
        columns().build_dataset(
            "x", data_dir=write(tmp_path / "train.tsv"), prepare=prepare, cache_dir=cache_dir
        )


def test_a_malformed_line_leaves_no_cache(tmp_path, cache_dir):
    path = write(tmp_path / "train.tsv", [*LINES, "text\tx"])
    with pytest.raises(DataError, match=r"train\.tsv:8: column 'label'"):
        columns().build_dataset("train", data_dir=path, cache_dir=cache_dir)
    assert caches(cache_dir) == []


# When it is built anew


class Counting(RawColumn):
    """Counts the cells that were converted."""

    converted = 0

    def convert(self, text):
        Counting.converted += 1
        return super().convert(text)


def upper(text):
    return list(text.upper())


def lower(text):
    return list(text.lower())


class Tokenizer:
    def __init__(self, fingerprint=None):
        if fingerprint:
            self.fingerprint = fingerprint

    def __call__(self, text):
        return list(text)


VOCAB = {"t": 1}


def test_the_cache_is_used_until_something_changes(tmp_path, cache_dir):
    path = write(tmp_path / "train.tsv")
    before = Counting.converted

    def built(**options):
        """Whether a call had to convert the rows."""
        nonlocal before
        columns = [Counting("text_a"), options.pop("label", LabelColumn("label")), *options.pop("more", [])]
        table = FeatureColumns(columns, file_columns=options.pop("file_columns", None))
        dataset = table.build_dataset(
            "train", data_dir=options.pop("path", path), cache_dir=cache_dir, **options
        )
        assert len(dataset) == 7
        built, before = Counting.converted - before, Counting.converted
        return built > 0

    assert built()
    assert not built()
    assert not built(shuffle=True, repeat=False, seed=4)
    assert built(label=LabelColumn("label", ["0", "1"]))
    assert not built(label=LabelColumn("label", ("0", "1")))
    assert built(label=LabelColumn("label", ["1", "0"]))
    assert built(label=LabelColumn("label", dtype="float32"))
    assert built(label=RawColumn("label"))
    assert built(file_columns=["text_a", "label"])
    assert built(prepare=list, prepare_key="1")
    assert not built(prepare=list, prepare_key="1")
    assert built(prepare=list, prepare_key="2")
    content = path.read_bytes()
    write(path, [*LINES[:-1], "other\t1"])
    assert built()
    assert not built()
    path.write_bytes(content)
    copy = write(tmp_path / "copy" / "train.tsv")
    assert built(path=copy)
    assert not built(path=copy)


@pytest.mark.parametrize(
    "tokenizer, vocab, reused",
    [
        (upper, {"t": 1}, True),
        (lower, {"t": 1}, False),
        (upper, {"t": 2}, False),
        (upper, {"t": np.int64(1)}, True),
    ],
)
def test_text_columns_depend_on_tokenizer_and_vocabulary(tmp_path, cache_dir, tokenizer, vocab, reused):
    path = write(tmp_path / "train.tsv", ["Tt"])
    for column in (
        TextColumn("text", upper, {"t": 1}, unk_id=0),
        TextColumn("text", tokenizer, vocab, unk_id=0),
    ):
        dataset = FeatureColumns([column]).build_dataset("train", data_dir=path, cache_dir=cache_dir)
    assert len(caches(cache_dir)) == 2 - reused
    assert dataset[0]["text"].tolist() == [vocab.get(token, 0) for token in tokenizer("Tt")]


@pytest.mark.parametrize(
    "tokenizer, kept",
    [
        (Tokenizer("v1"), True),
        (Tokenizer(), False),
        (Tokenizer().__call__, False),
        (lambda text: list(text), False),
    ],
)
def test_what_cannot_be_told_is_not_kept(tmp_path, cache_dir, tokenizer, kept):
    path = write(tmp_path / "train.tsv", ["Tt"])
    table = FeatureColumns([TextColumn("text", tokenizer, {"t": 1}, unk_id=0)])
    dataset = table.build_dataset("train", data_dir=path, cache_dir=cache_dir)
    assert dataset[0]["text"].tolist() == [0, 1]
    assert os.path.exists(cache_dir) == kept


def test_prepare_without_a_key_is_not_kept(tmp_path, cache_dir):
    path = write(tmp_path / "train.tsv")
    for suffix in "ab":
        dataset = columns().build_dataset(
            "train",
            data_dir=path,
            prepare=lambda rows, suffix=suffix: [{"text_a": row["text_a"] + suffix} for row in rows],
            cache_dir=cache_dir,
        )
        assert texts(dataset) == [text + suffix for text in EXPECTED]
    assert not cache_dir.exists()


def test_old_caches_of_a_source_do_not_pile_up(tmp_path, cache_dir):
    path, other = write(tmp_path / "train.tsv"), write(tmp_path / "dev.tsv")
    columns().build_dataset("dev", data_dir=other, cache_dir=cache_dir)
    (cache_dir / ".dev-unrelated.tmp").write_text("")
    datasets = []
    for count in range(6):
        write(path, LINES[: count + 1])
        datasets.append(columns().build_dataset("train", data_dir=path, cache_dir=cache_dir))
        stem = next(cache_dir.glob("train-*.lock")).stem
        (cache_dir / f".{stem}-half.written.tmp").write_text("")
    assert [len(dataset) for dataset in datasets] == [1, 2, 3, 4, 5, 6]
    assert texts(datasets[0]) == EXPECTED[:1]
    assert len([name for name in caches(cache_dir) if name.startswith("train-")]) == 4
    assert len([name for name in caches(cache_dir) if name.startswith("dev-")]) == 1
    write(path)
    columns().build_dataset("train", data_dir=path, cache_dir=cache_dir)
    assert [name for name in os.listdir(cache_dir) if name.endswith(".tmp")] == [".dev-unrelated.tmp"]


def test_another_release_builds_its_own(tmp_path, cache_dir, monkeypatch):
    path = write(tmp_path / "train.tsv")
    columns().build_dataset("train", data_dir=path, cache_dir=cache_dir)
    monkeypatch.setattr("propeller.data.cache.__version__", "99.0")
    assert texts(columns().build_dataset("train", data_dir=path, cache_dir=cache_dir)) == EXPECTED
    assert len(caches(cache_dir)) == 2


def test_a_damaged_cache_is_built_again(tmp_path, cache_dir, caplog):
    path = write(tmp_path / "train.tsv")
    columns().build_dataset("train", data_dir=path, cache_dir=cache_dir)
    (cache,) = cache_dir.glob("*.records")
    data = cache.read_bytes()
    for damaged in (data[:-9], data.replace(b"text 1", b"text X", 1), data.replace(b"0text", b"0texs", 1)):
        if damaged != data:
            cache.write_bytes(damaged)
            dataset = columns().build_dataset("train", data_dir=path, cache_dir=cache_dir)
            assert texts(dataset) == EXPECTED
            assert "building the cache again" in caplog.text
            caplog.clear()
    assert cache.read_bytes() == data


# Where it lies


def test_default_folder(tmp_path, monkeypatch):
    path = write(tmp_path / "train.tsv")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    columns().build_dataset("train", data_dir=path)
    assert len(caches(tmp_path / "xdg" / "propeller")) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    columns().build_dataset("train", data_dir=path)
    assert len(caches(tmp_path / "home" / ".cache" / "propeller")) == 1
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # a user whom the system does not know
    assert default_folder().is_absolute()


def test_a_folder_that_cannot_be_written_is_replaced_with_a_warning(tmp_path, caplog):
    path = write(tmp_path / "train.tsv")
    dataset = columns().build_dataset("train", data_dir=path, cache_dir=path / "cache")
    assert texts(dataset) == EXPECTED
    (record,) = caplog.records
    assert (record.levelno, record.name) == (logging.WARNING, "propeller")
    assert "cannot write the cache folder" in record.getMessage()


BUILD = """
import sys
from propeller.data import FeatureColumns, RawColumn

def prepare(rows):
    print("built", len(rows))
    return rows

table = FeatureColumns([RawColumn("text_a"), RawColumn("label")])
path, cache_dir = sys.argv[1:]
table.build_dataset("x", data_dir=path, prepare=prepare, prepare_key="1", cache_dir=cache_dir)[6]
"""


def test_several_processes_build_it_once(tmp_path, cache_dir, root):
    path = write(tmp_path / "train.tsv")
    command = [sys.executable, "-c", BUILD, str(path), str(cache_dir)]
    ranks = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert "".join(rank.communicate()[0] for rank in ranks) == "built 7\n"
    assert [rank.returncode for rank in ranks] == [0, 0, 0]


def test_no_file_at_all():
    with pytest.raises(
        ConfigError, match="the data set 'train' has an empty list of files; expected at least"
    ):
        prepare_files("train", [], columns().read, read_key="")

"""load_dataset: by a function, by name, from named files and from a data root; and what it refuses."""

from __future__ import annotations

import gzip

import pytest

from propeller.data import (
    Dataset,
    DatasetReader,
    IterDataset,
    MapDataset,
    load_dataset,
    register_reader,
    split_files,
)
from propeller.data import readers as module
from propeller.errors import ConfigError, DataError


def read(data_path, upper=False):
    with open(data_path, encoding="utf-8") as lines:
        next(lines)
        for line in lines:
            words, labels = line.strip("\n").split("\t")
            yield {"tokens": words.upper() if upper else words, "labels": labels}


def read_split(path, split):
    return Dataset.from_file(path).map(lambda line: {"text": line, "as": split})


FILES = {"train": ["words/train.txt", "words/training.txt"], "dev": ["words/dev.txt"]}


@pytest.fixture(autouse=True)
def words(monkeypatch):
    """A data set `words`, and a collection `many` of two."""
    monkeypatch.delenv("PROPELLER_DATA", raising=False)
    monkeypatch.setattr(module, "_registered", {})
    reader = DatasetReader(read_split, FILES, ("no", "yes"))
    register_reader("words", reader)
    register_reader("many", {"sst-2": reader, "CoLA": DatasetReader(read_split, {"train": ["CoLA/train"]})})


@pytest.fixture
def root(tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "training.txt").write_text("a\nb\n")
    (tmp_path / "words" / "dev.txt.gz").write_bytes(gzip.compress(b"c\n"))
    return tmp_path


@pytest.fixture
def files(root):
    (root / "one").write_text("head\na\t0\nb\t1\n")
    (root / "two").write_text("head\nc\t1\n")
    return [root / "one", str(root / "two")]


# By a function


def test_a_function(files):
    for lazy, kind in ((False, MapDataset), (True, IterDataset), (None, MapDataset)):
        dataset = load_dataset(read, data_path=files[0], lazy=lazy)
        assert type(dataset) is kind
        assert (
            list(dataset) == list(dataset) == [{"tokens": "a", "labels": "0"}, {"tokens": "b", "labels": "1"}]
        )
    assert load_dataset(read, data_path=files[0])[1]["tokens"] == "b"


def test_a_function_with_data_files(files):
    one, two = load_dataset(read, data_files=files, upper=True, lazy=True)
    assert [item["tokens"] for item in one] == ["A", "B"]
    assert [item["tokens"] for item in two] == ["C"]
    assert len(load_dataset(read, data_files=files[0])) == 2
    one, two = load_dataset(lambda path: [str(path)], data_files={"train": files[0], "dev": files[1]})
    assert one[0].endswith("one")
    assert two[0].endswith("two")


def test_a_lazy_function_is_not_called_before_it_must(files):
    calls = []
    dataset = load_dataset(lambda: calls.append(0) or [1, 2], lazy=True)
    assert calls == []
    assert list(dataset) == list(dataset) == [1, 2]
    assert len(calls) == 2
    entries = list(dataset.iterate())
    assert list(dataset.iterate(entries[0][1])) == entries[1:]


@pytest.mark.parametrize("more", [{"name": "x"}, {"splits": "train"}, {"data_root": "."}])
def test_a_function_has_no_names(more):
    with pytest.raises(ConfigError, match="not for a function"):
        load_dataset(read, data_path="x", **more)


@pytest.mark.parametrize("more", [{}, {"data_pat": "x"}, {"data_files": "x", "data_path": "y"}])
def test_a_function_gets_what_it_takes(more):
    with pytest.raises(ConfigError, match=r"the function takes \(data_path, upper=False\)"):
        load_dataset(read, **more)


def test_a_function_returns_examples():
    with pytest.raises(ConfigError, match="the data are None"):
        load_dataset(lambda: None)


# By name


def test_splits_of_a_data_root(root, monkeypatch):
    train, dev = load_dataset("words", splits=("train", "dev"), data_root=root)
    assert list(train) == [{"text": "a", "as": "train"}, {"text": "b", "as": "train"}]
    assert list(dev) == [{"text": "c", "as": "dev"}]
    assert train.label_list == dev.label_list == ["no", "yes"]
    assert type(load_dataset("words", splits="dev", data_root=root)) is MapDataset
    assert type(load_dataset("Words", splits=["dev"], data_root=str(root), lazy=True)) is IterDataset
    monkeypatch.setenv("PROPELLER_DATA", str(root))
    assert len(load_dataset("words", splits="train")) == 2


def test_named_files(root):
    path = root / "words" / "training.txt"
    assert load_dataset("words", data_files=path)[0] == {"text": "a", "as": "train"}
    assert load_dataset("words", data_files=[path], splits=["dev"])[0]["as"] == "dev"
    one, two = load_dataset("words", data_files=(str(path), path))
    assert list(one) == list(two)
    train, dev = load_dataset("words", splits=["train", "dev"], data_files=[path, path], lazy=True)
    assert [next(iter(dataset))["as"] for dataset in (train, dev)] == ["train", "dev"]
    (dev,) = [load_dataset("words", data_files={"dev": path})]
    assert dev[0]["as"] == "dev"


def test_one_of_several(root):
    path = root / "words" / "training.txt"
    for name in ("sst-2", "SST2", "sst_2"):
        assert load_dataset("many", name=name, data_files=path).label_list == ["no", "yes"]
    assert load_dataset("many", "cola", data_files=path).label_list is None


def test_an_entry_point(root, monkeypatch, tmp_path):
    folder = tmp_path / "site"
    (folder / "other-1.dist-info").mkdir(parents=True)
    (folder / "other-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (folder / "other-1.dist-info" / "entry_points.txt").write_text(
        "[propeller.readers]\nother = other:readers\n"
    )
    (folder / "other.py").write_text(
        "from propeller.data import Dataset, DatasetReader\n"
        "lines = DatasetReader(lambda path, split: Dataset.from_file(path), {'train': ['lines.txt']})\n"
        "readers = {'lines': lines}\n"
    )
    monkeypatch.syspath_prepend(folder)
    assert list(load_dataset("lines", data_files=root / "words" / "training.txt")) == ["a", "b"]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (("word",), ConfigError, "there is no data set 'word'. Did you mean 'words'? Known here: "),
        (("words",), ConfigError, "words got neither data_files nor splits; splits are train, dev"),
        (
            ("words", None, None, "tain"),
            ConfigError,
            "no split 'tain'. Did you mean 'train'?",
        ),
        (("words", None, "x", "tain"), ConfigError, "no split 'tain'"),
        (("words", None, []), ConfigError, "data_files is empty"),
        (("words", None, ["x", "y"], ["train"]), ConfigError, "2 data_files and the splits train"),
        (("words", None, {"dev": "x"}, "dev"), ConfigError, "none where data_files names them itself"),
        (("words", "x", "y"), ConfigError, "words is one data set, but name='x'"),
        (
            ("many", None, "x"),
            ConfigError,
            "name=None is none of them. There are: sst-2",
        ),
        (("many", "CoLAA", "x"), ConfigError, "Did you mean 'CoLA'?"),
        (
            ("words", None, None, "train"),
            ConfigError,
            "nothing is downloaded. Name the file of train",
        ),
        (("words", None, "missing.txt"), DataError, "missing.txt: there is no such file"),
    ],
)
def test_what_is_refused(call, kind, message):
    with pytest.raises(kind) as caught:
        load_dataset(*call)
    assert message in str(caught.value)


def test_a_file_that_is_not_there_is_named(root):
    (root / "words" / "training.txt").unlink()
    with pytest.raises(DataError) as caught:
        load_dataset("words", splits="train", data_root=root)
    assert f"{root}: there is no words/train.txt or words/training.txt (.gz or not)" in str(caught.value)


def test_files_of_a_data_set_whose_name_is_not_known(root):
    folder = root / "words"
    assert split_files("train", folder) == [folder / "training.txt"]
    assert split_files("dev", folder) == [folder / "dev.txt.gz"] and split_files("test", folder) == []
    (folder / "train").touch()  # a file of another data set
    (folder / "train.txt").touch()
    assert split_files("train", folder) == [folder / "train", folder / "train.txt"]


def test_an_argument_that_nobody_knows():
    with pytest.raises(ConfigError, match="got 'data_file'.*Did you mean 'data_files'"):
        load_dataset("words", data_file="x")

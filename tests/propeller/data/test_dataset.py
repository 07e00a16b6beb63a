"""Sources and transforms: what they give, what they know of themselves, and how they fail."""

from __future__ import annotations

import gzip
import subprocess
import sys
import traceback

import pytest

from propeller.data import Dataset, RecordWriter
from propeller.errors import ConfigError, DataError


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def test_importing_costs_no_paddle_and_no_names():
    code = (
        "import sys, propeller.data; assert 'numpy' not in sys.modules; propeller.data.Dataset; "
        "propeller.data.FeatureColumns; assert not [m for m in sys.modules if m.startswith('paddle')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Sources


def test_list_is_iterated_again_and_again():
    dataset = Dataset.from_list([3, 1, 2])
    assert list(dataset) == list(dataset) == [3, 1, 2]
    assert list(zip(dataset, dataset, strict=True)) == [(3, 3), (1, 1), (2, 2)]


def test_generator_func_is_called_for_each_pass():
    calls = []
    dataset = Dataset.from_generator_func(lambda: calls.append(0) or iter("ab")).repeat(3)
    assert list(dataset) == list("ababab")
    assert len(calls) == 3


UNUSUAL = [
    "a\u2028b",
    "c\x85d",
    "e\x0bf\x0cg",
    "h\x1ci\x1dj\x1ek",
    "l\rm",
    "",
    " n\t",
    '"quo"ted\'',
    "词\u2029😀",
    "end",
]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "\n"])
def test_only_a_newline_ends_a_line(tmp_path, newline, last):
    path = write(tmp_path / "a.txt", newline.join(UNUSUAL) + last.replace("\n", newline))
    assert list(Dataset.from_file(path)) == UNUSUAL


def test_one_carriage_return_belongs_to_the_end(tmp_path):
    assert list(Dataset.from_file(write(tmp_path / "a.txt", "a\r\r\nb\r"))) == ["a\r", "b"]


def test_byte_order_mark_and_header_of_each_file_are_dropped(tmp_path):
    bom = "\ufeff"
    paths = [write(tmp_path / f"{k}.txt", f"{bom}head {k}\n{bom}line {k}\n") for k in range(2)]
    assert list(Dataset.from_file(paths, skip_header=1)) == [f"{bom}line 0", f"{bom}line 1"]
    assert list(Dataset.from_file(str(paths[0]))) == ["head 0", f"{bom}line 0"]


def test_gzip_is_known_by_name_or_first_bytes(tmp_path):
    packed = gzip.compress(b"\xef\xbb\xbfa\nb\n")
    for name in ("x.gz", "x.txt"):
        assert list(Dataset.from_file(write(tmp_path / name, packed))) == ["a", "b"]
    assert list(Dataset.from_file(write(tmp_path / "y.txt", packed), gz=True)) == ["a", "b"]
    with pytest.raises(DataError, match="UTF-8"):
        list(Dataset.from_file(tmp_path / "y.txt", gz=False))


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("cut.gz", gzip.compress(b"line\n" * 50_000)[:-300], r"cut\.gz:\d+: cannot be read"),
        ("plain.gz", b"not gzipped\n", r"plain\.gz:1: cannot be read: Not a gzipped file"),
        ("latin.txt", b"fine\nna\xefve\n", r"latin\.txt:2: byte 3 .* not UTF-8"),
        ("surrogate.txt", b"\xed\xa0\x80\n", r"surrogate\.txt:1: .*UTF-8"),
        ("empty.txt", b"", r"empty\.txt: is empty; expected at least one line"),
        ("empty.gz", gzip.compress(b"", mtime=0), r"empty\.gz: is empty"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, data, message):
    with pytest.raises(DataError, match=message):
        list(Dataset.from_file(write(tmp_path / name, data)))


def test_missing_file_folder_and_empty_list(tmp_path):
    with pytest.raises(DataError, match="gone.txt: cannot be opened: No such file"):
        list(Dataset.from_file(tmp_path / "gone.txt"))
    with pytest.raises(DataError, match="cannot be opened: Is a directory"):
        list(Dataset.from_file(tmp_path))
    with pytest.raises(ConfigError, match="empty list of files"):
        Dataset.from_file([])


def test_a_file_that_is_only_header_is_an_error_not_a_hang(tmp_path):
    path = write(tmp_path / "a.tsv", "label\ttext\n")
    with pytest.raises(DataError, match=r"a\.tsv: is empty after 1 header line"):
        list(Dataset.from_file(path, skip_header=1).repeat())


def test_one_empty_part_among_others_is_none(tmp_path):
    paths = [write(tmp_path / name, data) for name, data in [("a", ""), ("b", "x\n"), ("c", "")]]
    assert list(Dataset.from_file(paths)) == ["x"]
    with pytest.raises(DataError, match="and so are the 1 after it"):
        list(Dataset.from_file([paths[0], paths[2]]))


# Transforms


def test_map_and_filter():
    dataset = Dataset.from_list(range(6)).map(lambda x: x * x).filter(lambda x: x % 2)
    assert list(dataset) == [1, 9, 25]


def test_shuffle_is_a_permutation_and_a_pool_shuffle_stays_within_its_pools():
    assert sorted(Dataset.from_list(range(99)).shuffle()) == list(range(99))
    assert list(Dataset.from_list(range(99)).shuffle()) != list(range(99))
    pools = list(Dataset.from_list(range(9)).filter(lambda x: True).shuffle(3))
    assert [set(pools[k : k + 3]) for k in (0, 3, 6)] == [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}]
    assert pools != list(range(9))


def test_shuffle_seeds_differ():
    orders = {tuple(Dataset.from_list(range(30)).shuffle(seed=seed)) for seed in (None, 1, 2)}
    assert len(orders) == 3


def test_shuffle_of_a_stream_says_what_to_do():
    stream = Dataset.from_generator_func(lambda: range(3))
    for dataset in (stream, Dataset.from_list([1]).repeat(), Dataset.from_list([1]).filter(bool)):
        with pytest.raises(ConfigError, match="buffer_size"):
            dataset.shuffle()


def test_shards_are_disjoint_and_whole():
    stream = Dataset.from_generator_func(lambda: range(11))
    for dataset in (Dataset.from_list(range(11)), stream, Dataset.from_list(range(11)).shuffle()):
        shards = [list(dataset.shard(3, index)) for index in range(3)]
        assert sorted(sum(shards, [])) == list(range(11))
        assert [len(shard) for shard in shards] == [4, 4, 3]


def test_interleave_takes_blocks_in_turn_and_opens_the_next():
    datasets = [Dataset.from_list([name * 2] * count) for name, count in [("a", 3), ("b", 1), ("c", 4)]]
    assert list(Dataset.from_list(datasets).interleave(cycle_length=2, block_length=2)) == (
        ["aa", "aa", "bb", "cc", "cc", "aa", "cc", "cc"]
    )
    assert list(
        Dataset.from_list("ab").interleave(lambda x: Dataset.from_list(x * 2), cycle_length=5)
    ) == list("abab")


def test_interleave_shuffles_equal_datasets_differently():
    dataset = Dataset.from_list(range(50)).shuffle()
    mixed = list(Dataset.from_list([dataset, dataset]).interleave(cycle_length=2))
    assert mixed[::2] != mixed[1::2]


def test_take():
    assert list(Dataset.from_list("abc").take(2)) == ["a", "b"]
    assert list(Dataset.from_list("abc").take(0)) == []
    assert list(Dataset.from_list("abc").take(9)) == list("abc")

    def two():
        yield from "ab"
        raise AssertionError("one item too many was read")

    assert list(Dataset.from_generator_func(two).take(2)) == ["a", "b"]


def test_length_and_random_access(tmp_path):
    with RecordWriter(tmp_path / "r") as writer:
        for index in range(10):
            writer.write({"x": index})
    for source in (
        Dataset.from_list([{"x": index} for index in range(10)]),
        Dataset.from_record_file(tmp_path / "r"),
    ):
        dataset = source.map(lambda item: item["x"]).shard(2, 1).take(4)
        assert (len(dataset), list(dataset), dataset[0], dataset[-1]) == (4, [1, 3, 5, 7], 1, 7)
        order = source.map(lambda item: item["x"]).shuffle()
        assert [order[index] for index in range(10)] == list(order)
        for index in (4, -5):
            with pytest.raises(IndexError):
                dataset[index]
        assert len(source.shuffle().repeat(3).padded_batch(4)) == 8
        assert len(source.buffered(2).take(7).padded_batch(4, drop_remainder=True)) == 1
        assert (
            len(source.bucket(batch_size=4, pool_size=6))
            == len(list(source.bucket(batch_size=4, pool_size=6)))
            == 3
        )


@pytest.mark.parametrize(
    "dataset",
    [
        Dataset.from_generator_func(list),
        Dataset.from_list([1]).repeat(),
        Dataset.from_list([1]).filter(bool),
        Dataset.from_list([Dataset.from_list([1])]).interleave(cycle_length=1),
        Dataset.from_list([{}]).token_batch(1),
    ],
)
def test_unknown_length_is_a_type_error(dataset):
    with pytest.raises(TypeError, match="not known"):
        len(dataset)
    with pytest.raises(TypeError, match="no random access"):
        dataset[0]


# Errors


@pytest.mark.parametrize(
    "make",
    [
        lambda dataset: Dataset.from_list([]),
        lambda dataset: dataset.filter(lambda item: False),
        lambda dataset: dataset.shard(3, 2),
        lambda dataset: dataset.take(0),
    ],
)
def test_repeat_over_nothing_is_an_error_not_a_hang(make):
    empty = make(Dataset.from_list([1, 2]))
    assert list(empty) == []
    for dataset in (empty.repeat(), empty.repeat(2), empty.shuffle(2).repeat().padded_batch(2).buffered(1)):
        with pytest.raises(DataError, match="whole pass"):
            list(dataset)


@pytest.mark.parametrize(
    "call",
    [
        lambda dataset: dataset.repeat(0),
        lambda dataset: dataset.take(-1),
        lambda dataset: dataset.buffered(0),
        lambda dataset: dataset.shuffle(0),
        lambda dataset: dataset.shuffle(2, seed=-1),
        lambda dataset: dataset.shard(2, 2),
        lambda dataset: dataset.shard(0, 0),
        lambda dataset: dataset.shard(2, -1),
        lambda dataset: dataset.interleave(cycle_length=0),
        lambda dataset: dataset.interleave(cycle_length=1, block_length=0),
        lambda dataset: dataset.padded_batch(0),
        lambda dataset: dataset.padded_batch(2.5),
        lambda dataset: dataset.padded_batch(2, pad_to_multiple=0),
        lambda dataset: dataset.token_batch(0),
        lambda dataset: dataset.bucket(),
        lambda dataset: dataset.bucket(batch_size=1, max_tokens=1),
        lambda dataset: dataset.bucket(batch_size=1, pool_size=0),
        lambda dataset: dataset.iterate(seed=-1),
    ],
)
def test_numbers_out_of_range_are_refused(call):
    with pytest.raises(ConfigError, match="expected"):
        call(Dataset.from_list([1, 2, 3]))


def fails_at_four(item):
    if str(item) == "4":
        raise KeyError("four")
    return True


PLACES = {
    "map": lambda dataset: dataset.map(fails_at_four),
    "filter": lambda dataset: dataset.filter(fails_at_four),
    "after filter": lambda dataset: dataset.filter(lambda item: int(item) % 2 == 0).map(fails_at_four),
    "after shuffle": lambda dataset: dataset.shuffle(4).map(fails_at_four),
    "after repeat": lambda dataset: dataset.repeat(2).take(9).map(fails_at_four),
    "after shard": lambda dataset: dataset.shard(2, 1).map(fails_at_four),
    "after buffered": lambda dataset: dataset.buffered(3).map(fails_at_four),
    "within buffered": lambda dataset: dataset.map(fails_at_four).buffered(3),
    "after interleave": lambda dataset: (
        Dataset.from_list([Dataset.from_list("123"), dataset])
        .interleave(cycle_length=2, block_length=2)
        .map(fails_at_four)
    ),
    "in interleave": lambda dataset: dataset.interleave(
        lambda item: fails_at_four(item) and Dataset.from_list([item]), cycle_length=2
    ),
}


@pytest.mark.parametrize("place", sorted(PLACES))
@pytest.mark.parametrize("source", ["file", "gz", "records", "list"])
def test_a_function_that_raises_names_the_line_of_its_item(tmp_path, source, place):
    lines = [str(index) for index in range(1, 8)]
    if source == "list":
        dataset, name = Dataset.from_list(lines), "<list>"
    elif source == "records":
        with RecordWriter(tmp_path / "r") as writer:
            for line in lines:
                writer.write({"line": line})
        dataset, name = (
            Dataset.from_record_file(tmp_path / "r").map(lambda item: item["line"]),
            str(tmp_path / "r"),
        )
    else:
        data = "\n".join(lines).encode()
        path = write(tmp_path / "a", gzip.compress(data) if source == "gz" else data)
        dataset, name = Dataset.from_file(path), str(path)
    with pytest.raises(DataError) as caught:
        list(PLACES[place](dataset))
    func = "<lambda>.<locals>.<lambda>" if place == "in interleave" else "fails_at_four"
    assert str(caught.value) == f"{name}:4: {func} raised KeyError: 'four'"
    assert (str(caught.value.path), caught.value.line) == (name, 4)
    assert isinstance(caught.value.__cause__, KeyError)
    assert "in fails_at_four" in "".join(traceback.format_exception(caught.value))


def test_random_access_names_the_item_too():
    dataset = Dataset.from_list(["3", "4"]).shuffle().map(fails_at_four)
    with pytest.raises(DataError, match="<list>:2: fails_at_four raised KeyError"):
        [dataset[0], dataset[1]]


def test_an_error_of_the_function_itself_keeps_its_words(tmp_path):
    def strict(line):
        raise DataError("no good", path="elsewhere", line=7) if line == "a" else DataError("bad line")

    path = write(tmp_path / "a.txt", "a\nb\n")
    with pytest.raises(DataError, match=r"^elsewhere:7: no good$"):
        list(Dataset.from_file(path).map(strict))
    with pytest.raises(DataError, match=r"a\.txt:2: bad line$"):
        list(Dataset.from_file(path, skip_header=1).map(strict))


def test_a_generator_is_named_by_its_function():
    with pytest.raises(DataError, match=r"<.*numbers>:4: fails_at_four raised"):
        list(Dataset.from_generator_func(numbers).map(fails_at_four))


def numbers():
    return iter(range(1, 6))


def test_interleave_wants_datasets():
    with pytest.raises(DataError, match="<list>:1: interleave.. got int; expected a Dataset"):
        list(Dataset.from_list([5]).interleave(cycle_length=1))

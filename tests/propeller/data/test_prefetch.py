"""Reading ahead: order, errors, and no thread left behind."""

from __future__ import annotations

import gc
import itertools
import threading
import traceback

import pytest

from propeller.data import Dataset
from propeller.errors import DataError


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "propeller-buffered"]


@pytest.fixture(autouse=True)
def no_reader_stays():
    yield
    assert not readers()


@pytest.mark.parametrize("size", [1, 2, 50])
def test_same_items_in_order_again_and_again(size):
    dataset = Dataset.from_list(range(20)).buffered(size)
    assert list(dataset) == list(dataset) == list(range(20))
    plain = list(Dataset.from_list(range(20)).iterate())
    assert list(dataset.iterate()) == plain


def test_it_reads_ahead_in_another_thread_but_not_further_than_asked():
    seen, third = [], threading.Event()

    def note(item):
        seen.append((item, threading.current_thread().name))
        if item == 3:
            third.set()
        return item

    stream = Dataset.from_list(range(100)).map(note).buffered(2).iterate()
    assert next(stream) == (0, 1)
    # Two wait in the buffer, and one more, which was read, waits for room.
    assert third.wait(10)
    assert next(stream) == (1, 2)
    stream.close()
    assert [item for item, _ in seen] == list(range(len(seen)))
    assert 4 <= len(seen) <= 5
    assert {name for _, name in seen} == {"propeller-buffered"}


def test_reading_starts_with_the_first_item_asked_for():
    stream = Dataset.from_list([1]).buffered(1).iterate()
    assert not readers()
    assert next(stream) == (1, 1)
    stream.close()


def test_an_error_comes_after_what_was_read_before_it_with_its_traceback(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text("1\n2\nx\n4\n")
    dataset = Dataset.from_file(path).map(int).buffered(4)
    got = []
    with pytest.raises(DataError, match=r"numbers\.txt:3: int raised ValueError") as caught:
        for item in dataset:
            got.append(item)
    assert got == [1, 2]
    lines = "".join(traceback.format_exception(caught.value))
    assert "in _read" in lines and "invalid literal" in lines


def test_whatever_is_raised_reaches_the_consumer():
    def stop():
        yield 1
        raise SystemExit(3)

    with pytest.raises(SystemExit) as caught:
        list(Dataset.from_generator_func(stop).buffered(1))
    assert caught.value.code == 3


@pytest.mark.parametrize("leave", ["close", "drop", "error", "take"])
def test_the_thread_ends_with_its_consumer(leave):
    closed = threading.Event()

    def endless():
        try:
            yield from itertools.count()
        finally:
            closed.set()

    dataset = Dataset.from_generator_func(endless).buffered(2).map(str).buffered(1)
    if leave == "take":
        assert list(dataset.take(3)) == ["0", "1", "2"]
    elif leave == "error":
        with pytest.raises(ZeroDivisionError):
            for _ in dataset:
                raise ZeroDivisionError
    else:
        stream = dataset.iterate()
        assert next(stream)[0] == "0"
        assert len(readers()) == 2
        if leave == "close":
            stream.close()
        del stream
    gc.collect()
    assert closed.wait(10)
    for reader in readers():
        reader.join(10)


def test_a_reader_that_never_returns_does_not_hold_up_its_consumer(monkeypatch):
    monkeypatch.setattr("propeller.data.prefetch._JOIN_S", 0.01)
    release = threading.Event()

    def stuck():
        yield 1
        release.wait()

    stream = Dataset.from_generator_func(stuck).buffered(1).iterate()
    assert next(stream) == (1, 1)
    stream.close()
    assert len(readers()) == 1
    release.set()
    for reader in readers():
        reader.join(10)


def test_many_short_iterations_leave_nothing():
    dataset = Dataset.from_list(range(1000)).buffered(3)
    for _ in range(100):
        assert list(itertools.islice(dataset, 2)) == [0, 1]
    assert not readers()

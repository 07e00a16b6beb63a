"""Registering and finding processors; one bad example harms no neighbour."""

from __future__ import annotations

import sys

import pytest

from propeller import processor
from propeller.errors import DataError, ExportError, PropellerError
from propeller.processor import Processor, as_answer, find_processor, register_processor, windows_each


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(processor, "_registered", {})
    monkeypatch.setattr(processor, "_logged", set())


def make(name):
    """A processor class called `name`, which doubles numbers and refuses odd ones."""

    class Doubling(Processor):
        calls = 0

        def prepare(self, raws):
            type(self).calls += 1
            if any(raw["x"] % 2 for raw in raws):
                raise DataError(f"odd: {[raw.get('x') for raw in raws]}")
            return [{"x": 2 * raw["x"]} for raw in raws]

        def finish(self, outputs):
            return [{"x": value} for value in outputs["x"]]

        def parse(self, line):
            return {"x": int(line)}

        def format(self, raw, answer):
            return str(answer["x"])

        def metrics(self):
            return {}

        def save(self, folder):
            (folder / "factor.txt").write_text("2")
            return {"factor": 2}

        @classmethod
        def load(cls, folder, settings):
            return cls()

        @property
        def fingerprint(self):
            return "2"

    Doubling.name = name
    return Doubling


def test_registered_here(monkeypatch):
    cls = make("doubling")
    assert register_processor(cls) is cls
    assert register_processor(cls) is cls
    assert find_processor("doubling") is cls


def test_a_class_that_is_defined_anew_takes_the_place_of_the_one_before():
    register_processor(make("edited"))
    again = register_processor(make("edited"))
    assert find_processor("edited") is again


@pytest.mark.parametrize(("place", "value"), [("__qualname__", "Other"), ("__module__", "other.package")])
def test_two_classes_of_one_name(place, value):
    cls, other = make("claimed"), make("claimed")
    setattr(other, place, value)
    register_processor(cls)
    with pytest.raises(PropellerError, match="Two processors are called 'claimed': .*Doubling and"):
        register_processor(other)
    assert find_processor("claimed") is cls


def test_found_by_the_entry_point_of_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "third_party.py").write_text("class Theirs:\n    name = 'theirs'\n", "utf-8")
    info = tmp_path / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n", "utf-8")
    (info / "entry_points.txt").write_text("[propeller.processors]\ntheirs = third_party:Theirs\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert find_processor("theirs").__module__ == "third_party"
    finally:
        sys.modules.pop("third_party", None)
    with pytest.raises(ExportError, match="'their'. Did you mean 'theirs'. Known here: .*theirs"):
        find_processor("their")


def test_unknown_name_says_what_there_is():
    register_processor(make("doubling"))
    with pytest.raises(
        ExportError, match="No processor is registered as 'zzz'. Known here: .*doubling.*Install"
    ):
        find_processor("zzz")


def test_one_bad_example_harms_no_neighbour():
    cls = make("doubling")
    results = windows_each(cls(), [{"x": 2}, {"x": 3}, {"x": 4}])
    assert results[0] == [{"x": 4}] and results[2] == [{"x": 8}]
    assert isinstance(results[1], DataError) and str(results[1]) == "odd: [3]"


def test_good_examples_are_prepared_in_one_call():
    cls = make("doubling")
    assert windows_each(cls(), [{"x": 2}, {"x": 4}]) == [[{"x": 4}], [{"x": 8}]]
    assert cls.calls == 1
    assert windows_each(cls(), []) == []


def test_an_unforeseen_error_is_the_answer_to_one_input_and_logged_once(caplog):
    """It may be a bug: the answer names it, and its traceback is seen, but not a million times."""
    raws = [{"x": 2}, {"y": 1}, {"x": "a"}, {"x": 3}, *[{"x": 4}] * 9, {"y": 2}]
    results = windows_each(make("doubling")(), raws)
    assert [str(result) for result in results if isinstance(result, PropellerError)] == [
        "This input could not be answered (KeyError: 'x').",
        "This input could not be answered (TypeError: not all arguments converted during string formatting).",
        "odd: [3]",
        "This input could not be answered (KeyError: 'x').",
    ]
    assert results[0] == [{"x": 4}] and results[4:13] == [[{"x": 8}]] * 9
    assert isinstance(results[1].__cause__, KeyError)
    assert [record.exc_info[0] for record in caplog.records] == [KeyError, TypeError]
    assert 'if any(raw["x"] % 2 for raw in raws)' in caplog.text


def test_what_wants_to_end_the_process_does():
    class Quitting(make("quitting")):
        def prepare(self, raws):
            raise SystemExit(3)

    with pytest.raises(SystemExit):
        windows_each(Quitting(), [{"x": 2}])


@pytest.mark.parametrize("windows", [[], [[]], [[{"x": 1}]] * 3])
def test_windows_must_be_those_of_the_examples(windows):
    class Odd(make("odd")):
        def windows(self, raws):
            return windows

    (result,) = windows_each(Odd(), [{"x": 2}])
    assert str(result).startswith(f"The processor 'odd' made {[*map(len, windows)]} windows of 1 examples;")


def test_an_error_without_text_or_with_much():
    for error, words in (
        (ValueError(), "(ValueError())."),
        (RuntimeError("head\n" + "x" * 500 + "\n tail"), "xxx tail)."),
    ):
        answer = as_answer(error)
        assert isinstance(answer, DataError) and str(answer).endswith(words) and len(str(answer)) < 400
        assert type(error).__name__ in str(answer) and answer.__cause__ is error
    assert as_answer(answer) is answer


class TestRaws:
    def test_what_people_write(self):
        processor = make("doubling")()
        assert processor.raw_of("a") == processor.raw_of(("a",)) == {"text_a": "a"}
        assert processor.raw_of(("a", "b")) == processor.raw_of(["a", "b"]) == {"text_a": "a", "text_b": "b"}
        raw = {"x": 1, "text_b": "b"}
        assert processor.raw_of(raw) is raw

    def test_a_pair_for_a_task_of_single_texts(self):
        class Single(make("single")):
            pair = False

        for given in (("a", "b"), ["a", "b"], {"text_a": "a", "text_b": "b"}):
            with pytest.raises(DataError, match="takes one text, this is a pair: text_b is 'b'. Leave"):
                Single().raw_of(given)
        for given in ("a", ("a",), {"text_a": "a"}, {"text_a": "a", "text_b": None}):
            assert Single().raw_of(given)["text_a"] == "a"


def test_a_processor_must_be_complete():
    class Half(Processor):
        name = "half"

    with pytest.raises(TypeError, match="abstract"):
        Half()

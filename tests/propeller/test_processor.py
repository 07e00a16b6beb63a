"""Registering and finding processors; one bad example harms no neighbour."""

from __future__ import annotations

import sys

import pytest

from propeller import processor
from propeller.errors import DataError, ExportError, PropellerError
from propeller.processor import Processor, find_processor, register_processor, windows_each


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(processor, "_registered", {})


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
    other = make("doubling")
    other.__qualname__ = "Other"
    with pytest.raises(PropellerError, match="Two processors are called 'doubling': .*Doubling.*Other"):
        register_processor(other)
    assert find_processor("doubling") is cls


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


def test_a_programming_error_is_not_an_answer():
    for raws in ([{"y": 1}], [{"x": 3}, {"y": 1}]):
        with pytest.raises(KeyError):
            windows_each(make("doubling")(), raws)


def test_a_processor_must_be_complete():
    class Half(Processor):
        name = "half"

    with pytest.raises(TypeError, match="abstract"):
        Half()

"""`run.json`: what it holds, what is said to have changed, with how many ranks a run began."""

from __future__ import annotations

import json
import math

import pytest

from propeller.errors import ConfigError
from propeller.run_file import RUN_FILE, read_run_file, write_run_file


def values(**changes):
    return {
        "run_config": {"max_steps": 10, "seed": 0},
        "hparams": {"learning_rate": 0.1},
        "versions": {"paddle": "3.3.1"},
        "device": "cpu",
        "ranks": 2,
        **changes,
    }


@pytest.fixture
def said(caplog):
    """What was said at a level since the last call."""

    def messages(level="WARNING"):
        found = [record.getMessage() for record in caplog.records if record.levelname == level]
        caplog.clear()
        return found

    caplog.set_level("INFO", logger="propeller")
    return messages


def test_it_is_written_and_logged(tmp_path, said):
    write_run_file(tmp_path / "new", values(hparams={"scale": math.inf}), resumed=False)
    stored = json.loads((tmp_path / "new" / RUN_FILE).read_text("utf-8"))
    assert stored == values(hparams={"scale": "Infinity"})
    assert read_run_file(tmp_path / "new") == stored
    (message,) = said("INFO")
    assert json.loads(message.removeprefix("configuration: ")) == stored


def test_there_is_none(tmp_path):
    assert read_run_file(tmp_path) is None
    assert read_run_file(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"run_config": {"max_steps": 20, "seed": 0}}, ["run_config.max_steps: 10 -> 20"]),
        (
            {"run_config": {"max_steps": 10, "seed": 0, "profile": True}},
            ["run_config.profile: None -> True"],
        ),
        (
            {"hparams": {"dropout": 0.5}},
            ["hparams.dropout: None -> 0.5", "hparams.learning_rate: 0.1 -> None"],
        ),
        ({"versions": {"paddle": "3.2.2"}}, ["versions.paddle: '3.3.1' -> '3.2.2'"]),
        ({"device": "gpu:0", "ranks": 1}, ["device: 'cpu' -> 'gpu:0'", "ranks: 2 -> 1"]),
    ],
)
def test_what_changed_is_said(tmp_path, said, changes, expected):
    write_run_file(tmp_path, values(), resumed=False)
    assert said() == []
    write_run_file(tmp_path, values(**changes), resumed=True)
    assert said() == [f"changed since this run was last started: {change}" for change in expected]
    write_run_file(tmp_path, values(**changes), resumed=True)
    assert said() == [], "it is the last start that counts"


def test_values_are_compared_as_json_holds_them(tmp_path, said):
    given = values(hparams={"tuple": (1, 2), "nan": math.nan, "nested": {"a": (1,)}})
    write_run_file(tmp_path, given, resumed=False)
    write_run_file(tmp_path, given, resumed=True)
    assert said() == []


def test_a_run_that_begins_is_compared_with_nothing(tmp_path, said):
    write_run_file(tmp_path, values(), resumed=False)
    write_run_file(tmp_path, values(device="gpu:0"), resumed=False)
    assert said() == []
    assert read_run_file(tmp_path)["device"] == "gpu:0"


def test_of_an_older_release(tmp_path, said):
    """One that knew neither device nor ranks."""
    old = {key: value for key, value in values().items() if key not in ("device", "ranks")}
    (tmp_path / RUN_FILE).write_text(json.dumps(old), "utf-8")
    write_run_file(tmp_path, values(), resumed=True)
    head = "changed since this run was last started: "
    assert said() == [f"{head}device: None -> 'cpu'", f"{head}ranks: None -> 2"]


@pytest.mark.parametrize("text", ["{", "[1]", "3", "", "null", b"\xff\xfe{}"])
def test_it_was_damaged(tmp_path, text):
    (tmp_path / RUN_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    for read in (
        lambda: read_run_file(tmp_path),
        lambda: write_run_file(tmp_path, values(), resumed=True),
    ):
        with pytest.raises(ConfigError, match=r"run\.json is no JSON object any more \(.*Mend it, or remove"):
            read()


def test_what_json_has_no_place_for(tmp_path):
    with pytest.raises(ConfigError, match=r"hparams\.model is <object object.*which JSON has no place for"):
        write_run_file(tmp_path, values(hparams={"model": object()}), resumed=False)
    assert list(tmp_path.iterdir()) == []

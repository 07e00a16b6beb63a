from __future__ import annotations

import collections
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from ernie.convert.unpickle import PLAIN_TYPES, safe_load
from propeller.errors import CheckpointError

PLAIN = {"词": -3.5, "b": 2, "nested": [1, (2.5, None, True), {"x"}, frozenset({"y"})], "bytes": "é"}


def load(data: bytes, allowed: Any = PLAIN_TYPES, **kwargs: Any) -> Any:
    return safe_load(io.BytesIO(data), allowed, **kwargs)


class Evil:
    """Runs a command when it is unpickled the ordinary way."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_back(protocol: int) -> None:
    assert load(pickle.dumps(PLAIN, protocol=protocol)) == PLAIN


def test_bytes_come_back() -> None:
    assert load(pickle.dumps([b"\x00\xff"], protocol=3)) == [b"\x00\xff"]


def test_str_of_python_2_is_utf8() -> None:
    # What Python 2 wrote for {'词': 1}: SHORT_BINSTRING of the UTF-8 bytes.
    word = "词".encode()
    assert load(b"\x80\x02}U" + bytes([len(word)]) + word + b"K\x01s.") == {"词": 1}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_forbidden_call_is_named_and_not_made(tmp_path: Path, protocol: int) -> None:
    victim = tmp_path / "ran"
    data = pickle.dumps({"word": Evil(f"touch {victim}")}, protocol=protocol)
    with pytest.raises(CheckpointError, match=r"(posix|nt)\.system"):
        load(data)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (pickle.dumps(collections.OrderedDict(a=1)), "collections.OrderedDict"),
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (b"(S'true'\nios\nsystem\n.", "os.system"),  # INST
        (b"(cos\nsystem\nS'true'\no.", "os.system"),  # OBJ
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "builtins.eval"),
        (b"c__builtin__\neval\n.", "__builtin__.eval"),
        (b"\x80\x04\x8c\x08builtins\x8c\x0aset.__new_\x93.", "builtins.set.__new_"),
        (pickle.dumps(1j), "builtins.complex"),
    ],
)
def test_each_way_to_name_a_global_is_checked(data: bytes, name: str) -> None:
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(data)


def test_the_caller_decides_what_a_name_stands_for() -> None:
    data = pickle.dumps(collections.OrderedDict(a=1))
    assert type(load(data, {("collections", "OrderedDict"): dict})) is dict
    with pytest.raises(CheckpointError, match=r"builtins\.set"):
        load(pickle.dumps({1, 2}, protocol=3), {})


def test_outside_data_needs_a_loader() -> None:
    data = b"\x80\x02X\x03\x00\x00\x00keyQ."
    assert load(data, persistent_load=lambda key: f"loaded {key}") == "loaded key"
    with pytest.raises(CheckpointError, match="'key'"):
        load(data)


@pytest.mark.parametrize(
    "data", [b"", b"\x80", b"garbage", pickle.dumps(PLAIN)[:-5], b"0.", b"\x80\x02h\x07."]
)
def test_damaged_pickles(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "dict.pickle"
    path.write_bytes(data)
    with (
        open(path, "rb") as file,
        pytest.raises(CheckpointError, match=r"dict\.pickle is not a readable pickle"),
    ):
        safe_load(file, PLAIN_TYPES)


def test_random_damage_never_escapes() -> None:
    data = pickle.dumps(PLAIN, protocol=2)
    for place in range(len(data)):
        for value in (0, 0x2E, 0x52, 0x63, 0x62, 0x93, 0xFF):
            try:
                load(data[:place] + bytes([value]) + data[place + 1 :])
            except CheckpointError:
                pass

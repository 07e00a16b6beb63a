"""A line of a stream: its length and its text."""

from __future__ import annotations

import pytest

from propeller import lines
from propeller.errors import DataError


def test_the_text_of_a_line():
    assert lines.line_text("中\r".encode(), 4) == "中"
    assert lines.line_text(b"a\rb", 3) == "a\rb"
    assert lines.line_text(b"x" * lines.MAX_LINE_BYTES, lines.MAX_LINE_BYTES) == "x" * lines.MAX_LINE_BYTES


@pytest.mark.parametrize(
    ("line", "num_bytes", "message"),
    [
        (b"ab\xff", 3, "line 7 is not UTF-8 (invalid start byte at byte 2)"),
        (b"rest", lines.MAX_LINE_BYTES + 1, "line 7 has 4194305 bytes; at most 4194304 are taken"),
    ],
)
def test_why_it_has_none(line, num_bytes, message):
    found = lines.line_text(line, num_bytes, "line 7")
    assert isinstance(found, DataError) and str(found) == message

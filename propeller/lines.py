"""A line of a stream, in which anything may stand: how long it may be, and its text."""

from __future__ import annotations

from propeller.errors import DataError

# A longer line gets an error in place of an answer, so that memory stays bounded whatever comes.
MAX_LINE_BYTES = 4 << 20


def line_text(line: bytes, num_bytes: int, name: str = "the line") -> str | DataError:
    """The text of a line without its end, or why it is none.

    Args:
        line: what was kept of it.
        num_bytes: what it had; more than were kept, if it is longer than `MAX_LINE_BYTES`.
        name: how an error calls it.
    """
    if num_bytes > MAX_LINE_BYTES:
        return DataError(f"{name} has {num_bytes} bytes; at most {MAX_LINE_BYTES} are taken")
    try:
        return line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        return DataError(f"{name} is not UTF-8 ({error.reason} at byte {error.start})")

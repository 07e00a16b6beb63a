"""Lines of a stream of any size, in blocks, with the position behind each."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import BinaryIO

from ernie.service.vector_file import Position
from propeller import lines as limits
from propeller.errors import ConfigError, DataError
from propeller.lines import line_text

_READ_BYTES = 1 << 18


@dataclasses.dataclass(frozen=True)
class Block:
    """Some lines, each a text or why it is none, and the position behind them."""

    lines: list[str | DataError]
    position: Position


class LineReader:
    """Cuts a stream of bytes into blocks of lines. Only `\\n`, or `\\r\\n`, ends a line.

    Args:
        source: the stream; best one without a buffer, whose `read` returns what is there.
        max_lines: lines of a block; it has less where no more is there at once.
    """

    def __init__(self, source: BinaryIO, max_lines: int):
        self._source, self._max_lines = source, max_lines
        self._digest = hashlib.sha256()
        self._lines = self._num_bytes = 0

    @property
    def position(self) -> Position:
        """Behind what has been given."""
        return Position(self._lines, self._num_bytes, self._digest.hexdigest())

    def skip(self, position: Position) -> None:
        """Reads up to where another run was.

        Raises:
            ConfigError: it is another input.
        """
        while self._num_bytes < position.num_bytes:
            piece = self._source.read(min(_READ_BYTES, position.num_bytes - self._num_bytes))
            if not piece:
                break
            self._take(piece)
        self._lines = position.lines
        if self.position != position:
            raise ConfigError(
                f"The input is not the one that the run was begun with: its first {position.num_bytes} "
                f"bytes, {position.lines} lines, have changed. --restart begins anew."
            )

    def blocks(self) -> Iterator[Block]:
        """Gives what is left."""
        begun, dropped, ended = b"", 0, False
        while not ended:
            piece = self._source.read(_READ_BYTES)
            ended = not piece
            lines = (begun + piece).split(b"\n")
            begun = lines.pop()
            if ended and (begun or dropped):
                lines.append(begun)
            for start in range(0, len(lines), self._max_lines):
                members = lines[start : start + self._max_lines]
                self._take(b"\n".join(members) + (b"" if ended else b"\n"))
                texts = [line_text(line, len(line)) for line in members]
                if dropped:
                    texts[0], dropped = line_text(members[0], dropped + len(members[0])), 0
                self._lines += len(members)
                yield Block(texts, self.position)
            if len(begun) > limits.MAX_LINE_BYTES:
                self._take(begun)
                dropped, begun = dropped + len(begun), b""

    def _take(self, data: bytes) -> None:
        self._digest.update(data)
        self._num_bytes += len(data)

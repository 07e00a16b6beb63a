"""Reading ahead in a thread, with the errors, the order and the positions of reading in place."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from propeller.data.node import Context, Entries, Node, Position, Transform

# How long an early stop waits for the reader to finish its item. It gives up then, since the reader may be
# blocked in a read that never returns (a pipe); as a daemon it ends after that item, or with the process.
_JOIN_S = 5.0


class Buffered(Transform):
    """Reads up to `size` items ahead. Positions are those of the source: they travel with the items."""

    def __init__(self, source: Node, size: int):
        super().__init__(source)
        self._size = size

    @property
    def indexed(self) -> bool:
        return self.source.indexed

    def size(self) -> int | None:
        return self.source.size()

    def at(self, index: int, context: Context) -> Any:
        return self.source.at(index, context)

    def settings(self) -> None:
        return None

    def iterate(self, position: Position, context: Context) -> Entries:
        channel = _Channel(self._size)
        entries = self.source.iterate(position, context)
        reader = threading.Thread(
            target=_read, args=(entries, channel), name="propeller-buffered", daemon=True
        )
        # The reader alone holds the iterator, so that files and inner readers are closed when it ends.
        del entries
        reader.start()
        try:
            while (entry := channel.get()) is not None:
                yield entry
        finally:
            channel.close()
            # A generator may be finalised by whichever thread drops it, even the reader.
            if reader is not threading.current_thread():
                reader.join(_JOIN_S)


def _read(entries: Entries, channel: _Channel) -> None:
    """Body of the reading thread."""
    try:
        for entry in entries:
            if not channel.put(entry):
                break
    except BaseException as error:  # whatever it is, the consumer must see it
        channel.end(error)
    else:
        channel.end(None)


class _Channel:
    """A bounded queue from one producer to one consumer that either side can end.

    `queue.Queue` cannot wake a blocked producer when its consumer leaves; that would take polling.
    """

    def __init__(self, size: int):
        self._size = size
        self._entries: deque[tuple[Any, Position]] = deque()
        self._error: BaseException | None = None
        self._ended = False
        self._closed = False
        self._changed = threading.Condition()

    def put(self, entry: tuple[Any, Position]) -> bool:
        """Adds an entry, waiting for room. Returns False if the consumer has left."""
        with self._changed:
            while len(self._entries) >= self._size and not self._closed:
                self._changed.wait()
            self._entries.append(entry)
            self._changed.notify_all()
            return not self._closed

    def end(self, error: BaseException | None) -> None:
        """Says that no entry will follow, and why if it is an error."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def get(self) -> tuple[Any, Position] | None:
        """Returns the next entry, or None at the end.

        Raises:
            BaseException: the producer's own error, with its traceback, after all that it had read.
        """
        with self._changed:
            while not self._entries and not self._ended:
                self._changed.wait()
            if self._entries:
                self._changed.notify_all()
                return self._entries.popleft()
            error, self._error = self._error, None
        if error is None:
            return None
        try:
            raise error
        finally:
            del error  # the traceback refers to this frame: a cycle that would keep the items alive

    def close(self) -> None:
        """Says that the consumer has left."""
        with self._changed:
            self._closed = True
            self._entries.clear()
            self._changed.notify_all()

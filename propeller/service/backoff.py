"""How long to wait before what has failed is tried again."""

from __future__ import annotations


class Backoff:
    """Pauses in seconds, each twice as long as the one before, up to the longest.

    Args:
        first: the first pause, also after `reset`.
        longest: what no pause exceeds.

    Attributes:
        count: pauses since the last success.
    """

    def __init__(self, first: float, longest: float):
        self._first, self._longest = first, longest
        self._pause, self.count = first, 0

    def next(self) -> float:
        """Takes note of a failure; returns the pause after it."""
        self.count += 1
        pause, self._pause = self._pause, min(2.0 * self._pause, self._longest)
        return pause

    def reset(self) -> None:
        """Takes note of a success."""
        self._pause, self.count = self._first, 0

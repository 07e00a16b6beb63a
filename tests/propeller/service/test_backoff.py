"""Pauses between attempts."""

from __future__ import annotations

from propeller.service.backoff import Backoff


def test_pauses_grow_until_a_success():
    backoff = Backoff(0.1, 10.0)
    pauses = [backoff.next() for _ in range(9)]
    assert pauses[:4] == [0.1, 0.2, 0.4, 0.8] and pauses[-2:] == [10.0, 10.0] and backoff.count == 9
    backoff.reset()
    assert (backoff.count, backoff.next(), backoff.next()) == (0, 0.1, 0.2)

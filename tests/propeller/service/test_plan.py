"""How a server batches what a bundle is asked."""

from __future__ import annotations

import pytest

from propeller.bundle import read_bundle
from propeller.errors import ConfigError
from propeller.service.plan import BatchLimits, batch_limits
from propeller.service.settings import ServerSettings


def limits(folder, **settings):
    return batch_limits(ServerSettings(models={"m": folder}, **settings), read_bundle(folder))


def test_without_a_word_every_row_fits(tiny_bundle):
    assert limits(tiny_bundle) == BatchLimits(1024, 64, 4, 16)
    assert limits(tiny_bundle, bf16=True) == BatchLimits(1024, 64, 16, 32)
    assert limits(tiny_bundle, devices=("gpu:0",), max_batch_size=8) == BatchLimits(16384, 8, 8, 512)


def test_a_batch_has_room_for_a_real_row(tiny_bundle):
    """The rows that the bundle was exported with have 5 and 7 tokens."""
    assert limits(tiny_bundle, max_batch_tokens=5).max_tokens == 5
    with pytest.raises(
        ConfigError, match=r"max_batch_tokens is 4, but .* has 5 tokens; expected at least that"
    ):
        limits(tiny_bundle, max_batch_tokens=4)


def test_rows_of_one_size_need_one_token(linear_bundle):
    assert limits(linear_bundle, max_batch_tokens=1).max_tokens == 1

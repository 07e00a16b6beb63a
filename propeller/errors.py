"""One exception tree for `propeller` and what is built on it.

A message says what was given, what was expected, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class PropellerError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(PropellerError, ValueError):
    """A flag, configuration key or value that cannot be used."""


class DataError(PropellerError):
    """Data that cannot be read.

    Args:
        message: what was found and what was expected.
        path: the file, where there is one.
        line: 1-based line (or record) number in that file.
    """

    def __init__(self, message: str, *, path: str | Path | None = None, line: int | None = None):
        self.path = path
        self.line = line
        where = "" if path is None else f"{path}:{line}: " if line is not None else f"{path}: "
        super().__init__(where + message)


class CheckpointError(PropellerError):
    """A checkpoint or weight file that is missing, damaged or does not fit."""


class ExportError(PropellerError):
    """A model that could not be exported, or a bundle that cannot be served."""


class NonFiniteLossError(PropellerError):
    """Training produced NaN or infinity; the message names the step and the last good checkpoint."""


class RankError(PropellerError):
    """Another rank of the run failed or is gone, so this one cannot go on; the message is its own."""


class Interrupted(PropellerError):
    """A run that was asked to stop by a signal and has saved what it had.

    Args:
        message: what was saved and how to go on.
        signum: the signal.
    """

    def __init__(self, message: str, signum: int):
        self.signum = signum
        super().__init__(message)


# How near (0 to 1) a key must be to a known one to be its misspelling, where unknown keys are allowed:
# `hiden_size` scores 0.95, `learning_rat` 0.96, but `bos_token_id` against `pad_token_id` 0.83.
NEAR_MISS = 0.85


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Returns `" Did you mean 'x'?"` for the nearest of `known`, or an empty string if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""

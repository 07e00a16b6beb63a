"""Scalars and histograms from inside a model, for VisualDL or TensorBoard.

Call `propeller.summary.scalar('name', value)` anywhere in `forward` or `loss`; on the steps that are
logged the values are written below `model_dir/summary`, on all others a call costs nothing.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any, Protocol

import numpy as np

log = logging.getLogger("propeller")


class Writer(Protocol):
    """What the writers of VisualDL and tensorboardX have in common, in one form."""

    def add(self, kind: str, name: str, value: Any, step: int) -> None:
        """Writes one `scalar` or `histogram`."""

    def close(self) -> None:
        """Flushes and closes the files."""


class _VisualDL:
    def __init__(self, module: Any, folder: Path):
        self._writer = module.LogWriter(logdir=str(folder))

    def add(self, kind: str, name: str, value: Any, step: int) -> None:
        if kind == "scalar":
            self._writer.add_scalar(tag=name, value=float(value), step=step)
        else:
            self._writer.add_histogram(tag=name, values=value, step=step)

    def close(self) -> None:
        self._writer.close()


class _TensorBoard:
    def __init__(self, module: Any, folder: Path):
        self._writer = module.SummaryWriter(str(folder))

    def add(self, kind: str, name: str, value: Any, step: int) -> None:
        getattr(self._writer, f"add_{kind}")(name, value, step)

    def close(self) -> None:
        self._writer.close()


_WRITERS = (
    ("visualdl", _VisualDL),
    ("tensorboardX", _TensorBoard),
)

_collected: list[tuple[str, str, Any]] | None = None


def open_writer(folder: Path) -> Writer | None:
    """Opens the first writer that is installed (VisualDL, then tensorboardX), None without any."""
    for name, writer in _WRITERS:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        return writer(module, folder)
    log.debug("no summaries: neither visualdl nor tensorboardX is installed")
    return None


def start_collecting() -> None:
    """Keeps what `scalar` and `histogram` get, until `write_collected`."""
    global _collected
    _collected = []


def write_collected(writer: Writer, step: int) -> None:
    """Writes what was collected and stops collecting."""
    for kind, name, value in _collected or ():
        writer.add(kind, name, value, step)
    stop_collecting()


def stop_collecting() -> None:
    """Drops what was collected; `scalar` and `histogram` cost nothing again."""
    global _collected
    _collected = None


def scalar(name: str, value: Any) -> None:
    """Records one number (a float or a one-element tensor) if this step is logged."""
    if _collected is not None:
        _collected.append(("scalar", name, float(np.asarray(value).reshape(()))))


def histogram(name: str, values: Any) -> None:
    """Records the distribution of a tensor if this step is logged."""
    if _collected is not None:
        _collected.append(("histogram", name, np.asarray(values).reshape(-1)))

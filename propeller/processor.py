"""What a task knows without Paddle: raw examples -> arrays, outputs -> answers, and its metrics.

Training, batch prediction and serving use the same processor, so they cannot disagree. A bundle names
it by its registered name; the code comes from an installed package (entry point group
`propeller.processors`) or from a module that was imported, never from the bundle.
"""

from __future__ import annotations

import abc
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from propeller.errors import ExportError, PropellerError, did_you_mean
from propeller.metrics import Metric

ENTRY_POINTS = "propeller.processors"

Raw = Mapping[str, Any]
Answer = dict[str, Any]


class Processor(abc.ABC):
    """One task, without Paddle.

    Attributes:
        name: the registered name that a bundle stores.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def prepare(self, raws: Sequence[Raw]) -> list[dict[str, Any]]:
        """Turns raw examples into arrays, one result for each, in order.

        Args:
            raws: examples by column name (`{"text_a": ..., "text_b": ..., "label": ...}`).

        Returns:
            For each example its unpadded features (and label, where there is one) by name.

        Raises:
            DataError: an example that cannot be used.
        """

    @abc.abstractmethod
    def finish(self, outputs: Mapping[str, Any]) -> list[Answer]:
        """Turns model outputs (numpy, rows first) into one JSON-able answer for each row."""

    @abc.abstractmethod
    def parse(self, line: str) -> Raw:
        """Reads one input line of batch prediction.

        Raises:
            DataError: the line is malformed.
        """

    @abc.abstractmethod
    def format(self, answer: Answer) -> str:
        """Writes one answer as a line of plain text, without the line end."""

    @abc.abstractmethod
    def metrics(self) -> dict[str, Metric]:
        """New, empty metrics by name; the first one is the one to choose a model by."""

    @abc.abstractmethod
    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the processor's files (vocabulary, tokenizer) and returns its settings for JSON."""

    @classmethod
    @abc.abstractmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> Processor:
        """Builds the processor that `save` wrote."""

    @property
    def pad_values(self) -> Mapping[str, int | float]:
        """What fills up shorter rows of a feature, where that is not 0."""
        return {}

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever `prepare` would give other arrays; the key of caches."""


P = TypeVar("P", bound=type[Processor])
_registered: dict[str, type[Processor]] = {}


def register_processor(cls: P) -> P:
    """Class decorator: makes a processor known by its `name` in this process."""
    other = _registered.setdefault(cls.name, cls)
    if other is not cls and other.__qualname__ != cls.__qualname__:
        raise PropellerError(f"Two processors are called {cls.name!r}: {other!r} and {cls!r}.")
    return cls


def find_processor(name: str) -> type[Processor]:
    """Returns the processor class registered as `name`, here or by an installed package.

    Raises:
        ExportError: nobody registered that name.
    """
    if name in _registered:
        return _registered[name]
    points = {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    if name in points:
        found: type[Processor] = points[name].load()
        return found
    known = {*_registered, *points}
    raise ExportError(
        f"No processor is registered as {name!r}.{did_you_mean(name, known)} Known here: "
        f"{', '.join(sorted(known)) or 'none'}. Install the package that provides it."
    )


def prepare_each(processor: Processor, raws: Sequence[Raw]) -> list[dict[str, Any] | PropellerError]:
    """Prepares a batch so that one bad example harms no neighbour: its place holds its error."""
    try:
        return list(processor.prepare(raws))
    except PropellerError:
        results: list[dict[str, Any] | PropellerError] = []
        for raw in raws:
            try:
                results.extend(processor.prepare([raw]))
            except PropellerError as error:
                results.append(error)
        return results

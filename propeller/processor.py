"""What a task knows without Paddle: raw examples -> arrays, outputs -> answers, and its metrics.

    file or line -> raw -> windows (its examples) -> model -> finish (a part for each) -> join -> answer

Training, batch prediction and serving use the same processor, so they cannot disagree. A bundle names
it by its registered name; the code comes from an installed package (entry point group
`propeller.processors`) or from a module that was imported, never from the bundle.
"""

from __future__ import annotations

import abc
import importlib.metadata
import logging
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from propeller.errors import ConfigError, DataError, ExportError, PropellerError, did_you_mean
from propeller.metrics import Metric

if TYPE_CHECKING:
    from propeller.data import Dataset

log = logging.getLogger("propeller")

ENTRY_POINTS = "propeller.processors"

Raw = Mapping[str, Any]
Answer = dict[str, Any]

# Of what an unforeseen error says: the end, where Paddle says what is wrong.
_SHOWN_CHARS = 300
# The errors that `log_failure` has logged: type, and file and line that they come from.
_logged: set[tuple[Any, ...]] = set()


class Processor(abc.ABC):
    """One task, without Paddle.

    A raw example is a mapping of JSON values. It becomes one example, the arrays of one model input, or
    several where a task cuts long texts into windows; from what the model gives for these comes one answer.

    Attributes:
        name: the registered name that a bundle stores.
        label_names: the columns of an example that the loss and the metrics get.
        pair: whether an example may have a second text, `text_b`.
    """

    name: ClassVar[str]
    label_names: ClassVar[tuple[str, ...]] = ("label",)
    pair: bool = True

    @abc.abstractmethod
    def prepare(self, raws: Sequence[Raw]) -> list[dict[str, Any]]:
        """Turns raw examples into arrays, in order: one example for each, or for each of its windows.

        Args:
            raws: examples by column name (`{"text_a": ..., "text_b": ..., "label": ...}`).

        Returns:
            The unpadded features of each (and its labels, where there are some) by name.

        Raises:
            DataError: an example that cannot be used.
        """

    def windows(self, raws: Sequence[Raw]) -> list[list[dict[str, Any]]]:
        """Turns raw examples into arrays: of each the examples that `prepare` makes of it, at least one.

        Raises:
            DataError: an example that cannot be used.
        """
        examples = self.prepare(raws)
        if len(examples) != len(raws):
            raise PropellerError(
                f"The processor {self.name!r} made {len(examples)} examples of {len(raws)}. One that makes "
                "several of one must define `windows` and `join`."
            )
        return [[example] for example in examples]

    @abc.abstractmethod
    def finish(self, outputs: Mapping[str, Any]) -> list[Answer]:
        """Turns model outputs (numpy, rows first) into one JSON-able answer for each row.

        Where a raw example may have several rows, that is a part of its answer; see `join`.
        """

    def join(self, raw: Raw, examples: Sequence[Mapping[str, Any]], parts: Sequence[Answer]) -> Answer:
        """Makes the answer for one raw example.

        Args:
            raw: the example.
            examples: its windows.
            parts: what `finish` made of each of them.
        """
        (answer,) = parts
        return answer

    def read(self, path: Path, *, columns: Sequence[str] | None = None) -> Dataset:
        """Reads the labelled raw examples of a data file.

        Args:
            path: the file.
            columns: names of the cells of a table without a header, in order.

        Raises:
            ConfigError: the task has no file format of its own.
            DataError: the file cannot be read, or a row cannot be used; it names file and line.
        """
        raise ConfigError(f"The task {self.name!r} reads no files.")

    def raw_of(self, value: Any) -> Raw:
        """Takes an input as people write it: a text, a tuple of two, or a mapping as it is.

        Raises:
            DataError: it is none of these, or has a second text where the task takes one.
        """
        raw = value if isinstance(value, Mapping) else _texts(value)
        if not self.pair and raw.get("text_b") is not None:
            raise DataError(
                f"The model takes one text, this is a pair: text_b is {raw['text_b']!r:.80}. Leave it out, "
                "or ask a model that was trained with pairs."
            )
        return raw

    @abc.abstractmethod
    def parse(self, line: str) -> Raw:
        """Reads one input line of batch prediction.

        Raises:
            DataError: the line is malformed.
        """

    @abc.abstractmethod
    def format(self, raw: Raw, answer: Answer) -> str:
        """Writes the answer for `raw` as a line of plain text, without the line end."""

    @abc.abstractmethod
    def metrics(self) -> dict[str, Metric]:
        """New, empty metrics by name."""

    @property
    def best_metric(self) -> str:
        """The result of an evaluation by which a model is chosen; by default the first metric."""
        return next(iter(self.metrics()))

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


def _texts(value: Any) -> Raw:
    """The raw example of a text, or of a tuple of two.

    Raises:
        DataError: it is neither.
    """
    texts = (value,) if isinstance(value, str) else value
    is_texts = isinstance(texts, tuple | list) and all(isinstance(text, str) for text in texts)
    if is_texts and 1 <= len(texts) <= 2:
        return dict(zip(("text_a", "text_b"), texts, strict=False))
    raise DataError(
        f"An input is {type(value).__name__}; expected a text, a tuple of two texts, or a dict such as "
        '{"text_a": "..."}.'
    )


P = TypeVar("P", bound=type[Processor])
_registered: dict[str, type[Processor]] = {}


def register_processor(cls: P) -> P:
    """Class decorator: makes a processor known by its `name` in this process.

    A class that is defined anew, as when a cell of a notebook runs again, takes the place of the one before.

    Raises:
        PropellerError: another class has this name.
    """
    other = _registered.get(cls.name, cls)
    if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise PropellerError(
            f"Two processors are called {cls.name!r}: {other.__module__}.{other.__qualname__} and "
            f"{cls.__module__}.{cls.__qualname__}. Name one of them otherwise."
        )
    _registered[cls.name] = cls
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


def windows_each(
    processor: Processor, raws: Sequence[Raw]
) -> list[list[dict[str, Any]] | PropellerError]:
    """Prepares a batch so that one bad example harms no neighbour: its place holds its error.

    What `windows` raises, or gives in place of one or more examples for each raw one, is such an error,
    see `as_answer`.
    """
    try:
        windows = list(processor.windows(raws))
        if len(windows) != len(raws) or not all(windows):
            raise PropellerError(
                f"The processor {processor.name!r} made {[*map(len, windows[:10])]} windows of {len(raws)} "
                "examples; expected one or more of each."
            )
        return [*windows]
    except Exception as error:
        problem = as_answer(error)
    if len(raws) <= 1:
        return [problem for _ in raws]
    half = len(raws) // 2  # one of them is bad
    return windows_each(processor, raws[:half]) + windows_each(processor, raws[half:])


def as_answer(error: Exception) -> PropellerError:
    """What an input gets as its answer, for which a task or a model raised this.

    An error of the project says what is wrong with the input. Any other names its type and text, and is
    logged, see `log_failure`.
    """
    if isinstance(error, PropellerError):
        return error
    log_failure(error)
    text = " ".join(str(error).split())
    shown = f"{type(error).__name__}: {text[-_SHOWN_CHARS:]}" if text else repr(error)
    answer = DataError(f"This input could not be answered ({shown}).")
    answer.__cause__ = error
    return answer


def log_failure(error: BaseException) -> None:
    """Logs the traceback of what is no error of the project, and so may be a bug.

    It does so once for each place in the code that an error comes from: of a million inputs all may meet it.
    """
    if isinstance(error, PropellerError):
        return
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    place = (type(error), *frames[-1:])
    if place not in _logged:
        _logged.add(place)
        log.error(
            "an input could not be answered; others that fail alike are not logged again", exc_info=error
        )

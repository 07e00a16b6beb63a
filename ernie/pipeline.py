"""One line for those who only want an answer.

    pipeline = Pipeline("output/best/inference")
    pipeline("a friendly place")                               # an answer
    pipeline(["a friendly place", ("first", "second")])        # a list of answers
    for answer in pipeline.stream(lines): ...                  # any number of them

For every task: the bundle names its processor, which training and server use as well, so that the answers are
the same. Paddle is loaded when a pipeline is made, not before.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from propeller.bundle import Bundle, read_bundle
from propeller.errors import DataError, PropellerError
from propeller.processor import Answer, Raw, as_answer

# A stream begins with so many inputs, and goes on with twice as many each time: the first answers come soon.
_FIRST_ROWS = 32


class Pipeline:
    """Answers inputs with an exported model. May be used by several threads, which take turns.

    An input is a text, a tuple of two texts, or a dict of what the task reads, such as
    `{"question": ..., "context": ...}`. For sequence labels a text is cut at blanks or, if train was in
    characters, into all its characters, blanks included: `tags[i]` is that of `text[i]`. Units of one's own
    are `{"units": [...]}`.

    Args:
        bundle: an exported model, or its folder.
        device: any device Paddle knows; None takes the best there is.
        bf16: compute in bfloat16 on a CPU.
        num_threads: threads for the math; None takes all cores that this process may use.

    Attributes:
        bundle: the exported model.
        processor: its task.

    Raises:
        ExportError: no bundle, a damaged one, one that cannot be run, or one without processor.
        ConfigError: the device cannot be used.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path,
        *,
        device: str | None = None,
        bf16: bool = False,
        num_threads: int | None = None,
    ):
        self.bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
        self.processor = self.bundle.processor()
        from propeller.paddle import stream
        from propeller.paddle.inference import Predictor
        from propeller.paddle.runtime import set_device

        where = set_device(device)
        predictor = Predictor(self.bundle, device=where, num_threads=num_threads, bf16=bf16)
        self._answer_all = functools.partial(stream.answer_all, predictor, self.processor)
        self._chunk_rows = stream.CHUNK_ROWS
        self._lock = threading.Lock()

    def __call__(self, inputs: Any, *, return_errors: bool = False) -> Any:
        """Answers one input, or a list of them.

        Args:
            inputs: an input, or a list (or another iterable, but no tuple) of inputs.
            return_errors: give an input's error as its answer, rather than raise the first one.

        Returns:
            The answer, a dict; of a list the answers, in order.

        Raises:
            DataError: an input that cannot be answered; of several its place is named.
        """
        if isinstance(inputs, str | tuple | Mapping):
            (answer,) = self._answers([inputs])
            if isinstance(answer, PropellerError) and not return_errors:
                raise DataError(str(answer)) from answer
            return answer
        return list(self._results(_several(inputs), self._chunk_rows, return_errors))

    def stream(
        self, inputs: Iterable[Any], *, return_errors: bool = False
    ) -> Iterator[Answer | PropellerError]:
        """Answers any number of inputs in order, in bounded memory.

        Args:
            inputs: read in chunks as their turn comes, of 32 at first, then of twice as many each time up to
                2048. Within a chunk inputs of like length are run together.
            return_errors: as for a call of the pipeline itself.

        Returns:
            An answer for each input.

        Raises:
            DataError: as for a call of the pipeline itself, after the answers to the inputs before.
        """
        return self._results(_several(inputs), _FIRST_ROWS, return_errors)

    def _results(
        self, inputs: Iterator[Any], size: int, return_errors: bool
    ) -> Iterator[Answer | PropellerError]:
        places = itertools.count()
        while chunk := list(itertools.islice(inputs, size)):
            for answer in self._answers(chunk):
                place = next(places)
                if isinstance(answer, PropellerError) and not return_errors:
                    raise DataError(f"inputs[{place}]: {answer}") from answer
                yield answer
            size = min(2 * size, self._chunk_rows)

    def _answers(self, values: list[Any]) -> list[Answer | PropellerError]:
        """An answer for each input, or the error in its place."""
        raws = [self._raw_of(value) for value in values]
        with self._lock:
            return self._answer_all(raws)

    def _raw_of(self, value: Any) -> Raw | PropellerError:
        try:
            return self.processor.raw_of(value)
        except Exception as error:
            return as_answer(error)


def _several(inputs: Any) -> Iterator[Any]:
    """The inputs, one after the other.

    Raises:
        DataError: it is one input, or none.
    """
    if isinstance(inputs, str | Mapping):
        raise DataError(f"Expected several inputs, got one {type(inputs).__name__}; write [input].")
    if isinstance(inputs, bytes) or not isinstance(inputs, Iterable):
        raise DataError(
            f"Expected inputs, got {type(inputs).__name__}; an input is a text, a tuple of two texts, or a "
            "dict."
        )
    return iter(inputs)

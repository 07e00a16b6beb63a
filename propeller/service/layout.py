"""Between the arrays of requests and those of batches: what a bundle takes and gives, row by row.

    arrays or raw examples -> Inputs -> rows of several requests, padded -> run -> rows of one request

A raw example is one row, or one for each of its windows, and then its answer is joined of theirs.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from propeller.bundle import Bundle
from propeller.data import pad_batch
from propeller.errors import BadRequest, DataError, ExportError, PropellerError, ServerError, ServiceError
from propeller.inputs import check_inputs, match_inputs, row_lengths
from propeller.processor import Answer, Processor, Raw, as_answer
from propeller.service.frames import Array
from propeller.service.wire import Request, WireArray

Example = Mapping[str, Any]


@dataclass(frozen=True)
class Windows:
    """What the answers of a request are joined with.

    Attributes:
        raws: its raw examples.
        examples: of each the windows that were made of it, in the order of the rows. What the model takes of
            them are views of the request's arrays.
        num_bytes: about what they hold besides these arrays.
    """

    raws: Sequence[Raw]
    examples: Sequence[Sequence[Example]]
    num_bytes: int


@dataclass(frozen=True)
class Inputs:
    """What a request asks the model to run.

    Attributes:
        arrays: the bundle's inputs by name, rows first.
        lengths: tokens of each row, trailing padding not counted; 1 where the model has no such axis.
        extras: columns of the processor that the model does not take; they come back with the outputs.
        windows: what answers are joined with; None where each row has its own.
    """

    arrays: Mapping[str, Array]
    lengths: list[int]
    extras: Mapping[str, Array] = field(default_factory=dict)
    windows: Windows | None = None

    @property
    def num_bytes(self) -> int:
        """About what it holds until it is answered."""
        arrays = sum(array.nbytes for array in self.arrays.values())
        return arrays if self.windows is None else arrays + self.windows.num_bytes


# Arrays of a request, places of its rows in a batch, and these rows.
Part = tuple[Mapping[str, Array], list[int], list[int]]


class Layout:
    """How the rows of requests become those of batches, and back.

    Args:
        name: what clients call the model, for messages.
        bundle: the export.
        max_rows: rows that raw examples may become.

    Attributes:
        processor: the bundle's, None if it has none.
        joins: whether the processor makes the answer to a raw example of the parts for its windows.
        axis: the axis whose size is a row's length in tokens: the second one of an input, where that varies;
            None if there is none.
        takes_padding: whether rows of unlike length can be run together.

    Raises:
        ExportError: the bundle's inputs and outputs do not all begin with rows, or its processor cannot be
            built.
    """

    def __init__(self, name: str, bundle: Bundle, max_rows: int = sys.maxsize):
        _check_axes(bundle)
        self._max_rows = max_rows
        self._name, self._inputs, self._outputs = name, bundle.inputs, bundle.outputs
        self._limits = bundle.axis_limits
        self.processor: Processor | None = bundle.processor() if bundle.metadata.get("processor") else None
        self.joins = self.processor is not None and type(self.processor).join is not Processor.join
        self.axis = next(
            (axis for spec in bundle.inputs for axis in spec.axes[1:2] if isinstance(axis, str)), None
        )
        self._measure = next((spec.name for spec in bundle.inputs if self.axis in spec.axes[1:2]), None)
        named = {axis for spec in bundle.inputs for axis in spec.axes}
        # What has an axis of its own could not be cut to a request's size again.
        self.takes_padding = bundle.ignores_padding and all(
            isinstance(axis, int) or axis in named for spec in bundle.outputs for axis in spec.axes
        )
        # Padding is cut where that cannot be seen.
        self._trims = self.takes_padding and not any(self.axis in spec.axes for spec in bundle.outputs)

    def check(self, request: Request) -> Inputs:
        """Checks the arrays of a request against the bundle.

        Raises:
            BadRequest: they are not what the model takes.
        """
        named = {array.name: array.values for array in request.arrays if array.name is not None}
        try:
            if not named:
                named = match_inputs(self._inputs, [array.values for array in request.arrays])
            arrays = check_inputs(self._inputs, named, self._limits)
        except DataError as error:
            raise BadRequest(str(error), request_id=request.id) from error
        rows = len(arrays[self._inputs[0].name])
        if self.axis is None or not self._trims:
            return Inputs(arrays, [max(1, self._width(arrays))] * rows)
        return Inputs(arrays, row_lengths(self._inputs, arrays, self.axis).tolist())

    def prepare(self, request: Request) -> Inputs:
        """Has the processor turn raw examples into arrays; safe to call from several threads.

        Raises:
            BadRequest: an example that cannot be used, or that the processor failed on; or a bundle without
                processor.
            ServerError: the processor made another number of windows than it may.
        """
        try:
            return self.prepare_all([request])[0]
        except ServiceError:
            raise
        except Exception as error:  # a processor is anybody's code
            raise BadRequest(str(as_answer(error)), request_id=request.id) from error

    def prepare_all(self, requests: Sequence[Request]) -> list[Inputs]:
        """As `prepare`, for several requests at once, which takes much less time.

        Raises:
            Exception: whatever is wrong with any of them; `prepare` says of each what it is.
        """
        if self.processor is None:
            raise BadRequest(
                f"The model {self._name!r} was exported without a processor: it takes arrays "
                f"({', '.join(spec.name for spec in self._inputs)}), not raws.",
                request_id=requests[0].id,
            )
        raws = [
            [_raw_of(self.processor, place, value) for place, value in enumerate(request.raws or ())]
            for request in requests
        ]
        made = iter(self._windows(self.processor, [raw for own in raws for raw in own]))
        windows = [[next(made) for _ in own] for own in raws]
        examples = [[example for each in own for example in each] for own in windows]
        for request, own, rows in zip(requests, windows, examples, strict=True):
            self._check_count(request, len(own), len(rows))
        arrays = self._padded(examples)
        return [self._inputs_of(*each) for each in zip(requests, raws, windows, arrays, strict=True)]

    def _windows(self, processor: Processor, raws: Sequence[Raw]) -> list[list[dict[str, Any]]]:
        """The windows of each example; of several the error names the one that is bad."""
        try:
            examples = processor.windows(raws)
        except Exception:
            for place, raw in enumerate(raws if len(raws) > 1 else ()):
                try:
                    processor.windows([raw])
                except Exception as problem:
                    raise DataError(f"raws[{place}]: {as_answer(problem)}") from problem
            raise
        counts = [len(windows) for windows in examples]
        if len(counts) != len(raws) or not all(counts) or (not self.joins and any(n > 1 for n in counts)):
            expected = "one or more of each" if self.joins else "one of each, since it defines no `join`"
            raise ServerError(
                f"the processor {processor.name!r} made {counts[:10]} windows of {len(raws)} examples; "
                f"expected {expected}"
            )
        return examples

    def _padded(self, examples: Sequence[Sequence[Example]]) -> list[dict[str, Array]]:
        """The arrays of several requests, checked; of each they are what they would be by themselves."""
        named = {spec.name: spec.pad_value for spec in self._inputs}
        rows = [{name: row[name] for name in named} for own in examples for row in own]
        if len(examples) > 1 and any(len({type(row[name]) for row in rows}) > 1 for name in named):
            raise DataError("numbers of several types, which each request has to make one of by itself")
        arrays = check_inputs(self._inputs, pad_batch(rows, pad_values=named), self._limits)
        if len(examples) == 1:
            return [arrays]
        ends = itertools.accumulate(map(len, examples))
        return [_cut(arrays, end - len(own), own) for own, end in zip(examples, ends, strict=True)]

    def _inputs_of(
        self,
        request: Request,
        raws: Sequence[Raw],
        windows: Sequence[Sequence[Example]],
        arrays: Mapping[str, Array],
    ) -> Inputs:
        """What a request asks to run, once its arrays are made."""
        examples = [example for each in windows for example in each]
        lengths = [1 if self._measure is None else len(row[self._measure]) for row in examples]
        if not self.joins or request.want == "arrays":
            extras = {
                name: np.asarray([row[name] for row in examples])
                for name, value in examples[0].items()
                if name not in arrays and np.ndim(value) == 0 and np.asarray(value).dtype.kind in "biuf"
                if all(name in row for row in examples)
            }
            return Inputs(arrays, lengths, extras)
        rows = itertools.count()
        kept = [[{**example, **_views(arrays, next(rows), example)} for example in own] for own in windows]
        rest = [value for example in examples for name, value in example.items() if name not in arrays]
        return Inputs(arrays, lengths, {}, Windows(raws, kept, _held_bytes(raws, rest)))

    def _check_count(self, request: Request, num_raws: int, num_rows: int) -> None:
        """Refuses examples that have too many windows, or several where there must be one."""
        problem = None
        if num_rows > self._max_rows:
            problem = (
                f"expected at most {self._max_rows}, which is all the queue takes. Send fewer at a time, or "
                "shorter ones."
            )
        elif num_rows > num_raws and request.want == "arrays":
            problem = (
                "the model's outputs would not be theirs row by row. Ask for answers, or send texts that "
                "make one row each."
            )
        if problem is not None:
            raise BadRequest(
                f"The {num_raws} examples make {num_rows} rows, as long ones are cut in windows: {problem}",
                request_id=request.id,
            )

    def join_answers(self, inputs: Inputs, parts: Sequence[Answer]) -> list[Answer]:
        """Has the processor make the answers to raw examples; for a thread, since that may take its time.

        Args:
            inputs: a request's, with windows.
            parts: what `finish` made of each of its rows.

        Returns:
            One for each raw example.

        Raises:
            ServerError: the processor failed on one of them.
        """
        if self.processor is None or inputs.windows is None:
            return list(parts)
        answers, start = [], 0
        pairs = zip(inputs.windows.raws, inputs.windows.examples, strict=True)
        for place, (raw, examples) in enumerate(pairs):
            own, start = parts[start : start + len(examples)], start + len(examples)
            try:
                answers.append(self.processor.join(raw, examples, own))
            except Exception as error:  # a processor is anybody's code
                text = str(error) if isinstance(error, PropellerError) else repr(error)
                raise ServerError(
                    f"the processor could not make the answer to raws[{place}] of its {len(examples)} parts: "
                    f"{text:.300}"
                ) from error
        return answers

    def pad(self, parts: Sequence[Part], num_rows: int, length: int) -> dict[str, Array]:
        """Puts rows of several requests into one batch, filled up with pad values.

        Args:
            parts: of each request its arrays, the places of its rows in the batch, and these rows.
            num_rows: of the batch.
            length: size of `axis`.
        """
        padded = {}
        for spec in self._inputs:
            arrays = [(part[spec.name], places, rows) for part, places, rows in parts]
            shape = [num_rows]
            for place, axis in enumerate(spec.axes[1:], start=1):
                longest = max(array.shape[place] for array, _, _ in arrays)
                shape.append(length if axis == self.axis else longest)
            target = np.full(shape, spec.pad_value, dtype=spec.dtype)
            for array, places, rows in arrays:
                _copy(array, rows, target, places)
            padded[spec.name] = target
        return padded

    def join(
        self, parts: Sequence[tuple[list[int], Mapping[str, Array]]], inputs: Inputs
    ) -> list[WireArray]:
        """Puts the outputs of a request together, with the columns that rode along.

        Args:
            parts: rows of the request, and the outputs for them.
            inputs: the request's. An output that varies as they do is as large as they are; what lies beyond
                the batch that a row was in is 0.
        """
        own = {
            axis: size
            for spec in self._inputs
            for axis, size in zip(spec.axes, inputs.arrays[spec.name].shape, strict=True)
        }
        joined = []
        num_rows = len(inputs.lengths)
        is_whole = parts[0][0] == list(range(num_rows))
        for spec in self._outputs:
            arrays = [(rows, outputs[spec.name]) for rows, outputs in parts]
            shape = [num_rows]
            for place, axis in enumerate(spec.axes[1:], start=1):
                shape.append(own.get(axis, max(array.shape[place] for _, array in arrays)))
            first = arrays[0][1]
            if is_whole and first.shape == tuple(shape) and first.dtype == spec.dtype:
                joined.append(WireArray(spec.name, first))
                continue
            target = np.zeros(shape, dtype=spec.dtype)
            for rows, array in arrays:
                _copy(array, slice(None), target, rows)
            joined.append(WireArray(spec.name, target))
        return [*joined, *(WireArray(name, values) for name, values in inputs.extras.items())]

    def _width(self, arrays: Mapping[str, Array]) -> int:
        """Size of `axis` in a request's arrays, 0 if there is none."""
        return 0 if self._measure is None else arrays[self._measure].shape[1]


def _raw_of(processor: Processor, place: int, value: Any) -> Raw:
    try:
        return processor.raw_of(value)
    except Exception as error:
        raise DataError(f"raws[{place}]: {as_answer(error)}") from error


def _cut(arrays: Mapping[str, Array], start: int, examples: Sequence[Example]) -> dict[str, Array]:
    """The rows of some examples, with no more padding than these need."""
    cut = {}
    for name, array in arrays.items():
        sizes = [max(each) for each in zip(*[np.shape(example[name]) for example in examples], strict=True)]
        place = (slice(start, start + len(examples)), *map(slice, sizes[: array.ndim - 1]))
        cut[name] = array[place].copy()  # so that none keeps the rows of the others alive
    return cut


def _copy(source: Array, from_rows: list[int] | slice, target: Array, to_rows: list[int]) -> None:
    """Copies rows, and of each what has room in both arrays."""
    inner = tuple(slice(min(sizes)) for sizes in zip(source.shape[1:], target.shape[1:], strict=True))
    here: tuple[Any, ...] = (from_rows, *inner)
    there: tuple[Any, ...] = (to_rows, *inner)
    target[there] = source[here]


def _check_axes(bundle: Bundle) -> None:
    rows = {spec.axes[:1] for spec in (*bundle.inputs, *bundle.outputs)}
    if len(rows) != 1 or not all(isinstance(axis, str) for axis in rows.pop() or (0,)):
        raise ExportError(
            f"{bundle.folder} cannot be served: its inputs and outputs must begin with the same axis of "
            "varying size, such as 'batch', so that rows of several requests can be run together."
        )
    varying = {axis for spec in bundle.inputs for axis in spec.axes[1:] if isinstance(axis, str)}
    second = {axis for spec in bundle.inputs for axis in spec.axes[1:2] if isinstance(axis, str)}
    if not bundle.ignores_padding and (len(varying) > 1 or varying != second):
        raise ExportError(
            f"{bundle.folder} cannot be served: its inputs vary along {', '.join(sorted(varying))}, and "
            "padding changes its outputs, so that no two requests could be run together. Have the model mask "
            "what is padding, and export it again."
        )


def _views(arrays: Mapping[str, Array], row: int, example: Example) -> dict[str, Array]:
    """What the model takes of an example, out of the padded arrays, so that it is not held twice."""
    return {
        name: array[row][tuple(slice(size) for size in np.shape(example[name]))]
        for name, array in arrays.items()
    }


def _held_bytes(*values: Any) -> int:
    """About what nested lists, texts, numbers and arrays hold; what is there twice counts once."""
    size, waiting, seen = 0, list(values), set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        size += value.nbytes if isinstance(value, np.ndarray) else sys.getsizeof(value)
        if isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            waiting += value
    return size

"""What a client is asked for, as requests of moderate size, and their replies put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from propeller.errors import BadRequest, ServerError
from propeller.service.frames import Array, to_json
from propeller.service.wire import Reply, Request, WireArray

# With its header a part is below the lowest limit that a server can be given, of 1 MiB: a server hangs up on
# what is larger. A single row may be.
_MAX_ARRAY_BYTES = (1 << 20) - (64 << 10)
_MAX_JSON_BYTES = 512 << 10

# The id is given when it is sent.
_NO_ID = "-"


@dataclasses.dataclass(frozen=True)
class Part:
    """One request of a task, and how many rows its reply must have; None where rows mean nothing."""

    request: Request
    rows: int | None


@dataclasses.dataclass(frozen=True)
class Task:
    """What one call of a client asks for.

    Attributes:
        parts: its requests, made as they are needed.
        join: makes the result of all replies, in order.
    """

    parts: Iterator[Part]
    join: Callable[[Sequence[Reply]], Any]


def of_arrays(arrays: Sequence[Any], model: str | None, max_rows: int) -> Task:
    """Arrays by their place -> a list of arrays.

    Raises:
        BadRequest: they are no arrays of equally many rows.
    """
    if not arrays:
        raise BadRequest("There are no arrays to predict from; give one for each input of the bundle.")
    wired = [WireArray(None, _array(place, values)) for place, values in enumerate(arrays)]
    return Task(_slices(wired, model, max_rows), lambda replies: [values for _, values in _joined(replies)])


def of_named(arrays: Mapping[str, Any], model: str | None, max_rows: int) -> Task:
    """Arrays by name -> arrays by name.

    Raises:
        BadRequest: they are no arrays of equally many rows.
    """
    if not isinstance(arrays, Mapping):
        raise BadRequest(f"Expected arrays by name, got {type(arrays).__name__}.")
    if not arrays:
        raise BadRequest("There are no arrays to predict from; give one for each input of the bundle.")
    wired = [WireArray(name, _array(name, values)) for name, values in arrays.items()]
    return Task(_slices(wired, model, max_rows), _by_name)


def of_answers(raws: Sequence[Any], model: str | None, max_rows: int) -> Task:
    """Raw examples -> a list of what the bundle's processor answers.

    Raises:
        BadRequest: they are no list of examples.
    """
    return Task(_raw_parts(_examples(raws), model, max_rows, "answers"), _answers)


def of_outputs(raws: Sequence[Any], model: str | None, max_rows: int) -> Task:
    """Raw examples -> the model's outputs for them by name.

    Raises:
        BadRequest: they are no list of examples.
    """
    return Task(_raw_parts(_examples(raws), model, max_rows, "arrays"), _by_name)


def of_question(kind: str, model: str | None) -> Task:
    """`spec` or `ping` -> its result."""
    return Task(iter([Part(Request(_NO_ID, kind, model), None)]), _result)


def mismatch(reply: Reply, part: Part) -> ServerError | None:
    """Returns what is wrong with a reply whose rows are not the request's."""
    found = [(f"output {name!r}", values.shape[:1]) for name, values in reply.arrays]
    if reply.answers is not None:
        found.append(("the answers", (len(reply.answers),)))
    for what, rows in found:
        if part.rows is not None and rows != (part.rows,):
            return ServerError(
                f"The server gave {what} with {rows[0] if rows else 'no'} rows for {part.rows} of input.",
                request_id=reply.id,
            )
    return None


def _array(name: int | str, values: Any) -> Array:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise BadRequest(f"Array {name!r} is no array: {error}. All its rows must have one shape.") from error
    if array.ndim == 0:
        raise BadRequest(f"Array {name!r} is a single {array.dtype}; expected an array, rows first.")
    return array


def _slices(arrays: Sequence[WireArray], model: str | None, max_rows: int) -> Iterator[Part]:
    counts = [len(values) for _, values in arrays]
    rows = counts[0]
    if len(set(counts)) > 1:
        raise BadRequest(f"All arrays must have the same number of rows, got {counts}.")
    if rows == 0:
        raise BadRequest("The arrays have zero rows: there is nothing to predict.")
    row_bytes = max(1, sum(values.nbytes for _, values in arrays) // rows)
    step = max(1, min(max_rows, _MAX_ARRAY_BYTES // row_bytes))

    def parts() -> Iterator[Part]:
        for start in range(0, rows, step):
            cut = tuple(WireArray(name, values[start : start + step]) for name, values in arrays)
            yield Part(Request(_NO_ID, model=model, arrays=cut), min(step, rows - start))

    return parts()


def _examples(raws: Sequence[Any]) -> list[Any]:
    if isinstance(raws, str | Mapping):
        raise BadRequest(f"Expected a list of examples, got one {type(raws).__name__}; write [example].")
    examples = [_example(place, raw) for place, raw in enumerate(raws)]
    if not examples:
        raise BadRequest("The list of examples is empty: there is nothing to predict.")
    return examples


def _example(place: int, raw: Any) -> Any:
    texts = raw if isinstance(raw, tuple | list) else ()
    if isinstance(raw, Mapping | str) or (texts and all(isinstance(text, str) for text in texts)):
        return raw
    raise BadRequest(
        f"Example {place} is {type(raw).__name__}; expected a text, a tuple of two texts, or a dict such as "
        '{"text_a": "..."}.'
    )


def _raw_parts(
    examples: Sequence[Any], model: str | None, max_rows: int, want: str
) -> Iterator[Part]:
    """Cuts before the part has too many examples, or too much JSON; one example is never cut."""
    part: list[Any] = []
    size = 0
    for place, example in enumerate(examples):
        try:
            num_bytes = len(to_json(example))
        except (TypeError, ValueError, RecursionError) as error:
            raise BadRequest(f"Example {place} cannot be sent as JSON: {error}.") from error
        if part and (len(part) == max_rows or size + num_bytes > _MAX_JSON_BYTES):
            yield Part(Request(_NO_ID, model=model, raws=part, want=want), len(part))
            part, size = [], 0
        part.append(example)
        size += num_bytes
    yield Part(Request(_NO_ID, model=model, raws=part, want=want), len(part))


def _joined(replies: Sequence[Reply]) -> list[tuple[str | None, Array]]:
    """The arrays of all replies, row after row, writable.

    Raises:
        ServerError: the replies do not fit together.
    """
    names = [name for name, _ in replies[0].arrays]
    if not names or any([name for name, _ in reply.arrays] != names for reply in replies):
        raise ServerError(f"The server gave no arrays, or others for some rows; the first were {names}.")
    columns = zip(*([values for _, values in reply.arrays] for reply in replies), strict=True)
    return [(name, _stacked(name, column)) for name, column in zip(names, columns, strict=True)]


def _stacked(name: str | None, arrays: Sequence[Array]) -> Array:
    """Rows of arrays that may differ in their second axis: the shorter ones end in zeros."""
    first = arrays[0]
    if len(arrays) == 1:
        return np.array(first)
    kinds = {(array.dtype, array.ndim, array.shape[2:]) for array in arrays}
    if len(kinds) > 1:
        shapes = sorted({f"{array.dtype} {list(array.shape)}" for array in arrays})
        raise ServerError(f"Output {name!r} has parts that do not fit together: {', '.join(shapes)}.")
    if len({array.shape[1:] for array in arrays}) == 1:
        return np.concatenate(arrays)
    width = max(array.shape[1] for array in arrays)
    joined = np.zeros((sum(map(len, arrays)), width, *first.shape[2:]), first.dtype)
    start = 0
    for array in arrays:
        joined[start : start + len(array), : array.shape[1]] = array
        start += len(array)
    return joined


def _by_name(replies: Sequence[Reply]) -> dict[str, Array]:
    return {name or str(place): values for place, (name, values) in enumerate(_joined(replies))}


def _answers(replies: Sequence[Reply]) -> list[Any]:
    for reply in replies:
        if reply.answers is None:
            raise ServerError("The server gave no answers to raw examples.", request_id=reply.id)
    return [answer for reply in replies for answer in reply.answers or ()]


def _result(replies: Sequence[Reply]) -> dict[str, Any]:
    if replies[0].result is None:
        raise ServerError("The server gave no result.", request_id=replies[0].id)
    return dict(replies[0].result)

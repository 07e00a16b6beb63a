"""A message as frames: a JSON header, one raw frame for each array, perhaps a JSON body.

    header   {"v": 1, "id": "...", "arrays": [array, ...], "body": text | null, and what the message adds}
    array    {"name": text | null, "dtype": "int64", "shape": [8, 128]}

The frame of an array holds its values in C order, little endian; they come in the order of `arrays`, the body
last. The body is a frame of its own so that the header stays small, and with it what an unknown sender can
make the server parse before it knows whom to answer.

Nothing is pickled or evaluated. All sizes are checked before an array is made, and arrays are views of their
frames.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from propeller.errors import ConfigError, ServiceError, did_you_mean

VERSION = 1

_DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    )
}
# By dtype, of either byte order: numpy makes the name anew, in Python, each time that it is asked for.
_NAMES = {either: name for name, dtype in _DTYPES.items() for either in (dtype, dtype.newbyteorder())}
_ARRAY_KEYS = ("name", "dtype", "shape")
_MAX_NAME = 64
# An integer of 64 bits has no more, and none is so long that reading it takes noticeable time.
_MAX_DIGITS = 20
# Real examples and answers have a few levels. What is no deeper can be walked and written again safely.
_MAX_DEPTH = 32
_MIN_HEADER_BYTES = 1 << 14
_NUMPY_MAX_NDIM = 32

Array: TypeAlias = npt.NDArray[Any]
Frame = bytes | memoryview


@dataclasses.dataclass(frozen=True)
class Limits:
    """How large a message may be. What is larger is refused before it takes memory.

    Attributes:
        max_message_bytes: all frames of a message together.
        max_header_bytes: the header.
        max_body_bytes: the body. JSON can take 30 times as much while it is parsed.
        max_arrays: arrays in a message.
        max_ndim: axes of an array.
        max_rows: size of the first axis of an array, and number of raw examples or answers.

    Raises:
        ConfigError: a limit too low for any message, or beyond what numpy can hold.
    """

    max_message_bytes: int = 64 << 20
    max_header_bytes: int = 64 << 10
    max_body_bytes: int = 1 << 20
    max_arrays: int = 16
    max_ndim: int = 8
    max_rows: int = 1 << 16

    def __post_init__(self) -> None:
        lowest = {"max_header_bytes": _MIN_HEADER_BYTES, "max_message_bytes": _MIN_HEADER_BYTES}
        for field in dataclasses.fields(self):
            value, at_least = getattr(self, field.name), lowest.get(field.name, 1)
            if type(value) is not int or value < at_least:
                raise ConfigError(
                    f"Limits.{field.name} must be a whole number of at least {at_least}, got {value!r}."
                )
        if self.max_ndim > _NUMPY_MAX_NDIM:
            raise ConfigError(f"Limits.max_ndim must be at most {_NUMPY_MAX_NDIM}, got {self.max_ndim}.")


class WireArray(NamedTuple):
    """One array of a message; `name` is None where its place says what it is."""

    name: str | None
    values: Array


def to_frames(
    header: dict[str, Any],
    arrays: Sequence[WireArray],
    body: tuple[str, Any] | None,
    error: type[ServiceError],
) -> list[Frame]:
    """Makes the frames of a message; arrays that are contiguous and little endian are not copied.

    Args:
        header: what the kind of message adds to the header; it has an `id`.
        arrays: rows first.
        body: what the body is called, and its content.
        error: what to raise.

    Raises:
        ServiceError: an `error`: an array's dtype is not one that is sent, or the body is not JSON, which
            NaN and infinity are not.
    """
    described, frames = [], []
    for place, (name, values) in enumerate(arrays):
        array = np.asarray(values)
        dtype_name = _NAMES.get(array.dtype)
        if dtype_name is None:
            raise error(
                f"Array {place if name is None else repr(name)} is {array.dtype}; expected one of "
                f"{', '.join(_DTYPES)}.",
                request_id=header["id"],
            )
        described.append({"name": name, "dtype": dtype_name, "shape": list(array.shape)})
        # As bytes by way of numpy: a memoryview cannot be cast where a size is 0.
        fitting = np.asarray(array, dtype=_DTYPES[dtype_name], order="C")
        frames.append(fitting.reshape(-1).view(np.uint8).data)
    parts = {"header": {"v": VERSION, **header, "arrays": described, "body": body[0] if body else None}}
    if body is not None:
        parts[body[0]] = body[1]
    written: list[Frame] = []
    for what, content in parts.items():
        try:
            written.append(to_json(content))
        except (TypeError, ValueError, RecursionError) as problem:
            text = f"The {what} cannot be sent as JSON: {problem}."
            raise error(text, request_id=header["id"]) from problem
    return [written[0], *frames, *written[1:]]


def to_json(value: Any) -> bytes:
    """Writes compact JSON, in UTF-8.

    Raises:
        TypeError: something that JSON does not have.
        ValueError: NaN or infinity, or a value that holds itself.
        RecursionError: it is nested too deep.
    """
    try:
        return _ENCODER.encode(value).encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can stand for
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


class MessageReader:
    """Reads and checks a message that may come from anybody.

    Args:
        frames: all frames, without the sender's address.
        limits: how large it may be.
        error: what to raise; its `request_id` is set once the id could be read.

    Attributes:
        id: the request's.
        header: the header; only `id` and `v` are checked so far.

    Raises:
        ServiceError: an `error`: too large, no header, or of another version. So do all methods.
    """

    id: str
    header: dict[str, Any]

    def __init__(self, frames: Sequence[Frame], limits: Limits, error: type[ServiceError]):
        self._limits, self._error = limits, error
        self._known_id: str | None = None
        if not frames:
            self.fail("The message has no frames; expected a header.")
        self._frames = [memoryview(frame) for frame in frames]
        header = self._parsed(self._frames[0], "header", limits.max_header_bytes)
        if not isinstance(header, dict):
            self.fail(f"The header must be a JSON object, got {shown(header)}.")
        self.header = header
        self._identify()
        total = sum(frame.nbytes for frame in self._frames)
        if total > limits.max_message_bytes:
            self.fail(
                f"The message has {total} bytes; at most {limits.max_message_bytes} are taken. "
                "Send fewer rows at a time."
            )

    def fail(self, problem: str) -> NoReturn:
        """Raises the reader's error."""
        raise self._error(problem, request_id=self._known_id)

    def _identify(self) -> None:
        """Reads the id first, so that all other errors can be addressed, then the version."""
        given = self.header.get("id")
        if (
            isinstance(given, str)
            and 1 <= len(given) <= _MAX_NAME
            and given.isascii()
            and given.isprintable()
        ):
            self.id = self._known_id = given
        version = self.header.get("v")
        if type(version) is not int or version != VERSION:
            self.fail(
                f"The message speaks protocol version {shown(version)}, this side speaks {VERSION}. "
                "Install the same release of ernie-propeller on both sides."
            )
        if self._known_id is None:
            self.fail(f"id must be 1 to {_MAX_NAME} printable ASCII characters, got {shown(given)}.")

    def _parsed(self, frame: memoryview, what: str, max_bytes: int) -> Any:
        if frame.nbytes > max_bytes:
            given = "examples of a request have" if what == "raws" else f"{what} frame has"
            self.fail(f"The {given} {frame.nbytes} bytes; at most {max_bytes} are taken.")
        try:
            return _DECODER.decode(str(frame, "utf-8"))
        except RecursionError:
            self.fail(f"The {what} frame is nested too deep.")
        except ValueError as error:
            self.fail(f"The {what} frame is not JSON in UTF-8: {error}.")

    def only(self, values: dict[str, Any], known: Sequence[str], where: str) -> None:
        """Refuses keys that are not known: a misspelt `deadline_ms` must not mean none."""
        for key in values:
            if key not in known:
                near = did_you_mean(key[:_MAX_NAME], known)
                self.fail(f"Unknown key {shown(key)} in {where}.{near} Known keys: {', '.join(known)}.")

    def text(self, where: str, value: Any) -> str:
        """Checks a short name."""
        if isinstance(value, str) and 1 <= len(value) <= _MAX_NAME and value.isprintable():
            return value
        self.fail(f"{where} must be 1 to {_MAX_NAME} printable characters, got {shown(value)}.")

    def text_or_none(self, where: str, value: Any) -> str | None:
        """Checks a short name that may be missing."""
        return None if value is None else self.text(where, value)

    def one_of(self, where: str, value: str, known: Sequence[str]) -> str:
        """Checks a name that is one of a few."""
        if value not in known:
            near = did_you_mean(value, known)
            self.fail(f"Unknown {where} {value!r}; expected one of {', '.join(known)}.{near}")
        return value

    def number_or_none(self, where: str, value: Any) -> float | None:
        """Checks a number that may be missing; it is finite, for the parser lets no other through."""
        if value is None:
            return None
        if type(value) not in (int, float):
            self.fail(f"{where} must be a number or null, got {shown(value)}.")
        return float(value)

    def payload(self, bodies: Mapping[str, type]) -> tuple[tuple[WireArray, ...], str | None, Any]:
        """Reads everything after the header.

        Args:
            bodies: what the body may be called, and whether it then is a `list` or a `dict`.

        Returns:
            The arrays, read-only views of their frames; what the body is called, and its content (None and
            None where there is none).
        """
        entries = self.header.get("arrays", [])
        if not isinstance(entries, list):
            self.fail(f"arrays must be a JSON list, got {shown(entries)}.")
        what = self.text_or_none("body", self.header.get("body"))
        if what is not None and what not in bodies:
            self.fail(f"Unknown body {what!r}; expected {' or '.join(bodies) or 'none'}.")
        expected = 1 + len(entries) + (what is not None)
        if len(self._frames) != expected:
            self.fail(
                f"The message has {len(self._frames)} frames, but its header announces {expected}: itself, "
                f"{len(entries)} arrays, {'a' if what else 'no'} body."
            )
        if len(entries) > self._limits.max_arrays:
            self.fail(f"The message has {len(entries)} arrays; at most {self._limits.max_arrays} are taken.")
        arrays = tuple(
            self._array(place, entry, self._frames[1 + place]) for place, entry in enumerate(entries)
        )
        names = [name for name, _ in arrays if name is not None]
        if len(names) not in (0, len(arrays)):
            self.fail(f"Either all arrays have a name or none; got {len(names)} of {len(arrays)}.")
        if len(set(names)) != len(names):
            self.fail(f"Two arrays are called {next(name for name in names if names.count(name) > 1)!r}.")
        return arrays, what, self._body(what, bodies[what]) if what else None

    def _array(self, place: int, entry: Any, frame: memoryview) -> WireArray:
        where = f"arrays[{place}]"
        if not isinstance(entry, dict):
            self.fail(f"{where} must be a JSON object, got {shown(entry)}.")
        self.only(entry, _ARRAY_KEYS, where)
        name = self.text_or_none(f"{where}.name", entry.get("name"))
        where += f" ({name})" if name else ""
        given = entry.get("dtype")
        dtype = _DTYPES.get(given) if isinstance(given, str) else None
        if dtype is None:
            self.fail(f"{where} has the dtype {shown(given)}; expected one of {', '.join(_DTYPES)}.")
        shape = self._shape(where, entry.get("shape"))
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes != frame.nbytes:
            self.fail(
                f"{where} is {given} of the shape {list(shape)}, which takes {num_bytes} bytes, but its "
                f"frame has {frame.nbytes}."
            )
        # Beside a size of 0 the others can be anything, and numpy multiplies them all the same.
        if math.prod(max(1, size) for size in shape) > self._limits.max_message_bytes:
            self.fail(f"{where} has the shape {list(shape)}, which is beyond the limits of a message.")
        values: Array = np.ndarray(shape, dtype, buffer=frame)
        if given == "bool" and values.view(np.uint8).max(initial=0) > 1:
            self.fail(f"{where} is bool, but holds bytes other than 0 and 1.")
        values.setflags(write=False)
        return WireArray(name, values)

    def _shape(self, where: str, shape: Any) -> tuple[int, ...]:
        if not isinstance(shape, list):
            self.fail(f"{where} has the shape {shown(shape)}; expected a list of whole numbers from 0 on.")
        for size in shape:
            if type(size) is not int or size < 0:
                self.fail(f"{where} has {shown(size)} in its shape; expected whole numbers from 0 on.")
        if len(shape) > self._limits.max_ndim:
            self.fail(f"{where} has {len(shape)} axes; at most {self._limits.max_ndim} are taken.")
        if shape:
            self._check_rows(where, shape[0])
        return tuple(shape)

    def _check_rows(self, where: str, rows: int) -> None:
        if rows > self._limits.max_rows:
            self.fail(f"{where} has {rows} rows; at most {self._limits.max_rows} are taken at a time.")

    def _body(self, what: str, expected: type) -> Any:
        body = self._parsed(self._frames[-1], what, self._limits.max_body_bytes)
        if not isinstance(body, expected):
            called = "list" if expected is list else "object"
            self.fail(f"{what} must be a JSON {called}, got {shown(body)}.")
        if isinstance(body, list):
            self._check_rows(what, len(body))
        if _is_deeper(body, _MAX_DEPTH):
            self.fail(f"{what} is nested more than {_MAX_DEPTH} levels deep.")
        return body


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether a parsed JSON value has more than so many levels of lists and objects."""
    level = [value]
    for _ in range(limit):
        if not level:
            return False
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, list | dict)
        ]
    return bool(level)


def shown(value: Any) -> str:
    """A parsed JSON value for a message: short, and never walked into, however deep it is."""
    if isinstance(value, list | dict):
        return f"a JSON {'list' if isinstance(value, list) else 'object'} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= _MAX_NAME else f"{text[:_MAX_NAME]}..."


def _refused(text: str) -> NoReturn:
    raise ValueError(f"it holds {text}, which is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"it holds {text[:_MAX_DIGITS]}, which is beyond the range of a double")
    return value


def _moderate(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"it holds an integer of {len(text)} digits; at most {_MAX_DIGITS} are taken")
    return int(text)


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_DECODER = json.JSONDecoder(parse_constant=_refused, parse_float=_finite, parse_int=_moderate)

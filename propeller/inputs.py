"""What a bundle's inputs must be, checked before the model sees them. No Paddle: the server asks too.

A model that is given what it was not made for can answer nonsense (an id of -1 reads what lies before the
table) or end the process (an id beyond it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from propeller.bundle import ArraySpec
from propeller.errors import DataError, did_you_mean


def match_inputs(specs: Sequence[ArraySpec], values: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Names arrays that came without names, by their place.

    Raises:
        DataError: there are not as many arrays as inputs.
    """
    if len(values) != len(specs):
        raise DataError(f"Got {len(values)} arrays without names; expected {len(specs)}: {_wanted(specs)}.")
    return {spec.name: value for spec, value in zip(specs, values, strict=True)}


def check_inputs(
    specs: Sequence[ArraySpec], arrays: Mapping[str, np.ndarray], axis_limits: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Checks a batch and makes it what the model takes.

    A trailing axis of size 1 that the spec does not have is dropped, since older clients send
    `[rows, seq_len, 1]`. Types are cast where the values stay what they are: bools to numbers, integers to
    other integers and to floats, and floats that are all whole to integers, since older clients send a float
    mask. A float may be rounded to a narrower one, but must stay finite.

    Args:
        specs: the bundle's inputs.
        arrays: the batch by name.
        axis_limits: the longest that named axes may be.

    Returns:
        Every input by name, in the order of the specs: of the spec's dtype, C-contiguous, copied only
        where it was not so before.

    Raises:
        DataError: an input is missing or unknown, has a wrong rank, type or size or is too long, holds an
            id beyond the spec's `max_value`, or there are no rows.
    """
    _check_names(specs, arrays)
    shaped = {spec.name: _shaped(spec, arrays[spec.name]) for spec in specs}
    _check_sizes(specs, shaped, axis_limits)
    fitting = {spec.name: np.ascontiguousarray(_cast(spec, shaped[spec.name])) for spec in specs}
    for spec in specs:
        if spec.max_value is not None:
            _check_ids(spec.name, fitting[spec.name], spec.max_value)
    return fitting


def row_lengths(specs: Sequence[ArraySpec], arrays: Mapping[str, np.ndarray], axis: str) -> np.ndarray:
    """Finds how much of each row is more than padding at its end.

    Args:
        specs: the bundle's inputs; those with `axis` as their second axis count.
        arrays: a checked batch by name.
        axis: the axis that is padded, such as `seq_len`.

    Returns:
        int64 `[rows]`: 1 + the last position along `axis` at which any of these inputs differs from its pad
        value; 1 where none does.
    """
    used: np.ndarray | None = None  # bool [rows, size of the axis]
    for spec in specs:
        if spec.axes[1:2] == (axis,):
            differs = arrays[spec.name] != spec.pad_value
            if differs.ndim > 2:
                differs = differs.any(axis=tuple(range(2, differs.ndim)))
            used = differs if used is None else used | differs
    if used is None:
        return np.ones(len(arrays[specs[0].name]), np.int64)
    # argmax finds the first True from the end, and 0 where there is none: there it would be the whole row.
    from_end = used[:, ::-1].argmax(axis=1)
    return np.where(used.any(axis=1), used.shape[1] - from_end, 1).astype(np.int64, copy=False)


def _wanted(specs: Sequence[ArraySpec]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {_axes(spec)}" for spec in specs)


def _axes(spec: ArraySpec) -> str:
    return f"[{', '.join(map(str, spec.axes))}]"


def _check_names(specs: Sequence[ArraySpec], arrays: Mapping[str, np.ndarray]) -> None:
    names = {spec.name for spec in specs}
    if arrays.keys() == names:
        return
    # The unknown first: it tells what the missing one was called.
    for name in arrays:
        if name not in names:
            raise DataError(
                f"There is no input {name!r}.{did_you_mean(name, names)} Expected {_wanted(specs)}."
            )
    missing = ", ".join(repr(spec.name) for spec in specs if spec.name not in arrays)
    raise DataError(f"Input {missing} is missing; got {sorted(arrays)}. Expected {_wanted(specs)}.")


def _shaped(spec: ArraySpec, values: np.ndarray) -> np.ndarray:
    """The values as an array with the spec's number of axes."""
    try:
        array = np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise DataError(
            f"Input {spec.name!r} is no array: {error}. Expected {spec.dtype} {_axes(spec)}."
        ) from error
    rank = len(spec.axes)
    if array.ndim == rank + 1 and array.shape[-1] == 1:
        return array[..., 0]
    if array.ndim != rank:
        raise DataError(
            f"Input {spec.name!r} must have the {rank} axes {_axes(spec)}, got the shape {array.shape}."
        )
    return array


def _check_sizes(
    specs: Sequence[ArraySpec], arrays: Mapping[str, np.ndarray], axis_limits: Mapping[str, int]
) -> None:
    """Compares the sizes of all axes with the specs, with one another and with the limits."""
    if not len(arrays[specs[0].name]):
        raise DataError("The batch has no rows; expected at least one.")
    sizes: dict[str, tuple[int, str]] = {}
    for spec in specs:
        shape = arrays[spec.name].shape
        for axis, size in zip(spec.axes, shape, strict=True):
            if isinstance(axis, int):
                expected, why = axis, "is fixed at"
            else:
                expected, other = sizes.setdefault(axis, (size, spec.name))
                why = f"in {other!r} has"
            if size != expected:
                raise DataError(
                    f"Input {spec.name!r} has the shape {shape} for the axes {_axes(spec)}, "
                    f"but axis {axis!r} {why} {expected}."
                )
    for axis, (size, name) in sizes.items():
        if not size:
            raise DataError(f"Axis {axis!r} of {name!r} has the size 0; expected at least 1.")
        if size > axis_limits.get(axis, size):
            raise DataError(
                f"Input {name!r} is too long: axis {axis!r} has {size}; expected at most {axis_limits[axis]}."
            )


def _cast(spec: ArraySpec, array: np.ndarray) -> np.ndarray:
    """The array in the spec's dtype; see `check_inputs` for what may become what."""
    given, wanted = array.dtype, np.dtype(spec.dtype)
    if given == wanted:
        return array
    if given.kind not in "biuf" or (wanted.kind == "b" and given.kind != "b"):
        raise DataError(f"Input {spec.name!r} must be {spec.dtype}, got {given}.")
    if np.can_cast(given, wanted):
        return array.astype(wanted)
    if wanted.kind in "iu":
        limits = np.iinfo(wanted)
        for value in (array.min(), array.max()):  # NaN, if there is any
            # As Python's integers, which compare exactly whatever the types are.
            if not (np.isfinite(value) and limits.min <= int(value) <= limits.max):
                raise _unfit(spec, given, value)
    with np.errstate(over="ignore"):
        fitting = array.astype(wanted)
    if given.kind == "f" and wanted.kind == "f":
        lost = np.isfinite(array) & ~np.isfinite(fitting)
    else:
        lost = fitting != array
    if lost.any():
        raise _unfit(spec, given, array[lost][0])
    return fitting


def _unfit(spec: ArraySpec, given: np.dtype, value: np.generic) -> DataError:
    return DataError(
        f"Input {spec.name!r} must be {spec.dtype}, got {given} with {value.item()!r}, which {spec.dtype} "
        "cannot hold."
    )


def _check_ids(name: str, ids: np.ndarray, max_value: int) -> None:
    # Seen as unsigned, a negative id is larger than all others: one pass finds both kinds.
    unsigned = ids.view(f"u{ids.itemsize}")
    if int(unsigned.max()) > max_value:
        place = tuple(np.argwhere(unsigned > max_value)[0])
        raise DataError(
            f"Input {name!r} holds the id {ids[place].item()} in row {place[0]}; expected 0 to {max_value}."
        )

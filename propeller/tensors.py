"""Safetensors files as numpy arrays, bfloat16 among them, which numpy does not have. No Paddle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open

from propeller.errors import CheckpointError


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) -> the same values as float32: it is the upper half of one."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def each_tensor(path: str | Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Reads a safetensors file one tensor after the other, by name.

    Yields:
        Name, type as stored (`F32`, `BF16`), and values: bfloat16 as float32, others as they are.

    Raises:
        CheckpointError: the file cannot be read, or holds a type that numpy does not have.
    """
    path = Path(path)
    try:
        with safe_open(str(path), framework="numpy") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in sorted(file.keys())}
            raw = dict(deserialize(path.read_bytes())) if "BF16" in dtypes.values() else {}
            for name, dtype in dtypes.items():
                if dtype == "BF16":
                    bits = np.frombuffer(raw[name]["data"], "<u2")
                    yield name, dtype, widen_bfloat16(bits).reshape(raw[name]["shape"])
                else:
                    yield name, dtype, file.get_tensor(name)
    except (OSError, SafetensorError, TypeError, AttributeError) as error:  # the latter: no such dtype
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Reads all tensors of a file by name; see `each_tensor`."""
    return {name: array for name, _, array in each_tensor(path)}

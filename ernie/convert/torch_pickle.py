"""`pytorch_model.bin` without PyTorch and without running anything.

Source: the zip format of `torch.save` since PyTorch 1.6: a folder in an uncompressed zip archive with
    `data.pkl`, whose tensors refer to the records `data/<key>`, the raw elements of one storage each.
"""

from __future__ import annotations

import collections
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ernie.convert.unpickle import safe_load
from propeller.errors import CheckpointError
from propeller.tensors import widen_bfloat16

# Storage class -> element type; bfloat16 has none in numpy and is widened when it is read.
_STORAGES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


def read_torch_file(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a state dict written by `torch.save`.

    Args:
        path: such as `pytorch_model.bin`.

    Returns:
        The tensors by name; bfloat16 as float32, other types as they are.

    Raises:
        CheckpointError: the file is not of that format, is damaged, names anything but tensors, or
            holds something else than a flat dictionary of tensors.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            content = _TorchArchive(archive).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a zip file of PyTorch 1.6 or later ({error}). If an older PyTorch "
            "wrote it, load it there and save it again; if not, it may be damaged."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(x, np.ndarray) for x in content.values()):
        raise CheckpointError(
            f"{path} is not a flat dictionary of tensors, as `torch.save(model.state_dict(), path)` writes."
        )
    return dict(content)


class _TorchArchive:
    """One archive. What its pickle may call are methods of this object, so no file can alter the next."""

    def __init__(self, archive: zipfile.ZipFile):
        self._archive = archive
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError("A zip file, but not one that torch.save wrote: it has no data.pkl.")
        self._folder = pickles[0].removesuffix("data.pkl")
        self._storages: dict[str, np.ndarray] = {}
        has_order = self._folder + "byteorder" in archive.namelist()
        self._big_endian = has_order and self._read("byteorder") == b"big"

    def load(self) -> Any:
        allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
        }
        allowed |= {("torch", name): kind for name, kind in _STORAGES.items()}
        return safe_load(io.BytesIO(self._read("data.pkl")), allowed, self._storage)

    def _read(self, record: str) -> bytes:
        try:
            info = self._archive.getinfo(self._folder + record)
        except KeyError:
            raise CheckpointError(f"The file refers to {record}, which it does not hold.") from None
        if info.compress_type != zipfile.ZIP_STORED:
            # torch.save never compresses; a small file that unpacks to a huge one is no model.
            raise CheckpointError(f"{record} is compressed, which torch.save does not do.")
        return self._archive.read(info)

    def _storage(self, reference: Any) -> np.ndarray:
        """`("storage", element type, key, device, number of elements)` -> all its elements `[n]`."""
        _, kind, key, _, size = reference
        if key not in self._storages:
            order = ">" if self._big_endian else "<"
            element = np.dtype(order + ("u2" if kind == "bfloat16" else kind))
            raw = self._read(f"data/{key}")
            if len(raw) != size * element.itemsize:
                raise CheckpointError(f"data/{key} holds {len(raw)} bytes, not {size} elements of {kind}.")
            elements = np.frombuffer(raw, element).astype(element.newbyteorder("="), copy=False)
            self._storages[key] = widen_bfloat16(elements) if kind == "bfloat16" else elements
        return self._storages[key]

    def _tensor(self, storage: np.ndarray, offset: int, shape: Any, strides: Any, *_: Any) -> np.ndarray:
        """A view of a storage by element offset, shape and strides, checked to stay inside it."""
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise CheckpointError(f"A tensor has shape {shape}, strides {strides}.")
        count = int(np.prod(shape, dtype=object))
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if count and (last >= len(storage) or count > len(storage)):
            raise CheckpointError(
                f"A tensor of shape {shape}, strides {strides} from element {offset} on does "
                f"not fit its storage of {len(storage)} elements."
            )
        if not count:
            return np.zeros(shape, storage.dtype)
        steps = [stride * storage.itemsize for stride in strides]
        view = np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)
        return np.ascontiguousarray(view).reshape(shape)

    def _parameter(self, tensor: np.ndarray, *_: Any) -> np.ndarray:
        return tensor

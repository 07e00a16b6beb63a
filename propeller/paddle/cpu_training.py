"""Process settings under which training on a CPU is faster.

Freed memory is kept. A step frees and takes gigabytes of tensors. glibc hands large blocks back to the kernel
at once, which has to clear every page anew: 5 to 14 % of a step of a small BERT.

Denormals count as zero. Numbers below 1e-38 take CPUs a slow path. They come by themselves: Adam's first
moment of a word that no longer occurs shrinks by a tenth at each step and is there after 800 steps. Nothing
can be learnt from them.

Both go through glibc by ctypes; on other systems there is nothing to set.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator

import numpy as np

from propeller.paddle.runtime import paddle

# Where `fenv_t` has the register that controls floating point (byte offset), and the bits that flush
# denormal results and operands. Source: glibc, sysdeps/x86/fpu/bits/fenv.h and
# sysdeps/aarch64/fpu/bits/fenv.h; FTZ and DAZ of MXCSR, FZ of FPCR.
_CONTROL = {"x86_64": (28, 1 << 15 | 1 << 6), "aarch64": (0, 1 << 24)}
_FENV_BYTES = 64  # more than any `fenv_t`

# Parameters of mallopt. Source: glibc, malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# The second is the most that older versions take.
_MMAP_THRESHOLDS = (1 << 30, 32 << 20)
_USERS_OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


@contextlib.contextmanager
def training_settings() -> Iterator[None]:
    """Keeps freed memory and flushes denormals, where this process trains on a CPU.

    The memory setting stays for the life of the process, since glibc has no way to ask for the one before;
    it gives way to a user's own in the environment. Denormals are flushed until the context ends, in the
    thread that entered it, in threads started from there, and in the workers of its parallel loops.
    """
    if not paddle.get_device().startswith("cpu") or not _is_glibc():
        yield
        return
    _keep_freed_memory()
    with _denormals_flushed():
        yield


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # Windows; macOS; musl
        return False


def _keep_freed_memory() -> None:
    if any(name in os.environ for name in _USERS_OWN):
        return
    mallopt = ctypes.CDLL(None).mallopt
    # Setting either ends glibc's own adjustment of both, so the trim threshold may follow only a threshold
    # that was taken; alone it would make a step slower by a third.
    if any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MMAP_THRESHOLDS):
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def _denormals_flushed() -> Iterator[None]:
    if platform.machine() not in _CONTROL:
        yield
        return
    for kind in (np.float32, np.float64):
        np.finfo(kind)  # numpy keeps it; older versions would warn of a zero if they made it below
    _, mask = _CONTROL[platform.machine()]
    before = _control_bits()
    _set_control_bits(before | mask)
    try:
        yield
    finally:
        _set_control_bits((_control_bits() & ~mask) | (before & mask))


def _environment() -> ctypes.Array[ctypes.c_ubyte]:
    """The floating-point environment of this thread."""
    environment = (ctypes.c_ubyte * _FENV_BYTES)()
    if ctypes.CDLL("libm.so.6").fegetenv(environment) != 0:
        raise OSError("fegetenv failed: glibc cannot read the floating-point environment.")
    return environment


def _control_bits() -> int:
    offset, _ = _CONTROL[platform.machine()]
    return int.from_bytes(bytes(_environment()[offset : offset + 4]), "little")


def _set_control_bits(bits: int) -> None:
    offset, _ = _CONTROL[platform.machine()]
    environment = _environment()
    environment[offset : offset + 4] = list(bits.to_bytes(4, "little"))
    ctypes.CDLL("libm.so.6").fesetenv(environment)

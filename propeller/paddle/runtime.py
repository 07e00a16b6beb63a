"""The one place where Paddle is imported and set up.

Paddle and its math library read some settings only while they are loaded, so they are put into the
environment first; whatever the user has set stays. Every other module takes Paddle from here:
`from propeller.paddle.runtime import paddle`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TextIO

from propeller.cores import available_cores, has_made_up_threads, rank_threads
from propeller.errors import ConfigError


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _prepare_environment() -> None:
    """Sets what Paddle reads while it loads, never over what the user set."""
    # Level 2 leaves errors: Paddle's C++ side otherwise logs a warning at each export.
    wanted = {"OMP_NUM_THREADS": str(rank_threads()), "GLOG_minloglevel": "2"}
    if _is_amd():
        # Paddle's MKL is from 2019 and takes its slow path on AMD unless told the CPU's kind:
        # 63 -> 141 GFLOP/s for a matmul on a Zen 4 core pair.
        wanted["MKL_DEBUG_CPU_TYPE"] = "5"
    unset = wanted.keys() - os.environ.keys()
    if has_made_up_threads():
        unset.add("OMP_NUM_THREADS")
    if "paddle" not in sys.modules:
        os.environ.update({key: wanted[key] for key in unset})
    elif slow := {key for key in unset - {"GLOG_minloglevel"} if os.environ.get(key) != wanted[key]}:
        warnings.warn(
            "Paddle was imported before propeller.paddle, and computes more slowly than it could here, since "
            f"these settings came too late: {', '.join(sorted(slow))}. Import propeller.paddle first, or set "
            "them yourself.",
            RuntimeWarning,
            stacklevel=2,
        )


class _Filtered(io.TextIOBase):
    """Standard error without the two lines Paddle prints about OMP_NUM_THREADS whenever it is not 1."""

    def __init__(self, stream: TextIO):
        self._stream, self._line = stream, ""

    def write(self, text: str) -> int:
        self._line += text
        while "\n" in self._line:
            line, _, self._line = self._line.partition("\n")
            if "OMP_NUM_THREADS" not in line:
                self._stream.write(line + "\n")
        return len(text)


_prepare_environment()
try:
    with warnings.catch_warnings(), contextlib.redirect_stderr(_Filtered(sys.stderr)):
        warnings.filterwarnings("ignore", message="No ccache found")
        import paddle
except ModuleNotFoundError as error:
    if error.name != "paddle":
        raise
    raise ModuleNotFoundError(
        "This part needs PaddlePaddle, which is not installed. "
        "Install it with `pip install 'ernie-propeller[cpu]'` (or `[gpu]`).",
        name="paddle",
    ) from None


def _check_version(version: str) -> None:
    """Refuses a Paddle before 3.2, whose exports and optimizer states have another form.

    Raises:
        ImportError: it is one.
    """
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    # One that was built from an unreleased source calls itself 0.0.0.
    if (0, 0) < found < (3, 2):
        raise ImportError(
            f"Paddle {version} is installed; this package needs 3.2 or 3.3. For a CPU run "
            "`pip install 'paddlepaddle>=3.2,<3.4'`. For a GPU run `pip install 'paddlepaddle-gpu>=3.2,<3.4' "
            "--extra-index-url https://www.paddlepaddle.org.cn/packages/stable/cu126/`: PyPI has no newer "
            "paddlepaddle-gpu than 2.6.2.",
            name="paddle",
        )


_check_version(paddle.__version__)


def check_card(device: str) -> None:
    """Refuses a card that is not there: Paddle Inference takes the CPU instead without a word.

    Raises:
        ConfigError: there is none such, or `device` is neither `gpu` nor `gpu:` with a number.
    """
    if not paddle.is_compiled_with_cuda():
        raise ConfigError(
            f"device is {device!r}, but this Paddle {paddle.__version__} has no GPU support. Take 'cpu', or "
            "install paddlepaddle-gpu in its place."
        )
    number, cards = device.removeprefix("gpu").removeprefix(":") or "0", paddle.device.cuda.device_count()
    if not number.isdecimal() or int(number) >= cards:
        raise ConfigError(
            f"device is {device!r}, but Paddle sees {cards} cards here; expected 'gpu', or 'gpu:N' with N "
            "below that."
        )


def set_device(name: str | None = None) -> str:
    """Makes `name` the device of this process and returns it.

    Args:
        name: any device Paddle knows (`cpu`, `gpu`, `gpu:1`, `xpu`, a custom one); None takes the
            best there is.

    Raises:
        ConfigError: Paddle does not know the device, or this build cannot use it.
    """
    if name is not None and name.partition(":")[0] == "gpu":
        check_card(name)
    try:
        paddle.set_device(name or paddle.get_device())
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"device {name!r} cannot be used with this build of Paddle {paddle.__version__}: "
            f"{reason}. Devices here: {', '.join(['cpu', *paddle.device.get_available_device()])}."
        ) from error
    return paddle.get_device()


__all__ = ["available_cores", "check_card", "paddle", "set_device"]

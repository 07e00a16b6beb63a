"""Paddle is set up before it is imported; devices; cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from propeller.errors import ConfigError
from propeller.paddle import runtime
from propeller.paddle.runtime import available_cores, paddle, set_device


def test_devices():
    assert set_device("cpu") == "cpu"
    assert set_device(None) == "cpu" or paddle.device.get_available_device()
    for name in ("nonsense", "npu:99", "cpu:x"):
        with pytest.raises(ConfigError, match=rf"device '{name}' cannot be used .* Devices here: cpu"):
            set_device(name)
    for name in ("gpu:99", "gpu:x"):
        with pytest.raises(ConfigError, match=f"^device is '{name}', but (this Paddle|Paddle sees)"):
            set_device(name)


STUB = """
import os, sys
print("OMP_NUM_THREADS set to 2, not 1. The computation will be slow.", file=sys.stderr)
print("something else", file=sys.stderr)
__version__ = "{version}"
{more}
seen = {{key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "GLOG_minloglevel", "MKL_DEBUG_CPU_TYPE")}}
"""


@pytest.fixture
def with_stub(tmp_path, root):
    """Runs code in a process that has a stand-in for Paddle, which says what it saw."""
    (tmp_path / "paddle").mkdir()

    def run(code, more="", version="3.3.1", **environment):
        (tmp_path / "paddle/__init__.py").write_text(STUB.format(more=more, version=version))
        clean = {
            key: value for key, value in os.environ.items() if not key.startswith(("OMP", "GLOG", "MKL"))
        }
        return subprocess.run(
            [sys.executable, "-B", "-c", code], capture_output=True, text=True, timeout=60,
            env={**clean, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}", **environment},
        )  # fmt: skip

    return run


FIRST = "import json, propeller.paddle.runtime as r; print(json.dumps(r.paddle.seen))"


def test_the_environment_is_set_before_paddle_is_loaded(with_stub):
    done = with_stub(FIRST)
    seen = json.loads(done.stdout)
    assert seen["OMP_NUM_THREADS"] == str(available_cores())
    assert seen["GLOG_minloglevel"] == "2"
    assert seen["MKL_DEBUG_CPU_TYPE"] == ("5" if runtime._is_amd() else None)
    assert done.stderr == "something else\n", "only Paddle's line about threads is left out"


def test_what_the_user_set_stays(with_stub):
    done = with_stub(FIRST, OMP_NUM_THREADS="7", GLOG_minloglevel="0", MKL_DEBUG_CPU_TYPE="")
    assert json.loads(done.stdout) == {
        "OMP_NUM_THREADS": "7",
        "GLOG_minloglevel": "0",
        "MKL_DEBUG_CPU_TYPE": "",
    }


def test_paddle_imported_first_is_said_once(with_stub):
    done = with_stub(
        "import paddle; import propeller.paddle.runtime, os; print('OMP_NUM_THREADS' in os.environ)"
    )
    assert done.stdout == "False\n"
    assert done.stderr.count("RuntimeWarning: Paddle was imported before propeller.paddle") == 1
    assert "OMP_NUM_THREADS. Import propeller.paddle first" in done.stderr


ON_A_CPU_OF = """
import pathlib
read = pathlib.Path.read_text
pathlib.Path.read_text = lambda path: "{vendor}" if path.name == "cpuinfo" else read(path)
import paddle
import propeller.paddle.runtime
"""


@pytest.mark.parametrize(("vendor", "said"), [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_what_costs_no_speed_is_not_said(with_stub, vendor, said):
    """That of the MKL is for AMD alone; without the level of the log there are more lines in that."""
    done = with_stub(ON_A_CPU_OF.format(vendor=vendor), OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    assert ("MKL_DEBUG_CPU_TYPE" in done.stderr) is ("RuntimeWarning" in done.stderr) is said
    assert "GLOG_minloglevel" not in done.stderr


def test_a_broken_paddle_says_itself_what_it_lacks(with_stub):
    done = with_stub(FIRST, more="import a_module_that_is_not_there")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ModuleNotFoundError: No module named 'a_module_that_is_not_there'")
    assert "ernie-propeller" not in done.stderr


@pytest.mark.parametrize("version", ["2.6.2", "3.1.1", "3.0.0b2", "1.8"])
def test_a_paddle_that_is_too_old_is_refused(with_stub, version):
    # By the first name of the package's face that somebody asks for.
    done = with_stub("import propeller.paddle as propeller; propeller.Learner", version=version)
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last.startswith(f"ImportError: Paddle {version} is installed; this package needs 3.2 or 3.3. ")
    assert "pip install 'paddlepaddle>=3.2,<3.4'" in last
    assert "https://www.paddlepaddle.org.cn/packages/stable/cu126/" in last


@pytest.mark.parametrize("version", ["3.2.0", "3.10.0", "4.0.0.dev20261120", "0.0.0"])
def test_a_newer_paddle_is_taken(with_stub, version):
    done = with_stub(FIRST, version=version)
    assert done.returncode == 0, done.stderr

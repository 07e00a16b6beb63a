"""Training's process settings: denormals count as zero inside and only there, freed memory is kept."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from propeller.paddle import cpu_training
from propeller.paddle.cpu_training import training_settings
from propeller.paddle.runtime import paddle

DENORMAL = 1e-39
glibc = pytest.mark.skipif(
    sys.platform != "linux"
    or platform.libc_ver()[0] != "glibc"
    or platform.machine() not in ("x86_64", "aarch64"),
    reason="nothing to set here",
)


def flushed() -> bool:
    """Whether every thread that works on large tensors takes denormals for zero."""
    tensor = paddle.full([2048, 1024], DENORMAL)
    products = [tensor * 1.0, paddle.matmul(tensor, paddle.eye(1024)), tensor + tensor]
    # Compared as bits: a comparison of numbers would take denormals for zero itself.
    zeros = [not product.numpy().view(np.int32).any() for product in products]
    whole = [product.numpy().view(np.int32).all() for product in products]
    assert all(zeros) or all(whole)  # else some threads do, others do not
    return all(zeros)


@glibc
def test_denormals_are_flushed_inside_alone():
    assert not flushed()
    with training_settings():
        assert flushed()
        assert np.float32(DENORMAL) * np.float32(1) == 0
    assert not flushed()


@glibc
def test_put_back_after_an_error():
    with pytest.raises(KeyError), training_settings():
        assert flushed()
        raise KeyError
    assert not flushed()


@glibc
def test_one_within_the_other():
    with training_settings():
        with training_settings():
            assert flushed()
        assert flushed()
    assert not flushed()


@glibc
def test_the_rounding_of_others_is_left_alone():
    with training_settings():
        rounding = cpu_training._control_bits()
        cpu_training._set_control_bits(rounding | 3 << (13 if platform.machine() == "x86_64" else 22))
        inside = cpu_training._control_bits()
    after = cpu_training._control_bits()
    cpu_training._set_control_bits(rounding & after)
    assert after != inside and after & ~rounding  # towards zero, as set inside
    assert not flushed()


def test_numpy_does_not_warn_of_a_zero():
    with training_settings():
        for kind in (np.float32, np.float64):
            assert np.finfo(kind).tiny > 0


def no_confstr(name):
    raise ValueError("unrecognized configuration name")


@pytest.mark.parametrize(
    ("owner", "name", "replacement"),
    [
        (os, "confstr", no_confstr),  # macOS
        (os, "confstr", lambda name: None),  # musl
        (platform, "machine", lambda: "riscv64"),
        (paddle, "get_device", lambda: "gpu:0"),
    ],
    ids=["macos", "musl", "other-cpu", "gpu"],
)
def test_nothing_is_set_where_it_does_not_belong(monkeypatch, owner, name, replacement):
    monkeypatch.setattr(owner, name, replacement)
    with training_settings():
        assert not flushed()


# The fewest page faults of a tensor, of several that are freed at once. Not of each: what else is put into
# the gap of the one before may leave too little of it.
FAULTS = """
import resource
from propeller.paddle.cpu_training import training_settings
from propeller.paddle.runtime import paddle

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    paddle.full([1 << 22], 1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with training_settings():
    print(min(faults() for _ in range(8)))
"""


def count_faults(root, **environment):
    clean = {name: value for name, value in os.environ.items() if name not in cpu_training._USERS_OWN}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env={**clean, "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@glibc
def test_freed_memory_is_kept_unless_the_user_says_otherwise(root):
    pages = (4 << 22) // os.sysconf("SC_PAGE_SIZE")
    assert count_faults(root) < pages / 20
    assert count_faults(root, MALLOC_MMAP_THRESHOLD_="65536") >= pages

"""Cores of this process, and the part of them that a rank gets."""

from __future__ import annotations

import os
import sys

import pytest

from propeller import cores
from propeller.cores import available_cores, has_made_up_threads, rank_threads


def test_cores_of_a_container(tmp_path):
    quota = cores._cgroup_quota
    assert quota(tmp_path) is None
    for text, expected in (
        ("max 100000\n", None),
        ("250000 100000\n", 2),
        ("50000 100000\n", 1),
        ("200000 100000", 2),
    ):
        (tmp_path / "cpu.max").write_text(text)
        assert quota(tmp_path) == expected
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    for text, expected in (("-1\n", None), ("300000\n", 3)):
        (tmp_path / "cpu/cpu.cfs_quota_us").write_text(text)
        (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
        assert quota(tmp_path) == expected


def test_available_cores_are_those_of_this_process(monkeypatch):
    monkeypatch.setattr(cores, "_cgroup_quota", lambda: None)
    assert available_cores() == len(os.sched_getaffinity(0))
    monkeypatch.setattr(cores, "_cgroup_quota", lambda: 1)
    assert available_cores() == 1
    monkeypatch.setattr(cores, "_cgroup_quota", lambda: 10_000)
    assert available_cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("ranks", "threads"),
    [(None, 8), ("1", 8), ("2", 4), ("3", 2), ("8", 1), ("20", 1), ("0", 8), ("many", 8)],
)
def test_ranks_share_the_cores(monkeypatch, ranks, threads):
    monkeypatch.setattr(cores, "available_cores", lambda: 8)
    monkeypatch.delenv("PADDLE_LOCAL_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("PADDLE_LOCAL_SIZE", ranks)
    assert rank_threads() == threads


@pytest.mark.parametrize(
    ("own", "importer", "made_up"),
    [
        ("1", b"PATH=/bin\0HOME=/root\0", True),
        ("1", b"PATH=/bin\0OMP_NUM_THREADS=1\0", False),
        ("2", b"PATH=/bin\0", False),
        (None, b"PATH=/bin\0", False),
        ("1", None, False),
    ],
    ids=["Paddle", "user", "own", "unset", "unknown"],
)
@pytest.mark.parametrize("launched", [False, True])
def test_threads_that_only_paddle_chose(monkeypatch, tmp_path, own, importer, made_up, launched):
    monkeypatch.delitem(sys.modules, "paddle", raising=False)
    monkeypatch.delenv("PADDLE_LOCAL_SIZE", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    if importer is not None:
        folder = tmp_path / (str(os.getppid()) if launched else "self")
        folder.mkdir()
        (folder / "environ").write_bytes(importer)
    assert not has_made_up_threads(tmp_path), "neither a launcher nor this process has imported Paddle"
    if launched:
        monkeypatch.setenv("PADDLE_LOCAL_SIZE", "2")
    else:
        monkeypatch.setitem(sys.modules, "paddle", cores)
    assert has_made_up_threads(tmp_path) is made_up

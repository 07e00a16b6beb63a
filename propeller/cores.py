"""Which of several ranks this process is, and how many cores it may use."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from propeller.errors import ConfigError

RANK_ENV, SIZE_ENV = "PADDLE_TRAINER_ID", "PADDLE_TRAINERS_NUM"


def rank_from_environment(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Returns this process's rank and the number of ranks, as a launcher set them; (0, 1) without one.

    Raises:
        ConfigError: what is set makes no sense.
    """
    texts = environ.get(RANK_ENV, "0"), environ.get(SIZE_ENV, "1")
    if all(text.isdecimal() for text in texts) and int(texts[0]) < int(texts[1]):
        return int(texts[0]), int(texts[1])
    raise ConfigError(
        f"{RANK_ENV} is {texts[0]!r} and {SIZE_ENV} is {texts[1]!r}; expected 0 <= {RANK_ENV} < "
        f"{SIZE_ENV}. A launcher sets both; unset them for a run in one process."
    )


def available_cores() -> int:
    """Cores this process may really use: its CPU affinity, cut by the container's quota."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    return max(1, min(cores, _cgroup_quota() or cores))


def _cgroup_quota(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Whole cores the CPU quota allows (cgroup v2, then v1), None without a quota."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        except OSError:
            return None
    if quota.strip() == "max" or int(quota) <= 0:
        return None
    return max(1, int(quota) // int(period))


def rank_threads() -> int:
    """Threads for this process: all cores, or its part of them if a launcher started several ranks here."""
    ranks = os.environ.get("PADDLE_LOCAL_SIZE", "")
    return max(1, available_cores() // (int(ranks) if ranks.isdecimal() and int(ranks) else 1))


def has_made_up_threads(root: Path = Path("/proc")) -> bool:
    """Whether OMP_NUM_THREADS is not the user's: Paddle puts a 1 there at its import, unless it was set.

    Paddle's launcher has imported it, too, and passes this on to every rank. What it, or this process, was
    started with, the system remembers (Linux).
    """
    if os.environ.get("OMP_NUM_THREADS") != "1":
        return False
    if "PADDLE_LOCAL_SIZE" in os.environ:
        importer = str(os.getppid())
    elif "paddle" in sys.modules:
        importer = "self"
    else:
        return False
    try:
        started_with = (root / importer / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return not any(entry.startswith(b"OMP_NUM_THREADS=") for entry in started_with)

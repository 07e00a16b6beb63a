"""Several ranks of one run: what their launchers tell them, and the launcher behind `--nproc`.

Needs no Paddle: all of this must be settled before Paddle is imported.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import IO, Any

from propeller import atomic, signals
from propeller.config import parse_config
from propeller.cores import RANK_ENV, SIZE_ENV, available_cores
from propeller.errors import ConfigError
from propeller.types import RunConfig

log = logging.getLogger("propeller")

DISCONFIG_ENV = "PROPELLER_DISCONFIG"
# Set for ranks that `--nproc` started: `batch_size` is then the whole batch, on whatever machine.
WHOLE_BATCH_ENV = "PROPELLER_WHOLE_BATCH"

# More ranks than this on a CPU talk more than they gain: the cores are dealt out as threads instead.
_MAX_CPU_RANKS = 8
# The launcher takes these from the environment before its own flags, by which it is called here.
_LAUNCHER_ENV = ("PADDLE_LOG_DIR", "PADDLE_LOG_LEVEL", "PADDLE_LOG_OVERWRITE", "PADDLE_NPROC_PER_NODE")
# Files in which the launcher keeps the whole environment, passwords and all. Ranks that start read them.
_ENVIRONMENT_FILES = ("envlog.*", "backup_env.*.json", "default.*.log")
_POLL_S = 0.1
_TAIL_LINES = 30


def started_by_nproc() -> bool:
    """Whether this process is a rank that `--nproc` started, so that `batch_size` is the whole batch."""
    return WHOLE_BATCH_ENV in os.environ


def apply_disconfig(environ: MutableMapping[str, str] = os.environ) -> None:
    """Translates `PROPELLER_DISCONFIG`, by which the older launcher starts ranks one by one, into Paddle's.

    It is JSON: `{"cluster": {"chief": ["host:port"], "worker": ["host:port", ...]}, "task": {"type":
    "worker", "index": 0}}`; the chief is rank 0, the workers follow. A cluster of one is a plain run. Where
    Paddle's variables are set already, they count. Call it before Paddle is imported.

    Raises:
        ConfigError: a key is missing or wrong; it is named.
    """
    text = environ.get(DISCONFIG_ENV, "").strip()
    if not text or RANK_ENV in environ or SIZE_ENV in environ:
        return
    config = parse_config(text, what=DISCONFIG_ENV)
    cluster, task = _part(config, "cluster"), _part(config, "task")
    chiefs = _addresses(cluster, "chief")
    if not chiefs:
        raise _wrong("cluster.chief", cluster.get("chief"), "at least one address")
    workers = _addresses(cluster, "worker")
    addresses = [*chiefs, *workers]
    for address in addresses:
        if addresses.count(address) > 1:
            raise _wrong("cluster", address, "every address once, but this one stands there twice")
    members = {"chief": chiefs, "worker": workers}.get(str(task.get("type")))
    if members is None:
        raise _wrong("task.type", task.get("type"), "'chief' or 'worker'")
    index = task.get("index")
    if type(index) is not int or not 0 <= index < len(members):
        raise _wrong("task.index", index, f"one of the {len(members)} of type {task['type']}, from 0")
    if len(addresses) == 1:
        return
    rank = index + (len(chiefs) if members is workers else 0)
    if rank == 0:
        _check_free(addresses[0])
    environ.update(_paddle_variables(addresses, rank, environ))


def _check_free(address: str) -> None:
    """Raises ConfigError where the port is taken: Paddle would abort."""
    try:
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except OSError as error:
        raise ConfigError(
            f"{DISCONFIG_ENV}: rank 0 cannot listen on {address}: {error.strerror}. Is it running already?"
        ) from error


def _part(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = config.get(key)
    if not isinstance(found, dict):
        raise _wrong(key, found, "an object")
    return found


def _addresses(cluster: Mapping[str, Any], key: str) -> list[str]:
    """The addresses under a key that may be missing."""
    found = cluster.get(key, [])
    if not isinstance(found, list):
        raise _wrong(f"cluster.{key}", found, "a list of addresses")
    for address in found:
        match = re.fullmatch(r"[^\s:,/]+:([0-9]{1,5})", address) if isinstance(address, str) else None
        if match is None or not 0 < int(match[1]) < 2**16:
            raise _wrong(f"cluster.{key}", address, "an address such as '10.0.0.1:6170'")
    return found


def _wrong(key: str, found: Any, expected: str) -> ConfigError:
    given = "is missing" if found is None else f"has {found!r:.80}"
    return ConfigError(f"{DISCONFIG_ENV}: {key} {given}; expected {expected}.")


def _paddle_variables(addresses: Sequence[str], rank: int, environ: Mapping[str, str]) -> dict[str, str]:
    """What `paddle.distributed.init_parallel_env` reads; the first address is its meeting place."""
    hosts = [address.partition(":")[0] for address in addresses]
    local_rank = hosts[:rank].count(hosts[rank])
    variables = {
        RANK_ENV: str(rank),
        SIZE_ENV: str(len(addresses)),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(addresses),
        "PADDLE_CURRENT_ENDPOINT": addresses[rank],
        "PADDLE_LOCAL_SIZE": str(hosts.count(hosts[rank])),
        "PADDLE_LOCAL_RANK": str(local_rank),
    }
    cards = visible_gpus(environ)
    if cards:  # the older launcher shows every process one card, or all of them to all
        variables["FLAGS_selected_gpus"] = str(local_rank if cards > 1 else 0)
    else:
        variables["PADDLE_DISTRI_BACKEND"] = "gloo"
    return {name: value for name, value in variables.items() if name not in environ}


def visible_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """Number of NVIDIA cards that Paddle will see, found out without loading it."""
    try:
        importlib.metadata.version("paddlepaddle-gpu")
    except importlib.metadata.PackageNotFoundError:
        return 0
    chosen = environ.get("CUDA_VISIBLE_DEVICES", "all")
    if chosen != "all":  # cards after an invalid one are hidden
        return len(list(itertools.takewhile(lambda card: card.strip() not in ("", "-1"), chosen.split(","))))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def num_ranks(nproc: str, device: str | None = None) -> int:
    """How many ranks `--nproc` means on this machine.

    Args:
        nproc: a number; or `auto`: one a card, or on a CPU one a core up to eight, which share its threads.
        device: as in `RunConfig`.

    Raises:
        ConfigError: it is neither, or there are not so many cards.
    """
    if nproc != "auto" and not (nproc.isdecimal() and int(nproc)):
        raise ConfigError(f"--nproc is {nproc!r}; expected auto, or a number of processes from 1 on.")
    if nproc == "1" or (nproc == "auto" and device not in (None, "cpu", "gpu")):
        return 1
    if device is not None and ":" in device:
        raise ConfigError(f"--nproc {nproc} with device {device!r}, which is one card: leave its number out.")
    cards = 0 if device == "cpu" else visible_gpus()
    if nproc == "auto":
        return cards or (1 if device == "gpu" else min(available_cores(), _MAX_CPU_RANKS))
    if cards and int(nproc) > cards:
        raise ConfigError(f"--nproc is {nproc}, but there are {cards} cards; expected one process a card.")
    return int(nproc)


def relaunch(nproc: str | None, run_config: RunConfig, *, restart: bool = False) -> int | None:
    """Starts this script again as several ranks by Paddle's own launcher, and waits for them.

    What rank 0 writes is shown on standard error as it comes; what each writes is kept in
    `model_dir/launch/workerlog.N`. The ranks get the script's flags without `--nproc` and `--restart`. A
    signal is passed on: the ranks save a checkpoint first, for which the launcher gives them 30 s.

    Args:
        nproc: the flag `--nproc`; see `num_ranks`.
        run_config: of the run.
        restart: begin anew: `model_dir` is kept aside before the ranks are started.

    Returns:
        The exit code: 128 + signal if one came, else that of the rank that failed, or 0. None if this
        process is to do the work itself: no flag, one rank, or it is a rank already.

    Raises:
        ConfigError: the flag is wrong, another launcher started this, or there is no script file.
        PropellerError: another run uses `model_dir`.
    """
    if nproc is None or WHOLE_BATCH_ENV in os.environ:
        return None
    if SIZE_ENV in os.environ:
        raise ConfigError(
            "--nproc starts a launcher, but one has started this already: leave out one of them."
        )
    ranks = num_ranks(nproc, run_config.device)
    if ranks == 1:
        return None
    script = _script()
    model_dir = Path(run_config.model_dir)
    if restart:
        atomic.set_aside(model_dir)
    on_cpu = run_config.device == "cpu" or not visible_gpus()
    if on_cpu and ranks > available_cores():
        log.warning("more processes (%d) than cores take turns: more memory, and no time saved", ranks)
    with atomic.FolderLock(model_dir):
        folder = model_dir / "launch"
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(ranks)]
    command += ["--log_dir", str(folder), "--log_level", "ERROR", "--enable_gpu_log", "0", *script]
    with atomic.FolderLock(folder):
        log.info("starting %d ranks; their logs: %s", ranks, folder)
        try:
            return _wait_for(command, _environment(ranks, on_cpu), folder)
        finally:
            for path in itertools.chain.from_iterable(map(folder.glob, _ENVIRONMENT_FILES)):
                path.unlink()


def _script() -> list[str]:
    """The script and the flags that its ranks get.

    Raises:
        ConfigError: this is no script, but a module (`python -m`) or an interactive session.
    """
    if getattr(sys.modules["__main__"], "__spec__", None) is not None or not Path(sys.argv[0]).is_file():
        raise ConfigError(
            "--nproc starts the script's file again, and there is none: run `python FILE.py --nproc ...`, "
            "not a module or an interactive session."
        )
    flags: list[str] = []
    given = iter(sys.argv[1:])
    for flag in given:
        if flag == "--nproc":
            next(given, None)
        elif flag != "--restart" and not flag.startswith("--nproc="):
            flags.append(flag)
    return [sys.argv[0], *flags]


def _environment(ranks: int, on_cpu: bool) -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_ENV}
    environ[WHOLE_BATCH_ENV] = "1"
    if on_cpu:
        # The launcher deals out what this lists, one a rank, and takes no notice that it hides all cards.
        environ["CUDA_VISIBLE_DEVICES"] = ",".join(["-1"] * ranks)
        environ["PADDLE_DISTRI_BACKEND"] = "gloo"
    return environ


def _wait_for(command: Sequence[str], environ: Mapping[str, str], folder: Path) -> int:
    """Runs the launcher to its end; returns the exit code as `relaunch` documents it."""
    shown = _Follower(folder / "workerlog.0")
    passed_on = 0
    caught: list[int] = []
    with signals.handled(lambda number, _: caught.append(number)), tempfile.TemporaryFile() as said:
        # In a session of its own, so that Ctrl-C reaches it once, from here; its standard output is rank 0's
        # log once more.
        launcher = subprocess.Popen(
            command, env=environ, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
        )
        try:
            while (code := _poll(launcher)) is None:
                shown.more()
                while passed_on < len(caught):
                    launcher.terminate()
                    passed_on += 1
        finally:
            if launcher.poll() is None:
                launcher.terminate()
                launcher.wait()
            shown.rest()
        if code == 0 or caught:
            return 128 + caught[0] if code else 0
        return _explained(code, said, folder)


def _poll(launcher: subprocess.Popen[bytes]) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return launcher.wait(_POLL_S)
    return None


def _explained(code: int, said: IO[bytes], folder: Path) -> int:
    """Says on standard error which rank failed; returns its exit code, or the launcher's own."""
    said.seek(0)
    text = said.read().decode("utf-8", "replace")
    failed = re.search(r"rank (\d+) status failed .* code (-?\d+) log", text)
    if failed is None:
        print(f"{text}error: the launcher ended with exit code {code}.", file=sys.stderr)
        return code if code > 0 else 1
    rank, code = int(failed[1]), int(failed[2])
    path = folder / f"workerlog.{rank}"
    if rank and path.exists():  # rank 0's has been shown
        lines = path.read_text("utf-8", "replace").splitlines()[-_TAIL_LINES:]
        print(*(f"[rank {rank}] {line}" for line in lines), sep="\n", file=sys.stderr)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    print(f"error: rank {rank} {how}, and so all were ended. The logs of all: {folder}", file=sys.stderr)
    return code if code > 0 else 128 - code


class _Follower:
    """Copies what is added to a log to standard error, in whole lines."""

    def __init__(self, path: Path):
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def more(self) -> None:
        """Copies the lines that were added."""
        data = self._read()
        self._copy(data[: data.rfind(b"\n") + 1])

    def rest(self) -> None:
        """Copies all that is left."""
        self._copy(self._read())

    def _read(self) -> bytes:
        if not self._path.exists():
            return b""
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            return file.read()

    def _copy(self, data: bytes) -> None:
        self._offset += len(data)
        # Where nobody reads any more, the ranks go on, and their logs are kept.
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(data.decode("utf-8", "replace"))
            sys.stderr.flush()

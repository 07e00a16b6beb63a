"""How a server is set up: what its flags, or the code that starts it, say about it."""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import re
from pathlib import Path
from typing import NamedTuple

from propeller.errors import ConfigError
from propeller.service.wire import REPLY_LIMITS, Limits

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}")
_DEVICE = re.compile(r"cpu|gpu:\d{1,3}")
_MAX_PORT = 65535
# The lowest value of a field, and whether it must be a whole number; None is allowed where it is the default.
_LOWEST = {
    "port": (0, True),
    "num_workers": (1, True),
    "num_threads": (1, True),
    "max_batch_tokens": (1, True),
    "max_batch_size": (1, True),
    "max_wait_ms": (0, False),
    "max_queue_rows": (1, True),
    "batch_timeout_s": (0.001, False),
    "drain_s": (0, False),
    "warmup_s": (0, False),
    "metrics_port": (0, True),
    "worker_port": (0, True),
}
# The flags that are called otherwise than what they set.
_FLAGS = {"num_workers": "--workers", "num_threads": "--threads", "max_queue_rows": "--max-queue"}


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """The settings of a server; they check themselves.

    Attributes:
        models: bundle folders by the name that clients give; the first one is for those who give none.
        port: where clients connect; 0 takes a free one.
        bind: the address that it listens on. One that other machines can reach needs keys.
        num_workers: worker processes of each model, on GPUs of each card; None: see `worker_plan`.
        num_threads: threads of each worker; None: see `worker_plan`.
        devices: `cpu`, or cards as `gpu:0`, `gpu:1`, counted among those CUDA_VISIBLE_DEVICES shows.
        bf16: compute in bfloat16 (CPU).
        max_batch_tokens: what rows times padded length of a batch may come to; None leaves it to the server.
        max_batch_size: rows of a batch.
        max_wait_ms: how long a row waits for company while all workers are busy.
        max_queue_rows: rows that may wait, for each model.
        max_message_bytes: the largest request.
        batch_timeout_s: a worker that takes longer for a batch hangs, and is replaced.
        drain_s: how long a server that is told to end goes on with what it has.
        warmup_s: how long a worker may warm up before it takes requests.
        curve_keys: folder of the keys (`propeller.service.auth`); None: no keys.
        insecure: allow other machines without keys.
        metrics_port: HTTP port of metrics and health, 0 takes a free one; None: there is none.
        metrics_bind: the address of this port. It shows figures alone, to anybody who can reach it.
        worker_port: where hosts join with workers, 0 takes a free one; None: none can.
        worker_bind: the address of this port.
        verbose: log each step.

    Raises:
        ConfigError: a value that cannot be used; it is named.
    """

    models: dict[str, Path]
    port: int = 8888
    bind: str = "127.0.0.1"
    num_workers: int | None = None
    num_threads: int | None = None
    devices: tuple[str, ...] = ("cpu",)
    bf16: bool = False
    max_batch_tokens: int | None = None
    max_batch_size: int = 64
    max_wait_ms: float = 5.0
    max_queue_rows: int = 8192
    max_message_bytes: int = 64 << 20
    batch_timeout_s: float = 60.0
    drain_s: float = 30.0
    warmup_s: float = 10.0
    curve_keys: Path | None = None
    insecure: bool = False
    metrics_port: int | None = None
    metrics_bind: str = "127.0.0.1"
    worker_port: int | None = None
    worker_bind: str = "127.0.0.1"
    verbose: bool = False

    def __post_init__(self) -> None:
        self._check_models()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _LOWEST and not (value is None and field.default is None):
                _check_number(field.name, value)
        self._check_message_size()
        self._check_devices()
        self._check_addresses()
        self._check_keys()

    def _check_models(self) -> None:
        if not self.models:
            raise ConfigError("models is empty; expected at least one bundle to serve.")
        for name in self.models:
            if not _MODEL_NAME.fullmatch(name):
                raise ConfigError(
                    f"A model is called {name!r:.80}; expected 1 to 64 letters, digits, '_', '.', ':' or "
                    "'-', the first a letter or digit."
                )

    def _check_message_size(self) -> None:
        Limits(max_message_bytes=self.max_message_bytes)  # checks the other end
        if self.max_message_bytes > REPLY_LIMITS.max_message_bytes:
            raise ConfigError(
                f"max_message_bytes is {self.max_message_bytes}; expected at most "
                f"{REPLY_LIMITS.max_message_bytes}, which is what workers and clients take."
            )

    def _check_devices(self) -> None:
        if not self.devices or len(set(self.devices)) < len(self.devices):
            raise ConfigError(f"devices is {self.devices}; expected at least one, and each once.")
        for device in self.devices:
            if not _DEVICE.fullmatch(device) or (device == "cpu" and len(self.devices) > 1):
                raise ConfigError(f"devices is {self.devices}; expected ('cpu',) or cards such as 'gpu:0'.")
        if self.bf16 and self.devices != ("cpu",):
            raise ConfigError(f"bf16 is for the CPU, but devices is {self.devices}; leave one of them out.")

    def _check_addresses(self) -> None:
        ports = (self.port, self.metrics_port, self.worker_port)
        names = ("port", "metrics_port", "worker_port")
        taken: dict[int, str] = {}
        for name, port in zip(names, ports, strict=True):
            if port is not None and port > _MAX_PORT:
                raise ConfigError(f"{name} is {port}; expected 0 to {_MAX_PORT}.")
            if port and taken.setdefault(port, name) != name:
                raise ConfigError(f"{name} and {taken[port]} are both {port}; expected one port each.")
        for name in ("bind", "metrics_bind", "worker_bind"):
            if not getattr(self, name).strip():
                raise ConfigError(
                    f"{name} is empty; expected an address such as 127.0.0.1, or 0.0.0.0 for all."
                )

    def _check_keys(self) -> None:
        if self.insecure and self.curve_keys is not None:
            raise ConfigError("insecure and curve_keys contradict each other; expected one of them.")
        if self.worker_port is not None and self.curve_keys is None:
            raise ConfigError(
                "worker_port lets other hosts join, which needs keys. Make some by `propeller-server keys "
                "DIR` and give --curve-keys DIR."
            )
        if not (self.insecure or self.curve_keys or is_loopback(self.bind)):
            raise ConfigError(
                f"bind is {self.bind}, which other machines can reach, and there are no keys. Make some by "
                "`propeller-server keys DIR` and give --curve-keys DIR, or let in everybody who can reach it "
                "by --insecure."
            )


class WorkerGroup(NamedTuple):
    """Workers of one kind: the device, how many, and the threads of each."""

    device: str
    num_workers: int
    num_threads: int


def default_workers(cores: int) -> tuple[int, int]:
    """How many CPU workers, and with how many threads each, make the most of so many cores.

    Workers beat threads, since much of what a predictor does uses one thread; but a single request is run by
    one worker, and each costs memory. So one thread up to 2 cores, two up to 8, four beyond. A core that is
    left over is the server's own.

    Args:
        cores: that this process may really use.

    Returns:
        Number of workers, threads of each.
    """
    threads = 1 if cores <= 2 else 2 if cores <= 8 else 4
    return max(1, cores // threads), threads


def worker_plan(settings: ServerSettings, cores: int) -> list[WorkerGroup]:
    """Which workers to start for each model.

    On a CPU what is not set follows from the cores: threads from the number of workers, or this from the
    threads, or both by `default_workers`. A card has one worker, which has one thread, unless told otherwise.

    Args:
        settings: the server's.
        cores: that this process may really use.
    """
    workers, threads = settings.num_workers, settings.num_threads
    if settings.devices != ("cpu",):
        return [WorkerGroup(device, workers or 1, threads or 1) for device in settings.devices]
    if workers is None and threads is None:
        workers, threads = default_workers(cores)
    elif workers is None:
        workers = max(1, cores // (threads or 1))
    elif threads is None:
        threads = max(1, cores // workers)
    return [WorkerGroup("cpu", workers, threads or 1)]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address: `localhost`, 127.x.x.x or ::1, also in brackets."""
    host = _bare(host)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def tcp_address(host: str, port: int) -> str:
    """The ZeroMQ address to bind; port 0 becomes `*`, any free one. `localhost` becomes 127.0.0.1.

    ZeroMQ binds to no names. For an IPv6 address the socket needs its option `ipv6`.
    """
    host = "127.0.0.1" if _bare(host) == "localhost" else _bare(host)
    return f"tcp://{f'[{host}]' if ':' in host else host}:{port or '*'}"


def _bare(host: str) -> str:
    return host.strip().removeprefix("[").removesuffix("]")


def _check_number(name: str, value: object) -> None:
    lowest, whole = _LOWEST[name]
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not lowest <= value < math.inf:
        kind = "a whole number" if whole else "a finite number"
        flag = f" ({_FLAGS[name]})" if name in _FLAGS else ""
        raise ConfigError(f"{name}{flag} is {value!r}; expected {kind} of at least {lowest}.")

"""Hosts as whoever starts them sees them: what they are told, how they begin and end.

`host.py` is what runs in them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys

from propeller.errors import ConfigError, did_you_mean

_STDERR = 2


@dataclasses.dataclass(frozen=True)
class HostSettings:
    """What a host is to run, and for whom.

    Attributes:
        endpoint: of the server's ROUTER for workers, `ipc://` or `tcp://`.
        host_id: 16 hex digits, never used twice; its workers are called `<host_id>.<number>`.
        model: what the server calls the model.
        folder: the bundle.
        bundle_hash: of the bundle that is meant; another one is refused.
        num_workers: processes that predict.
        num_threads: threads of each for the math.
        device: `cpu`, or a card such as `gpu:0`.
        bf16: compute in bfloat16 on a CPU.
        warmup_s: after so many seconds no further shape is warmed up.
        warmup_shapes: (rows, length in tokens) of batches that are run before the first real one, the most
            important first.
        curve_keys: folder of the keys by which the server is joined; None: the connection is not encrypted.
        verbose: log what happens, not just what is wrong.

    Raises:
        ConfigError: no worker or no thread.
    """

    endpoint: str
    host_id: str
    model: str
    folder: str
    bundle_hash: str
    num_workers: int = 1
    num_threads: int = 1
    device: str = "cpu"
    bf16: bool = False
    warmup_s: float = 10.0
    warmup_shapes: tuple[tuple[int, int], ...] = ()
    curve_keys: str | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        for name in ("num_workers", "num_threads"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} is {value!r}; expected a whole number of at least 1.")

    @property
    def forks_first(self) -> bool:
        """Whether each worker loads the model itself."""
        return self.device.partition(":")[0] == "gpu"

    def to_json(self) -> str:
        """Writes the settings as the one argument of the host's command."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> HostSettings:
        """Reads what `to_json` wrote.

        Raises:
            ConfigError: it is something else.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        try:
            values = dict(json.loads(text))
            for name in values:
                if name not in known:
                    raise ConfigError(f"A host has no setting {name!r}.{did_you_mean(name, known)}")
            shapes = tuple((int(rows), int(length)) for rows, length in values.pop("warmup_shapes", ()))
            return cls(**values, warmup_shapes=shapes)
        except (ValueError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"The settings of a host cannot be read ({error}): {text:.200}") from error

    def command(self) -> list[str]:
        """The command that runs the host; this module could not, since it loads no Paddle."""
        return [sys.executable, "-m", "propeller.service.worker", self.to_json()]

    def environment(self) -> dict[str, str]:
        """The environment of that command.

        The math libraries read the number of threads while they are loaded. However this process found the
        package, the host finds it, too.
        """
        path = os.pathsep.join(filter(None, sys.path))
        return {
            # Idle threads would otherwise spin for 0.2 s after each batch, on cores that others need.
            "KMP_BLOCKTIME": "1",
            **os.environ,
            # Scikit-learn turns this off in every process that imports it, and in those it starts. Then a
            # forked worker waits for ever for threads that it does not have.
            "KMP_INIT_AT_FORK": "TRUE",
            "OMP_NUM_THREADS": str(self.num_threads),
            "PYTHONPATH": path,
        }


def start_host(settings: HostSettings) -> subprocess.Popen[bytes]:
    """Starts a host that lives as long as `stdin` of what is returned is open.

    What Paddle prints goes to standard error: the standard output of a server is for its one line.
    """
    return subprocess.Popen(
        settings.command(), env=settings.environment(), stdin=subprocess.PIPE, stdout=_STDERR,
        start_new_session=True, bufsize=0,  # what a dead host did not take must not be in the way at the end
    )  # fmt: skip


def end_host(process: subprocess.Popen[bytes]) -> None:
    """Ends a host and its workers, which are a process group, at once if they have not ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()

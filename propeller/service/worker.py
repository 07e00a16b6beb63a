"""A worker: receive -> predict -> finish -> reply. The one module of the service that loads Paddle.

    python -m propeller.service.worker SETTINGS

runs a host (see `propeller/service/host.py`), which forks the workers.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from propeller import cli
from propeller.bundle import ArraySpec, read_bundle
from propeller.errors import ConfigError, ExportError, ServerError
from propeller.processor import log_failure
from propeller.service.child import one_line
from propeller.service.frames import Array, Frame, MessageReader, WireArray, to_frames
from propeller.service.host import ANNOUNCE, STOP, Host
from propeller.service.spawn import HostSettings
from propeller.service.uplink import Uplink

if TYPE_CHECKING:
    from propeller.paddle.inference import Predictor

log = logging.getLogger("propeller")

_MAX_PROBLEM_CHARS = 300


class Model:
    """A bundle with all that its batches need.

    Args:
        settings: they name the bundle.

    Raises:
        ExportError: there is none, it is damaged or another one, or its processor cannot be built.
    """

    def __init__(self, settings: HostSettings):
        self._settings = settings
        self._bundle = bundle = read_bundle(settings.folder)
        if bundle.hash != settings.bundle_hash:
            raise ExportError(
                f"{bundle.folder} holds the bundle {bundle.hash:.12}, but the server serves "
                f"{settings.bundle_hash:.12}. Put the server's there."
            )
        self._processor = None if bundle.metadata.get("processor") is None else bundle.processor()
        self._predictor: Predictor

    def load(self) -> Iterator[None]:
        """Loads the predictor and runs it on the shapes of the settings.

        Raises:
            ExportError: the bundle cannot be run here.
        """
        predictor = _import_predictor()
        yield
        settings, bundle = self._settings, self._bundle
        self._predictor = predictor(
            bundle, device=settings.device, num_threads=settings.num_threads, bf16=settings.bf16
        )
        yield
        probe, _ = bundle.probe()
        for shape in in_time(settings.warmup_shapes, settings.warmup_s):
            self._predictor.predict(warmup_batch(bundle.inputs, probe, bundle.axis_limits, *shape))
            yield

    def work(self, name: str, pipe: socket.socket) -> None:
        """Runs one batch after the other; see `host.Runner`."""
        uplink = Uplink(self._settings.endpoint, self._settings.curve_keys)
        about = {"host": self._settings.host_id, "pid": os.getpid()}
        announce = functools.partial(uplink.announce, "ready", name, about)
        for batch in _batches(uplink, pipe, announce):
            if not uplink.send_frames(self.reply(batch)):
                announce()  # the connection is a new one: the server gives the batch to others
        uplink.close()

    def reply(self, batch: MessageReader) -> list[Frame]:
        """Runs one batch and makes the reply. Whatever goes wrong is the reply, and harms no other batch."""
        started = time.perf_counter()
        try:
            arrays, _, _ = batch.payload({})
            outputs = self._predictor.predict({str(name): values for name, values in arrays})
            answers = self._finish(outputs, batch.header["finish"])
            sent = [WireArray(*output) for output in outputs.items()] if batch.header["outputs"] else []
            header = {"id": batch.id, "kind": "done", "seconds": time.perf_counter() - started}
            return to_frames(header, sent, ("answers", answers), ServerError)
        except Exception as error:
            problem = one_line(error, _MAX_PROBLEM_CHARS)
            log.warning("a batch of %s failed: %s", self._settings.model, problem)
            log_failure(error)
            return to_frames({"id": batch.id, "kind": "failed", "problem": problem}, (), None, ServerError)

    def _finish(self, outputs: Mapping[str, Array], rows: Sequence[int]) -> list[Any]:
        """What the processor makes of some of the rows."""
        if not rows:
            return []
        if self._processor is None:
            raise ExportError(f"{self._bundle.folder} was exported without a processor: it gives no answers.")
        answers = self._processor.finish({name: array[rows] for name, array in outputs.items()})
        if len(answers) != len(rows):
            raise ServerError(f"The processor gave {len(answers)} answers for {len(rows)} rows.")
        return list(answers)


def _batches(uplink: Uplink, pipe: socket.socket, announce: Callable[[], None]) -> Iterator[MessageReader]:
    """Gives batches as they come, until the server or the host says stop, or the host is dead."""
    uplink.watch(pipe.fileno())
    announce()
    while True:
        readable = uplink.wait()
        message = uplink.receive()
        if message is not None:
            if message.header.get("kind") != "batch":  # it is stop
                return
            yield message
        command = _read(pipe) if pipe.fileno() in readable else None
        if command == ANNOUNCE:
            announce()
        elif command is not None:
            # What came before the stop is answered. What a dead host's workers have is given to others.
            while command == STOP and (message := uplink.receive()) is not None:
                if message.header.get("kind") == "batch":
                    yield message
            return


def _read(pipe: socket.socket) -> bytes:
    """What the host says; nothing if it is dead."""
    try:
        return pipe.recv(1)
    except ConnectionResetError:
        return b""


def _import_predictor() -> type[Predictor]:
    """Loads Paddle, which takes SIGTERM for itself, and gives that back."""
    handler = signal.getsignal(signal.SIGTERM)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        from propeller.paddle.inference import Predictor
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return Predictor


def in_time(
    shapes: Sequence[tuple[int, int]], seconds: float, clock: Callable[[], float] = time.monotonic
) -> Iterator[tuple[int, int]]:
    """Gives one shape after the other, until the time is over."""
    end = clock() + seconds
    for shape in shapes:
        if clock() >= end:
            return
        yield shape


def warmup_batch(
    specs: Sequence[ArraySpec],
    probe: Mapping[str, Array],
    axis_limits: Mapping[str, int],
    num_rows: int,
    length: int,
) -> dict[str, Array]:
    """Repeats and cuts a batch, whose values the model takes, to a shape.

    Args:
        specs: the bundle's inputs.
        probe: a batch of them.
        axis_limits: the longest that named axes may be.
        num_rows: size of the first axis.
        length: size of all other axes that vary, or their limit where that is less.
    """
    batch = {}
    for spec in specs:
        array = probe[spec.name]
        for place, axis in enumerate(spec.axes):
            if isinstance(axis, str):
                size = min(length, axis_limits.get(axis, length)) if place else num_rows
                array = array.take(range(size), axis=place, mode="wrap")
        batch[spec.name] = array
    return batch


def main() -> int:
    """Runs the host whose settings are the one argument; returns its exit code.

    Raises:
        ConfigError: the argument is no host's settings.
    """
    if len(sys.argv) != 2:
        raise ConfigError(f"Expected the settings of a host as the one argument, got {len(sys.argv) - 1}.")
    settings = HostSettings.from_json(sys.argv[1])
    # Not as commands do it: the lock of their handler is shared by forked processes, and one that is killed
    # while it writes would keep it.
    logging.basicConfig(
        level=logging.INFO if settings.verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    # Also where it was started by hand. Paddle is not loaded yet.
    os.environ["OMP_NUM_THREADS"] = str(settings.num_threads)
    return Host(settings, Model).run()


if __name__ == "__main__":
    cli.run(main)

"""The ranks of a run: processes that train one model together, each on its rows of every batch.

They are started by `python -m paddle.distributed.launch`, by `--nproc`, or one by one with
`PROPELLER_DISCONFIG`. Tensors go through Paddle (gloo on a CPU, NCCL on a GPU), all else through a
`Channel`.

Gradients are summed here rather than by `paddle.DataParallel`: after the last backward of a step, in few
flat pieces, a missing one counting as zero. So any step strategy works, and parameters that one rank does
not use cannot make the ranks part ways, as they silently do there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import AuthenticationError
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from propeller import atomic, cores
from propeller.channel import Channel
from propeller.errors import ConfigError, Interrupted, RankError
from propeller.paddle.runtime import paddle

log = logging.getLogger("propeller")

# Gradients travel in pieces of about this size, so that one is summed while the next is put together.
_PIECE_BYTES = 32 << 20
# A table with at least so many rows sends only those that some rank has touched: of a vocabulary of 30,522 a
# batch of 32 short sentences has some 500, and the table is half of a small model.
_TABLE_ROWS = 4096
_CHANNEL_KEY = "propeller/channel"


class Ranks:
    """All processes of a run, seen from one of them.

    Args:
        rank: this process, from 0.
        size: how many there are.
        channel: to the others; None if there is none.
    """

    def __init__(self, rank: int = 0, size: int = 1, channel: Channel | None = None):
        self.rank, self.size = rank, size
        self._channel = channel

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes files and runs hooks."""
        return self.rank == 0

    def wait(self) -> None:
        """Returns once every rank has come here.

        Raises:
            RankError: one of them failed or is gone.
        """
        self._exchange(b"")

    def sum(self, values: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Sums float64 `[n]` over the ranks, in their order: all get the same bits."""
        own = np.asarray(values, np.float64)
        total = np.zeros_like(own)
        for payload in self._exchange(own.tobytes()):
            total += np.frombuffer(payload, np.float64)
        return total

    def max(self, values: Sequence[int]) -> list[int]:
        """The largest of the ranks' numbers, one by one."""
        payloads = self._exchange(np.asarray(values, np.int64).tobytes())
        return [int(value) for value in np.max([np.frombuffer(p, np.int64) for p in payloads], axis=0)]

    def gather(self, arrays: Mapping[str, npt.NDArray[Any]]) -> list[dict[str, npt.NDArray[Any]]]:
        """Every rank's arrays, in the order of the ranks; their shapes may differ."""
        if self._channel is None:
            return [dict(arrays)]
        own = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        self.wait()  # what is larger than a socket's buffers must find its readers: see the channel
        return [safetensors.numpy.load(payload) for payload in self._exchange(safetensors.numpy.save(own))]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, which JSON must hold, on all ranks."""
        if self._channel is None:
            return value
        payload = atomic.to_json(value).encode("utf-8") if self.is_main else b""
        return json.loads(self._exchange(payload)[0])

    def check_same(self, value: Any, what: str) -> None:
        """Makes sure that all ranks have the same value, which JSON must hold.

        Raises:
            ConfigError: one has another than rank 0.
        """
        own = hashlib.sha256(atomic.to_json(value).encode("utf-8", "surrogatepass")).digest()
        first, *others = self._exchange(own)
        for rank, other in enumerate(others, start=1):
            if other != first:
                raise ConfigError(f"{what} of rank {rank} differ from those of rank 0. Give all the same.")

    def broadcast_tensors(self, tensors: Sequence[paddle.Tensor]) -> None:
        """Puts rank 0's values into the tensors of all ranks."""
        if self._channel is None:
            return
        self.wait()
        place = paddle.framework._current_expected_place()
        with self._explaining(), paddle.no_grad():
            for tensor in tensors:
                # NCCL takes what lies on its card alone; AdamW keeps two numbers on the CPU.
                there = tensor if tensor.place._equals(place) else tensor._copy_to(place, True)
                if tensor.size:
                    paddle.distributed.broadcast(there, 0)
                if there is not tensor:
                    tensor.copy_(there, True)

    def sum_gradients(self, parameters: Sequence[paddle.Tensor], factor: float) -> None:
        """Makes every gradient `factor` times its sum over the ranks.

        Args:
            parameters: the same on all ranks; some rank has a gradient for each.
            factor: usually 1 by the weight of the whole batch.
        """
        if self._channel is None:
            for parameter in parameters:
                parameter.grad = parameter.grad * factor
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = paddle.zeros_like(parameter)
        tables = [parameter for parameter in parameters if _is_table(parameter)]
        for table in tables:
            self._sum_touched_rows(table, factor)
        pieces = []
        self.wait()  # gloo waits 30 s at most
        for group in _pieces([parameter for parameter in parameters if not _is_table(parameter)]):
            flat = paddle.concat([parameter.grad.flatten() for parameter in group])
            with self._explaining():
                task = paddle.distributed.all_reduce(flat, sync_op=False)
            pieces.append((group, flat, task))
        for group, flat, task in pieces:
            with self._explaining():
                task.wait()
            flat.scale_(factor)
            start = 0
            for parameter in group:
                stop = start + parameter.size
                parameter.grad = flat[start:stop].reshape(parameter.shape)
                start = stop

    def sum_tensor(self, tensor: paddle.Tensor) -> paddle.Tensor:
        """The sum of a tensor over the ranks."""
        total = tensor.clone()
        if self._channel is not None:
            self.wait()
            with self._explaining():
                paddle.distributed.all_reduce(total)
        return total

    def fail(self, error: BaseException) -> None:
        """Tells the others why this rank ends, so that they end too and show it."""
        if self._channel is not None and not isinstance(error, RankError):
            self._channel.fail(str(error) or type(error).__name__)

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Tells the others why, if the block fails on this rank. (A signal is agreed on by all.)"""
        try:
            yield
        except Interrupted:
            raise
        except BaseException as error:
            self.fail(error)
            raise

    def _sum_touched_rows(self, table: paddle.Tensor, factor: float) -> None:
        gradient = np.from_dlpack(table.grad.detach())  # the same memory, to read
        touched = np.packbits(gradient.any(axis=1))
        for payload in self._exchange(touched.tobytes()):
            touched |= np.frombuffer(payload, np.uint8)
        rows = np.flatnonzero(np.unpackbits(touched, count=len(gradient)))
        if not len(rows):  # nothing but zeros, which gloo refuses to sum
            return
        total = paddle.to_tensor(gradient[rows])
        with self._explaining():
            paddle.distributed.all_reduce(total)
        with paddle.no_grad():
            paddle.scatter_(table.grad, paddle.to_tensor(rows), total * factor)

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """Where tensors do not come through, raises what the rank that is the cause says."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            others = self._channel
            raise (RankError(str(error)) if others is None else others.explain(error)) from error

    def _exchange(self, payload: bytes) -> list[bytes]:
        return [payload] if self._channel is None else self._channel.exchange(payload)


def _is_table(parameter: paddle.Tensor) -> bool:
    """Whether its gradient is worth sending by rows: on a GPU looking for them costs more than it saves."""
    return parameter.ndim == 2 and parameter.shape[0] >= _TABLE_ROWS and parameter.place.is_cpu_place()


def _pieces(parameters: Sequence[paddle.Tensor]) -> Iterator[list[paddle.Tensor]]:
    """Cuts the parameters, in order, into groups of one dtype and about `_PIECE_BYTES`."""
    group: list[paddle.Tensor] = []
    size = 0
    for parameter in parameters:
        num_bytes = parameter.size * parameter.element_size()
        if group and (size + num_bytes > _PIECE_BYTES or parameter.dtype != group[0].dtype):
            yield group
            group, size = [], 0
        group.append(parameter)
        size += num_bytes
    if group:
        yield group


_joined: list[Ranks] = []


def join(device: str | None = None) -> Ranks:
    """Joins the ranks that this process was started with; the same object at each call.

    Args:
        device: the run's; `cpu` makes ranks on a machine with GPUs train on its CPU.

    Raises:
        ConfigError: the environment that the launcher sets makes no sense, or a rank is to take a card
            that is not its own.
        RankError: the others cannot be reached.
    """
    if not _joined:
        _joined.append(_join(device))
    return _joined[0]


def _join(device: str | None) -> Ranks:
    rank, size = cores.rank_from_environment()
    if size == 1:
        return Ranks()
    if device is not None and ":" in device:
        raise ConfigError(
            f"device {device!r} names one card, but there are {size} ranks: leave out its number."
        )
    if device == "cpu":
        os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
    log.info("rank %d of %d; they meet at %s", rank, size, _main_host())
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a frame around a flag that it set itself
            paddle.distributed.init_parallel_env()
        store = paddle.base.core.create_or_get_global_tcp_store()
        host = _main_host()
        if rank == 0:
            key = secrets.token_bytes(32)

            def publish(port: int) -> None:
                store.set(_CHANNEL_KEY, json.dumps({"port": port, "key": key.hex()}).encode())

            return Ranks(0, size, Channel.listen(host, size, key, publish))
        found = json.loads(bytes(store.get(_CHANNEL_KEY)))
        return Ranks(rank, size, Channel.connect(host, found["port"], bytes.fromhex(found["key"]), rank))
    except (RuntimeError, OSError, EOFError, AuthenticationError) as error:
        raise RankError(f"rank {rank} of {size} cannot reach the others: {error}") from error


def _main_host() -> str:
    """Host of rank 0, as Paddle's own rendezvous finds it."""
    endpoint = os.environ.get("PADDLE_MASTER") or os.environ["PADDLE_TRAINER_ENDPOINTS"].split(",")[0]
    return os.environ.get("MASTER_ADDR") or endpoint.rpartition(":")[0]

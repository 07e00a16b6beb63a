"""What the ranks of the tests do that exchange values without training; see `rank_jobs`."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np

from propeller.errors import ConfigError, DataError
from propeller.paddle import distributed
from propeller.paddle.runtime import paddle


def same_or_not(report):
    """What all ranks have to agree on, and one that fails where nobody exchanges anything."""
    ranks = distributed.join("cpu")
    ranks.check_same({"seed": 1}, "Seeds")
    try:
        ranks.check_same({"seed": ranks.rank}, "Seeds")
    except ConfigError as error:
        report("differ", str(error))
    ranks.broadcast_tensors([paddle.zeros([0, 3])])  # a buffer that holds nothing
    with ranks.telling():
        if ranks.rank == 1:
            raise ValueError("rank 1 cannot make its model")
        ranks.wait()


def exchange_values(report):
    """What is exchanged besides gradients."""
    ranks = distributed.join("cpu")
    own = ranks.rank
    tensors = [
        paddle.full([3, 2], own + 1.5),
        paddle.full([], own + 2.5),
        paddle.full([4], own + 3, "int64"),
        paddle.arange(6, dtype="float32").reshape([2, 3]).t() + own,
    ]
    ranks.broadcast_tensors(tensors)
    total = paddle.full([2], own + 1.0)
    arrays = {
        "rows": np.arange(own * 3, dtype=np.int64).reshape(own, 3),
        "none": np.zeros((0, 4), np.float32),
        "turned": np.arange(6.0).reshape(2, 3).T + own,
        "yes": np.array([own == 1]),
    }
    ranks.wait()
    return {
        "self": (ranks.rank, ranks.size, ranks.is_main, distributed.join("cpu") is ranks),
        "sum": ranks.sum([0.1 * (own + 1), 1e16 if own == 0 else 1.0, -1e16 * (own == ranks.size - 1)]),
        "max": ranks.max([own, -own, 2**62 + own]),
        "gather": ranks.gather(arrays),
        "broadcast": ranks.broadcast({"of": own, "text": "größe", "nothing": None}),
        "tensors": [tensor.numpy() for tensor in tensors],
        "sum_tensor": ranks.sum_tensor(total).numpy(),
        "its argument": total.numpy(),
    }


def sum_gradients(report, cases):
    """Sums gradients in pieces of so many bytes, tables being what has so many rows.

    Args:
        cases: (bytes, rows, shapes, for each rank the places without a gradient, the rows of each 2-d
            gradient that are not zero).
    """
    found = []
    ranks = distributed.join("cpu")
    for piece_bytes, table_rows, shapes, missing, touched in cases:
        distributed._PIECE_BYTES, distributed._TABLE_ROWS = piece_bytes, table_rows
        own = gradients(ranks.rank, shapes, missing, touched)
        parameters = [paddle.create_parameter(shape, "float32") for shape in shapes]
        for parameter, gradient in zip(parameters, own, strict=True):
            parameter.clear_gradient(set_to_zero=False)
            if gradient is not None:
                parameter.grad = paddle.to_tensor(gradient)
        ranks.sum_gradients(parameters, 0.125)
        found.append([parameter.grad.numpy() for parameter in parameters])
    return found


def gradients(rank, shapes, missing, touched):
    """The gradients of a rank: small whole numbers, whose sums are exact."""
    rng = np.random.default_rng(rank)
    found = []
    for place, shape in enumerate(shapes):
        values = rng.integers(-8, 9, shape).astype(np.float32)
        if touched is not None and len(shape) == 2:
            keep = np.zeros(shape[0], bool)
            keep[touched[rank]] = True
            values = np.where(keep[:, None], values, np.float32(0))
        found.append(None if place in missing[rank] else values)
    return found


def fail_in_the_middle(report, victim, how):
    """One rank ends while the others sum gradients."""
    ranks = distributed.join("cpu")
    parameter = paddle.create_parameter([1000], "float32")
    parameter.grad = paddle.ones([1000])
    if ranks.rank == victim:
        ranks.wait()
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        error = DataError("a label is 7", path="train.tsv", line=3)
        ranks.fail(error)
        raise error
    ranks.sum_gradients([parameter], 1.0)


def wait_long(report, seconds):
    """Rank 1 comes late, later than gloo waits."""
    ranks = distributed.join("cpu")
    parameter = paddle.create_parameter([3], "float32")
    parameter.grad = paddle.ones([3])
    if ranks.rank == 1:
        threading.Event().wait(seconds)
    ranks.sum_gradients([parameter], 1.0)
    return parameter.grad.tolist()

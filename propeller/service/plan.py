"""How a bundle is run: how large its batches are, what is warmed up, which hosts there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from propeller.bundle import Bundle
from propeller.cores import available_cores
from propeller.errors import ConfigError
from propeller.inputs import row_lengths
from propeller.service.settings import ServerSettings, worker_plan
from propeller.service.spawn import HostSettings

# A length that warms up stands for those up to the next one.
_WARM_STEP, _WARM_LENGTHS = 8, 64


class BatchLimits(NamedTuple):
    """What batches are like; see `Batcher`."""

    max_tokens: int
    max_size: int
    length_step: int
    cost: int


def batch_limits(settings: ServerSettings, bundle: Bundle) -> BatchLimits:
    """How a server batches what a bundle is asked.

    On a CPU larger batches gain nothing, and short requests wait longer behind them; reading the weights once
    costs as much as some 16 tokens, in bfloat16 32 (MiniLM on Zen 4; larger models are alike, as weights and
    work grow together). In bfloat16 few shapes are kept ready. A card is filled by more, in round sizes.

    Raises:
        ConfigError: not even the shortest row of the bundle's own batch would fit into a batch.
    """
    if settings.devices == ("cpu",):
        step, cost = (16, 32) if settings.bf16 else (4, 16)
        limits = BatchLimits(1024, settings.max_batch_size, step, cost)
    else:
        limits = BatchLimits(16384, settings.max_batch_size, 8, 512)
    if settings.max_batch_tokens is None:
        return limits._replace(max_tokens=max([limits.max_tokens, *bundle.axis_limits.values()]))
    axis = _length_axis(bundle)
    shortest = 1 if axis is None else row_lengths(bundle.inputs, bundle.probe()[0], axis).min()
    if settings.max_batch_tokens < shortest:
        raise ConfigError(
            f"max_batch_tokens is {settings.max_batch_tokens}, but even the shortest of the rows that "
            f"{bundle.folder} was exported with has {shortest} tokens; expected at least that. Requests with "
            "longer rows than max_batch_tokens are refused."
        )
    return limits._replace(max_tokens=settings.max_batch_tokens)


def host_settings(
    settings: ServerSettings, name: str, bundle: Bundle, endpoint: str, curve_keys: str | None = None
) -> Iterator[HostSettings]:
    """The hosts of a model on this machine, without ids, which each process gets anew.

    Args:
        settings: the server's.
        name: the model's.
        bundle: what is run.
        endpoint: where hosts and workers connect.
        curve_keys: folder of the keys to do so; None if it is this machine.
    """
    for group in worker_plan(settings, available_cores()):
        yield HostSettings(
            endpoint=endpoint,
            host_id="",
            model=name,
            folder=str(bundle.folder),
            bundle_hash=bundle.hash,
            num_workers=group.num_workers,
            num_threads=group.num_threads,
            device=group.device,
            bf16=settings.bf16,
            warmup_s=settings.warmup_s,
            warmup_shapes=tuple(_usual_shapes(bundle, batch_limits(settings, bundle))),
            curve_keys=curve_keys,
            verbose=settings.verbose,
        )


def _usual_shapes(bundle: Bundle, limits: BatchLimits) -> Iterator[tuple[int, int]]:
    """Rows and length of batches to warm up with, the most usual first: single rows and full batches."""
    axis = _length_axis(bundle)
    if axis is None:
        yield from ((1, 1), (limits.max_size, 1))
        return
    longest = min(bundle.axis_limits.get(axis, limits.max_tokens), limits.max_tokens)
    for length in range(_WARM_STEP, min(longest, _WARM_STEP * _WARM_LENGTHS) + 1, _WARM_STEP):
        yield 1, length
        yield max(1, min(limits.max_size, limits.max_tokens // length)), length


def _length_axis(bundle: Bundle) -> str | None:
    """The axis whose size is the length of a row: the second one of an input, where that varies."""
    return next((axis for spec in bundle.inputs for axis in spec.axes[1:2] if isinstance(axis, str)), None)

"""A model under its name, while the bundle behind it is replaced by a newer one.

    read -> new hosts up -> new requests go to them -> the old ones finish what they have -> gone
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path

from propeller.bundle import read_bundle
from propeller.cores import available_cores
from propeller.errors import PropellerError, ServerError
from propeller.service.host import HostSettings
from propeller.service.metrics import Metrics
from propeller.service.pool import Pool
from propeller.service.serving import Answered, Serving, Work
from propeller.service.settings import ServerSettings, worker_plan
from propeller.service.sockets import Sockets

log = logging.getLogger("propeller")

# On a CPU larger batches gain nothing, and short requests wait longer behind them; a card is filled by more.
_CPU_BATCH_TOKENS, _GPU_BATCH_TOKENS = 1024, 16384


class Model:
    """Serves the newest bundle that a path leads to.

    Args:
        name: what clients call it.
        path: a bundle, or a link to it.
        make: builds the pool of a bundle's folder, without starting it; may take its time.
        background: where `make` runs.

    Raises:
        PropellerError: the bundle cannot be served.
    """

    def __init__(self, name: str, path: Path, make: Callable[[Path], Pool], background: Executor):
        self.name, self.path = name, path
        self._make, self._background = make, background
        self.current = make(path)
        self._folder = self.current.serving.bundle.folder
        self._loading: Future[Pool] | None = None
        self._coming: Pool | None = None
        self._leaving: list[Pool] = []

    def start(self) -> None:
        """Starts the hosts."""
        self.current.start()

    def pools(self) -> Iterator[Pool]:
        """All that have processes."""
        yield self.current
        if self._coming is not None:
            yield self._coming
        yield from self._leaving

    def reload(self, *, changed_only: bool = False) -> None:
        """Looks for a new version.

        Args:
            changed_only: only if the path leads elsewhere than before.
        """
        if self._loading is not None or self._coming is not None:
            return
        folder = self.path.resolve()
        if changed_only and folder == self._folder:
            return
        self._folder = folder  # whatever comes of it, it is not tried again and again
        self._loading = self._background.submit(self._make, self.path)

    def tick(self) -> list[tuple[Pool, Answered]]:
        """Goes on with what is under way; to be called a few times a second."""
        if self._loading is not None and self._loading.done():
            loading, self._loading = self._loading, None
            self._loaded(loading)
        coming = self._coming
        if coming is not None and coming.problem is not None:
            log.error("the new version of the model %s cannot be run: %s", self.name, coming.problem)
            coming.stop()
            self._coming = None
            self._leaving.append(coming)
        elif coming is not None and coming.is_ready:
            log.info("the model %s is now %s", self.name, coming.serving.bundle.folder)
            self._leaving.append(self.current)
            self.current, self._coming = coming, None
        answered = [(pool, pool.tick()) for pool in list(self.pools())]
        for pool in list(self._leaving):
            if pool.serving.is_empty and not pool.is_stopping:
                pool.stop()
            if pool.is_stopping and pool.is_gone:
                self._leaving.remove(pool)
        problem = self.current.problem
        if problem is not None:
            error = f"the model {self.name} cannot be run: {problem}"
            answered.append((self.current, self.current.serving.fail_all(lambda ticket: ServerError(error))))
        return answered

    def gauges(self) -> Mapping[str, float]:
        """What the metrics show of this moment."""
        counters, (workers, idle) = self.current.serving.counters, self.current.counts
        return {
            "queued_rows": counters.queued_rows,
            "running_rows": counters.running_rows,
            "workers": workers,
            "idle_workers": idle,
        }

    def _loaded(self, loading: Future[Pool]) -> None:
        try:
            pool = loading.result()
        except (PropellerError, OSError) as error:
            log.error("the new version of the model %s cannot be served: %s", self.name, error)
            return
        if pool.serving.bundle.hash == self.current.serving.bundle.hash:
            log.info("the model %s is as it was", self.name)
            return
        self._coming = pool
        pool.start()


def make_pool(settings: ServerSettings, name: str, sockets: Sockets, metrics: Metrics, path: Path) -> Pool:
    """Reads a bundle and makes its pool, which is not started; may be called in a thread.

    Raises:
        PropellerError: the bundle cannot be served.
    """
    bundle = read_bundle(path)
    tokens = settings.max_batch_tokens
    if tokens is None:
        tokens = _CPU_BATCH_TOKENS if settings.devices == ("cpu",) else _GPU_BATCH_TOKENS
        tokens = max([tokens, *bundle.axis_limits.values()])
    serving = Serving(
        name,
        bundle,
        max_batch_tokens=tokens,
        max_batch_size=settings.max_batch_size,
        max_queue_rows=settings.max_queue_rows,
        max_wait_s=settings.max_wait_ms / 1000.0,
        max_message_bytes=settings.max_message_bytes,
    )
    hosts = [
        HostSettings(
            endpoint=sockets.worker_endpoints[0],
            host_id="",  # the pool gives each process a new one
            model=name,
            folder=str(bundle.folder),
            bundle_hash=bundle.hash,
            num_workers=group.num_workers,
            num_threads=group.num_threads,
            device=group.device,
            bf16=settings.bf16,
            warmup_s=settings.warmup_s,
            warmup_shapes=serving.usual_shapes(),
            verbose=settings.verbose,
        )
        for group in worker_plan(settings, available_cores())
    ]

    def note(work: Work, seconds: float) -> None:
        rows = len(work.batch.rows)
        metrics.batch(name, rows, work.batch.tokens, rows * work.batch.padded_length, seconds)

    return Pool(
        serving,
        hosts,
        sockets.to_worker,
        batch_timeout_s=settings.batch_timeout_s,
        on_restart=functools.partial(metrics.worker_restarted, name),
        on_batch=note,
    )

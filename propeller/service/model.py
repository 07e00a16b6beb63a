"""A model under its name, while the bundle behind it is replaced by a newer one.

    read -> new hosts up -> new requests go to them -> the old ones finish what they have -> gone
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path

from propeller.bundle import read_bundle
from propeller.errors import Overloaded, PropellerError
from propeller.service.metrics import Metrics
from propeller.service.plan import batch_limits, host_settings
from propeller.service.pool import Pool
from propeller.service.serving import Answered, Serving, Work
from propeller.service.settings import ServerSettings
from propeller.service.sockets import Sockets

log = logging.getLogger("propeller")

# Between tries to read a bundle again whose workers are gone, such as one that is just being replaced.
_AGAIN_S = 5.0


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
        self._folder, self._again_at = self.current.serving.bundle.folder, 0.0
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

    @property
    def problem(self) -> str | None:
        """Why no request can be run at this moment; None if one can."""
        if self.current.counts[0]:
            return None
        return f"the model {self.name} has no worker now ({self.current.problem or 'they start again'})"

    def reload(self, *, changed_only: bool = False) -> None:
        """Looks for a new version.

        Args:
            changed_only: only if the path leads elsewhere than before, or the version that it led to cannot
                be run any more, as when its folder is gone.
        """
        if self._loading is not None or self._coming is not None:
            return
        folder = Path(os.path.realpath(self.path))  # `resolve` raises where links go round in a circle
        again = self.current.is_lost and time.monotonic() >= self._again_at
        if changed_only and folder == self._folder and not again:
            return
        # Whatever comes of it, it is not tried again and again.
        self._folder, self._again_at = folder, time.monotonic() + _AGAIN_S
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
        for pool in list(self.pools()):
            if pool.is_lost:
                error = Overloaded(f"the model {self.name} cannot be run now: {pool.problem}", _AGAIN_S * 1e3)
                answered.append((pool, pool.serving.fail_all(error, joining=False)))
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
        except Exception:  # a processor is anybody's code
            log.exception("the new version of the model %s cannot be served", self.name)
            return
        now, new = self.current.serving.bundle, pool.serving.bundle
        if (new.hash, new.folder) == (now.hash, now.folder):
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
    limits = batch_limits(settings, bundle)
    serving = Serving(
        name,
        bundle,
        limits,
        max_queue_rows=settings.max_queue_rows,
        max_wait_s=settings.max_wait_ms / 1000.0,
        max_message_bytes=settings.max_message_bytes,
    )

    def note(work: Work, seconds: float) -> None:
        rows = len(work.batch.rows)
        metrics.batch(name, rows, work.batch.tokens, rows * work.batch.padded_length, seconds)

    return Pool(
        serving,
        list(host_settings(settings, name, bundle, sockets.worker_endpoints[0])),
        sockets.to_worker,
        batch_timeout_s=settings.batch_timeout_s,
        on_restart=functools.partial(metrics.worker_restarted, name),
        on_batch=note,
    )

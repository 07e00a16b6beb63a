"""What a server counts and measures, and where Prometheus and health checks read it.

No client can make a label value: a model that is not served has an empty one, a code, kind or reason that is
not on its list is counted as `other`.
"""

from __future__ import annotations

import logging
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from propeller.errors import (
    BadRequest,
    ConfigError,
    DeadlineExceeded,
    Draining,
    Overloaded,
    ServerError,
    WorkerDied,
)
from propeller.service.wire import KINDS

log = logging.getLogger("propeller")

OK = "ok"
OTHER = "other"
CODES = (
    OK,
    *(error.code for error in (BadRequest, Overloaded, DeadlineExceeded, WorkerDied, ServerError, Draining)),
    OTHER,
)
# Why a message came to nothing: it could not be read, so that nobody could be answered; its sender was gone
# when the answer was there; or it was a worker's, about a batch that was done or given to another one.
DROP_REASONS = ("unreadable", "client_gone", "late", OTHER)

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_ROWS = tuple(float(2**power) for power in range(10))  # to 512
_TOKENS = tuple(float(2**power) for power in range(4, 17))  # 16 to 65536
_GAUGES = {
    "queued_rows": "Rows that wait for a batch.",
    "running_rows": "Rows in batches that run.",
    "workers": "Workers that are ready.",
    "idle_workers": "Workers that have nothing to do.",
}


class Metrics:
    """The metrics of one server, in a registry of their own.

    Every method takes well under 10 microseconds. The registry also has the server process's memory, open
    files and processor time.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        kinds = Counter("propeller_received_requests", "Requests that came in.", ["kind"], registry=registry)
        self._received = {kind: kinds.labels(kind) for kind in (*KINDS, OTHER)}
        reasons = Counter(
            "propeller_dropped_messages", "Messages that came to nothing.", ["reason"], registry=registry
        )
        self._dropped = {reason: reasons.labels(reason) for reason in DROP_REASONS}
        self._families = _Families(registry)
        self._none = _Model(self._families, "")
        self._models: dict[str, _Model] = {}
        self._gauges = _Gauges()
        registry.register(self._gauges)

    def received(self, kind: str) -> None:
        """A request of this kind came in."""
        self._received.get(kind, self._received[OTHER]).inc()

    def answered(self, model: str | None, code: str, seconds: float) -> None:
        """A request got its reply.

        Args:
            model: None, or any other name, for a request for none of the models.
            code: `ok` or the error's.
            seconds: since it came in; only those of results go into the histogram, since errors are quick.
        """
        own = self._model(model)
        own.requests.get(code, own.requests[OTHER]).inc()
        if code == OK:
            own.request_seconds.observe(seconds)

    def dropped(self, reason: str) -> None:
        """A message came to nothing, for one of `DROP_REASONS`."""
        self._dropped.get(reason, self._dropped[OTHER]).inc()

    def batch(self, model: str, rows: int, tokens: int, padded_tokens: int, seconds: float) -> None:
        """A batch was run.

        Args:
            model: the model it was for.
            rows: in it.
            tokens: of all rows, without padding.
            padded_tokens: the same with padding.
            seconds: that the worker took.
        """
        own = self._model(model)
        own.batch_rows.observe(rows)
        own.batch_tokens.observe(padded_tokens)
        own.tokens.inc(tokens)
        own.padding_tokens.inc(padded_tokens - tokens)
        own.predict_seconds.observe(seconds)

    def worker_restarted(self, model: str) -> None:
        """A worker of the model died and another one is started."""
        self._model(model).worker_restarts.inc()

    def watch(self, model: str, gauges: Callable[[], Mapping[str, float]]) -> None:
        """Makes a model known, or has its gauges read elsewhere from now on; what was counted stays.

        Args:
            model: its name.
            gauges: gives `queued_rows`, `running_rows`, `workers` and `idle_workers` of this moment. It is
                called from other threads, so it must only read.
        """
        if model not in self._models:
            self._models[model] = _Model(self._families, model)
        self._gauges.sources[model] = gauges

    def forget(self, model: str) -> None:
        """Takes out all series of a model that is served no more; does nothing if it is not known."""
        self._gauges.sources.pop(model, None)
        if self._models.pop(model, None) is not None:
            self._families.remove(model)

    def _model(self, model: str | None) -> _Model:
        return self._models.get(model, self._none) if model is not None else self._none


class _Families:
    """The metrics that each model has a child of."""

    def __init__(self, registry: CollectorRegistry):
        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"propeller_{name}", what, ["model", *labels], registry=registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"propeller_{name}", what, ["model"], buckets=buckets, registry=registry)

        self.requests = counter("requests", "Requests that were answered, by ok or error.", "code")
        self.tokens = counter("tokens", "Tokens run, without padding.")
        self.padding_tokens = counter("padding_tokens", "Tokens of padding run.")
        self.worker_restarts = counter("worker_restarts", "Workers that died and were replaced.")
        self.request_seconds = histogram(
            "request_seconds", "From a request to its result, seconds.", _SECONDS
        )
        self.predict_seconds = histogram("predict_seconds", "Time of a batch in its worker.", _SECONDS)
        self.batch_rows = histogram("batch_rows", "Rows of a batch.", _ROWS)
        self.batch_tokens = histogram("batch_tokens", "Tokens of a batch, padding included.", _TOKENS)

    def remove(self, model: str) -> None:
        for code in CODES:
            self.requests.remove(model, code)
        for counter in (self.tokens, self.padding_tokens, self.worker_restarts):
            counter.remove(model)
        for histogram in (self.request_seconds, self.predict_seconds, self.batch_rows, self.batch_tokens):
            histogram.remove(model)


class _Model:
    """The children of one model, found once: looking them up takes longer than counting."""

    def __init__(self, families: _Families, model: str):
        self.requests = {code: families.requests.labels(model, code) for code in CODES}
        self.tokens = families.tokens.labels(model)
        self.padding_tokens = families.padding_tokens.labels(model)
        self.worker_restarts = families.worker_restarts.labels(model)
        self.request_seconds = families.request_seconds.labels(model)
        self.predict_seconds = families.predict_seconds.labels(model)
        self.batch_rows = families.batch_rows.labels(model)
        self.batch_tokens = families.batch_tokens.labels(model)


class _Gauges(Collector):
    """Asks for the gauges when they are read, so that they cost nothing in between."""

    def __init__(self) -> None:
        self.sources: dict[str, Callable[[], Mapping[str, float]]] = {}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        found = {model: source() for model, source in list(self.sources.items())}
        for name, what in _GAUGES.items():
            family = GaugeMetricFamily(f"propeller_{name}", what, labels=["model"])
            for model, values in found.items():
                family.add_metric([model], values[name])
            yield family


class HttpServer(ThreadingHTTPServer):
    """Answers `/metrics` and `/health` in threads of its own; made by `serve_http`.

    Whoever is slow or opens many connections gets nothing and holds nobody up: a connection lives a few
    seconds, and there are only so many of them.

    Attributes:
        port: the port it listens on.
        url: by which this machine reaches it.
    """

    daemon_threads = True
    # Python 3.13 and later would share the port with whoever else asks for that.
    allow_reuse_port = False
    request_queue_size = 64

    _max_connections = 64
    _max_seconds = 10.0
    _poll_seconds = 0.25

    def __init__(self, metrics: Metrics, health: Callable[[], str], host: str, port: int):
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self.address_family = family
            self._metrics, self._health = metrics, health
            self._open: dict[Any, float] = {}  # connection -> when it was opened
            super().__init__(address[:2], _Handler)  # type: ignore[arg-type]
        except (OSError, OverflowError, UnicodeError) as error:
            raise ConfigError(
                f"Metrics cannot be served on {host!r}, port {port}: {error}. Name an address of this "
                "machine and a free port, or port 0 for any."
            ) from error
        self.port: int = self.server_address[1]
        name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(address[0]), str(address[0]))
        self.url = f"http://{f'[{name}]' if ':' in name else name}:{self.port}"
        self._thread = threading.Thread(
            target=self.serve_forever, args=(self._poll_seconds,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops listening; does nothing the second time."""
        self.shutdown()
        self._thread.join()
        self.server_close()

    def answer(self, path: str, accept: str) -> tuple[HTTPStatus, str, bytes]:
        """What stands at a path: status, content type, content."""
        text = "text/plain; charset=utf-8"
        if path == "/metrics":
            encode, content_type = choose_encoder(accept)
            return HTTPStatus.OK, content_type, encode(self._metrics.registry)
        if path == "/health":
            health = self._health()
            status = HTTPStatus.OK if health == "ready" else HTTPStatus.SERVICE_UNAVAILABLE
            return status, text, f"{health}\n".encode()
        return HTTPStatus.NOT_FOUND, text, b"There is /metrics and /health.\n"

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the name service for this host's name.
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._open) >= self._max_connections:
            self.shutdown_request(request)
            return
        self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        oldest = time.monotonic() - self._max_seconds
        for connection, opened in list(self._open.items()):
            if opened < oldest:
                try:
                    connection.shutdown(socket.SHUT_RDWR)  # its thread wakes up and closes it
                except OSError as error:  # the client went first
                    log.debug("metrics: %s", error)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):  # those are clients that went away
            log.error("metrics: a request failed", exc_info=error)


class _Handler(BaseHTTPRequestHandler):
    """One request; the connection ends with it."""

    server: HttpServer
    timeout = 5.0  # seconds for a read or write
    server_version, sys_version = "propeller", ""

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def _answer(self, with_content: bool) -> None:
        path = self.path.partition("?")[0]
        status, content_type, content = self.server.answer(path, self.headers.get("Accept", ""))
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps quiet: scrapes and probes come every few seconds."""


def serve_http(
    metrics: Metrics, health: Callable[[], str], host: str = "127.0.0.1", port: int = 0
) -> HttpServer:
    """Serves `/metrics` and `/health` over HTTP until it is closed.

    Args:
        metrics: what `/metrics` shows, as Prometheus or OpenMetrics text.
        health: gives `starting`, `ready` or `draining`, perhaps with lines that say why, which is `/health`'s
            answer: status 200 for `ready`, 503 for all else. It is called from other threads.
        host: the address to listen on.
        port: 0 takes a free one.

    Raises:
        ConfigError: it cannot listen there.
    """
    return HttpServer(metrics, health, host, port)

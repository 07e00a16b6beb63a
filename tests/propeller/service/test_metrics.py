"""Metrics, and the HTTP server that shows them."""

from __future__ import annotations

import http.client
import logging
import re
import select
import socket
import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from propeller.errors import ConfigError
from propeller.service import metrics as module
from propeller.service.metrics import CODES, HttpServer, Metrics, serve_http

GAUGES = {"queued_rows": 3, "running_rows": 64, "workers": 2, "idle_workers": 1}


@pytest.fixture
def metrics():
    metrics = Metrics()
    metrics.watch("default", lambda: GAUGES)
    return metrics


@pytest.fixture
def serve(metrics):
    """Starts servers that are closed at the end."""
    opened = []

    def start(health=lambda: "ready", host="127.0.0.1", port=0):
        opened.append(serve_http(metrics, health, host, port))
        return opened[-1]

    yield start
    for server in opened:
        server.close()


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"propeller_{name}", labels)


def labels(metrics):
    """Every label value there is."""
    families = list(metrics.registry.collect())
    return {pair for family in families for sample in family.samples for pair in sample.labels.items()}


def fetch(server, path="/metrics", method="GET", headers=None, host="127.0.0.1"):
    connection = http.client.HTTPConnection(host, server.port, timeout=10)
    try:
        connection.request(method, path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()
    finally:
        connection.close()


def test_counts(metrics):
    metrics.received("predict")
    metrics.received("ping")
    metrics.answered("default", "ok", 0.015)
    metrics.answered("default", "ok", 3.0)
    metrics.answered("default", "overloaded", 0.0001)
    metrics.dropped("late")
    metrics.batch("default", rows=3, tokens=40, padded_tokens=48, seconds=0.004)
    metrics.worker_restarted("default")
    assert value(metrics, "received_requests_total", kind="predict") == 1
    assert value(metrics, "received_requests_total", kind="ping") == 1
    assert value(metrics, "requests_total", model="default", code="ok") == 2
    assert value(metrics, "requests_total", model="default", code="overloaded") == 1
    assert value(metrics, "requests_total", model="default", code="worker_died") == 0
    assert value(metrics, "dropped_messages_total", reason="late") == 1
    assert value(metrics, "tokens_total", model="default") == 40
    assert value(metrics, "padding_tokens_total", model="default") == 8
    assert value(metrics, "worker_restarts_total", model="default") == 1
    for name, count, total in [
        ("request_seconds", 2, 3.015),
        ("predict_seconds", 1, 0.004),
        ("batch_rows", 1, 3),
        ("batch_tokens", 1, 48),
    ]:
        assert value(metrics, f"{name}_count", model="default") == count
        assert value(metrics, f"{name}_sum", model="default") == pytest.approx(total)
    for name, bound, count in [
        ("request_seconds", "0.01", 0),
        ("request_seconds", "0.02", 1),
        ("request_seconds", "5.0", 2),
        ("batch_rows", "2.0", 0),
        ("batch_rows", "4.0", 1),
        ("batch_tokens", "32.0", 0),
        ("batch_tokens", "64.0", 1),
    ]:
        assert value(metrics, f"{name}_bucket", model="default", le=bound) == count


def test_buckets(metrics):
    bounds = {
        name: [
            float(sample.labels["le"])
            for family in metrics.registry.collect()
            for sample in family.samples
            if sample.name == f"propeller_{name}_bucket" and sample.labels["model"] == "default"
        ]
        for name in ("request_seconds", "batch_rows")
    }
    assert bounds["request_seconds"][0] == 0.001 and bounds["request_seconds"][-2] == 60
    assert bounds["batch_rows"] == [*(2.0**power for power in range(10)), float("inf")]


def test_nobody_can_make_label_values(metrics):
    before = labels(metrics)
    for text in ("x", "../", "\n", "ok ", "", "x" * 10_000):
        metrics.received(text)
        metrics.dropped(text)
        metrics.answered(text, text, 0.1)
        metrics.answered("default", text, 0.1)
        metrics.batch(text, 1, 1, 1, 0.1)
        metrics.worker_restarted(text)
        metrics.forget(text)
    metrics.answered(None, "bad_request", 0.1)
    assert labels(metrics) == before
    assert value(metrics, "received_requests_total", kind="other") == 6
    assert value(metrics, "dropped_messages_total", reason="other") == 6
    assert value(metrics, "requests_total", model="", code="other") == 6
    assert value(metrics, "requests_total", model="default", code="other") == 6
    assert value(metrics, "requests_total", model="", code="bad_request") == 1


def test_every_error_a_server_answers_has_a_code():
    answered = {"bad_request", "overloaded", "deadline_exceeded", "worker_died", "server_error", "draining"}
    assert set(CODES) == answered | {"ok", "other"}


def test_gauges_are_read_when_they_are_shown(metrics):
    figures = dict(GAUGES)
    metrics.watch("second", lambda: figures)
    figures["queued_rows"] = 7
    assert value(metrics, "queued_rows", model="second") == 7
    assert value(metrics, "queued_rows", model="default") == 3
    assert [value(metrics, name, model="default") for name in GAUGES] == [3, 64, 2, 1]


def test_a_new_version_of_a_model_goes_on_counting(metrics):
    metrics.answered("default", "ok", 0.1)
    metrics.watch("default", lambda: {**GAUGES, "workers": 5})
    metrics.answered("default", "ok", 0.1)
    assert value(metrics, "requests_total", model="default", code="ok") == 2
    assert value(metrics, "workers", model="default") == 5


def test_forget(metrics):
    metrics.watch("second", lambda: GAUGES)
    metrics.answered("second", "ok", 0.1)
    metrics.forget("second")
    assert ("model", "second") not in labels(metrics)
    metrics.answered("second", "ok", 0.1)  # a late one
    assert value(metrics, "requests_total", model="", code="ok") == 1
    metrics.watch("second", lambda: GAUGES)
    assert value(metrics, "requests_total", model="second", code="ok") == 0


def test_two_servers_in_one_process_count_apart(metrics):
    other = Metrics()
    metrics.received("predict")
    assert value(other, "received_requests_total", kind="predict") == 0


def test_metrics_over_http(metrics, serve):
    metrics.answered("default", "ok", 0.1)
    status, headers, text = fetch(serve())
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert int(headers["Content-Length"]) == len(text)
    assert 'propeller_requests_total{code="ok",model="default"} 1.0\n' in text
    names = {family.name for family in text_string_to_metric_families(text)}
    assert {"propeller_requests", "propeller_workers", "process_resident_memory_bytes"} <= names
    server = serve()
    status, headers, text = fetch(server, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert status == 200 and headers["Content-Type"].startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")


def test_health_over_http(serve):
    state = ["starting"]
    server = serve(health=lambda: state[0])
    found = []
    for text in ("starting", "ready", "draining"):
        state[0] = text
        status, headers, content = fetch(server, "/health")
        assert headers["Content-Type"] == "text/plain; charset=utf-8"
        found.append((status, content))
    assert found == [(503, "starting\n"), (200, "ready\n"), (503, "draining\n")]
    assert fetch(server, "/health?from=probe")[0] == 503


def test_other_paths_and_methods(serve, capfd):
    server = serve()
    assert fetch(server, "/")[::2] == (404, "There is /metrics and /health.\n")
    assert fetch(server, "/health/../metrics")[0] == 404
    assert fetch(server, "/metrics", "POST")[0] == 501
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b"".join(iter(lambda: received(connection), b""))
    assert answer.startswith(b"HTTP/1.0 200 ") and answer.endswith(b"Content-Length: 6\r\n\r\n")
    assert b"Python" not in answer
    assert capfd.readouterr() == ("", ""), "requests are not logged"


def test_a_failure_is_logged_and_the_next_request_answered(metrics, serve, caplog):
    server = serve()
    metrics.watch("second", lambda: {})
    with pytest.raises(http.client.RemoteDisconnected):
        fetch(server)
    metrics.forget("second")
    assert fetch(server)[0] == 200
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and record.exc_info[0] is KeyError


def test_a_port_in_use(serve):
    first = serve()
    with pytest.raises(ConfigError, match=rf"on '127.0.0.1', port {first.port}: .*in use.* a free port"):
        serve(port=first.port)
    with pytest.raises(ConfigError, match=r"on 'no such host', port 0: .*Name an address of this machine"):
        serve(host="no such host")
    assert fetch(first)[0] == 200


def test_ipv6(serve):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    server = serve(host="::1")
    assert fetch(server, "/health", host="::1")[0] == 200


def test_close_frees_the_port(serve):
    server = serve()
    server.close()
    again = serve(port=server.port)
    assert again.port == server.port
    again.close()
    again.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), 10)


def slow_client(server):
    """A connection that has sent half a request."""
    connection = socket.create_connection(("127.0.0.1", server.port), 10)
    connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Slow: ")
    return connection


def test_a_slow_client_is_cut_off(serve, monkeypatch, caplog):
    monkeypatch.setattr(HttpServer, "_max_seconds", 0.3)
    server = serve()
    with slow_client(server) as slow:
        assert fetch(server, "/health")[0] == 200
        deadline = time.monotonic() + 10
        # A byte whenever 20 ms have passed without an answer, so that no single read takes long.
        while not select.select([slow], [], [], 0.02)[0]:
            assert time.monotonic() < deadline, "it is held on to"
            slow.sendall(b"x")
        assert not b"".join(iter(lambda: received(slow), b"")), "it got an answer"
    assert fetch(server, "/health")[0] == 200
    assert caplog.records == []


def received(connection):
    try:
        return connection.recv(1000)
    except ConnectionResetError:
        return b""


def test_an_idle_client_is_cut_off(serve, monkeypatch):
    assert 0 < module._Handler.timeout < HttpServer._max_seconds <= 30
    monkeypatch.setattr(module._Handler, "timeout", 0.2)
    with slow_client(serve()) as slow:
        assert slow.recv(1) == b""


def test_connections_are_bounded(serve, monkeypatch):
    monkeypatch.setattr(HttpServer, "_max_connections", 3)
    server = serve()
    threads = threading.active_count()
    held = [slow_client(server) for _ in range(3)]
    try:
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            fetch(server, "/health")
        assert threading.active_count() <= threads + 3
    finally:
        for connection in held:
            connection.close()
    for _ in range(1000):  # until the three threads have noticed
        try:
            assert fetch(server, "/health")[0] == 200
            break
        except (http.client.RemoteDisconnected, ConnectionError):
            continue
    else:
        pytest.fail("the connections were not given back")


def test_scrapes_while_models_come_and_go(metrics, serve):
    server = serve()
    stop = threading.Event()

    def change():
        while not stop.is_set():
            metrics.watch("second", lambda: GAUGES)
            metrics.batch("second", 1, 10, 16, 0.1)
            metrics.forget("second")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(20):
            status, _, text = fetch(server)
            assert status == 200
            assert re.search(r'^propeller_workers\{model="default"\} 2.0$', text, re.MULTILINE)
    finally:
        stop.set()
        thread.join()

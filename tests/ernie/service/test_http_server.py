"""The HTTP front: the real process, the real `openai` client, over real sockets."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import http.client
import http.server
import json
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from ernie.service import http_server
from propeller.errors import BadRequest, ConfigError
from propeller.service.client import AsyncInferenceClient

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
fastapi = pytest.importorskip("fastapi")
pydantic = pytest.importorskip("pydantic")

from ernie.service import openai_api  # noqa: E402
from ernie.service.openai_api import MAX_INPUTS, MAX_RUNNING, EmbeddingsRequest  # noqa: E402

KEY = "secret-key"
METRICS = b"# TYPE propeller_requests_total counter\npropeller_requests_total 3.0\n"


class Metrics(http.server.BaseHTTPRequestHandler):
    """The server's own metrics, where the front looks for them."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("content-type", "text/plain; version=0.0.4; charset=utf-8")
        self.end_headers()
        self.wfile.write(METRICS)

    def log_message(self, *args):
        """Says nothing."""


@pytest.fixture(scope="module")
def metrics_url():
    with http.server.HTTPServer(("127.0.0.1", 0), Metrics) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Front:
    """The process, started by the command line that the encoder server uses."""

    def __init__(self, toy, metrics_url, environment, root, **options):
        self.port = free_port()
        command = http_server.command("127.0.0.1", self.port, **options)
        if metrics_url is None:
            place = command.index("--metrics")
            del command[place : place + 2]
        values = {"address": f"tcp://127.0.0.1:{toy.port}", "metrics": metrics_url}
        self.process = subprocess.Popen(
            [word.format(**values) for word in command],
            env=environment,
            cwd=root,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        while self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except ConnectionRefusedError:
                time.sleep(0.02)
        raise AssertionError(self.process.stderr.read())

    def ask(self, method, path, body=None, headers=None):
        """Status, headers and parsed body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"authorization": f"Bearer {KEY}".encode(), **(headers or {})}
        body = json.dumps(body).encode() if isinstance(body, dict | list) else body
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if answer.headers.get_content_type() == "application/json":
            content = json.loads(content)
        return answer.status, answer.headers, content

    def embed(self, **body):
        """Asks for embeddings."""
        return self.ask("POST", "/v1/embeddings", {"model": "toy", **body})

    def stop(self):
        """Ends it as a server does; returns its exit status and what it logged."""
        self.process.terminate()
        _, told = self.process.communicate(timeout=30)
        return self.process.returncode, told.decode()


@pytest.fixture(scope="module")
def shared_toy(toy_class):
    with toy_class() as toy:
        yield toy


@pytest.fixture(scope="module")
def environment(clean_environment):
    return {**clean_environment, http_server.KEY_VARIABLE: KEY}


@pytest.fixture(scope="module")
def front(shared_toy, metrics_url, environment, root):
    front = Front(shared_toy, metrics_url, environment, root)
    yield front
    assert front.stop() == (0, "")


@pytest.fixture
def client(front):
    with openai.OpenAI(api_key=KEY, base_url=f"http://127.0.0.1:{front.port}/v1", max_retries=0) as client:
        yield client


TEXTS = ["a friendly place", "never again", "\N{GRINNING FACE} w1 \0", "w1 " * 30]


@pytest.mark.parametrize("form", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_the_real_client(shared_toy, client, form):
    answer = client.embeddings.create(model="toy", input=TEXTS, **form)
    assert [item.index for item in answer.data] == [0, 1, 2, 3]
    vectors = [item.embedding for item in answer.data]
    if form.get("encoding_format") == "base64":
        vectors = [np.frombuffer(base64.b64decode(text), "<f4") for text in vectors]
    np.testing.assert_array_equal(np.array(vectors, np.float32), shared_toy.vectors(TEXTS))
    assert answer.model == "toy" and answer.object == "list"
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 5 + 4 + 4 + 16


def test_one_text(shared_toy, client):
    answer = client.embeddings.create(model="toy", input="never again", user="somebody")
    np.testing.assert_array_equal(
        np.array([answer.data[0].embedding], np.float32), shared_toy.vectors(["never again"])
    )


def test_token_ids(shared_toy, client):
    encodings = shared_toy.tokenizer.encode_batch(["a friendly place", "never"])
    rows = [encoding.input_ids.tolist() for encoding in encodings]
    answer = client.embeddings.create(model="toy", input=rows)
    expected = shared_toy.vectors(["a friendly place", "never"])
    np.testing.assert_array_equal(np.array([item.embedding for item in answer.data], np.float32), expected)
    assert answer.usage.prompt_tokens == 8
    answer = client.embeddings.create(model="toy", input=rows[1])
    np.testing.assert_array_equal(np.array([answer.data[0].embedding], np.float32), expected[1:])


def test_dimensions(shared_toy, client):
    answer = client.embeddings.create(model="toy", input=TEXTS, dimensions=3)
    expected = shared_toy.vectors(TEXTS)[:, :3]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose([item.embedding for item in answer.data], expected, rtol=1e-6)
    with pytest.raises(openai.BadRequestError, match="dimensions is 9; expected 1 to 8"):
        client.embeddings.create(model="toy", input=TEXTS, dimensions=9)


def test_a_prompt(shared_toy, client):
    answer = client.embeddings.create(model="toy", input=["never"], extra_body={"prompt": "query"})
    np.testing.assert_array_equal(
        np.array([answer.data[0].embedding], np.float32), shared_toy.vectors(["never"], "query")
    )


def test_many_texts_by_many_callers(shared_toy, client):
    def embed(number):
        texts = [f"w{number} w{place % 200}" for place in range(2048)]
        answer = client.embeddings.create(model="toy", input=texts)
        return texts, np.array([item.embedding for item in answer.data], np.float32)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for texts, vectors in pool.map(embed, range(4)):
            np.testing.assert_array_equal(vectors, shared_toy.vectors(texts))


def test_models(client):
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError, match="'gpt' does not exist here; expected 'toy'"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="gpt", input="a")
    assert caught.value.code == "model_not_found" and caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("text", "error", "code"),
    [
        ("!bad", openai.BadRequestError, "bad_request"),
        ("!full", openai.RateLimitError, "overloaded"),
        ("!late", openai.InternalServerError, "deadline_exceeded"),
        ("!died", openai.InternalServerError, "worker_died"),
    ],
)
def test_errors_of_the_server(toy, metrics_url, environment, root, front, client, text, error, code):
    if code == "overloaded":  # a front that does not wait so long
        impatient = Front(toy, metrics_url, environment, root, timeout=0.5)
        status, headers, body = impatient.embed(input=text)
        assert impatient.stop() == (0, "")
        assert (status, headers["retry-after"]) == (429, "2")
        assert body["error"]["type"] == "rate_limit_error" and body["error"]["code"] == code
        return
    with pytest.raises(error) as caught:
        client.embeddings.create(model="toy", input=text)
    assert caught.value.code == code
    assert caught.value.status_code == {"bad_request": 400, "deadline_exceeded": 504}.get(code, 500)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": ""}, "input is empty"),
        ({"input": []}, "input is empty"),
        ({"input": ["a", ""]}, r"input[1] is empty"),
        ({"input": [[1], []]}, r"input[1] is empty"),
        ({"input": ["a"] * 2049}, "input: at most 2048 texts, or rows of token ids, are taken"),
        ({"input": [[2]] * 2049}, "input: at most 2048 texts"),
        ({"input": 3}, "input: expected a string, a list of strings, a list of token ids"),
        ({"input": ["a", 3]}, "input: expected a string"),
        ({"input": [1.5]}, "input: expected a string"),
        ({"input": [10**30]}, "input"),
        ({"input": [2, 99_999, 3]}, "an id is beyond 218"),
        ({}, "input: Field required"),
        ({"input": "a", "model": None}, "model: "),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format: "),
        ({"input": "a", "dimensions": 0}, "dimensions is 0"),
        ({"input": "a", "dimensions": "3"}, "dimensions: "),
        ({"input": [1], "prompt": "query"}, "input has token ids"),
    ],
)
def test_bad_requests(front, body, message):
    status, _, answer = front.embed(**body)
    assert status == 400
    assert message in answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("item", [{}, None, [None], ["a", None]])
def test_what_is_wrong_is_noted_once(item):
    """Not for each of a million items."""
    with pytest.raises(pydantic.ValidationError) as caught:
        EmbeddingsRequest.model_validate({"input": [item] * 1000, "model": "toy"})
    assert caught.value.error_count() <= 4


@pytest.mark.parametrize("item", [b"[]", b"{}", b"[1]", b'"a"', b"1", b'"\\\\","\\","'])
def test_what_would_take_long_to_parse_is_not_parsed(monkeypatch, item):
    monkeypatch.setattr(EmbeddingsRequest, "model_validate_json", None)
    count = openai_api.MAX_BODY_BYTES // (len(item) + 1)
    for text in (b'{"input": [%s]}', b'{"input": "a", "user": [%s]}'):
        with pytest.raises(BadRequest, match=r"^input: at most 2048 texts, .* 1048576 ids altogether"):
            openai_api._parsed(text % b",".join([item] * count))


def test_the_largest_requests_are_parsed():
    """What stands in a text is no item."""
    for given in (['[{","\\' * 500] * MAX_INPUTS, [[10_000] * 512] * MAX_INPUTS):
        body = json.dumps({"input": given, "model": "toy"}).encode()
        assert openai_api._parsed(body).input == given


def test_health_while_a_large_body_is_parsed(shared_toy, monkeypatch):
    parsing, go_on = threading.Event(), threading.Event()
    parsed = openai_api._parsed

    def slow(body):
        parsing.set()
        assert go_on.wait(30)
        return parsed(body)

    monkeypatch.setattr(openai_api, "_parsed", slow)

    async def work():
        app = openai_api.make_app(lambda: AsyncInferenceClient(f"tcp://127.0.0.1:{shared_toy.port}"))
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport) as client:
            body = {"model": "toy", "input": ["w1 " * 100] * 300}
            answer = asyncio.create_task(client.post("http://front/v1/embeddings", json=body))
            await asyncio.to_thread(parsing.wait, 30)
            assert (await client.get("http://front/health")).status_code == 200 and not answer.done()
            go_on.set()
            assert (await answer).status_code == 200

    asyncio.run(work())


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"input": "\\ud800", "model": "toy"}'])
def test_what_is_no_request(front, body):
    status, _, answer = front.ask("POST", "/v1/embeddings", body)
    assert status == 400 and answer["error"]["message"]


def test_a_large_body(front):
    status, _, answer = front.embed(input="a" * (17 << 20))
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    status, _, answer = front.embed(input="\N{GRINNING FACE}" * 300_000)
    assert status == 400 and "a request takes 1048576" in answer["error"]["message"]


def test_truncation_is_told(front):
    _, headers, _ = front.embed(input=TEXTS)
    assert headers["x-truncated-inputs"] == "1"


@pytest.mark.parametrize(
    "given", [b"", b"Bearer wrong", b"Bearer \xff", f"Basic {KEY}".encode(), KEY.encode(), b"Bearer "]
)
def test_the_key(front, given):
    keyed = (
        ("POST", "/v1/embeddings"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
    )
    for method, path in keyed:
        status, _, answer = front.ask(method, path, headers={"authorization": given})
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    status, _, answer = front.ask("GET", "/health", headers={"authorization": given})
    assert (status, answer) == (200, {"status": "ready"})


def test_a_model_that_is_taken_over(toy, clean_environment, root):
    """Its vectors are not mixed with those of the one before."""
    front = Front(toy, None, clean_environment, root)
    toy.hurdle = lambda: setattr(toy, "bundle", "c" * 64)
    status, _, answer = front.embed(input=["a"] * 200)
    assert status == 500 and "another model meanwhile" in answer["error"]["message"]
    assert front.embed(input=["a"] * 200)[0] == 200
    assert front.stop() == (0, "")


def test_health(shared_toy, front):
    shared_toy.status = "draining"
    status, _, answer = front.ask("GET", "/health")
    shared_toy.status = "ready"
    assert (status, answer) == (503, {"status": "draining"})


def test_who_asks_for_nothing_takes_no_place(front):
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_RUNNING + 1):
            stack.enter_context(socket.create_connection(("127.0.0.1", front.port)))
        assert front.embed(input="a")[0] == 200


def test_more_requests_than_are_run(front):
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nhost: front\r\nauthorization: Bearer {KEY}\r\n"
        "content-length: 9\r\nexpect: 100-continue\r\n\r\n"
    )
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_RUNNING):
            link = stack.enter_context(socket.create_connection(("127.0.0.1", front.port)))
            link.sendall(head.encode())
            assert link.recv(100).startswith(b"HTTP/1.1 100 ")  # it runs, and waits for its body
        status, headers, answer = front.embed(input="a")
        assert (status, answer["error"]["code"], headers["retry-after"]) == (429, "overloaded", "1")
        assert front.ask("GET", "/health")[0] == 200
    while front.embed(input="a")[0] == 429:
        time.sleep(0.01)
    assert front.embed(input="a")[0] == 200


def test_a_body_that_does_not_come(front, monkeypatch):
    async def receive():
        await asyncio.sleep(60)

    monkeypatch.setattr(openai_api, "_BODY_S", 0.01)
    request = fastapi.Request({"type": "http"}, receive)
    with pytest.raises(fastapi.HTTPException) as caught:
        asyncio.run(openai_api._body(request))
    assert caught.value.status_code == 408


def test_metrics(front):
    status, headers, content = front.ask("GET", "/metrics")
    assert (status, content) == (200, METRICS)
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_other_paths(front):
    others = (("/v2", 404), ("/docs", 404), ("/redoc", 404), ("/v1/embeddings", 405))
    for method, path, expected in (("GET", *other) for other in others):
        status, _, answer = front.ask(method, path)
        assert status == expected and answer["error"]["message"]


def test_the_schema(front):
    status, _, schema = front.ask("GET", "/openapi.json")
    assert status == 200 and {"/v1/embeddings", "/health"} <= set(schema["paths"])


def test_without_server_metrics_and_key(toy_class, clean_environment, root):
    with toy_class() as toy:
        front = Front(toy, None, clean_environment, root, timeout=0.5)
        assert front.ask("GET", "/metrics")[0] == 404
        assert front.embed(input="a")[0] == 200
    status, _, answer = front.embed(input="a")
    assert status == 503 and answer["error"]["code"] == "unavailable"
    assert front.ask("GET", "/health")[::2] == (503, {"status": "unavailable"})
    assert front.stop() == (0, "")


def test_a_vector_for_each_token(toy_of, clean_environment, root):
    front = Front(toy_of(pooling="none"), None, clean_environment, root)
    status, _, answer = front.embed(input="a")
    assert front.stop()[0] == 0
    assert status == 400 and "--pooling cls" in answer["error"]["message"]


def test_it_ends_with_who_started_it(toy, clean_environment, root):
    for end in (lambda front: front.process.stdin.close(), lambda front: front.process.terminate()):
        front = Front(toy, None, clean_environment, root)
        end(front)
        assert front.process.wait(timeout=30) == 0
        assert front.process.stderr.read() == b""
        front.process.stdin.close()
        front.process.stderr.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "example.org"])
def test_beyond_this_host(monkeypatch, host):
    monkeypatch.delenv(http_server.KEY_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="there is no API key"):
        http_server.main(["--host", host])
    http_server.check_exposure(host, insecure=True)
    monkeypatch.setenv(http_server.KEY_VARIABLE, KEY)
    http_server.check_exposure(host, insecure=False)


def test_this_host_alone(monkeypatch):
    monkeypatch.delenv(http_server.KEY_VARIABLE, raising=False)
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        http_server.check_exposure(host, insecure=False)


def test_the_command_line():
    words = http_server.command("::1", 80, model="m", curve_keys="keys", insecure=True, timeout=3.0)
    args = http_server._parser().parse_args(words[3:])
    assert words[:3] == [sys.executable, "-m", "ernie.service.http_server"]
    assert (args.server, args.metrics) == ("{address}", "{metrics}/metrics")
    assert (args.host, args.port, args.model, args.curve_keys) == ("::1", 80, "m", "keys")
    assert args.insecure and args.timeout == 3.0


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"pip install 'ernie-propeller\[http\]'"):
        http_server.main([])

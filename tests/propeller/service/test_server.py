"""What a server answers: real processes, real clients, four models at once."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from propeller.bundle import read_bundle
from propeller.errors import BadRequest, DeadlineExceeded, ServerError
from propeller.paddle.inference import Predictor
from propeller.service.client import AsyncInferenceClient, InferenceClient
from propeller.service.wire import Request, WireArray, encode_request
from propeller.version import __version__

X = np.array([[1, 2], [3, 4.5], [0, -1]], np.float32)
MODELS = ("stage", "tiny", "four", "mean")
PATIENCE_S = 30


@pytest.fixture(scope="module")
def bundles(stage, tiny_bundle, four_bundle, mean_bundle):
    return dict(zip(MODELS, (stage.bundles[0], tiny_bundle, four_bundle, mean_bundle), strict=True))


@pytest.fixture(scope="module")
def predictors(bundles):
    return {name: Predictor(folder, num_threads=1) for name, folder in bundles.items()}


@pytest.fixture(scope="module")
def server(start_server, bundles):
    """A server with a worker for each of four models."""
    words = [word for name, folder in bundles.items() for word in ("-m", f"{name}={folder}")]
    words += ["-p", 0, "--workers", 1, "--threads", 1, "--metrics-port", 0, "--max-message-mb", 1]
    return start_server(*words, "--max-batch-size", 16).wait_ready()


@pytest.fixture
def client_of(server):
    """`client_of(model)` connects one."""
    clients = []

    def connect(model=None, **options):
        clients.append(InferenceClient(server.address, model=model, timeout=PATIENCE_S, **options))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


def ragged(lengths, seed=0, width=None):
    """The four inputs for rows of these lengths, padded to the longest or wider."""
    rng = np.random.default_rng(seed)
    width = width or max(lengths)
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    ids, types = rng.integers(1, 20, mask.shape) * mask, rng.integers(0, 2, mask.shape) * mask
    return {
        "sentence_ids": ids, "token_type_ids": types,
        "position_ids": np.arange(width) * mask, "input_mask": mask,
    }  # fmt: skip


class TestPredictions:
    def test_arrays_by_place_and_by_name(self, client_of, stage):
        y, command = client_of()(X)
        np.testing.assert_allclose(y, stage.y(X), rtol=1e-5)
        np.testing.assert_array_equal(command, X[:, 0])
        found = client_of("stage").predict({"x": X[:1].tolist()})
        assert list(found) == ["y", "command"]
        np.testing.assert_allclose(found["y"], stage.y(X[:1]), rtol=1e-5)

    def test_the_older_call(self, client_of, predictors):
        """Four arrays by place, each with an axis of 1 behind it, and a mask of floats."""
        inputs = ragged([5, 3, 9])
        arrays = [values[..., None] for values in inputs.values()]
        tokens, pooled = client_of("four")(*arrays[:3], arrays[3].astype(np.float32))
        expected = predictors["four"].predict(inputs)
        np.testing.assert_allclose(pooled, expected["pooled"], atol=1e-6)
        np.testing.assert_allclose(tokens, expected["tokens"], atol=1e-6)

    def test_rows_of_unlike_length_with_a_value_for_each_token(self, server, dealer, predictors):
        """Sent together, so that they share batches; widths differ from request to request."""
        one, sent = dealer(server.address), {}
        for number in range(40):
            lengths = [1 + (number * 7 + row * 11) % 40 for row in range(1 + number % 5)]
            sent[f"r{number}"] = lengths, ragged(lengths, number, min(40, max(lengths) + number % 3))
        for id, (_, inputs) in sent.items():
            arrays = tuple(WireArray(*item) for item in inputs.items())
            one.send(Request(id, model="four", arrays=arrays))
        while sent:
            reply = one.receive()
            assert reply.error is None, reply.error
            lengths, inputs = sent.pop(reply.id)
            found = dict(reply.arrays)
            expected = predictors["four"].predict(inputs)
            np.testing.assert_allclose(found["pooled"], expected["pooled"], atol=1e-5)
            assert found["tokens"].shape == expected["tokens"].shape
            for row, length in enumerate(lengths):
                np.testing.assert_allclose(
                    found["tokens"][row, :length], expected["tokens"][row, :length], atol=1e-5
                )

    def test_a_model_to_which_padding_counts(self, server, dealer, predictors, bundles):
        """It gets no padding but what was sent."""
        assert (
            not read_bundle(bundles["mean"]).ignores_padding and read_bundle(bundles["four"]).ignores_padding
        )
        one, rng = dealer(server.address), np.random.default_rng(3)
        sent = {f"r{n}": rng.integers(0, 20, (1 + n % 3, 1 + n % 7)) for n in range(60)}
        sent["padded"] = np.array([[5, 0, 0], [5, 7, 0]])
        for id, ids in sent.items():
            one.send(Request(id, model="mean", arrays=(WireArray("ids", ids),)))
        while sent:
            reply = one.receive()
            expected = predictors["mean"].predict({"ids": sent.pop(reply.id)})["mean"]
            np.testing.assert_allclose(dict(reply.arrays)["mean"], expected, atol=1e-6)

    def test_a_request_larger_than_a_batch(self, server, dealer, client_of, stage, predictors):
        x = np.random.default_rng(1).normal(size=(1000, 2)).astype(np.float32)
        before = server.metric("batch_rows_count", model="stage")
        reply = dealer(server.address).ask(Request("r1", arrays=(WireArray(None, x),)))
        np.testing.assert_allclose(dict(reply.arrays)["y"], stage.y(x), rtol=1e-4, atol=1e-5)
        assert server.metric("batch_rows_count", model="stage") - before >= 1000 / 16
        y, _ = client_of(max_rows=64)(x)  # split by the client, too
        np.testing.assert_allclose(y, stage.y(x), rtol=1e-4, atol=1e-5)
        inputs = ragged([1 + n % 40 for n in range(150)])
        found = client_of("four", max_rows=150).predict(inputs)
        np.testing.assert_allclose(found["pooled"], predictors["four"].predict(inputs)["pooled"], atol=1e-5)

    def test_many_clients_at_once(self, client_of, stage, predictors):
        clients = {name: client_of(name) for name in ("stage", "four", "mean")}

        def ask(number):
            rng, name = np.random.default_rng(number), list(clients)[number % 3]
            if name == "stage":
                inputs = {"x": rng.normal(size=(1 + number % 9, 2)).astype(np.float32)}
            elif name == "four":
                inputs = ragged([1 + (number * row) % 40 for row in range(1, 4)], number)
            else:
                inputs = {"ids": rng.integers(0, 20, (2, 1 + number % 20))}
            return name, inputs, clients[name].predict(inputs)

        with ThreadPoolExecutor(12) as pool:
            for name, inputs, found in pool.map(ask, range(180)):
                for output, expected in predictors[name].predict(inputs).items():
                    np.testing.assert_allclose(found[output], expected, atol=1e-5)

    def test_asyncio(self, server, stage):
        async def ask():
            async with AsyncInferenceClient(server.address, timeout=PATIENCE_S) as client:
                return await asyncio.gather(*(client(X + number) for number in range(20)))

        for number, (y, _) in enumerate(asyncio.run(ask())):
            np.testing.assert_allclose(y, stage.y(X + number), rtol=1e-4)


TEXTS = ["it is good", "the hotel is bad bad", "", "good \0 \ud800 \U0001f600", "good " * 50]


class TestTexts:
    def test_text_in_answers_out(self, client_of, bundles, predictors):
        processor = read_bundle(bundles["tiny"]).processor()
        client = client_of("tiny")
        found = client.answers(TEXTS)
        for text, answer in zip(TEXTS, found, strict=True):
            (example,) = processor.prepare([{"text_a": text}])
            columns = {spec.name: example[spec.name][None] for spec in predictors["tiny"].bundle.inputs}
            (expected,) = processor.finish(predictors["tiny"].predict(columns))
            assert answer.keys() == expected.keys() and answer["label"] == expected["label"]
            assert answer["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)
        assert client.answers(TEXTS[::-1])[0]["label"] == found[-1]["label"]

    def test_text_in_arrays_out(self, client_of):
        found = client_of("stage").outputs([{"x": [1, 2]}, {"x": [3, 4]}])
        assert list(found) == ["y", "command", "number"], "a column that the model does not take comes back"
        np.testing.assert_array_equal(found["command"], [1, 3])
        np.testing.assert_array_equal(found["number"], [0, 1])

    def test_arrays_in_answers_out(self, server, dealer, stage):
        reply = dealer(server.address).ask(Request("r1", arrays=(WireArray("x", X),), want="answers"))
        assert not reply.arrays
        np.testing.assert_allclose([answer["y"] for answer in reply.answers], stage.y(X), rtol=1e-4)

    def test_bad_examples(self, client_of):
        client = client_of("stage")
        with pytest.raises(BadRequest, match=r"raws\[1\]: x is \[1\]; expected two numbers"):
            client.answers([{"x": [1, 2]}, {"x": [1]}])
        with pytest.raises(BadRequest, match="could not be answered .KeyError: "):
            client.answers(["a text"])
        with pytest.raises(BadRequest, match="'four' was exported without a processor: it takes arrays"):
            client_of("four").answers(["a text"])

    def test_an_answer_that_cannot_be_written(self, server, dealer, stage):
        """NaN is no JSON: the one request fails, and no other of its batch."""
        one = dealer(server.address)
        rows = [[1, 2], [np.nan, 0], [3, 4]]
        for number, row in enumerate(rows):
            array = WireArray("x", np.array([row], np.float32))
            one.send(Request(f"r{number}", model="stage", arrays=(array,), want="answers"))
        found = {reply.id: reply for reply in (one.receive() for _ in rows)}
        assert type(found["r1"].error) is ServerError and "JSON" in str(found["r1"].error)
        for number in (0, 2):
            np.testing.assert_allclose(found[f"r{number}"].answers[0]["y"], stage.y(rows[number]), rtol=1e-4)


class TestQuestions:
    def test_the_first_model_is_the_default(self, client_of):
        assert client_of().spec()["model"] == "stage"
        with pytest.raises(
            BadRequest, match="no model 'stge' here. Did you mean 'stage'. Those served: stage, tiny"
        ):
            client_of("stge")(X)

    def test_spec(self, client_of, bundles):
        spec = client_of("tiny").spec()
        bundle = read_bundle(bundles["tiny"])
        assert spec["models"] == list(MODELS) and spec["model"] == "tiny"
        assert [each["name"] for each in spec["inputs"]] == [one.name for one in bundle.inputs]
        assert spec["inputs"][0]["axes"] == ["batch", "seq_len"] and spec["inputs"][0]["max_value"] == 10
        assert spec["labels"] == ["no", "yes"] and spec["processor"]["name"] == "classification"
        assert spec["axis_limits"] == {"seq_len": 16}
        assert (spec["bundle"], spec["version"]) == (bundle.hash, __version__)
        assert spec["limits"] == {"max_rows": 8192, "max_message_bytes": 1 << 20}
        assert client_of("four").spec()["processor"] is None

    def test_ping(self, client_of):
        assert client_of().ping() == {"status": "ready", "version": __version__, "models": list(MODELS)}

    def test_health(self, server):
        assert server.http("/health") == (200, "ready\n")
        assert server.http("/")[0] == 404

    def test_its_line(self, server):
        assert server.line == (
            f"READY {server.address} serves stage, tiny, four, mean (1 workers x 1 threads on cpu)\n"
        )


def frames_of(*frames, **header):
    """A message whose header is changed; None takes a key out."""
    header = {"v": 1, "id": "r1", "kind": "predict", "arrays": [], **header}
    return [json.dumps({key: value for key, value in header.items() if value is not None}).encode(), *frames]


def arrays_of(values, **changed):
    values = np.asarray(values)
    entry = {"name": "x", "dtype": values.dtype.name, "shape": list(values.shape), **changed}
    return frames_of(values.tobytes(), arrays=[entry])


def four_of(**changed):
    arrays = {**ragged([3, 2]), **changed}
    return encode_request(
        Request("r1", model="four", arrays=tuple(WireArray(*item) for item in arrays.items()))
    )


BAD = {
    "frames are missing": (frames_of(arrays=[{}]), "has 1 frames, but its header announces 2"),
    "a frame too many": (arrays_of(X) + [b"more"], "has 3 frames, but its header announces 2"),
    "an unknown dtype": (arrays_of(X, dtype="object"), "the dtype \"object\"; expected one of bool, int8"),
    "a shape that does not fit": (arrays_of(X, shape=[3, 3]), "takes 36 bytes, but its frame has 24"),
    "a shape of giants": (arrays_of(X, shape=[2**62, 2**62]), "rows; at most 8192 are taken at a time"),
    "an unknown kind": (frames_of(kind="predct"), "Unknown kind 'predct'.*Did you mean 'predict'"),
    "nothing to predict": (frames_of(), "carries either arrays or raws, got neither"),
    "another version": (frames_of(v=2), "speaks protocol version 2"),
    "an unknown key": (frames_of(deadline=3), 'Unknown key "deadline" in the header'),
    "a wrong rank": (arrays_of(X[0]), r"'x' must have the 2 axes \[batch, 2\], got the shape \(2,\)"),
    "a wrong size": (arrays_of(np.ones((2, 3), np.float32)), "axis 2 is fixed at 2"),
    "a wrong name": (arrays_of(X, name="y"), r"no input 'y'.*Expected x float32 \[batch, 2\]"),
    "no rows": (arrays_of(X[:0]), "no rows; expected at least one"),
    "halves where ids are wanted": (
        four_of(sentence_ids=np.full((2, 3), 0.5)), "'sentence_ids' must be int64, got float64 with 0.5"
    ),
    "an id beyond the vocabulary": (
        four_of(sentence_ids=np.array([[1, 1, 1], [20, 1, 0]])), "the id 20 in row 1; expected 0 to 19"
    ),
    "the id -1": (four_of(sentence_ids=np.full((2, 3), -1)), "holds the id -1 in row 0"),
    "too long": (
        four_of(**{name: np.ones((1, 41), np.int64) for name in ragged([1])}), "has 41; expected at most 40"
    ),
    "sizes that differ": (four_of(input_mask=np.ones((2, 4), np.int64)), "in 'sentence_ids' has 3"),
    "no processor": (frames_of(b'[{"a": 1}]', model="four", body="raws"), "without a processor"),
    "answers without processor": (
        frames_of(
            *(values.tobytes() for values in ragged([3]).values()), model="four", want="answers",
            arrays=[{"name": name, "dtype": "int64", "shape": [1, 3]} for name in ragged([3])],
        ),
        "without a processor: it gives arrays",
    ),
    "raws that are no list": (frames_of(b'{"a": 1}', body="raws"), "raws must be a JSON list"),
    "more rows than can wait": (arrays_of(np.zeros((9000, 2), np.float32)), "9000 rows; at most 8192"),
}  # fmt: skip


class TestBadMessages:
    @pytest.mark.parametrize("name", BAD)
    def test_the_answer_says_what_is_wrong(self, name, server, dealer):
        frames, words = BAD[name]
        one = dealer(server.address)
        reply = one.ask(list(frames))
        assert reply.id == "r1" and type(reply.error) is BadRequest
        with pytest.raises(BadRequest, match=words):
            raise reply.error
        assert one.ask(Request("r2", "ping")).result["status"] == "ready"

    @pytest.mark.parametrize(
        "frames",
        [
            [b""],
            [b"no JSON"],
            [b"[]"],
            [b'{"v": 1, "id": ""}'],
            [b"\xff" * 100],
            frames_of(id=None),
            [b""] * 50,
        ],
    )
    def test_what_cannot_be_addressed_is_dropped_and_counted(self, frames, server, dealer):
        before = server.metric("dropped_messages_total", reason="unreadable")
        one = dealer(server.address)
        one.send(list(frames))
        assert one.ask(Request("r1", "ping")).id == "r1", "the first reply is that of the next message"
        assert server.metric("dropped_messages_total", reason="unreadable") == before + 1

    def test_a_message_beyond_the_limit_ends_its_connection_alone(self, server, dealer, client_of, stage):
        huge = dealer(server.address)
        huge.send(arrays_of(np.zeros((1 << 18, 2), np.float32)))
        y, _ = client_of()(X)
        np.testing.assert_allclose(y, stage.y(X), rtol=1e-5)
        # The connection comes back, and with it the turn of the next message.
        assert huge.ask(Request("r2", "ping")).id == "r2"

    def test_no_time(self, server, dealer):
        reply = dealer(server.address).ask(Request("r1", arrays=(WireArray("x", X),), deadline_ms=0))
        assert type(reply.error) is DeadlineExceeded


def test_what_was_counted(server, dealer, wait_until):
    def figures():
        return {
            (name, tuple(labels.values())): server.metric(name, **labels)
            for name, labels in [
                ("received_requests_total", {"kind": "predict"}),
                ("received_requests_total", {"kind": "ping"}),
                ("received_requests_total", {"kind": "other"}),
                ("requests_total", {"model": "mean", "code": "ok"}),
                ("requests_total", {"model": "mean", "code": "bad_request"}),
                ("requests_total", {"model": "", "code": "bad_request"}),
                ("requests_total", {"model": "", "code": "ok"}),
                ("request_seconds_count", {"model": "mean"}),
                ("batch_rows_sum", {"model": "mean"}),
                ("tokens_total", {"model": "mean"}),
            ]
        }

    before, one = figures(), dealer(server.address)
    one.ask(Request("r1", model="mean", arrays=(WireArray("ids", np.ones((2, 5), np.int64)),)))
    one.ask(Request("r2", model="mean", arrays=(WireArray("ids", np.ones((2, 5, 2), np.int64)),)))
    one.ask(Request("r3", "ping"))
    one.ask(frames_of(kind="x"))
    counted = [after - before[name] for name, after in figures().items()]
    assert counted == [2, 1, 1, 1, 1, 1, 1, 1, 2, 10]
    assert server.metric("workers") == len(MODELS) and server.metric("queued_rows") == 0
    assert server.metric("padding_tokens_total", model="mean") == 0
    wait_until(lambda: server.metric("idle_workers") == len(MODELS), "all workers idle")

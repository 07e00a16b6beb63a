"""Text in, answer out: the client for it, and that it says what the pipeline says. A real server."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ernie import Pipeline
from propeller.errors import BadRequest, ConfigError, DeadlineExceeded, ServerError, Unavailable, WorkerDied
from propeller.service import TextClient

PATIENCE_S = 30
TEXTS = ["it is good", "the hotel is bad bad", "", "the \x00 hotel", "good " * 50, "\ud800", "是"]


@pytest.fixture(scope="module")
def server(start_server, tiny_bundle, windows_bundle):
    words = ("-m", f"texts={tiny_bundle}", "-m", f"windows={windows_bundle}", "-p", 0, "--workers", 1)
    more = ("--threads", 1, "--warmup-s", 0, "--metrics-port", 0, "--max-batch-size", 8)
    return start_server(*words, *more).wait_ready()


@pytest.fixture
def texts(server):
    with TextClient(server.address, PATIENCE_S, max_rows=4, max_in_flight=2) as client:
        yield client


@pytest.fixture
def windows(server):
    with TextClient(server.address, PATIENCE_S, "windows", max_rows=4, max_in_flight=2) as client:
        yield client


def numbered(count, bad=()):
    """Examples, some of them with an id that cannot be."""
    return [{"ids": [0] if i in bad else [i + 1] * (1 + i % 9), "name": str(i)} for i in range(count)]


def sums(answers):
    return [answer["sum"] for answer in answers]


class TestAnswers:
    def test_a_list_and_one(self, texts):
        answers = texts([*TEXTS, {"text_a": "bad"}])
        assert len(answers) == 8 and len({answer["probability"] for answer in answers}) > 4
        assert texts("it is good") == answers[0] == texts({"text_a": "it is good"})
        assert texts([]) == [] and texts(iter(["bad"])) == [answers[7]]

    def test_a_pair_for_a_model_of_single_texts(self, texts):
        for given in (("it is good", "is it"), {"text_a": "it is good", "text_b": "is it"}):
            with pytest.raises(BadRequest, match="The model takes one text, .*: text_b is 'is it'"):
                texts(given)

    def test_the_pipeline_says_the_same(self, texts, windows, tiny_bundle, windows_bundle):
        local = Pipeline(tiny_bundle, num_threads=1)(TEXTS)
        for answer, wanted in zip(texts(TEXTS), local, strict=True):
            assert answer["label"] == wanted["label"]
            for label, probability in wanted["probabilities"].items():
                assert answer["probabilities"][label] == pytest.approx(probability, abs=1e-6)
        inputs = [*numbered(300), "as many ids as words", {"ids": list(range(1, 200)), "name": "long"}]
        local = Pipeline(windows_bundle, num_threads=1)(inputs)
        for answer, wanted in zip(windows(inputs), local, strict=True):
            assert {**answer, "pids": None} == {**wanted, "pids": None}

    def test_what_the_model_is(self, texts, windows):
        assert texts.spec()["labels"] == ["no", "yes"]
        assert windows.spec()["processor"]["name"] == "toy_windows"

    def test_many_threads(self, windows):
        def ask(seed):
            raws = [{"ids": [int(v) for v in np.random.default_rng(seed).integers(1, 50, 1 + n)]}
                    for n in range(20)]  # fmt: skip
            return sums(windows(raws)) == [sum(raw["ids"]) for raw in raws]

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(ask, range(24)))


class TestStreams:
    def test_reads_no_further_ahead_than_it_sends(self, windows):
        read = []

        def endless():
            number = 0
            while True:
                number += 1
                read.append(number)
                yield {"ids": [number]}

        answers = windows.stream(endless())
        assert not read
        for number in range(1, 101):
            assert next(answers)["sum"] == number
            assert len(read) <= number + (2 + 1) * 4
        answers.close()
        assert windows({"ids": [5]})["sum"] == 5

    def test_errors_in_their_place(self, windows, toy_windows):
        raws = numbered(50, bad={0, 17, 18, 49})
        raws[30]["do"] = "fail"
        raws[40] = {"ids": [toy_windows.DIE]}
        found = list(windows.stream([*raws, 5], return_errors=True))
        kinds = {0: BadRequest, 17: BadRequest, 18: BadRequest, 49: BadRequest, 50: BadRequest}
        kinds |= {30: ServerError, 40: WorkerDied}
        for place, answer in enumerate(found):
            if place in kinds:
                assert type(answer) is kinds[place]
            else:
                assert answer["sum"] == sum(raws[place]["ids"])
        assert "expected numbers of 1 or more, got [0]" in str(found[17])
        assert windows(raws[17], return_errors=True).code == "bad_request"

    def test_the_first_error_is_raised_with_its_place(self, windows):
        answers = windows.stream(numbered(50, bad={17, 18}))
        assert sums(next(answers) for _ in range(17)) == sums(windows(numbered(17)))
        with pytest.raises(BadRequest, match=r"^inputs\[17\]: expected numbers of 1 or more, got \[0\]"):
            next(answers)
        with pytest.raises(ServerError, match=r"^inputs\[2\]: the processor could not make the answer"):
            windows([*numbered(2), {"ids": [1], "do": "fail"}])
        with pytest.raises(BadRequest, match="^expected numbers of 1"):
            windows({"ids": [0]})

    @pytest.mark.parametrize("one", ["a text", {"ids": [1]}])
    def test_a_stream_of_one_input(self, windows, one):
        with pytest.raises(BadRequest, match="Expected several inputs, got one .*write .input."):
            windows.stream(one)

    @pytest.mark.parametrize("none", [5, b"bytes", None])
    def test_what_is_no_input(self, windows, none):
        for call in (windows, windows.stream):
            with pytest.raises(BadRequest, match=f"Expected inputs, got {type(none).__name__}; an input is"):
                call(none)


class TestTime:
    def test_a_request_that_takes_too_long(self, windows, server):
        with server.gates["join"]:
            with pytest.raises((Unavailable, DeadlineExceeded)):
                windows({"ids": [1], "do": "wait"}, timeout=0.3)
            found = windows([{"ids": [1], "do": "wait"}] * 2, timeout=0.3, return_errors=True)
            assert {type(error) for error in found} <= {Unavailable, DeadlineExceeded} and len(found) == 2
        assert windows({"ids": [3]})["sum"] == 3

    def test_nobody_is_there(self):
        with TextClient("tcp://127.0.0.1:9", timeout=0.2) as client, pytest.raises(Unavailable):
            client(["a text"])
        with pytest.raises(ConfigError, match="max_rows"):
            TextClient(max_rows=0)

    def test_a_client_that_was_closed(self, server):
        client = TextClient(server.address)
        client.close()
        client.close()
        with pytest.raises(Unavailable, match="closed"):
            client("a text")


def test_it_needs_neither_paddle_nor_a_tokenizer(root):
    code = (
        "import sys\nfrom propeller.service import TextClient\nTextClient()\n"
        "assert not {'paddle', 'tokenizers', 'ernie'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=root)

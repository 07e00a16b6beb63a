"""The clients of an encoder server, over real sockets."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading

import numpy as np
import pytest

from ernie.service import encoder as encoder_module
from ernie.service.calls import address_of
from ernie.service.client import AsyncErnieClient, ErnieClient
from ernie.service.texts import TextJob
from ernie.tokenizing import WordPieceTokenizer
from propeller.errors import BadRequest, ConfigError, DeadlineExceeded, Overloaded, ServerError, Unavailable

TEXTS = ["a friendly place", "never again", "w1 w2 w3 w4 w5 w6 w7", "good"]
ODD = [
    "",
    "\0",
    "a\0b",
    "\N{GRINNING FACE} a",
    "\ud800",
    "good \udfff",
    "é\N{COMBINING ACUTE ACCENT}",
    "\u2028 ",
]


@pytest.fixture
def vocab_file(toy, tmp_path):
    toy.tokenizer.save_pretrained(tmp_path)
    return tmp_path / "vocab.txt"


def mixed_texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in rng.integers(0, 200, rng.integers(0, 14))) for _ in range(count)]


@pytest.fixture(params=["text", "ids"])
def client(request, toy, vocab_file):
    """One that sends texts, one that tokenises."""
    with ErnieClient(vocab_file if request.param == "ids" else None, port=toy.port) as client:
        yield client


def test_texts(toy, client):
    vectors = client(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, toy.vectors(TEXTS))


def test_pairs(toy, client):
    (expected,) = toy.processor.prepare([{"text_a": "a friendly place", "text_b": "again"}])
    vectors = client(("a friendly place", "a"), ("again", "good"))
    assert vectors.shape == (2, 8)
    np.testing.assert_array_equal(vectors[0], toy._row(expected["input_ids"]))


def test_no_texts(toy, client):
    encoded = client.encode([])
    assert encoded.embeddings.shape == (0, 8) and encoded.embeddings.dtype == np.float32
    assert encoded.num_tokens.shape == encoded.truncated.shape == (0,)
    assert client([], []).shape == (0, 8)
    assert toy.requests == []


def test_odd_texts(toy, client):
    np.testing.assert_array_equal(client(ODD), toy.vectors(ODD))


def test_many_texts_keep_their_order(toy, client):
    texts = mixed_texts(3000)
    np.testing.assert_array_equal(client(texts), toy.vectors(texts))
    assert all(rows <= 64 for _, rows, _ in toy.requests)


def test_long_texts(toy, client, caplog):
    texts = ["good", "w1 " * 200_000, "x" * 1_000_000, " " * 900_000 + "w5"]
    encoded = client.encode(texts)
    np.testing.assert_array_equal(encoded.embeddings, toy.vectors(texts))
    assert encoded.truncated.tolist() == [False, True, False, False]
    assert encoded.num_tokens.tolist() == [3, 200_002, 3, 3]
    assert [record.message for record in caplog.records] == [
        "1 of 4 texts were cut to 16 tokens; the longest has 200002"
    ]


def test_a_text_beyond_a_message(toy, vocab_file):
    text = "\N{GRINNING FACE}" * 300_000
    with ErnieClient(port=toy.port) as client:
        with pytest.raises(BadRequest, match=r"texts\[1\] takes 1200015 bytes; a request takes 1048576"):
            client(["good", text])
    assert toy.requests == []
    with ErnieClient(vocab_file, port=toy.port) as client:
        np.testing.assert_array_equal(client([text]), toy.vectors([text]))


def test_texts_of_many_bytes_are_sent_apart(toy):
    texts = [f"w{number} " + "\N{GRINNING FACE}\ud800" * 30_000 for number in range(4)]
    with ErnieClient(port=toy.port) as client:
        np.testing.assert_array_equal(client(texts), toy.vectors(texts))
    assert toy.requests == [("raws", 1, None)] * 4


def padding_share(toy, texts):
    tokens = sum(len(text.split()) + 2 for text in texts)
    return 1 - tokens / sum(rows * width for _, rows, width in toy.requests)


def test_little_padding_is_sent(toy_of):
    toy = toy_of(pooling="none", max_seqlen=64)
    texts = [" ".join(["good"] * (number % 60)) for number in range(1000)]
    with ErnieClient(toy.tokenizer, port=toy.port) as client:
        client(texts)
        assert padding_share(toy, texts) < 0.125
        assert len(toy.requests) < 30
        toy.requests.clear()
        client(texts[:32])
        assert padding_share(toy, texts[:32]) < 0.125
        assert len(toy.requests) < 10


def test_long_texts_are_sent_few_at_a_time(toy_of):
    """So that each request can be answered in time."""
    toy = toy_of(max_seqlen=512)
    with ErnieClient(port=toy.port) as client:
        client(["good " * 600] * 64)
    assert [rows for _, rows, _ in toy.requests] == [16] * 4


@pytest.mark.parametrize(
    ("texts", "texts_b", "message"),
    [
        ("one text", None, r"texts is one str; expected a list of strings: \[text\]"),
        (b"bytes", None, "texts is one bytes"),
        (["a"], "b", "texts_b is one str"),
        (["a", None], None, r"texts\[1\] is None; expected a string"),
        (["a"], [3], r"texts_b\[0\] is 3"),
        (["a", "b"], ["c"], "2 texts came with 1 texts_b"),
    ],
)
def test_bad_arguments(toy, client, texts, texts_b, message):
    with pytest.raises(BadRequest, match=message):
        client(texts, texts_b)
    assert toy.requests == []


def test_errors_of_the_server(toy):
    with ErnieClient(port=toy.port, timeout=0.3) as client:
        with pytest.raises(BadRequest, match="this text is refused"):
            client(["good", "!bad"])
        with pytest.raises(Overloaded):
            client(["!full"])
        np.testing.assert_array_equal(client(TEXTS), toy.vectors(TEXTS))


def test_nobody_there():
    with ErnieClient(port=1, timeout=0.1) as client, pytest.raises(Unavailable):
        client(["good"])


def test_prompts(toy, vocab_file):
    for vocab in (None, vocab_file):
        with ErnieClient(vocab, port=toy.port, prompt="query") as client:
            np.testing.assert_array_equal(client(TEXTS), toy.vectors(TEXTS, "query"))
            passages = client.encode(TEXTS, prompt="passage").embeddings
            np.testing.assert_array_equal(passages, toy.vectors(TEXTS))
            with pytest.raises(ConfigError, match="prompt is 'question'"):
                client.encode(TEXTS, prompt="question")
    with pytest.raises(ConfigError, match="expected 'query' or 'passage'"):
        ErnieClient(prompt="doc")


def test_a_prompt_where_none_is_named(toy_of):
    toy = toy_of(default_prefix="query: ")
    for vocab in (None, toy.tokenizer):
        with ErnieClient(vocab, port=toy.port) as client:
            np.testing.assert_array_equal(client(TEXTS), toy.vectors(TEXTS))


def test_tokens_and_offsets(toy, vocab_file):
    with ErnieClient(vocab_file, port=toy.port) as client:
        encoded = client.encode(["Friendly place", ""], ["good", "bad"], prompt="query", return_tokens=True)
    assert encoded.tokens == [
        ["[CLS]", "query", ":", "friendly", "place", "[SEP]", "good", "[SEP]"],
        ["[CLS]", "query", ":", "[SEP]", "bad", "[SEP]"],
    ]
    assert encoded.offsets[0].tolist() == [[0, 0]] * 3 + [[0, 8], [9, 14], [0, 0], [0, 4], [0, 0]]
    assert encoded.num_tokens.tolist() == [8, 6]
    with ErnieClient(port=toy.port) as client, pytest.raises(BadRequest, match="with the model's vocabulary"):
        client.encode(["good"], return_tokens=True)


@pytest.mark.parametrize("tokenises", [False, True])
def test_a_vector_for_each_token(toy_of, tokenises):
    toy = toy_of(pooling="none")
    texts = [*mixed_texts(300), "w1 " * 40]
    with ErnieClient(toy.tokenizer if tokenises else None, port=toy.port) as client:
        encoded = client.encode(texts)
        assert client([]) == []
    for text, vectors, truncated in zip(texts, encoded.embeddings, encoded.truncated, strict=True):
        (example,) = toy.processor.prepare([{"text_a": text}])
        assert vectors.dtype == np.float32
        np.testing.assert_array_equal(vectors, toy.table[example["input_ids"]])
        assert truncated == (len(text.split()) > 14)


def test_a_shorter_length(toy, vocab_file):
    with ErnieClient(vocab_file, port=toy.port, max_seqlen=4) as client:
        encoded = client.encode(["w1 w2 w3 w4 w5", "w1 w2"], return_tokens=True)
        np.testing.assert_array_equal(encoded.embeddings, toy.vectors(["w1 w2", "w1 w2"]))
    assert encoded.truncated.tolist() == [True, False] and encoded.num_tokens.tolist() == [7, 4]
    with ErnieClient(vocab_file, port=toy.port, max_seqlen=17) as client:
        with pytest.raises(ConfigError, match="max_seqlen is 17, but the server's model 'toy' takes 16"):
            client(["a"])
    with pytest.raises(ConfigError, match="max_seqlen needs a vocabulary"):
        ErnieClient(max_seqlen=4)


def test_a_vocabulary_takes_the_settings_of_the_server(toy, toy_of, tmp_path):
    vocab = toy.tokenizer.vocab
    cased = WordPieceTokenizer(dict(vocab), do_lower_case=False, tokenize_chinese_chars=False)
    toy = toy_of(tokenizer=cased)
    cased.save_pretrained(tmp_path)
    texts = ["Place", "place", "é"]
    with ErnieClient(tmp_path / "vocab.txt", port=toy.port) as client:
        np.testing.assert_array_equal(client(texts), toy.vectors(texts))
    with ErnieClient(tmp_path, port=toy.port) as client:
        np.testing.assert_array_equal(client(texts), toy.vectors(texts))


def test_other_settings_are_named(toy, tmp_path):
    own = WordPieceTokenizer(dict(toy.tokenizer.vocab), do_lower_case=False)
    own.save_pretrained(tmp_path)
    for vocab in (own, tmp_path):
        with ErnieClient(vocab, port=toy.port) as client:
            with pytest.raises(ConfigError) as caught:
                client(["a"])
        assert (
            "has the vocabulary of the server's model 'toy', but do_lower_case is False here and True"
            in str(caught.value)
        )
        assert "strip_accents is False here and True there" in str(caught.value)
        assert "tokenize_chinese_chars" not in str(caught.value)
    assert toy.requests == []


def test_another_vocabulary_is_refused(toy, tmp_path):
    vocab = dict(toy.tokenizer.vocab)
    vocab["w7"], vocab["w8"] = vocab["w8"], vocab["w7"]
    with ErnieClient(WordPieceTokenizer(vocab), port=toy.port) as client:
        with pytest.raises(ConfigError, match="is not that of the server's model 'toy': another vocabulary"):
            client(["a"])
    with pytest.raises(ConfigError, match="cannot be read"):
        ErnieClient(tmp_path / "nowhere.txt")


def test_a_model_that_is_taken_over(toy, vocab_file, monkeypatch):
    """It is noticed after a while, and by the shape of what comes at once."""
    now = [100.0]
    monkeypatch.setattr(encoder_module.time, "monotonic", lambda: now[0])
    with ErnieClient(vocab_file, port=toy.port) as client:
        client(TEXTS)
        vocab = dict(toy.tokenizer.vocab)
        vocab["w7"], vocab["w8"] = vocab["w8"], vocab["w7"]
        toy.tokenizer = WordPieceTokenizer(vocab)
        client(TEXTS)
        now[0] += 11.0
        with pytest.raises(ConfigError, match="another vocabulary"):
            client(TEXTS)
        toy.table = toy.table[:, :4]
    with ErnieClient(port=toy.port) as client, pytest.raises(ServerError, match=r"of the shape \[4, 4\]"):
        client(TEXTS)


@pytest.mark.parametrize("tokenises", [False, True])
def test_a_model_that_is_taken_over_during_a_call(toy, vocab_file, tokenises):
    vocab = vocab_file if tokenises else None

    def take_over():
        toy.bundle = "c" * 64 if len(toy.requests) == 1 else toy.bundle

    toy.hurdle = take_over
    texts = ["a"] * 200
    with ErnieClient(vocab, port=toy.port) as client:
        with pytest.raises(ServerError, match="another model meanwhile: cccccccccccc, .* bbbbbbbbbbbb"):
            client(texts)
        np.testing.assert_array_equal(client(texts), toy.vectors(texts))

    async def main():
        toy.bundle = "b" * 64
        toy.requests.clear()
        async with AsyncErnieClient(vocab, port=toy.port) as client:
            with pytest.raises(ServerError, match="another model meanwhile"):
                await client(texts)

    asyncio.run(main())


def test_no_encoder(toy, monkeypatch):
    spec = toy._spec()
    spec["processor"] = {"name": "classification", "settings": {"labels": ["no", "yes"]}}
    monkeypatch.setattr(toy, "_spec", lambda: spec)
    with ErnieClient(port=toy.port) as client, pytest.raises(ConfigError, match="no encoder but a classif"):
        client(["a"])
    with (
        ErnieClient(port=toy.port, model="other") as client,
        pytest.raises(BadRequest, match="no model other"),
    ):
        client(["a"])


def test_many_threads(toy, client):
    found = {}

    def call(number):
        texts = mixed_texts(100, seed=number)
        found[number] = np.array_equal(client(texts), toy.vectors(texts))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(8), True)


@pytest.mark.parametrize("tokenises", [False, True])
def test_asyncio(toy, vocab_file, caplog, tokenises):
    async def main():
        async with AsyncErnieClient(vocab_file if tokenises else None, port=toy.port) as client:
            batches = [mixed_texts(400, seed=number) for number in range(4)]
            for texts, vectors in zip(batches, await asyncio.gather(*map(client, batches)), strict=True):
                np.testing.assert_array_equal(vectors, toy.vectors(texts))
            encoded = await client.encode(["w1 " * 20], prompt="query")
            assert encoded.truncated.all() and (await client.encoder()).dim == 8
            with pytest.raises(BadRequest, match="expected a list"):
                await client("good")
            with pytest.raises(BadRequest, match="2 texts came with 1"):
                await client(["a", "b"], ["c"])

    with caplog.at_level(logging.WARNING, "ernie"):
        asyncio.run(main())
    assert [record.message for record in caplog.records] == [
        "1 of 1 texts were cut to 16 tokens; the longest has 24"
    ]


def test_the_next_texts_are_tokenised_while_others_are_computed(toy):
    with ErnieClient(port=toy.port) as client:
        encoder = client.encoder()
    job = TextJob(encoder, mixed_texts(2500), tokenizer=toy.tokenizer)
    inputs = job.inputs()
    next(inputs)
    assert (job.result().num_tokens > 0).sum() == 1024
    rows = 1 + sum(len(arrays["input_ids"]) for arrays in inputs)
    assert (job.result().num_tokens > 0).all() and rows > 2400


@pytest.mark.parametrize("tokenises", [False, True])
def test_a_slow_server(toy, vocab_file, tokenises):
    """A call goes on while some of its requests are answered in time, and ends when none is."""
    answers = itertools.chain([True, *[False] * 6] * 3, itertools.repeat(True))
    toy.hurdle = lambda: None if next(answers) else DeadlineExceeded("too late")
    texts = mixed_texts(2000)
    with ErnieClient(vocab_file if tokenises else None, port=toy.port) as client:
        np.testing.assert_array_equal(client(texts), toy.vectors(texts))
    asked = []
    toy.hurdle = lambda: asked.append(1) or (None if len(asked) <= 3 else DeadlineExceeded("too late"))
    toy.requests.clear()
    with ErnieClient(vocab_file if tokenises else None, port=toy.port) as client:
        with pytest.raises(DeadlineExceeded, match="too late"):
            client(texts)
    assert len(toy.requests) == 3 and len(asked) < 3 + 8 + 8 + 1
    with ErnieClient(port=toy.port) as client, pytest.raises(DeadlineExceeded, match="too late"):
        client(["good"])


def test_addresses():
    assert address_of("localhost", 8888) == "tcp://localhost:8888"
    assert address_of("::1", 80) == "tcp://[::1]:80"
    with pytest.raises(ConfigError, match="The host is 'tcp://localhost'; expected a name or number alone"):
        ErnieClient(host="tcp://localhost")

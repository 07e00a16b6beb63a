"""The retrieval script: a dual encoder that learns, and whose bundle the encoder server serves."""

from __future__ import annotations

import importlib.util
import json
import random
import socket
import subprocess
import sys

import numpy as np
import pytest

from ernie.service.client import ErnieClient
from propeller.bundle import read_bundle

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
LETTERS = "价格服务非常酒店"


@pytest.fixture(scope="session")
def script(root):
    """The script as a module, for the fixture `call`."""
    path = root / "example" / "finetune_retriever.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pairs(count, seed, *, negatives):
    """Rows in which a passage fits the query whose letters it holds."""
    rng = random.Random(seed)
    for _ in range(count):
        first, second, other = rng.sample(LETTERS, 3)
        query, right = f"hotel {first}{second} hotel", f"{second}{first}好好"
        yield "\t".join([query, right, f"{first}{other}好好"][: 2 + negatives])


@pytest.fixture
def retrieve(call, workplace, write, tmp_path):
    """`retrieve(*flags, run_config=, **hparams)` trains on pairs, unless flags name other files."""
    train = write(tmp_path / "train.tsv", *pairs(80, 1, negatives=True))
    dev = write(tmp_path / "dev.tsv", *pairs(20, 2, negatives=False))

    def run(*flags, run_config=(), **hparams):
        config = {"model_dir": str(tmp_path / "output"), "max_steps": 2, **dict(run_config)}
        return call(
            "--train_set", train, "--dev_set", dev, "--vocab_file", workplace / "vocab.txt",
            "--max_seqlen", 16, "--cache_dir", tmp_path / "cache", "--run_config", json.dumps(config),
            "--hparam", json.dumps({**SIZES, "batch_size": 16, **hparams}), *flags,
        )  # fmt: skip

    return run


@pytest.fixture
def serve(root, tmp_path):
    """`serve(bundle)` starts the encoder server and gives a client."""
    running = []

    def start(bundle):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = open(tmp_path / "server.log", "wb")
        command = [sys.executable, "-m", "ernie.service.encoder_server", "-m", str(bundle), "-p", str(port)]
        process = subprocess.Popen([*command, "--workers", "1"], cwd=root, stdout=log, stderr=log)
        client = ErnieClient(port=port, timeout=60.0)
        running.append((log, process, client))
        return client

    yield start
    for log, process, client in running:
        client.close()
        process.terminate()
        process.wait(30)
        log.close()


def test_a_dual_encoder_learns_and_is_served(retrieve, serve, call, tmp_path):
    done = retrieve(
        run_config={"max_steps": 60}, learning_rate=0.02, hidden_dropout_prob=0.0, symmetric=True,
        query_prefix="is : ", dimensions=12,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "right passages, " in done.err and "queries without a right passage: 0" in done.err
    folder = tmp_path / "output" / "best" / "inference"
    bundle = read_bundle(folder)
    assert bundle.metrics["dev"]["mrr"] > 0.8 and bundle.metrics["dev"].keys() >= {"recall@1", "ndcg@10"}

    client = serve(folder)
    queries, passages = zip(*(line.split("\t") for line in pairs(20, 2, negatives=False)), strict=True)
    asked = client.encode(list(queries), prompt="query").embeddings
    told = client.encode(list(passages), prompt="passage").embeddings
    assert asked.shape == (20, 12)
    np.testing.assert_allclose(np.linalg.norm(asked, axis=1), 1, atol=1e-5)
    best = (asked @ told.T).argmax(axis=1)
    right = np.mean([passages[found] == own for found, own in zip(best, passages, strict=True)])
    assert right == pytest.approx(bundle.metrics["dev"]["p@1"], abs=0.1)
    assert not np.allclose(asked, client.encode(list(queries)).embeddings), "the query's prefix counts"

    lines = call("--do_predict", "--bundle", folder, stdin=(passages[0] + "\n").encode()).out.split()
    np.testing.assert_allclose(np.array(lines, float), told[0], atol=1e-4)


def test_passages_with_labels_and_given_candidates(retrieve, write, tmp_path):
    rows = []
    for number, line in enumerate(pairs(9, 3, negatives=True)):
        query, right, wrong = line.split("\t")
        rows += [f"{number}\t{query}\t{right}\t1", f"{number}\t{query}\t{wrong}\t0"]
    path = write(tmp_path / "labelled.tsv", "qid\ttext_a\ttext_b\tlabel", *rows)
    test = write(tmp_path / "unlabelled.tsv", "qid\ttext_a\ttext_b", "1\thotel\tgood")
    flags = ["--train_set", path, "--dev_set", path, "--test_set", test]
    done = retrieve(*flags, candidates="given", group_size=2)
    assert done.code == 0, done.err
    assert "test has no labels and is left out" in done.err
    assert "dev: 9 queries, 9 right passages, 9 hard negatives" in done.err
    assert read_bundle(tmp_path / "output" / "best" / "inference").metrics["dev"]["mrr"] >= 0.5, "of two"


@pytest.mark.parametrize(
    ("flags", "hparams", "message"),
    [
        ([], {"scale": -1}, "scale must be a number above 0"),
        ([], {"pooling": "none"}, "gives no single embedding"),
        ([], {"candidates": "some"}, "there are: all, given"),
        ([], {"in_tokens": True}, "batch_size counts queries"),
        ([], {"poolin": "mean"}, "pooling"),
        (["--dev_predictions", "x"], {}, "answers by vectors"),
    ],
)
def test_what_cannot_be_used(retrieve, flags, hparams, message):
    done = retrieve(*flags, **hparams)
    assert done.code == 2 and message in done.err


def test_candidates_without_labels(retrieve, write, tmp_path):
    path = write(tmp_path / "dev.tsv", "qid\ttext_a\ttext_b", "1\thotel\tgood")
    done = retrieve("--dev_set", path)
    assert done.code == 1 and f"{path}:1: has a column for the qid" in done.err
    assert not (tmp_path / "output").exists()


def test_a_pair_without_its_passage(retrieve, write, tmp_path):
    path = write(tmp_path / "bad.tsv", "hotel\tgood", "hotel is\t")
    done = retrieve("--train_set", path)
    assert done.code == 1 and f"{path}:2: text_b is empty" in done.err

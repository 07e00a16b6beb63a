"""The ranking script: every loss to a bundle that scores lines, and what is refused before training."""

from __future__ import annotations

import importlib.util
import json
import random

import pytest

from propeller.bundle import read_bundle

QUERIES = ("the hotel", "这家酒店", "服务", "hotel is")
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}


@pytest.fixture(scope="session")
def script(root):
    """The script as a module, for the fixture `call`."""
    path = root / "example" / "finetune_ranker.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(queries, seed, *, labelled=True):
    """A header and rows of queries with candidates, of which those that hold `好` are relevant."""
    rng = random.Random(seed)
    yield "qid\ttext_a\ttext_b" + "\tlabel" * labelled
    for number in range(queries):
        query, right = rng.choice(QUERIES), rng.randrange(4)
        for place in range(4):
            text = "".join(rng.choices("价格非常", k=rng.randint(1, 6))) + "差好"[place == right]
            yield f"{number}\t{query}\t{text}" + f"\t{int(place == right)}" * labelled


@pytest.fixture(scope="module")
def data(tmp_path_factory, write):
    folder = tmp_path_factory.mktemp("ranking")
    for seed, (name, queries) in enumerate({"train": 40, "dev": 8}.items()):
        write(folder / f"{name}.tsv", *rows(queries, seed))
    write(folder / "test.tsv", *rows(3, 5, labelled=False))
    return folder


@pytest.fixture
def rank(call, workplace, data, tmp_path):
    """`rank(*flags, run_config=, **hparams)` trains on the data, unless flags name other files."""

    def run(*flags, run_config=(), **hparams):
        config = {"model_dir": str(tmp_path / "output"), "max_steps": 2, **dict(run_config)}
        return call(
            "--data_dir", data, "--vocab_file", workplace / "vocab.txt", "--max_seqlen", 32,
            "--cache_dir", tmp_path / "cache", "--run_config", json.dumps(config),
            "--hparam", json.dumps({**SIZES, "hidden_dropout_prob": 0.0, **hparams}), *flags,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    "hparams",
    [
        {"loss": "pointwise", "batch_size": 32},
        {"loss": "pairwise", "batch_size": 8},
        {"loss": "pairwise", "pair_loss": "logistic", "batch_size": 8, "group_size": 2},
        {"loss": "listwise", "batch_size": 8, "group_size": 3},
    ],
    ids=lambda hparams: "-".join(str(hparams.get(key, "")) for key in ("loss", "pair_loss")),
)
def test_a_ranker_learns_and_scores_lines(rank, call, tmp_path, hparams):
    predictions = tmp_path / "dev.jsonl"
    done = rank(
        "--dev_predictions", predictions, run_config={"max_steps": 40}, learning_rate=0.02, **hparams
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "test has no labels and is left out" in done.err
    assert "train: 40 queries, 160 rows" in done.err
    assert "mrr: 1.000000, map: 1.000000, ndcg@10: 1.000000, p@1: 1.000000, queries: 8" in done.err
    pointwise = hparams["loss"] == "pointwise"
    assert ("f1: 1.000000" in done.err) is pointwise

    folder = tmp_path / "output" / "best" / "inference"
    assert read_bundle(folder).metrics["dev"]["mrr"] == 1.0
    lines = "服务\t价格好\n服务\t价格差\nalone\n".encode()
    plain = call("--do_predict", "--bundle", folder, stdin=lines).out.splitlines()
    assert float(plain[0]) > float(plain[1]) and plain[2].startswith("#error\texpected text_a<TAB>text_b")
    first, second, _ = map(
        json.loads,
        call("--do_predict", "--bundle", folder, "--format", "jsonl", stdin=lines).out.splitlines(),
    )
    assert first["score"] == pytest.approx(float(plain[0]), rel=1e-5)
    assert (first.get("label"), second.get("label")) == ((1, 0) if pointwise else (None, None))

    answers = [json.loads(line) for line in predictions.read_text("utf-8").splitlines()]
    assert len(answers) == 32 and answers[5].keys() >= {"qid", "candidate", "label", "prediction"}


def test_a_qid_out_of_order_ends_the_run_before_training(rank, write, tmp_path):
    path = write(tmp_path / "bad.tsv", *rows(3, 1), "0\tthe hotel\tgood\t1")
    done = rank("--dev_set", path)
    assert done.code == 1 and not (tmp_path / "output").exists()
    assert done.errors == [
        f"error: {path}:14: qid '0' comes again after another one; expected the rows of a query to stand "
        "together. Sort the file by qid."
    ]


def test_a_query_in_two_parts_of_a_folder(rank, write, tmp_path):
    (tmp_path / "parts").mkdir()
    for name in ("part-0", "part-1"):
        write(tmp_path / "parts" / name, *rows(2, 1))
    done = rank("--dev_set", tmp_path / "parts")
    assert done.code == 1 and not (tmp_path / "output").exists()
    assert "error: The dev set has the query '0' twice, in different files" in done.err


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"loss": "pairwize"}, "Did you mean 'pairwise'"),
        ({"loss": "listwise", "in_tokens": True}, "batch_size counts queries"),
        ({"loss": "listwise", "group_size": 1}, "group_size must be"),
        ({"los": "listwise"}, "loss"),
        ({"r_drop": 1.0}, "no R-Drop"),
    ],
)
def test_hyper_parameters_that_cannot_be_used(rank, hparams, message):
    done = rank(**hparams)
    assert done.code == 2 and message in done.err


def test_nothing_to_learn_from(rank, write, tmp_path):
    path = write(tmp_path / "same.tsv", "1\tthe hotel\tgood\t1", "1\tthe hotel\tbad\t1")
    done = rank("--train_set", path, loss="pairwise")
    assert done.code == 1 and "The train set has no query to learn from" in done.err

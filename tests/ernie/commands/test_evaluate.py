"""`ernie evaluate`: what a bundle is worth on a file is what training logged; flags of single tasks."""

from __future__ import annotations

import argparse
import dataclasses
import json

import pytest

from ernie.commands import evaluate
from ernie.config import ErnieConfig
from ernie.tasks.classification import ClassificationProcessor
from ernie.tasks.classification_model import ClassificationModel
from ernie.tasks.dual_encoder import DualEncoderProcessor
from ernie.tasks.dual_encoder_model import DualEncoderModel
from ernie.tasks.embedding import EmbeddingProcessor
from ernie.tasks.evaluating import evaluate_bundle
from ernie.tasks.groups import Groups
from ernie.tasks.pooling import EmbeddingSettings
from ernie.tasks.sequence_labeling import SequenceLabelingProcessor
from ernie.tasks.sequence_labeling_model import SequenceLabelingModel
from ernie.tokenizing import load_tokenizer
from propeller.data import Dataset
from propeller.errors import ConfigError, DataError
from propeller.metrics import Acc
from propeller.paddle.distributed import Ranks
from propeller.paddle.inference import Predictor
from propeller.paddle.runtime import paddle
from propeller.paddle.train.evaluation import evaluate as evaluate_live
from propeller.paddle.train.exporter import export_bundle
from propeller.types import HParams, RunConfig, RunMode

SETTINGS = EmbeddingSettings("layer1", "mean", True, 16, 16, query_prefix="query : ")
PAIRS = ["the cat\ton the mat", "a dog\ta dog ran", "the dog\tthe cat sat", "a mat\tthe mat", "猫\tthe cat"]
TAGGED = ["the cat ran\tO B-X O", "a dog\tO B-X", "on the mat on\tO O B-X I-X"]


@pytest.fixture(scope="module")
def tokenizer(bert_folder):
    return load_tokenizer(bert_folder)


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory):
    """`made(name)` gives a live model with random weights, its processor, and the bundle of both."""
    processors = {
        "retrieval": DualEncoderProcessor(tokenizer, SETTINGS),
        "ner": SequenceLabelingProcessor(tokenizer, ["O", "B-X", "I-X"], max_seqlen=16, scheme="BIO"),
        "pairs": ClassificationProcessor(tokenizer, ["no", "yes"], max_seqlen=16, pair=True),
    }
    models = {"retrieval": DualEncoderModel, "ner": SequenceLabelingModel, "pairs": ClassificationModel}
    raws = {
        "retrieval": {"text_a": "the cat", "positives": ["on the mat"], "negatives": []},
        "ner": {"units": ["the", "cat"], "labels": ["O", "O"]},
        "pairs": {"text_a": "the cat", "text_b": "dog", "label": "no"},
    }
    done = {}

    def make(name):
        if name not in done:
            processor = processors[name]
            paddle.seed(5)
            config = ErnieConfig(
                vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=16, initializer_range=0.3,
            )  # fmt: skip
            given = HParams(), RunMode.PREDICT, RunConfig()
            model = models[name](*given, config=config, processor=processor)
            model.mode = RunMode.PREDICT
            dataset = Dataset.from_list(processor.prepare([raws[name]] * 2))
            (columns,) = dataset.padded_batch(8, pad_values=processor.pad_values)
            folder = tmp_path_factory.mktemp(name)
            export_bundle(folder, model, columns, processor=processor, metrics={})
            done[name] = model, processor, folder
        return done[name]

    return make


@pytest.fixture
def write(tmp_path):
    def to_file(name, *lines):
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        return path

    return to_file


@pytest.fixture
def run(made, capsys):
    """`run(name, path, *flags)` runs the command on a bundle; what it prints."""
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)

    def call(name, path, *flags):
        _, _, folder = made(name)
        words = map(str, (folder, "--data", path, "--device", "cpu", *flags))
        assert evaluate.run(parser.parse_args([*words])) == 0
        return json.loads(capsys.readouterr().out)

    return call


def of_training(model, dataset):
    """What a training logs of its dev set, without the loss."""
    results = evaluate_live(model, dataset, ranks=Ranks())
    return {name: pytest.approx(value, abs=1e-6) for name, value in results.items() if name != "loss"}


def test_a_folder_of_several_sets(tmp_path):
    for name in ("train.tsv", "dev.jsonl", "notes.txt"):
        (tmp_path / name).write_text("a\t1\n")
    (tmp_path / "test").mkdir()
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    with pytest.raises(ConfigError, match="name one of these in it: dev.jsonl, test, train.tsv"):
        evaluate.run(parser.parse_args(["BUNDLE", "--data", str(tmp_path)]))


@pytest.mark.parametrize("candidates", ["all", "given"])
def test_a_retriever(made, run, write, candidates):
    model, processor, _ = made("retrieval")
    rows = [f"{n}\t{line}\t1" for n, line in enumerate(PAIRS)]
    rows += [f"{n}\t{query}\tun ##happy\t0" for n, query in enumerate(line.split("\t")[0] for line in PAIRS)]
    path = write("dev.tsv", "qid\ttext_a\ttext_b\tlabel", *sorted(rows))
    task = DualEncoderProcessor(processor.tokenizer, SETTINGS, candidates=candidates)
    model.processor = task
    groups = Groups("dev", Dataset.from_list(task.prepare(list(task.read(path)))))
    batches = groups.evaluation(2, pad_values=task.pad_values, lead=1)
    flags = () if candidates == "all" else ("--candidates", "given")
    found = run("retrieval", path, *flags)
    assert found == of_training(model, batches)
    assert found.keys() >= {"mrr", "map", "ndcg@10", "p@1", "recall@1", "recall@10"}
    assert found["queries"] == 5 and found["n"] == 15


def test_right_pairs(run, write):
    path = write("dev.tsv", *PAIRS)
    assert run("retrieval", path)["queries"] == 5
    one_query = write("one.tsv", "the cat\ton the mat", "the cat\ta mat")
    assert run("retrieval", one_query)["queries"] == 1
    assert run("retrieval", one_query, "--columns", "text_b,text_a")["queries"] == 2
    unlabelled = write("test.tsv", "qid\ttext_a\ttext_b", "1\tcat\tdog")
    with pytest.raises(DataError, match="test.tsv:1: has a column for the qid"):
        run("retrieval", unlabelled)
    with pytest.raises(ConfigError, match="candidates is 'al'; there are: all, given"):
        run("retrieval", path, "--candidates", "al")


def test_embeddings_of_each_token(tokenizer, tmp_path):
    processor = EmbeddingProcessor(tokenizer, dataclasses.replace(SETTINGS, pooling="none"))
    with pytest.raises(ConfigError, match="gives no single embedding to compare"):
        evaluate_bundle(None, processor, tmp_path / "dev.tsv")


def test_tagged_units(made, run, write):
    model, processor, _ = made("ner")
    path = write("dev.tsv", *TAGGED)
    dataset = Dataset.from_list(processor.prepare(list(processor.read(path))))
    expected = of_training(model, dataset.padded_batch(2, pad_values=processor.pad_values))
    assert run("ner", path) == run("ner", path, "--data_format", "tsv") == expected


def test_the_format_of_tagged_units(run, write):
    """Of texts of one unit each nothing tells whether they are rows of a table or of one sentence."""
    path = write("dev.txt", "cat\tB-X", "dog\tB-X", "ran\tO")
    assert run("ner", path)["n"] == 1
    assert run("ner", path, "--data_format", "tsv")["n"] == 3
    with pytest.raises(SystemExit):
        run("ner", path, "--data_format", "csv")


def test_flags_of_another_task(run, write):
    path = write("dev.tsv", "the cat\tdog\tno")
    with pytest.raises(ConfigError, match="data_format is for sequence labels; .* is 'classification'"):
        run("pairs", path, "--data_format", "tsv")
    for name in ("pairs", "ner"):
        with pytest.raises(ConfigError, match="candidates are for embeddings; .* Leave them out"):
            run(name, path, "--candidates", "all")


def test_labels(made, run, write):
    model, processor, _ = made("pairs")
    path = write("dev.tsv", *(f"{line}\t{('no', 'yes')[place % 2]}" for place, line in enumerate(PAIRS)))
    dataset = Dataset.from_list(processor.prepare(list(processor.read(path))))
    expected = of_training(model, dataset.padded_batch(2, pad_values=processor.pad_values))
    assert run("pairs", path) == expected
    with pytest.raises(DataError, match="label"):
        run("pairs", write("test.tsv", "text_a\ttext_b", *PAIRS))


def test_what_is_wrong_with_metrics_is_said_before_data_are_read(made, monkeypatch, tmp_path):
    _, processor, folder = made("pairs")
    predictor = Predictor(folder, device="cpu")
    for metrics, words in (({"n": Acc()}, "cannot be called 'n'"), ({}, "'classification' has no metrics")):
        monkeypatch.setattr(processor, "metrics", lambda metrics=metrics: metrics)
        with pytest.raises(ConfigError, match=words):
            evaluate_bundle(predictor, processor, tmp_path / "nothing")

"""The classification processor and the columns of its files; all without Paddle."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest

from ernie.tasks.classification import ClassificationProcessor
from ernie.tokenizing import library_versions, load_tokenizer
from propeller.bundle import ArraySpec, read_bundle, write_bundle, write_probe
from propeller.errors import ConfigError, DataError
from propeller.processor import find_processor

VOCABULARY = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "好", "差", "good", "bad", "is"]
PAD, CLS, SEP, MASK, UNK, GOOD_ZH, BAD_ZH, GOOD, BAD, IS = range(10)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", "utf-8")
    return load_tokenizer(None, vocab_file=path)


@pytest.fixture
def make(tokenizer):
    def processor(labels=("0", "1"), max_seqlen=8, pair=False):
        return ClassificationProcessor(tokenizer, labels, max_seqlen=max_seqlen, pair=pair)

    return processor


@pytest.fixture
def many(tokenizer):
    """A processor of the labels a, b and c, of which an example may have any number."""

    def processor(**settings):
        return ClassificationProcessor(
            tokenizer, ["a", "b", "c"], max_seqlen=8, pair=False, label_separator=",", **settings
        )

    return processor


class TestPrepare:
    def test_texts(self, make):
        first, second = make().prepare([{"text_a": "good 好", "label": 1}, {"text_a": "", "label": 0}])
        assert first["input_ids"].tolist() == [CLS, GOOD, GOOD_ZH, SEP]
        assert first["token_type_ids"].tolist() == [0, 0, 0, 0]
        assert first["input_ids"].dtype == first["token_type_ids"].dtype == np.int64
        assert (first["num_tokens"], first["label"]) == (4, 1)
        assert second["input_ids"].tolist() == [CLS, SEP]

    def test_pairs(self, make):
        (example,) = make(pair=True).prepare([{"text_a": "is good", "text_b": "差"}])
        assert example["input_ids"].tolist() == [CLS, IS, GOOD, SEP, BAD_ZH, SEP]
        assert example["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1]
        assert "label" not in example

    def test_what_is_too_long_is_cut_and_its_length_kept(self, make):
        (example,) = make(max_seqlen=5).prepare([{"text_a": "好" * 20}])
        assert example["input_ids"].tolist() == [CLS, GOOD_ZH, GOOD_ZH, GOOD_ZH, SEP]
        assert example["num_tokens"] == 22
        (pair,) = make(max_seqlen=6, pair=True).prepare([{"text_a": "好" * 20, "text_b": "差"}])
        assert pair["input_ids"].tolist() == [CLS, GOOD_ZH, GOOD_ZH, SEP, BAD_ZH, SEP]

    def test_no_example(self, make):
        assert make().prepare([]) == []

    @pytest.mark.parametrize(("max_seqlen", "pair", "least"), [(2, False, 3), (4, True, 5)])
    def test_no_room(self, make, max_seqlen, pair, least):
        with pytest.raises(ConfigError, match=f"max_seqlen {max_seqlen} leaves no room.*{least} or more"):
            make(max_seqlen=max_seqlen, pair=pair)
        make(max_seqlen=least, pair=pair)

    @pytest.mark.parametrize("labels", [[], ["1"], ["1", "1"]])
    def test_too_few_labels(self, make, labels):
        with pytest.raises(ConfigError, match="at least two labels"):
            make(labels=labels)

    def test_equal_labels(self, make):
        with pytest.raises(ConfigError, match="Some of the labels are the same"):
            make(labels=["1", "2", "1"])


class TestFinish:
    def test_probabilities(self, make):
        answers = make(labels=["no", "yes", "so so"]).finish(
            {"logits": np.array([[1.0, 2.0, 0.5], [1000.0, -1000.0, 999.0]], np.float32)}
        )
        expected = np.exp([1, 2, 0.5]) / np.exp([1, 2, 0.5]).sum()
        assert answers[0]["label"] == "yes"
        assert answers[0]["probability"] == pytest.approx(expected[1])
        assert list(answers[0]["probabilities"]) == ["no", "yes", "so so"]
        assert list(answers[0]["probabilities"].values()) == pytest.approx(expected.tolist())
        assert answers[1]["label"] == "no"  # neither overflow nor a warning
        assert answers[1]["probability"] == pytest.approx(1 / (1 + np.exp(-1)))
        assert json.loads(json.dumps(answers)) == answers

    def test_regression(self, make):
        processor = make(labels=None)
        assert processor.num_outputs == 1
        answers = processor.finish({"logits": np.array([[1.5], [-2.25]], np.float32)})
        assert answers == [{"value": 1.5}, {"value": -2.25}]
        assert [processor.format({}, answer) for answer in answers] == ["1.5", "-2.25"]

    def test_format(self, make):
        processor = make()
        (answer,) = processor.finish({"logits": np.array([[0.0, np.log(3)]])})
        assert processor.format({}, answer) == "0.25\t0.75"


class TestParse:
    def test_texts_and_pairs(self, make):
        assert make().parse("good") == {"text_a": "good"}
        assert make().parse("") == {"text_a": ""}
        assert make(pair=True).parse("a\t b ") == {"text_a": "a", "text_b": " b "}
        assert make(pair=True).parse("\t") == {"text_a": "", "text_b": ""}

    @pytest.mark.parametrize(
        ("pair", "line", "message"),
        [
            (False, "a\tb", "expected one text without a tab, found 2 cells"),
            (True, "a", "expected text_a<TAB>text_b, found 1 cells"),
            (True, "a\tb\tc", "expected text_a<TAB>text_b, found 3 cells"),
        ],
    )
    def test_malformed(self, make, pair, line, message):
        with pytest.raises(DataError, match=message):
            make(pair=pair).parse(line)


def test_metrics(make):
    assert list(make().metrics()) == ["acc", "f1"]
    assert list(make(labels=["0", "1", "2"]).metrics()) == ["acc", "macro_f1"]
    assert list(make(labels=None).metrics()) == ["pearson", "spearman"]


def test_saved_in_a_bundle_and_loaded_by_name(make, tmp_path):
    processor = make(labels=["no", "yes"], max_seqlen=6, pair=True)
    specs = (ArraySpec("input_ids", "int64", ("batch", "seq_len")),)
    for name in ("model.json", "model.pdiparams"):
        (tmp_path / name).write_bytes(b"opaque here")
    write_probe(tmp_path, {"input_ids": np.zeros((1, 1), np.int64)}, {})
    write_bundle(tmp_path, inputs=specs, outputs=(), processor=processor, metrics={}, metadata={})
    loaded = read_bundle(tmp_path).processor()
    assert type(loaded) is find_processor("classification") is ClassificationProcessor
    assert (loaded.labels, loaded.max_seqlen, loaded.pair) == (["no", "yes"], 6, True)
    assert loaded.fingerprint == processor.fingerprint
    raw = {"text_a": "IS good", "text_b": "x"}
    assert loaded.prepare([raw])[0]["input_ids"].tolist() == [CLS, IS, GOOD, SEP, UNK, SEP]


def test_settings_of_older_bundles_and_newer(make, many, tokenizer):
    """What is not set is not written: a bundle reads as before."""
    assert make().settings == {"labels": ["0", "1"], "max_seqlen": 8, "pair": False}
    processor = many(thresholds={"b": 0.25})
    assert ClassificationProcessor(tokenizer, **processor.settings).settings == processor.settings
    assert processor.with_thresholds({"a": 0.75}).settings == {
        **processor.settings,
        "thresholds": {"a": 0.75},
    }


def test_fingerprint_tells_settings_apart(make, many, tmp_path):
    cased = ClassificationProcessor(
        load_tokenizer(None, vocab_file=_vocabulary(tmp_path), do_lower_case=False),
        ["0", "1"],
        max_seqlen=8,
        pair=False,
    )
    others = [
        many(),
        many(thresholds={"a": 0.1}),
        make(["0", "2"]),
        make(["1", "0"]),
        make(None),
        make(max_seqlen=9),
        make(pair=True),
        cased,
    ]
    assert len({processor.fingerprint for processor in [make(), *others]}) == 9
    assert make().fingerprint == make().fingerprint


@pytest.mark.parametrize("library", ["tokenizers", "sentencepiece"])
def test_fingerprint_tells_the_libraries_versions_apart(make, monkeypatch, library):
    before = make().fingerprint
    tokens = make().tokenizer.fingerprint
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "99.0" if name == library else real(name))
    assert make().fingerprint != before
    again = load_tokenizer(None, vocab_file={token: id for id, token in enumerate(VOCABULARY)})
    assert again.fingerprint == tokens, "which a client compares with its server's"


def test_fingerprint_without_a_library(make, monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert library_versions() == {}
    assert len(make().fingerprint) == 64


def _vocabulary(folder):
    path = folder / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", "utf-8")
    return path


class TestRead:
    def test_labels_are_texts(self, make, tmp_path):
        (tmp_path / "x.tsv").write_text("good\tyes\nbad\t no \n", "utf-8")
        raws = list(make(["no", "yes"]).read(tmp_path / "x.tsv"))
        assert raws == [{"text_a": "good", "label": "yes"}, {"text_a": "bad", "label": "no"}]

    def test_columns(self, make, tmp_path):
        (tmp_path / "x.tsv").write_text("7\t1\tgood\n", "utf-8")
        raws = make().read(tmp_path / "x.tsv", columns=["_", "label", "text_a"])
        assert list(raws) == [{"text_a": "good", "label": "1"}]

    def test_of_a_task(self, tokenizer, tmp_path):
        processor = ClassificationProcessor(tokenizer, ["0", "1"], max_seqlen=8, pair=False, task="CoLA")
        (tmp_path / "x.tsv").write_text("gj04\t1\t\tgood\n", "utf-8")
        assert list(processor.read(tmp_path / "x.tsv")) == [{"text_a": "good", "label": "1"}]

    def test_a_pair_needs_both(self, make, tmp_path):
        (tmp_path / "x.tsv").write_text("label\ttext_a\n1\tgood\n", "utf-8")
        with pytest.raises(DataError, match="x.tsv:1: .*text_b"):
            make(pair=True).read(tmp_path / "x.tsv")


class TestLabels:
    def label(self, processor, value):
        return processor.prepare([{"text_a": "good", "label": value}])[0]["label"]

    def test_ids(self, make):
        found = self.label(make(["no", "yes"]), " yes ")
        assert found == 1 and found.dtype == np.int64
        assert self.label(make(["1", "3"]), 3) == 1
        assert self.label(make(["entailment", "contradiction"]), "contradictory") == 1

    def test_numbers(self, make):
        for value in ("4.5", 4.5):
            found = self.label(make(None), value)
            assert found == np.float32(4.5) and found.dtype == np.float32

    def test_any_number_of_labels(self, many):
        found = self.label(many(), ["c", "a"])
        assert found.tolist() == [1, 0, 1] and found.dtype == np.float32
        assert self.label(many(), []).tolist() == [0, 0, 0]
        assert self.label(many(), "b").tolist() == [0, 1, 0]

    @pytest.mark.parametrize(
        ("labels", "value", "message"),
        [
            (["no", "yes"], "yess", "unknown label 'yess'; known are 'no', 'yes'.* Did you mean 'yes'"),
            ([str(i) for i in range(30)], "30", "unknown label '30'; .*'19' and 10 more"),
            (["no", "yes"], ["yes"], "one label was expected, found .*; for several set --multi_label"),
            (["no", "yes"], None, "the label is None"),
            (None, "nan", "expected a finite number"),
            (None, "1e39", "the label is '1e39'; expected a finite number, of float32"),
            (None, 10**400, "the label is 1000.*; expected a number"),
            (None, "five", "the label is 'five'; expected a number"),
            (None, ["1"], "expected a number"),
        ],
    )
    def test_wrong(self, make, labels, value, message):
        with pytest.raises(DataError, match=message):
            self.label(make(labels), value)

    def test_unknown_among_several(self, many):
        with pytest.raises(DataError, match="unknown label 'd'"):
            self.label(many(), ["a", "d"])

    @pytest.mark.parametrize(
        ("raw", "message"),
        [
            ({"text": "good"}, "the text 'text_a' is missing; the example has 'text'"),
            ({"text_a": 5}, "expected a text as 'text_a', found 5"),
        ],
    )
    def test_no_text(self, make, raw, message):
        with pytest.raises(DataError, match=message):
            make().prepare([raw])


class TestManyLabels:
    def test_answers(self, many):
        processor = many(thresholds={"b": 0.1})
        answers = processor.finish({"logits": np.array([[2.0, -2.0, 0.0], [-1.0, -9.0, -1.0]], np.float32)})
        assert [answer["labels"] for answer in answers] == [["a", "b", "c"], []]
        expected = 1 / (1 + np.exp([-2.0, 2.0, 0.0]))
        assert list(answers[0]["probabilities"].values()) == pytest.approx(expected.tolist())
        assert json.loads(json.dumps(answers)) == answers
        assert processor.format({}, answers[0]) == "0.88079708\t0.11920292\t0.5"

    def test_metrics(self, many):
        metrics = many(thresholds={"b": 0.1}).metrics()
        assert list(metrics) == ["micro_f1", "macro_f1", "exact_match"]
        labels, logits = np.array([[1, 1, 1], [0, 0, 0]]), np.array([[2.0, -2.0, 0.0], [-1.0, -9.0, -1.0]])
        for metric in metrics.values():
            metric.update({"logits": logits}, labels, {})
            assert metric.compute() in (1.0,)

    def test_one_label_will_do(self, tokenizer):
        processor = ClassificationProcessor(
            tokenizer, ["spam"], max_seqlen=8, pair=False, label_separator=","
        )
        assert processor.num_outputs == 1
        assert processor.finish({"logits": np.array([[1.0]])})[0]["labels"] == ["spam"]

    def test_a_regression_has_none(self, tokenizer):
        with pytest.raises(ConfigError, match="A regression has no labels"):
            ClassificationProcessor(tokenizer, None, max_seqlen=8, pair=False, label_separator=",")


class TestThresholds:
    def test_the_second_of_two(self, tokenizer):
        processor = ClassificationProcessor(
            tokenizer, ["no", "yes"], max_seqlen=8, pair=False, thresholds={"yes": 0.2}
        )
        logits = np.log([[0.75, 0.25], [0.85, 0.15]])
        answers = processor.finish({"logits": logits})
        assert [answer["label"] for answer in answers] == ["yes", "no"]
        assert [answer["probability"] for answer in answers] == pytest.approx([0.25, 0.85])
        metrics = processor.metrics()
        for metric in metrics.values():
            metric.update({"logits": logits}, np.array([1, 0]), {})
        assert {name: metric.compute() for name, metric in metrics.items()} == {"acc": 1.0, "f1": 1.0}

    @pytest.mark.parametrize(
        ("labels", "thresholds"),
        [
            (["0", "1"], {"0": 0.5}),
            (["0", "1"], {"1": 1.5}),
            (["0", "1", "2"], {"1": 0.5}),
            (None, {"1": 0.5}),
        ],
    )
    def test_what_cannot_be_used(self, tokenizer, labels, thresholds):
        with pytest.raises(ConfigError, match="threshold"):
            ClassificationProcessor(tokenizer, labels, max_seqlen=8, pair=False, thresholds=thresholds)


def test_the_metrics_of_a_task(tokenizer):
    def metrics(task, labels=("0", "1")):
        processor = ClassificationProcessor(tokenizer, labels, max_seqlen=8, pair=True, task=task)
        return list(processor.metrics())

    assert metrics("cola") == ["mcc"]
    assert metrics("mrpc") == ["f1", "acc"]
    assert metrics("qqp") == ["acc", "f1"]
    assert metrics("mnli", ("contradiction", "entailment", "neutral")) == ["acc", "mcc"]
    assert metrics("sts-b", None) == ["pearson", "spearman"]


def test_needs_no_paddle(root):
    code = "import sys, ernie.tasks.classification, ernie.tasks.finetuning; sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0

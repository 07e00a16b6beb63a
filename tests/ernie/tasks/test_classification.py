"""The classification processor and the columns of its files; all without Paddle."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest

from ernie.tasks.classification import (
    ClassificationProcessor,
    file_columns,
    find_labels,
    label_column,
    number_labels,
    raw_label_column,
)
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


def test_fingerprint_tells_settings_apart(make, tmp_path):
    cased = ClassificationProcessor(
        load_tokenizer(None, vocab_file=_vocabulary(tmp_path), do_lower_case=False),
        ["0", "1"],
        max_seqlen=8,
        pair=False,
    )
    others = [make(["0", "2"]), make(["1", "0"]), make(None), make(max_seqlen=9), make(pair=True), cased]
    assert len({processor.fingerprint for processor in [make(), *others]}) == 7
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


@pytest.mark.parametrize(
    ("found", "labels"),
    [
        (["10", "2", "0", "2"], ["0", "2", "10"]),
        (["1", "-1", "0"], ["-1", "0", "1"]),
        (["pos", "neg"], ["neg", "pos"]),
        (["2", "10", "x"], ["10", "2", "x"]),
        (["--1", "1"], ["--1", "1"]),
        (["1", "01", "0"], ["0", "01", "1"]),
        (["-", ""], ["", "-"]),
    ],
)
def test_number_labels(found, labels):
    assert number_labels(found) == labels
    assert number_labels(reversed(found)) == labels


class TestColumns:
    def read(self, path, text, columns):
        path.write_text(text, "utf-8")
        return list(columns.read(path))

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("label\ttext_a\n1\tgood\n", {"text_a": "good", "label": "1"}),
            ("sentence\tlabel\ngood\t1\n", {"text_a": "good", "label": "1"}),
            ("good\t1\n", {"text_a": "good", "label": "1"}),
            ("good\tbad\t1\n", {"text_a": "good", "text_b": "bad", "label": "1"}),
            ("query\ttitle\tlabel\na\tb\t0\n", {"text_a": "a", "text_b": "b", "label": "0"}),
            (
                'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t2\t3\ta\t"b\n',
                {"text_a": "a", "text_b": '"b', "label": "1"},
            ),
            ("premise\thypothesis\tgold_label\na\tb\tno\n", {"text_a": "a", "text_b": "b", "label": "no"}),
        ],
    )
    def test_public_files(self, tmp_path, text, expected):
        assert self.read(tmp_path / "x.tsv", text, file_columns(raw_label_column())) == [expected]

    def test_pair_or_not_is_what_was_said(self, tmp_path):
        pairs, singles = (file_columns(raw_label_column(), pair=pair) for pair in (True, False))
        with pytest.raises(DataError, match="text_b"):
            self.read(tmp_path / "x.tsv", "label\ttext_a\n1\tgood\n", pairs)
        assert self.read(tmp_path / "x.tsv", "text_b\ttext_a\tlabel\nb\ta\t1\n", singles) == [
            {"text_a": "a", "label": "1"}
        ]

    def test_a_file_without_labels(self, tmp_path):
        optional = raw_label_column(optional=True)
        singles, pairs = (file_columns(optional, pair=pair) for pair in (False, True))
        assert self.read(tmp_path / "x.tsv", "index\tsentence\n0\tgood\n", singles) == [{"text_a": "good"}]
        assert self.read(tmp_path / "x.tsv", "a\tb\n", pairs) == [{"text_a": "a", "text_b": "b"}]

    def test_names_in_order(self, tmp_path):
        columns = file_columns(raw_label_column(), names=["_", "label", "text_a"])
        assert self.read(tmp_path / "x.tsv", "id\t1\tgood\n", columns) == [{"text_a": "good", "label": "1"}]

    def test_ids_and_numbers(self, tmp_path):
        text = "good\tyes\nbad\t no \n"
        rows = self.read(tmp_path / "x.tsv", text, file_columns(label_column(["no", "yes"])))
        assert [row["label"] for row in rows] == [1, 0]
        rows = self.read(tmp_path / "x.tsv", "good\t4.5\n", file_columns(label_column(None)))
        assert rows[0]["label"] == np.float32(4.5) and rows[0]["label"].dtype == np.float32

    @pytest.mark.parametrize(
        ("labels", "cell", "message"),
        [
            (["no", "yes"], "yess", "x.tsv:2: .*unknown label 'yess'.*Did you mean 'yes'"),
            (None, "nan", "x.tsv:2: .*expected a finite number"),
            (None, "five", "x.tsv:2: .*expected a number, found 'five'"),
        ],
    )
    def test_wrong_labels_name_the_line(self, tmp_path, labels, cell, message):
        good = "1" if labels is None else "yes"
        with pytest.raises(DataError, match=message):
            self.read(tmp_path / "x.tsv", f"a\t{good}\nb\t{cell}\n", file_columns(label_column(labels)))


def test_needs_no_paddle(root):
    code = "import sys, ernie.tasks.classification, ernie.tasks.finetuning; sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0


def test_numbers_for_labels_are_taken_for_a_regression_that_was_not_asked_for(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("label\ttext_a\n0.5\ta\n3.8\tb\n", "utf-8")
    columns = file_columns(raw_label_column())
    with pytest.raises(ConfigError, match="For a regression set num_label to 1"):
        find_labels(path, columns, None)
    assert find_labels(path, columns, 1) is None
    assert find_labels(path, columns, 2) == ["0.5", "3.8"]


def test_an_empty_label_is_named(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("label\ttext_a\n0\ta\n \tb\n1\tc\n", "utf-8")
    with pytest.raises(DataError, match=r"train.tsv:3: .*the label is empty"):
        find_labels(path, file_columns(raw_label_column()), None)


@pytest.mark.parametrize(
    ("cells", "spellings"),
    [
        (["0", "1", "1", "01"], r"'1' \(2 rows\) and '01' \(1 rows\)"),
        (["0", "1", "\uff11"], r"'1' \(1 rows\) and '\uff11' \(1 rows\)"),
        (["-1", "1", "-01"], "'-1' .* and '-01'"),
        (["yes", "no", "Yes"], "'yes' .* and 'Yes'"),
        (["no", "\uff59\uff45\uff53", "yes"], "'\uff59\uff45\uff53' .* and 'yes'"),
    ],
    ids=["zero", "full-width-digit", "negative", "case", "full-width-letters"],
)
def test_two_spellings_of_a_label_are_named(tmp_path, cells, spellings):
    path = tmp_path / "train.tsv"
    path.write_text("label\ttext_a\n" + "".join(f"{cell}\ta\n" for cell in cells), "utf-8")
    columns = file_columns(raw_label_column())
    for wanted in (None, len(set(cells)), 2):
        with pytest.raises(ConfigError, match=rf"{re.escape(str(path))} has the labels {spellings}"):
            find_labels(path, columns, wanted)
    (tmp_path / "label_map.json").write_text(json.dumps({cell: i for i, cell in enumerate(set(cells))}))
    assert set(find_labels(path, columns, None)) == set(cells), "where they are meant"


def test_labels_that_are_not_spellings_of_one(tmp_path):
    path = tmp_path / "train.tsv"
    labels = ["+1", "-1", "1", "1.0", "a b", "ab", "\u00e9", "e"]
    path.write_text("label\ttext_a\n" + "".join(f"{label}\ta\n" for label in labels), "utf-8")
    assert find_labels(path, file_columns(raw_label_column()), None) == sorted(labels)

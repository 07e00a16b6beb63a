"""The report on the data before training."""

from __future__ import annotations

import pytest

from ernie.tasks.classification import ClassificationProcessor
from ernie.tasks.report import data_report
from ernie.tokenizing import load_tokenizer
from propeller.errors import DataError

TEXTS = {
    "train": ["good", "good x", "bad bad bad bad bad", "x"],
    "dev": ["good", "x", "bad"],
    "test": ["is"],
}
LABELS = {"train": ["yes", "yes", "no", "yes"], "dev": ["yes", "yes", "no"], "test": ["no"]}


@pytest.fixture
def make(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "good", "bad", "is"]) + "\n", "utf-8")
    tokenizer = load_tokenizer(None, vocab_file=path)
    return lambda labels, **settings: ClassificationProcessor(
        tokenizer, labels, max_seqlen=5, pair=False, **settings
    )


def report(processor, labels=LABELS, texts=TEXTS, shared=TEXTS):
    sets = {
        name: processor.prepare(
            [{"text_a": text, "label": label} for text, label in zip(texts[name], labels[name], strict=True)]
        )
        for name in texts
    }
    raws = {name: ((text,) for text in found) for name, found in shared.items()}
    return data_report(sets, texts=raws, processor=processor).split("\n")


def test_rows_lengths_cuts_unknown_tokens_labels_and_shared_texts(make):
    train, dev, test, *warnings = report(make(["no", "yes"]))
    # 3, 4, 7 and 3 tokens, of which the 7 are cut at 5; 2 of 15 are unknown.
    assert train == (
        "train: 4 rows, tokens a row: mean 4.2, 95 % up to 7, longest 7; cut at 5: 25.0%; "
        "unknown tokens: 13.33%; labels: no 1, yes 3"
    )
    assert dev.endswith("cut at 5: 0.0%; unknown tokens: 11.11%; labels: no 1, yes 2")
    assert test.startswith("test: 1 rows, ") and test.endswith("labels: no 1, yes 0")
    assert warnings == ["warning: 2 of 3 texts of dev also stand in train"]


def test_pairs_are_the_same_only_as_a_whole(make):
    shared = {"train": [("a", "b"), ("a b",)], "dev": [("a", "c"), ("a b",), ("b", "a")]}
    processor = make(["no", "yes"])
    example = processor.prepare([{"text_a": "good", "label": "no"}])
    lines = data_report({"train": example}, texts=shared, processor=processor).split("\n")
    assert lines[1:] == ["warning: 1 of 3 texts of dev also stand in train"]


def test_regression(make):
    labels = {name: [0.5 + (label == "yes") for label in found] for name, found in LABELS.items()}
    train, *_ = report(make(None), labels=labels)
    assert train.endswith("labels: 0.5 to 1.5, mean 1.250")


def test_any_number_of_labels(make):
    labels = {**LABELS, "train": [["yes", "no"], [], ["yes"], ["yes"]]}
    train, *_ = report(make(["no", "yes"], label_separator=","), labels=labels)
    assert train.endswith("labels: no 1, yes 3; 1.00 a row, 1 rows without")


def test_a_long_label_is_cut(make):
    labels = {
        name: ["no" * 30 if label == "no" else label for label in found] for name, found in LABELS.items()
    }
    train, *_ = report(make(["no" * 30, "yes"]), labels=labels)
    assert train.endswith(f"labels: {'no' * 20} 1, yes 3")


def test_lone_surrogates_do_no_harm(make):
    lines = report(make(["no", "yes"]), shared={"train": ["\ud800"], "dev": ["\ud800"]})
    assert lines[-1] == "warning: 1 of 1 texts of dev also stand in train"


def test_an_empty_set_is_named(make):
    with pytest.raises(DataError, match="The dev set is empty"):
        report(make(["no", "yes"]), texts={"train": ["good"], "dev": []}, labels={"train": ["no"], "dev": []})

"""Thresholds: the best for F1, and a bundle that gets them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from sklearn.metrics import f1_score

from ernie.tasks.classification import ClassificationProcessor
from ernie.tasks.thresholds import best_threshold, check_thresholds, find_thresholds, tune_thresholds
from ernie.tokenizing import load_tokenizer
from propeller.bundle import ArraySpec, read_bundle, write_bundle, write_probe
from propeller.data import Dataset
from propeller.errors import ConfigError, DataError

VOCABULARY = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(40))]


@pytest.fixture
def make(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", "utf-8")
    tokenizer = load_tokenizer(None, vocab_file=path)

    def processor(labels=("no", "yes"), **settings):
        return ClassificationProcessor(tokenizer, labels, max_seqlen=8, pair=False, **settings)

    return processor


class TestBestThreshold:
    @pytest.mark.parametrize("seed", range(20))
    def test_none_is_better(self, seed):
        rng = np.random.default_rng(seed)
        positive = rng.random(60) < 0.3
        scores = np.clip(np.round(rng.normal(0.3 + 0.2 * positive, 0.2), 2), 0, 1)  # with ties
        threshold, f1 = best_threshold(scores, positive)
        assert f1 == pytest.approx(f1_score(positive, scores >= threshold, zero_division=0))
        predicted = scores >= np.linspace(0, 1, 401)[:, None]
        others = 2 * (predicted & positive).sum(1) / (predicted.sum(1) + positive.sum())
        assert f1 >= others.max() - 1e-12

    def test_the_middle_of_what_it_may_be(self):
        assert best_threshold([0.1, 0.2, 0.3, 0.4], [False, False, True, True]) == (0.25, 1.0)

    def test_nearest_to_a_half_of_what_is_as_good(self):
        assert best_threshold([0.1, 0.9], [False, True]) == (0.5, 1.0)
        assert best_threshold([0.2, 0.9], [False, True]) == (0.5, 1.0), "which is between them as well"
        # The best one of two, or the best four: both have 2 / 3.
        assert best_threshold([0.9, 0.3, 0.2, 0.1], [True, False, False, True]) == (0.5, pytest.approx(2 / 3))

    def test_neighbours_in_the_last_digit(self):
        high = np.nextafter(0.3, 1)
        threshold, f1 = best_threshold([0.3, high], [False, True])
        assert (threshold, f1) == (high, 1.0)

    def test_nothing_to_choose_by(self):
        assert best_threshold([0.1, 0.9], [False, False]) == (0.5, 0.0)
        assert best_threshold([0.0], [True]) == (0.0, 1.0)

    @pytest.mark.parametrize("scores", [[], [1.5], [float("nan")]])
    def test_no_probabilities(self, scores):
        with pytest.raises(DataError, match="probabilities from 0 to 1"):
            best_threshold(scores, [True] * len(scores))


def test_of_two_labels_and_of_any_number(make):
    logits = np.log([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    assert find_thresholds(make(), logits, np.array([[0], [1], [1]])) == {"yes": pytest.approx(0.15)}
    many = make(["a", "b"], label_separator=",")
    logits = np.array([[-3.0, 1.0], [-1.0, 2.0], [-4.0, 4.0]])
    found = find_thresholds(many, logits, np.array([[0, 0], [1, 0], [0, 1]], np.float32))
    assert list(found) == ["a", "b"]
    rows = many.with_thresholds(found).finish({"logits": logits})
    assert [row["labels"] for row in rows] == [[], ["a"], ["b"]]


def test_tasks_without_thresholds(make):
    with pytest.raises(ConfigError, match="this is one of 3 labels"):
        check_thresholds(make(["0", "1", "2"]))
    with pytest.raises(ConfigError, match="this is a regression"):
        check_thresholds(make(None))


class Ramp:
    """A model that takes a row's second token for its probability of `yes`, in fortieths."""

    def predict(self, arrays):
        share = (arrays["input_ids"][:, 1] - 4 + 0.5) / 40
        return {"logits": np.log(np.stack([1 - share, share], axis=1)).astype(np.float32)}


@pytest.fixture
def published(make, tmp_path):
    """The link to a bundle of the model above, as an exporter leaves it."""
    processor = make()
    folder = tmp_path / "best" / ".inference" / "step_00000010"
    folder.mkdir(parents=True)
    for name in ("model.json", "model.pdiparams"):
        (folder / name).write_bytes(b"opaque here")
    write_probe(folder, {"input_ids": np.zeros((1, 1), np.int64)}, {})
    (folder / "best.json").write_text('{"step": 10}')
    write_bundle(
        folder,
        inputs=[ArraySpec("input_ids", "int64", ("batch", "seq_len"))],
        outputs=(),
        processor=processor,
        metrics={"dev": {"loss": 0.3, "acc": 0.5, "f1": 0.0, "n": 4}},
        metadata={"ignores_padding": True, "versions": {"paddle": "x"}},
        axis_limits={"seq_len": 9},
    )
    link = tmp_path / "best" / "inference"
    link.symlink_to(folder)
    return link


def examples(processor, *rows):
    raws = [{"text_a": f"w{word}", "label": label} for word, label in rows]
    return Dataset.from_list(processor.prepare(raws))


class TestTune:
    DEV = ((3, "no"), (5, "no"), (9, "yes"), (30, "yes"))
    TEST = ((4, "no"), (8, "yes"), (20, "no"))

    def tune(self, link, make):
        sets = {"dev": examples(make(), *self.DEV), "test": examples(make(), *self.TEST)}
        return tune_thresholds(link, Ramp(), sets)

    def test_a_new_version_takes_the_place(self, published, make):
        before = read_bundle(published)
        thresholds = self.tune(published, make)
        assert thresholds == {"yes": pytest.approx((5.5 + 9.5) / 80)}
        after = read_bundle(published)
        assert after.folder != before.folder and before.folder.exists() and published.is_symlink()
        assert after.processor().thresholds == thresholds
        assert after.metrics["dev"] == {"loss": 0.3, "acc": 1.0, "f1": 1.0, "n": 4}
        assert after.metrics["test"] == {"acc": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3)}
        for name in ("ignores_padding", "versions", "inputs", "axis_limits", "format_version"):
            assert after.metadata[name] == before.metadata[name]
        for name in ("model.json", "model.pdiparams", "probe.npz", "vocab.txt"):
            assert after.metadata["files"][name] == before.metadata["files"][name]
        assert json.loads((published / "best.json").read_text()) == {"step": 10}

    def test_again_it_finds_the_same(self, published, make):
        first = self.tune(published, make)
        assert self.tune(published, make) == first
        assert read_bundle(published).processor().thresholds == first

    def test_however_often_few_versions_stay(self, published, make):
        """Of a large model each is large."""
        names = []
        for _ in range(5):
            before = read_bundle(published).folder
            self.tune(published, make)
            assert before.exists(), "somebody may be reading it"
            names.append(read_bundle(published).folder.name)
        assert names == [f"step_00000010.tuned{end}" for end in ("", ".1", ".2", "", ".1")]
        assert len(list(before.parent.iterdir())) == 3

    def test_a_copy_that_is_no_link(self, published, make, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(published, copy)
        thresholds = self.tune(copy, make)
        assert not copy.is_symlink() and read_bundle(copy).processor().thresholds == thresholds

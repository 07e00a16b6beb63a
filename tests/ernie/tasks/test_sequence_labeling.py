"""Sequence labelling without Paddle: windows, tags, entities, offsets, scores."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ernie.tasks.sequence_labeling import NO_LABEL, SequenceLabelingProcessor
from ernie.tasks.tagging import entities_of
from ernie.tokenizing import WordPieceTokenizer
from propeller.data import pad_batch
from propeller.errors import ConfigError, DataError
from propeller.metrics import compute_all

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
TOKENS = ["[CLS]", "[SEP]", "[UNK]", *"abcdefghij", *"人民北京大学在", "un", "##happy", "##x", "[PAD]"]
TOKENIZER = WordPieceTokenizer({token: index for index, token in enumerate(TOKENS)})
B_PER, I_PER, B_LOC, I_LOC = range(1, 5)


def make(max_seqlen=12, tokenizer=TOKENIZER, labels=LABELS, scheme="BIO", **settings):
    return SequenceLabelingProcessor(tokenizer, labels, max_seqlen=max_seqlen, scheme=scheme, **settings)


def logits_for(examples, choose, num_labels=5):
    """A padded batch of logits for which label `choose(row, unit)` is best at each unit's first token."""
    size = max(len(example["units"]) for example in examples)
    logits = np.zeros((len(examples), size + 3, num_labels), np.float32)
    for row, example in enumerate(examples):
        for place in np.flatnonzero(example["units"] >= 0):
            logits[row, place, choose(row, int(example["units"][place]))] = 2.0
    return logits


def answer(processor, raw, choose):
    (examples,) = processor.windows([raw])
    parts = processor.finish({"logits": logits_for(examples, choose, len(processor.labels))})
    return processor.join(raw, examples, parts)


class TestWindows:
    def test_a_short_text_is_one_window(self):
        raw = {
            "units": ["a", "unhappy", "\x00", "北京", "zz"],
            "labels": ["O", "B-PER", "O", "B-LOC", "I-LOC"],
        }
        ((example,),) = make().windows([raw])
        tokens = TOKENIZER.convert_ids_to_tokens(example["input_ids"])
        assert tokens == ["[CLS]", "a", "un", "##happy", "北", "京", "[UNK]", "[SEP]"]
        assert example["units"].tolist() == [-1, 0, 1, -1, 3, -1, 4, -1]
        no = NO_LABEL
        assert example["label"].tolist() == [no, 0, B_PER, no, B_LOC, no, I_LOC, no]
        assert not example["token_type_ids"].any()
        assert {array.dtype for array in example.values()} == {np.dtype(np.int64)}

    def test_windows_overlap_and_the_last_is_full(self):
        units = list("abcdefghij") * 3
        (examples,) = make(max_seqlen=12, doc_stride=6).windows([{"units": units}])
        assert [example["units"][1:-1].tolist() for example in examples] == [
            list(range(start, start + 10)) for start in (0, 6, 12, 18, 20)
        ]
        for example in examples:
            assert (example["input_ids"][0], example["input_ids"][-1]) == (
                TOKENIZER.cls_token_id,
                TOKENIZER.sep_token_id,
            )
            found = TOKENIZER.convert_ids_to_tokens(example["input_ids"][1:-1])
            assert found == [units[unit] for unit in example["units"][1:-1]]

    def test_default_stride_is_three_quarters_of_the_room(self):
        assert make(max_seqlen=102).doc_stride == 75 and make(max_seqlen=3).doc_stride == 1

    @pytest.mark.parametrize("seed", range(20))
    def test_no_unit_and_no_label_is_lost(self, seed):
        """Units of no, one or many tokens: each label is in every window that holds its unit, whole windows
        follow each other without a gap, none is longer than it may be."""
        rng = random.Random(seed)
        units = [rng.choice(["a", "\x00", " ", "unhappy", "人民北", "x" * 3, "北" * 40]) for _ in range(60)]
        labels = [rng.choice(LABELS) for _ in units]
        size = rng.choice([3, 4, 7, 12, 30])
        processor = make(max_seqlen=size, doc_stride=rng.choice([None, 1, 5, 1000]))
        (examples,) = processor.windows([{"units": units, "labels": labels}])
        seen = set()
        for example in examples:
            assert len(example["input_ids"]) <= size
            held = example["units"][example["units"] >= 0]
            assert [LABELS[label] for label in example["label"][example["units"] >= 0]] == [
                labels[unit] for unit in held
            ]
            assert (example["label"][example["units"] < 0] == NO_LABEL).all()
            assert (np.diff(held) > 0).all()
            seen.update(held.tolist())
        assert seen == {unit for unit, text in enumerate(units) if text.strip("\x00 ")}

    def test_a_unit_longer_than_a_window_is_cut(self):
        raw = {"units": ["a", "北" * 10_000, "b"], "labels": ["O", "B-LOC", "O"]}
        (examples,) = make().windows([raw])
        assert [example["units"][example["units"] >= 0].tolist() for example in examples] == [[0], [1], [2]]
        assert len(examples[1]["input_ids"]) == 12
        assert answer(make(), raw, lambda row, unit: [0, B_LOC, 0][unit])["tags"] == raw["labels"]

    def test_prepare_lays_the_windows_out_and_keeps_what_the_metric_needs(self):
        raws = [{"units": ["a"]}, {"units": list("abc") * 9}]
        processor = make()
        flat = processor.prepare(raws)
        windows = [example for examples in processor.windows(raws) for example in examples]
        assert len(flat) == len(windows) == 5
        for found, wanted in zip(flat, windows, strict=True):
            assert found.keys() == wanted.keys()
            assert all((found[name] == wanted[name]).all() for name in wanted)
        labelled = [{**raw, "labels": ["O"] * len(raw["units"])} for raw in raws]
        assert [example["window"] for example in processor.prepare(labelled)] == [0, 0, 1, 2, 3]
        batch = pad_batch(processor.prepare(labelled), pad_values=processor.pad_values)
        assert batch["units"][0, 3:].tolist() == [-1] * 9 and batch["label"][0, 3:].tolist() == [NO_LABEL] * 9
        assert batch["input_ids"][0, 3:].tolist() == [TOKENIZER.pad_token_id] * 9

    @pytest.mark.parametrize(
        ("raw", "message"),
        [
            ({"units": ["a", "b"], "labels": ["O"]}, "1 labels came with 2 units; expected one for each"),
            ({"units": ["a"], "labels": ["B-PRE"]}, "unknown label 'B-PRE'. Did you mean 'B-PER'"),
            ({"units": ["a"], "labels": [3]}, "unknown label 3. Known are: O, B-PER"),
            ({"units": ["a"], "labels": [["O"]]}, r"unknown label \['O'\]"),
            ({"units": "ab"}, "expected units, a list of strings, or one text_a"),
            ({"units": ["a", None]}, "expected units, a list of strings"),
            ({"unit": ["a"]}, r"An example is \{'unit': \['a'\]\}; expected units"),
            ({"text_a": 3}, "or one text_a"),
            ({"text_a": "a", "text_b": "b"}, "or one text_a"),
            ({"units": ["a"], "separator": "\t"}, r"The separator is '\\t'; expected '\\x02'"),
            ({"units": ["a"], "separator": None}, "The separator is None"),
            ({"units": ["a"], "labels": 1}, "The labels are 1; expected a list"),
            ({"units": ["a"], "labels": "O"}, "The labels are 'O'; expected a list"),
        ],
    )
    def test_bad_examples(self, raw, message):
        with pytest.raises(DataError, match=message):
            make().windows([{"units": ["a"]}, raw])


class TestAnswer:
    def test_one_tag_a_unit_and_entities_with_offsets(self):
        raw = {"units": ["a", "unhappy", "b", "北京", "c"], "separator": " "}
        found = answer(make(), raw, lambda row, unit: [0, B_PER, I_PER, B_LOC, 0][unit])
        assert found["tags"] == ["O", "B-PER", "I-PER", "B-LOC", "O"]
        score = pytest.approx(np.exp(2) / (np.exp(2) + 4), rel=1e-6)
        assert found["entities"] == [
            {"type": "PER", "start": 2, "end": 11, "text": "unhappy b", "score": score},
            {"type": "LOC", "start": 12, "end": 14, "text": "北京", "score": score},
        ]

    @pytest.mark.parametrize(
        ("given", "by_character", "text"),
        [
            ({"separator": "\x02"}, False, "人民"),
            ({"separator": ""}, False, "人民"),
            ({"separator": " "}, True, "人 民"),
            ({}, True, "人民"),
            ({}, False, "人 民"),
        ],
    )
    def test_separators(self, given, by_character, text):
        raw = {"units": ["在", "人", "民"], **given}
        found = answer(make(by_character=by_character), raw, lambda row, unit: [0, B_PER, I_PER][unit])
        assert found["entities"][0]["text"] == text

    def test_the_score_is_the_mean_of_the_probabilities(self):
        raw = {"units": ["a", "b"]}
        (examples,) = make().windows([raw])
        part = {"labels": [0, B_PER, I_PER, 0], "probabilities": [0.1, 0.9, 0.5, 0.2]}
        assert make().join(raw, examples, [part])["entities"][0]["score"] == pytest.approx(0.7)

    def test_a_tag_comes_from_the_window_with_most_context(self):
        """Row number r says label r: of each overlap the first half is the window's before, the second the
        next one's. Where the text begins and ends there is no edge."""
        raw = {"units": list("abcdefghij") * 3}
        processor = make(max_seqlen=12, doc_stride=6)  # windows from 0, 6, 12, 18 and 20, ten units each
        found = answer(processor, raw, lambda row, unit: row)
        rows = [LABELS.index(tag) for tag in found["tags"]]
        assert rows == [0] * 8 + [1] * 6 + [2] * 6 + [3] * 4 + [4] * 6

    @pytest.mark.parametrize(
        ("units", "labels", "tags"),
        [
            ("a \x00b", [1, 2], ["B-PER", "I-PER", "I-PER", "I-PER"]),  # within an entity
            ("a b", [1, 1], ["B-PER", "O", "B-PER"]),  # between two
            ("a b", [1, 4], ["B-PER", "O", "I-LOC"]),  # of two types
            (" a ", [1], ["O", "B-PER", "O"]),
            ("  ", [], ["O", "O"]),
            ("", [], []),
        ],
    )
    def test_units_without_a_token(self, units, labels, tags):
        chosen = iter(labels)
        seen = {unit: next(chosen) for unit, text in enumerate(units) if text not in " \x00"}
        found = answer(make(), {"units": list(units)}, lambda row, unit: seen[unit])
        assert found["tags"] == tags
        kept = [tag for tag, unit in zip(tags, units, strict=True) if unit not in " \x00"]
        assert len(found["entities"]) == len(entities_of(kept)) == len(entities_of(tags))

    @pytest.mark.parametrize(
        ("scheme", "labels", "chosen", "tags"),
        [
            ("BMES", ["O", "B-X", "M-X", "E-X", "S-X"], [1, 3, 4], ["B-X", "M-X", "E-X", "O", "S-X"]),
            ("BIOES", ["O", "B-X", "I-X", "E-X", "S-X"], [1, 3, 4], ["B-X", "I-X", "E-X", "O", "S-X"]),
            ("IOB1", ["O", "B-X", "I-X"], [2, 2, 1], ["I-X", "I-X", "I-X", "O", "B-X"]),
            ("BMES", ["B", "M", "E", "S"], [0, 2, 3], ["B", "M", "E", "O", "S"]),
        ],
    )
    def test_units_without_a_token_in_other_schemes(self, scheme, labels, chosen, tags):
        processor = make(labels=labels, scheme=scheme)
        found = answer(processor, {"units": list("a b c")}, lambda row, unit: chosen[unit // 2])
        assert found["tags"] == tags and len(found["entities"]) == 2

    def test_a_crf_decodes_by_its_tables(self):
        """Alone each unit would be I-PER, which is forbidden at the start."""
        raws = [{"units": ["a", "unhappy"]}, {"units": ["b"]}]
        processor = make()
        examples = [example for (example,) in processor.windows(raws)]
        logits = logits_for(examples, lambda row, unit: I_PER)
        table = np.zeros((7, 5))
        table[-2, [I_PER, I_LOC]] = -1e4
        units = pad_batch(examples, pad_values=processor.pad_values)["units"]
        is_unit = np.zeros(logits.shape[:2], np.int64)
        is_unit[:, : units.shape[1]] = units >= 0
        outputs = {"logits": logits, "is_unit": is_unit, "transitions": np.stack([table, table])}
        parts = processor.finish(outputs)
        answers = [
            processor.join(raw, [example], [part])
            for raw, example, part in zip(raws, examples, parts, strict=True)
        ]
        assert [found["tags"] for found in answers] == [["O", "I-PER"], ["O"]]
        assert processor.finish({name: array[:0] for name, array in outputs.items()}) == []


class TestText:
    def test_lines_are_joined_alike(self):
        processor = make()
        for line, units, tags in [
            ("人\x02民\x02 ", ["人", "民", " "], "O\x02O\x02O"),
            ("a  b", ["a", "", "b"], "O O O"),
            (" a b ", ["", "a", "b", ""], "O O O O"),
            ("人民", ["人民"], "O"),
            ("", [""], "O"),
        ]:
            raw = processor.parse(line)
            assert raw["units"] == units
            assert processor.format(raw, answer(processor, raw, lambda row, unit: 0)) == tags

    def test_free_text(self):
        text = "\u3000a  unhappy\n北京"
        found = answer(make(), make().raw_of(text), lambda row, unit: [0, B_PER, B_LOC][unit])
        assert found["tags"] == ["O", "B-PER", "B-LOC"]
        for entity in found["entities"]:
            assert text[entity["start"] : entity["end"]] == entity["text"]
        assert [entity["text"] for entity in found["entities"]] == ["unhappy", "北京"]
        processor = make(by_character=True)
        found = answer(processor, processor.raw_of("a 北京"), lambda row, unit: [0, 0, B_LOC, I_LOC][unit])
        assert found["tags"] == ["O", "O", "B-LOC", "I-LOC"]
        assert [(entity["start"], entity["end"]) for entity in found["entities"]] == [(2, 4)]

    def test_what_people_hand_over(self):
        processor = make()
        assert processor.raw_of(["a", "b"]) == processor.raw_of(("a", "b")) == {"units": ["a", "b"]}
        assert processor.raw_of({"units": ["a"], "separator": ""})["separator"] == ""
        with pytest.raises(DataError, match="An input is int"):
            processor.raw_of(3)

    def test_files(self, tmp_path):
        path = tmp_path / "dev.tsv"
        path.write_text("text_a\tlabel\n人\x02民\tB-PER\x02I-PER\n北\tB-ORG\n", "utf-8")
        rows = iter(make().read(path))
        assert next(rows) == {"units": ["人", "民"], "labels": ["B-PER", "I-PER"], "separator": "\x02"}
        with pytest.raises(DataError, match="dev.tsv:3: .*unknown label 'B-ORG'"):
            next(rows)


class TestMetric:
    RAWS = [
        {"units": list("abcdefghij") * 2, "labels": ["B-PER", "I-PER", "O", "O"] * 5},
        {"units": ["在", "北", "京"], "labels": ["O", "B-LOC", "I-LOC"]},
    ]

    def evaluate(self, processor, change, size=2):
        """Feeds batches of two windows whose labels are those that `change(text, unit, label)` gives."""
        metrics = processor.metrics()
        examples = processor.prepare(self.RAWS)
        texts = [0] * (len(examples) - 1) + [1]
        for start in range(0, len(examples), size):
            batch = examples[start : start + size]

            def choose(row, unit, start=start):
                text = texts[start + row]
                return change(text, unit, LABELS.index(self.RAWS[text]["labels"][unit]))

            columns = pad_batch(batch, pad_values=processor.pad_values)
            for metric in metrics.values():
                metric.update({"logits": logits_for(batch, choose)}, columns["label"], columns)
        return compute_all(metrics)

    def test_scores_of_whole_texts(self):
        found = self.evaluate(make(max_seqlen=9), lambda text, unit, label: label)
        assert found == {"f1": 1.0, "precision": 1.0, "recall": 1.0}
        assert make().best_metric == next(iter(found)) == "f1"
        lost = self.evaluate(make(max_seqlen=9), lambda text, unit, label: 0 if text else label)
        assert lost["precision"] == 1.0 and lost["recall"] == pytest.approx(5 / 6)

    @pytest.mark.parametrize(("score", "f1"), [("default", 1.0), ("strict", 10 / 11), ("conlleval", 1.0)])
    def test_ways_of_counting(self, score, f1):
        """An entity that begins with I."""
        found = self.evaluate(make(score=score), lambda text, unit, label: I_LOC if text and unit else label)
        assert found["f1"] == pytest.approx(f1)


class TestSettings:
    def test_a_bundle_keeps_all(self, tmp_path):
        processor = make(max_seqlen=9, scheme="IOB2", doc_stride=3, by_character=True, score="strict")
        settings = processor.save(tmp_path)
        again = SequenceLabelingProcessor.load(tmp_path, settings)
        assert again.settings == settings and again.fingerprint == processor.fingerprint
        assert settings["scheme"] == "BIO" and settings["doc_stride"] == 3
        raw = {"text_a": "北京 unhappy"}
        for found, wanted in zip(*(each.windows([raw])[0] for each in (again, processor)), strict=True):
            assert (found["input_ids"] == wanted["input_ids"]).all()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_seqlen": 2}, "max_seqlen 2 leaves no room"),
            ({"labels": ["O"]}, r"At least two different labels are needed, got \['O'\]"),
            ({"labels": ["O", "B", "B"]}, "two different labels"),
            ({"doc_stride": 0}, "doc_stride must be a whole number of at least 1, got 0"),
            ({"doc_stride": 1.5}, "doc_stride must be a whole number"),
            ({"score": "strickt"}, "no score 'strickt'. Did you mean 'strict'"),
            ({"scheme": "BIEO"}, "'BIEO' is no tagging scheme"),
        ],
    )
    def test_bad_settings(self, settings, message):
        with pytest.raises(ConfigError, match=message):
            make(**settings)

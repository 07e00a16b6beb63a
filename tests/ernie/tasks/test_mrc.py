"""Reading comprehension: windows, labels, answers, lines."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from ernie.tasks.mrc import IGNORED, MrcProcessor, best_texts, is_chinese, is_trainable
from ernie.tasks.mrc_spans import SpanSearch
from ernie.tokenizing import SpecialTokens, WordPieceTokenizer
from propeller.data import pad_batch
from propeller.errors import ConfigError, DataError
from propeller.processor import find_processor

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "tokenizing_golden.json").read_text("utf-8"))
VOCAB = {token: index for index, token in enumerate(GOLDEN["vocab"])}
TEXTS = sorted({case[1] for case in GOLDEN["cases"]})
WORDS = ("the", "cat", "sat", "on", "mat", "un", "##happy", "where", "?", ".", "猫")


@pytest.fixture(scope="module")
def tokenizer():
    vocab = [*SpecialTokens().names(), *WORDS]
    return WordPieceTokenizer({token: index for index, token in enumerate(vocab)})


@pytest.fixture
def make(tokenizer):
    """`make(**settings)` gives a processor for windows of 10 tokens."""

    def build(**settings):
        given = {"max_seqlen": 10, "doc_stride": 2, "max_query_length": 3, **settings}
        return MrcProcessor(tokenizer, **given)

    return build


def raw(context, answer=None, start=None, **more):
    """A question on a text, answered by a piece of it."""
    if answer is not None:
        place = context.index(answer) if start is None else start
        more = {"answers": [{"text": answer, "answer_start": place}], "is_impossible": False, **more}
    return {"id": "1", "question": "where ?", "context": context, **more}


def labels(windows):
    return [(window["start_position"], window["end_position"]) for window in windows]


def outputs(windows, starts, ends):
    """What a model gives that is sure of these places."""
    size = max(len(window["input_ids"]) for window in windows)
    found = {name: np.zeros((len(windows), size), np.float32) for name in ("start_logits", "end_logits")}
    found["in_context"] = np.zeros((len(windows), size), np.int64)
    for row, window in enumerate(windows):
        found["start_logits"][row, starts[row]] = found["end_logits"][row, ends[row]] = 9
        found["in_context"][row, window["context_begin"] : len(window["input_ids"]) - 1] = 1
    return found


class TestWindows:
    def test_short_text_is_one(self, make, tokenizer):
        (window,) = make().windows([raw("The cat sat")])[0]
        tokens = tokenizer.convert_ids_to_tokens(window["input_ids"])
        assert tokens == ["[CLS]", "where", "?", "[SEP]", "the", "cat", "sat", "[SEP]"]
        assert window["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
        assert window["offsets"].tolist() == [[0, 0]] * 4 + [[0, 3], [4, 7], [8, 11], [0, 0]]
        assert (window["first_token"], window["context_begin"]) == (0, 4)
        assert "start_position" not in window

    def test_long_text_is_cut_every_stride(self, make):
        windows = make().windows([raw("cat " * 9)])[0]
        assert [window["first_token"] for window in windows] == [0, 2, 4]  # room for five
        assert [len(window["input_ids"]) for window in windows] == [10, 10, 10]

    def test_last_window_ends_with_the_text(self, make):
        windows = make(doc_stride=3).windows([raw("cat " * 9)])[0]
        assert [(window["first_token"], len(window["input_ids"])) for window in windows] == [
            (0, 10),
            (3, 10),
            (6, 8),
        ]

    def test_stride_beyond_the_room_leaves_nothing_out(self, make):
        windows = make(doc_stride=100).windows([raw("cat " * 12)])[0]
        assert [window["first_token"] for window in windows] == [0, 5, 10]

    def test_question_is_cut(self, make, tokenizer):
        (window,) = make().windows([{"question": "the cat sat on the mat", "context": "mat"}])[0]
        tokens = tokenizer.convert_ids_to_tokens(window["input_ids"])
        assert tokens == ["[CLS]", "the", "cat", "sat", "[SEP]", "mat", "[SEP]"]

    def test_empty_texts(self, make):
        (window,) = make().windows([{"question": "", "context": " "}])[0]
        assert len(window["input_ids"]) == 3 and window["token_type_ids"].tolist() == [0, 0, 1]
        assert make().windows([]) == []

    @pytest.mark.parametrize("answers", [None, ["cat"], [{"text": "cat", "answer_start": 3}]])
    def test_answers_are_not_looked_at(self, make, answers):
        (windows,) = make().windows([raw("the cat", answers=answers)])
        assert set(windows[0]) == set(make().windows([raw("the cat")])[0][0])

    def test_names_of_other_tasks(self, make):
        windows = make().windows([raw("the cat"), {"text_a": "where ?", "text_b": "the cat"}])
        assert windows[0][0]["input_ids"].tolist() == windows[1][0]["input_ids"].tolist()

    @pytest.mark.parametrize(("max_seqlen", "doc_stride"), [(24, 5), (40, 16), (60, 60)])
    def test_equal_the_tokenizers_library(self, max_seqlen, doc_stride):
        """Its `stride` is what two windows share."""
        own = WordPieceTokenizer(VOCAB)
        library = tokenizers.Tokenizer(tokenizers.models.WordPiece(VOCAB, unk_token="[UNK]"))
        library.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
        library.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        library.post_processor = tokenizers.processors.BertProcessing(
            ("[SEP]", VOCAB["[SEP]"]), ("[CLS]", VOCAB["[CLS]"])
        )
        rng = random.Random(0)
        # Literal special tokens and half characters are another subject.
        plain = [text for text in TEXTS if not re.search("[\\[\ud800-\udfff]", text)]
        several = 0
        for question in rng.sample(plain, 40):
            context = " ".join(rng.sample(plain, 7))
            asked = library.encode(question, add_special_tokens=False)
            if len(asked.ids) > 12:
                continue
            room = max_seqlen - len(asked.ids) - 3
            library.enable_truncation(max_seqlen, stride=room - min(room, doc_stride), strategy="only_second")
            first = library.encode(question, context)
            library.no_truncation()
            processor = MrcProcessor(own, max_seqlen=max_seqlen, doc_stride=doc_stride, max_query_length=12)
            windows = processor.windows([{"question": question, "context": context}])[0]
            expected = [first, *first.overflowing]
            several += len(expected) > 1
            assert [window["input_ids"].tolist() for window in windows] == [each.ids for each in expected]
            assert [window["token_type_ids"].tolist() for window in windows] == [
                each.type_ids for each in expected
            ]
            assert [window["offsets"].tolist() for window in windows] == [
                [list(place) if part == 1 else [0, 0]
                 for place, part in zip(each.offsets, each.sequence_ids, strict=True)]
                for each in expected
            ]  # fmt: skip
        assert several > 5


class TestLabels:
    def test_answer_in_a_window(self, make):
        assert labels(make().prepare([raw("The cat sat", "cat sat")])) == [(5, 6)]

    def test_piece_of_a_word_takes_the_whole_token(self, make):
        # "unhappy" is "un", "##happy".
        assert labels(make().prepare([raw("the unhappy cat", "happ")])) == [(6, 6)]
        assert labels(make().prepare([raw("the unhappy cat", "nhappy c")])) == [(5, 7)]

    def test_blanks_around_the_answer(self, make):
        assert labels(make().prepare([raw("the cat sat", " cat ")])) == [(5, 5)]

    def test_window_without_all_of_it_points_at_its_beginning(self, make):
        context = "cat cat cat cat on mat cat cat cat"
        windows = make().prepare([raw(context, "on mat")])
        assert labels(windows) == [(0, 0), (6, 7), (4, 5)]

    @pytest.mark.parametrize("context", ["cat  cat", "cat \u200b cat"])
    def test_answer_without_a_token(self, make, context):
        assert labels(make().prepare([raw(context, context[3:5])])) == [(0, 0)]

    def test_impossible(self, make):
        impossible = raw("the cat", answers=[], is_impossible=True)
        assert labels(make().prepare([impossible])) == [(0, 0)]
        assert is_trainable(impossible)

    def test_first_answer_that_has_a_place_counts(self, make):
        answers = [{"text": "mat", "answer_start": -1}, {"text": "cat", "answer_start": 4}]
        labelled = raw("the cat", answers=answers, is_impossible=False)
        assert labels(make().prepare([labelled])) == [(5, 5)]
        assert is_trainable(labelled)

    @pytest.mark.parametrize("answers", [[], [{"text": "mat", "answer_start": -1}]])
    def test_without_a_place_it_has_no_loss(self, make, answers):
        labelled = raw("the cat", answers=answers, is_impossible=False)
        assert labels(make().prepare([labelled])) == [(IGNORED, IGNORED)]
        assert not is_trainable(labelled)

    def test_wrong_place_is_refused(self, make):
        with pytest.raises(DataError, match="'cat' does not stand at answer_start 3 .* ' ca' is"):
            make().prepare([raw("the cat", "cat", start=3)])

    @pytest.mark.parametrize("answers", [["cat"], [{"text": "cat"}], [{"text": 1, "answer_start": 0}],
                                         [{"text": "cat", "answer_start": 4.0}], {"text": []}])  # fmt: skip
    def test_malformed(self, make, answers):
        with pytest.raises(DataError, match=r"The answers are .*; expected a list"):
            make().prepare([raw("the cat", answers=answers)])


class TestPrepare:
    def test_rows_for_training_and_metrics(self, make):
        raws = [raw("cat " * 7 + "mat", "mat"), raw("the cat", "cat", id="2")]
        examples = make().prepare(raws)
        assert [json.loads(example["raw"]) for example in (examples[0], examples[3])] == raws
        assert [example["window"] for example in examples] == [0, 1, 2, 0]
        batch = pad_batch(examples, pad_values=make().pad_values)
        assert batch["input_ids"].shape == (4, 10)
        assert batch["start_position"].dtype == np.int64
        assert batch["start_position"].tolist() == [0, 0, 7, 5]

    def test_without_labels_nothing_rides_along(self, make):
        (example,) = make().prepare([{"question": "where ?", "context": "cat"}])
        assert set(example) == {"input_ids", "token_type_ids"}

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ({"question": "where ?"}, "The context is missing; expected a string"),
            ({"question": None, "context": "cat"}, "The question is missing"),
            ({"question": "where ?", "context": ["cat"]}, r"The context is \['cat'\]; expected a string"),
        ],
    )
    def test_bad_examples(self, make, bad, message):
        with pytest.raises(DataError, match=message):
            make().prepare([bad])


class TestAnswers:
    def test_over_windows(self, make):
        processor, question = make(), raw("cat cat cat cat on the Mat.")
        windows = processor.windows([question])[0]
        assert len(windows) == 3
        # Sure in the second window only: "the" stands at its place 7, "Mat" at 8.
        parts = processor.finish(outputs(windows, [0, 7, 0], [0, 8, 0]))
        answer = processor.join(question, windows, json.loads(json.dumps(parts)))
        assert (answer["text"], answer["start"], answer["end"]) == ("the Mat", 19, 26)
        assert processor.format(question, answer) == "the Mat"

    def test_gold_logits_give_gold_answers(self, make):
        rng = random.Random(1)
        processor = make(max_seqlen=14, doc_stride=5, search=SpanSearch(with_negative=True))
        for _ in range(200):
            words = rng.choices([word for word in WORDS if "#" not in word], k=rng.randint(1, 30))
            context = "  ".join(words)
            first = rng.randrange(len(words))
            gold = "  ".join(words[first : first + rng.randint(1, 3)])
            start = len("  ".join([*words[:first], ""]))
            question = raw(context, gold, start=start)
            windows = processor.windows([question])[0]
            places = labels(processor.prepare([question]))
            found = outputs(windows, [start for start, _ in places], [end for _, end in places])
            # Where a window has no answer that is sure, too, but less so than the answer elsewhere.
            found["start_logits"][:, 0] /= 2
            answer = processor.join(question, windows, processor.finish(found))
            assert answer["text"] == gold == context[answer["start"] : answer["end"]]

    def test_metric_joins_windows(self, make):
        processor = make(search=SpanSearch(with_negative=True))
        raws = [
            raw("cat " * 7 + "mat", "mat", id="1"),
            raw("the cat", answers=[], is_impossible=True, id="2"),
            raw("the cat", "the", id="3"),
            raw("the cat", answers=[], is_impossible=False, id="4"),  # nobody knows
        ]
        windows = [window for found in processor.windows(raws) for window in found]
        assert len(windows) == 6
        batch = pad_batch(processor.prepare(raws))
        (metric,) = processor.metrics().values()
        assert math.isnan(metric.compute()[processor.best_metric])
        # The last window of the first question is right, the second question, the third is not.
        places = [0, 0, 7, 0, 5, 4]
        metric.update(outputs(windows, places, places), labels(processor.prepare(raws)), batch)
        result = metric.compute()
        assert result["em"] == pytest.approx(200 / 3) and result["total"] == 3
        assert result["HasAns_exact"] == 50 and result["NoAns_exact"] == 100
        assert {"best_f1_thresh", processor.best_metric} <= result.keys()

    @pytest.mark.parametrize(("score", "names"), [("squad", {"em", "f1", "total"}),
                                                  ("cmrc", {"em", "f1", "avg", "question_num"})])  # fmt: skip
    def test_scores(self, make, score, names):
        processor = make(score=score)
        scores = processor.scores([raw("猫 cat", "猫")], [{"text": "猫"}])
        assert set(scores) == names and scores[processor.best_metric] == 100
        assert math.isnan(processor.scores([], [])[processor.best_metric])

    def test_best_text_stands_behind_the_empty_one(self):
        answers = [
            {"nbest": [{"text": ""}, {"text": "cat"}], "null_odds": 2.0},
            {"nbest": [{"text": ""}], "null_odds": 3.0},
        ]
        assert best_texts([{"id": "1"}, {"id": "2"}], answers) == (
            {"1": "cat", "2": ""},
            {"1": 2.0, "2": 3.0},
        )

    def test_format_is_one_line(self, make):
        assert make().format({}, {"text": "the\tcat\r\nsat\u2028on"}) == "the cat sat on"


class TestLines:
    def test_table_and_json(self, make):
        expected = {"question": "where ?", "context": "the cat"}
        assert make().parse("where ?\tthe cat") == expected
        assert make().parse(json.dumps({**expected, "id": 7})) == {**expected, "id": 7}

    def test_half_characters_become_a_replacement(self, make):
        assert make().parse('{"question": "\\ud83d", "context": "a\\udc00b"}') == {
            "question": "\ufffd",
            "context": "a\ufffdb",
        }

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("where ?", "expected question<TAB>context, or a JSON object, found 1 cells"),
            ("a\tb\tc", "found 3 cells"),
            ('{"question": "where', "begins with {: Unterminated string"),
            ('{"question":' * 100_000, "begins with {: maximum recursion depth exceeded"),
        ],
    )
    def test_malformed(self, make, line, message):
        with pytest.raises(DataError, match=message):
            make().parse(line)


class TestSettings:
    def test_are_kept_by_a_bundle(self, make, tmp_path):
        processor = make(search=SpanSearch(n_best_size=3, with_negative=True), score="cmrc")
        settings = json.loads(json.dumps(processor.save(tmp_path)))
        loaded = find_processor("mrc").load(tmp_path, settings)
        assert loaded.settings == processor.settings
        assert loaded.fingerprint == processor.fingerprint != make().fingerprint
        assert (loaded.identity["doc_stride"], loaded.identity["n_best_size"]) == (2, 3)
        assert (loaded.best_metric, make().best_metric) == ("avg", "f1")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_seqlen": 6}, "max_seqlen 6 leaves no room .* set it to 7 or more"),
            ({"doc_stride": 0}, "doc_stride must be a whole number of at least 1, got 0"),
            ({"max_query_length": 1.5}, "max_query_length must be a whole number"),
            ({"score": "squd"}, "no score 'squd'. Did you mean 'squad'"),
            ({"search": {"n_best_size": -1}}, "n_best_size must be"),
        ],
    )
    def test_wrong(self, make, settings, message):
        with pytest.raises(ConfigError, match=message):
            make(**settings)

    def test_columns_are_for_tables(self, make, tmp_path):
        with pytest.raises(ConfigError, match="the files of mrc are JSON"):
            make().read(tmp_path / "train.json", columns=["text_a"])


@pytest.mark.parametrize(
    ("texts", "chinese"),
    [
        (("在哪里?", "猫坐在垫子上。"), True),
        (("where?", "The cat sat."), False),
        (("where?", "猫"), False),
        (("1 + 1", "2"), False),
    ],
)
def test_chinese_is_recognised(texts, chinese):
    assert is_chinese([dict(zip(("question", "context"), texts, strict=True))] * 3) is chinese


def test_answers_of_real_questions_are_their_own_text(real_data):
    """With gold logits the answers come back, in whole tokens."""
    path = real_data / "squad" / "cs224n_dev-v2.0.json.gz"
    if not path.exists():
        pytest.skip("no SQuAD here")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        articles = json.load(file)["data"]
    raws = [
        {**question, "context": paragraph["context"]}
        for article in articles[:6]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
        if question["answers"]
    ][:300]
    search = SpanSearch(max_answer_length=96)  # a small vocabulary makes many tokens
    processor = MrcProcessor(
        WordPieceTokenizer(VOCAB), max_seqlen=384, doc_stride=128, max_query_length=64, search=search
    )
    right = []
    for question, windows in zip(raws, processor.windows(raws), strict=True):
        places = labels(processor.prepare([question]))
        if not any(start for start, _ in places):
            continue  # longer than what two windows share
        found = outputs(windows, *zip(*places, strict=True))
        found["start_logits"][:, 0] = 0
        answer = processor.join(question, windows, processor.finish(found))
        assert question["context"][answer["start"] : answer["end"]] == answer["text"]
        right.append(question["answers"][0]["text"] in answer["text"])
    # A long answer may stand whole only where its first token has less context than in another window.
    assert len(right) > 250 and np.mean(right) > 0.97

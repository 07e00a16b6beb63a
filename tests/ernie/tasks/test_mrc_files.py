"""Files of questions on texts: every format, and what is wrong with them."""

from __future__ import annotations

import gzip
import json
import logging

import pytest

from ernie.tasks.mrc_files import MrcReport, mrc_report, read_mrc
from propeller.errors import DataError

CONTEXT = "北京是首都。上海在东边，上海很大。"


def squad(*questions, context=CONTEXT):
    """A file with one paragraph."""
    return {"version": "v1", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": questions}]}]}


def question(name, *answers, **more):
    """A question; answers are (text, start)."""
    found = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": name, "question": "哪里？", "answers": found, **more}


@pytest.fixture
def write(tmp_path):
    """`write(content)`: a file of text, bytes, or JSON of anything else."""

    def write(content, name="train.json"):
        if not isinstance(content, str | bytes):
            content = json.dumps(content, ensure_ascii=False, indent=1)
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def test_squad(write):
    path = write(
        squad(
            question("a", ("首都", 3), ("是首都", 2)),
            question("b", is_impossible=True, plausible_answers=[{"text": "北京", "answer_start": 0}]),
            question(3, ("上海", 6)),
        )
    )
    dataset = read_mrc(path)
    raws = list(dataset)
    assert raws[0] == {
        "id": "a",
        "question": "哪里？",
        "context": CONTEXT,
        "answers": [{"text": "首都", "answer_start": 3}, {"text": "是首都", "answer_start": 2}],
        "is_impossible": False,
    }
    assert (raws[1]["answers"], raws[1]["is_impossible"]) == ([], True)
    assert raws[2]["id"] == "3"
    assert list(dataset) == raws
    assert mrc_report(path) == MrcReport(questions=3, impossible=1, answers=3)


def test_questions_without_answers(write):
    path = write(squad({"id": "a", "question": "?"}, question("b"), question("c", is_impossible=False)))
    assert [(raw["answers"], raw["is_impossible"]) for raw in read_mrc(path)] == [([], False)] * 3
    assert mrc_report(path).unlabelled == 3


def test_checklist_writes_no_answer_as_an_empty_one(write):
    path = write(squad(question("a", ("", -1), is_impossible=True)))
    assert next(iter(read_mrc(path)))["answers"] == []


def test_wrong_starts(write, caplog):
    path = write(
        squad(
            question("once", ("首都", 4)),
            question("twice", ("上海", 5)),
            question("never", ("广州", 0)),
            question("unknown", ("东边", -1)),
            question("one of two", ("广州", -1), ("北京", 0)),
            question("beyond", ("很大", 99)),
        )
    )
    dataset = read_mrc(path)
    with caplog.at_level(logging.WARNING, "propeller"):
        starts = [[answer["answer_start"] for answer in raw["answers"]] for raw in dataset]
        list(dataset)
    assert starts == [[3], [-1], [-1], [9], [-1, 0], [14]]
    report = mrc_report(path)
    expected = MrcReport(
        questions=6, untrainable=2, answers=7, misplaced=6, repaired=3, ambiguous=1, absent=2
    )
    assert report == expected
    assert [record.getMessage() for record in caplog.records] == [f"{path}: {report}"]
    assert "6 of 7 answers do not stand" in str(report) and "2 of 6 questions have no answer" in str(report)


def test_an_answer_that_overlaps_itself_stands_more_than_once(write):
    path = write(squad(question("a", ("aa", 7)), context="baaab"))
    assert mrc_report(path).ambiguous == 1


@pytest.mark.parametrize("unit", ["utf-16-le", "utf-8"])
def test_offsets_in_other_units_are_repaired(write, unit):
    context = "𠀀😀 the answer"
    start = len(context[: context.index("answer")].encode(unit)) // (2 if unit == "utf-16-le" else 1)
    path = write(squad(question("a", ("answer", start)), context=context))
    assert next(iter(read_mrc(path)))["answers"] == [{"text": "answer", "answer_start": 7}]
    assert mrc_report(path).repaired == 1


def test_byte_order_mark_windows_lines_blanks_and_gzip(write):
    text = json.dumps(squad(question("a", ("yes", 2)), context="\ufeff yes \n"), indent=2)
    content = b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()
    plain, packed = write(content), write(gzip.compress(content), "train.json.gz")
    assert list(read_mrc(plain)) == list(read_mrc(packed))
    raw = next(iter(read_mrc(plain)))
    assert (raw["context"], raw["answers"][0]["answer_start"]) == ("\ufeff yes \n", 2)


def test_cmrc_as_first_released(write):
    path = write(
        [
            {
                "context_id": "DEV_0",
                "context_text": CONTEXT,
                "title": "t",
                "qas": [
                    {
                        "query_id": "DEV_0_QUERY_0",
                        "query_text": "哪里？",
                        "answers": ["首都", "上海", "广州"],
                    },
                    {"query_id": "DEV_0_QUERY_1", "query_text": "什么？"},
                ],
            }
        ]
    )
    raws = list(read_mrc(path))
    assert [raw["id"] for raw in raws] == ["DEV_0_QUERY_0", "DEV_0_QUERY_1"]
    assert [answer["answer_start"] for answer in raws[0]["answers"]] == [3, -1, -1]
    assert raws[1]["answers"] == []


def dureader(**changes):
    """A preprocessed line."""
    record = {
        "question_id": 181574,
        "question_type": "ENTITY",
        "question": "哪里大",
        "documents": [
            {
                "title": "一",
                "paragraphs": ["没有。", "上海很大"],
                "is_selected": False,
                "most_related_para": 1,
            },
            {
                "title": "二",
                "paragraphs": ["上海很大。北京很大。"],
                "segmented_paragraphs": [["上海", "很", "大", "。", "北京", "很", "大", "。"]],
                "is_selected": True,
                "most_related_para": 0,
            },
        ],
        "answers": ["北京", "都不大"],
        "fake_answers": ["很大。"],
        "answer_docs": [1],
        "answer_spans": [[5, 7]],
    }
    return record | changes


def test_dureader(write):
    records = [
        dureader(),
        # An index beyond the documents, as some have; the text then stands more than once.
        dureader(question_id=2, answer_docs=[7]),
        dureader(question_id=3, documents=[], answers=[], fake_answers=[], answer_docs=[], answer_spans=[]),
    ]
    test = {key: value for key, value in dureader(question_id=4).items() if "answer" not in key}
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in [*records, test])
    path = write(lines + "\n\n")
    raws = list(read_mrc(path))
    assert [raw["id"] for raw in raws] == ["181574", "2", "3", "4"]
    assert raws[0]["context"] == "没有。\n上海很大\n上海很大。北京很大。"
    assert raws[0]["answers"] == [
        {"text": "很大。", "answer_start": 16},
        {"text": "北京", "answer_start": 14},
        {"text": "都不大", "answer_start": -1},
    ]
    assert raws[1]["answers"][0] == {"text": "很大。", "answer_start": -1}
    assert (raws[2]["context"], raws[2]["answers"]) == ("", [])
    assert raws[3]["answers"] == []
    assert mrc_report(path) == MrcReport(
        questions=4, unlabelled=2, answers=6, misplaced=5, repaired=2, ambiguous=1, absent=2
    )


def broken_line(number, content):
    lines = [json.dumps(dureader(question_id=place)) for place in range(3)]
    lines[number] = content
    return "\n".join(lines)


def row(name, *answers, **more):
    """A question as a row of Hugging Face's data sets; answers are (text, start)."""
    found = {"text": [text for text, _ in answers], "answer_start": [start for _, start in answers]}
    return {"id": name, "title": "t", "context": CONTEXT, "question": "哪里？", "answers": found, **more}


@pytest.mark.parametrize(
    "form",
    [
        lambda rows: rows,
        lambda rows: json.dumps(rows),
        lambda rows: {"version": 1, "data": rows},
        lambda rows: "\n".join(map(json.dumps, rows)) + "\n\n",
        lambda rows: "\ufeff" + "\n".join(map(json.dumps, rows)),
    ],
    ids=["array", "array in a line", "data", "lines", "lines with a byte order mark"],
)
def test_rows_of_hugging_face(write, form):
    rows = [
        row("a", ("首都", 3), ("上海", 6)),
        row("b"),
        row("c", answers=None),
        row("d", is_impossible=False),
        row("e", answers=[{"text": "东边", "answer_start": 0}]),
        row("f", question='"paragraphs"'),
    ]
    path = write(form(rows))
    raws = list(read_mrc(path))
    assert raws[0]["answers"] == [{"text": "首都", "answer_start": 3}, {"text": "上海", "answer_start": 6}]
    assert raws[0]["question"] == "哪里？" and raws[0]["context"] == CONTEXT
    assert [raw["is_impossible"] for raw in raws] == [False, True, False, False, False, True]
    assert raws[4]["answers"] == [{"text": "东边", "answer_start": 9}]
    assert mrc_report(path) == MrcReport(
        questions=6, impossible=2, unlabelled=2, answers=3, misplaced=1, repaired=1
    )


def test_answers_as_the_file_has_them(write, caplog):
    path = write(squad(question("a", ("首都", 4)), question("b", ("广州", 0), ("北京", -1))))
    starts = [[answer["answer_start"] for answer in raw["answers"]] for raw in read_mrc(path, mend=False)]
    assert starts == [[4], [0, -1]]
    assert not caplog.records
    with pytest.raises(DataError, match="holds no question"):
        list(read_mrc(write({"data": []}), mend=False))


GOOD = squad(question("a"), question("b"))


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("\n".join(json.dumps(GOOD, indent=1).split("\n")[:12]), 12, "cut short"),
        (json.dumps(GOOD)[:-80], 1, "cut short"),
        ("question\tcontext\n", 1, "expected a file as SQuAD, CMRC2018, DRCD, DuReader or Hugging Face have"),
        (broken_line(1, "question\tcontext"), 2, "is it damaged"),
        (json.dumps(GOOD, indent=1).replace(":", "", 1), 2, "is it damaged"),
        (json.dumps(GOOD) + "\n{}", 2, "Extra data"),
        ('{"a":\n"\xe9"}'.encode("latin-1"), 2, "not UTF-8"),
        ("[" * 100_000, None, "no JSON"),
        ("", None, "is empty"),
        (b"\xef\xbb\xbf \n", None, "is empty"),
        ({"data": []}, None, "no question"),
        ([], None, "no question"),
        (squad(), None, "no question"),
        ("3", None, "the file is int 3; expected an object with 'data'"),
        ({"dat": []}, None, "the file has no 'data', but 'dat'. Did you mean"),
        ({"data": {}}, None, "'data' is dict {}; expected a list"),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, None, r"data\[0\].paragraphs\[0\] has no 'context'"),
        ({"data": [{"paragraphs": [[]]}]}, None, r"data\[0\].paragraphs\[0\] is list \[\]"),
        ({"data": [{"paragraphs": [{"context": None, "qas": []}]}]}, None, "'context' is null"),
        (squad({"question": "?"}), None, r"qas\[0\] has no 'id'"),
        (squad(question(None)), None, "'id' is null"),
        (squad(question(True)), None, "'id' is bool"),
        (squad({"id": "x"}), None, r"qas\[0\] \(id 'x'\) has no 'question'"),
        (squad(question("x", ("首都", "3"))), None, r"'x'\).answers\[0\]: 'answer_start' is '3'"),
        (squad(question("x", ("首都", 3.5))), None, "expected a whole number"),
        (squad(question("x", (None, 3))), None, "'text' is null"),
        (squad({**question("x"), "answers": [{"text": "首都"}]}), None, "has no 'answer_start'"),
        (
            squad({**question("x"), "answers": {"text": []}}),
            None,
            r"answers has no 'answer_start', but 'text'",
        ),
        (squad({**question("x"), "answers": "首都"}), None, "'answers' is str"),
        ([row("x", ("首都", "3"))], None, r"^\S+: \[0\] \(id 'x'\).answers\[0\]: 'answer_start' is '3'"),
        (
            [row("x", answers={"text": ["a"], "answer_start": []})],
            None,
            "has 0 items and 'text' 1; expected as",
        ),
        ([row("x", answers={"text": [None], "answer_start": [3]})], None, r"answers.text\[0\] is null"),
        ([{"question": "?", "id": "x"}], None, r"\[0\] has no 'context', but 'question', 'id'"),
        (
            [{"title": "t"}],
            None,
            r"\[0\] is dict .*; expected an object with 'paragraphs', as SQuAD has it, 'c",
        ),
        ({"data": ["a"]}, None, r"data\[0\] is str 'a'; expected an object with 'paragraphs'"),
        (json.dumps(row("x")) + '\n{"id": "y"}', 2, "the question has no 'context', but 'id'"),
        (json.dumps(row("x")) + "\n" + json.dumps(row("x")), 2, "'x' stands twice, at line 1 and at line 2"),
        (squad(question("x", is_impossible="no")), None, "'is_impossible' is 'no'"),
        (
            squad(question("x", ("首都", 3), is_impossible=True)),
            None,
            "marked as impossible and has the answer",
        ),
        (squad(question("x"), question("y"), question("x")), None, r"'x' stands twice.*qas\[0\].*qas\[2\]"),
        (
            [{"context_text": "c", "qas": [{"query_id": "q", "query_text": "?", "answers": [{}]}]}],
            None,
            "dict",
        ),
        (broken_line(1, '{"question_id": 7'), 2, "cut short"),
        (broken_line(2, json.dumps(dureader(question_id=0))), 3, "'0' stands twice, at line 1 and at line 3"),
        (broken_line(1, json.dumps({"question_id": 7, "question": "?"})), 2, "has no 'documents'"),
        (broken_line(1, json.dumps(dureader(documents=[{"title": "t"}]))), 2, r"documents\[0\] has no 'par"),
        (broken_line(1, json.dumps(dureader(answers=["a", 3]))), 2, r"answers\[1\] is int 3"),
        (broken_line(2, "\x00"), 3, "no JSON"),
    ],
)
def test_bad_files(write, content, line, message):
    path = write(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_mrc(path))
    assert (caught.value.path, caught.value.line) == (path, line)
    assert str(caught.value).count(str(path)) == 1


def test_missing_and_damaged_files(write, tmp_path):
    with pytest.raises(DataError, match="cannot be opened"):
        list(read_mrc(tmp_path / "none.json"))
    path = write(gzip.compress(json.dumps(GOOD).encode())[:-9], "train.json.gz")
    with pytest.raises(DataError, match="cannot be read") as caught:
        list(read_mrc(path))
    assert caught.value.path == path


def test_position_origin_and_signature(write):
    path = write(GOOD)
    dataset = read_mrc(path)
    (first, after), (second, _) = dataset.iterate()
    assert [raw["id"] for raw, _ in dataset.iterate(after)] == [second["id"]]

    def refuse(raw):
        raise ValueError("no")

    with pytest.raises(DataError, match="train.json, question:1: .*no"):
        list(dataset.map(refuse))
    before = dataset.signature()
    assert read_mrc(write(squad(question("c")))).signature() != before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "cmrc2018/cmrc2018_train.json.gz",
            MrcReport(10142, answers=10142, misplaced=21, repaired=20, ambiguous=1, untrainable=1),
        ),
        (
            "cmrc2018/cmrc2018_dev.json.gz",
            MrcReport(3219, answers=9657, misplaced=200, repaired=7, absent=193),
        ),
        ("cmrc2018/cmrc2018_trial.json", MrcReport(1002, answers=1002, misplaced=5, repaired=5)),
        ("drcd/DRCD_dev.json.gz", MrcReport(3524, answers=7048)),
        ("drcd/DRCD_test.json.gz", MrcReport(3493, answers=6986)),
        ("squad/cs224n_dev-v2.0.json.gz", MrcReport(6078, impossible=3168, answers=10052)),
    ],
)
def test_real_files(real_data, name, expected):
    path = real_data / name
    assert mrc_report(path) == expected
    for raw in read_mrc(path):
        for answer in raw["answers"]:
            start = answer["answer_start"]
            assert start == -1 or raw["context"].startswith(answer["text"], start)

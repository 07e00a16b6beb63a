"""Files of queries with candidates: headers, grouping, labels, and what is wrong with a file."""

from __future__ import annotations

import gzip

import pytest

from ernie.tasks.ranking_files import has_labels, lacks_labels, read_pairs, read_ranking
from propeller.errors import DataError


@pytest.fixture
def write(tmp_path):
    """`write(*rows)` makes a tab-separated file."""

    def make(*rows, name="data.tsv"):
        path = tmp_path / name
        path.write_text("".join("\t".join(row) + "\n" for row in rows), "utf-8")
        return path

    return make


def rows_of(path, **options):
    keys = ("qid", "candidate", "text_a", "text_b", "label")
    return [tuple(row.get(key) for key in keys) for row in read_ranking(path, **options)]


EXPECTED = [("7", 0, "who", "he", 0), ("7", 1, "who", "she", 2), ("a", 0, "what", "it", 1)]


def test_a_header_names_the_columns(write):
    path = write(
        ["label", "qid", "text_b", "text_a"],
        ["0", "7", "he", "who"],
        ["2", "7", "she", "who"],
        ["1", "a", "it", "what"],
    )
    assert rows_of(path) == EXPECTED


def test_wikiqa_own_header(write):
    header = ["QuestionID", "Question", "DocumentID", "DocumentTitle", "SentenceID", "Sentence", "Label"]
    path = write(header, ["7", "who", "D1", "a title", "D1-0", "he", "0"])
    assert rows_of(path) == [("7", 0, "who", "he", 0)]


def test_four_cells_without_a_header(write):
    path = write(*([row[0], row[2], row[3], str(row[4])] for row in EXPECTED))
    assert rows_of(path) == EXPECTED
    packed = path.with_suffix(".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert rows_of(packed) == EXPECTED


def test_columns_by_name(write):
    path = write(["he", "x", "0", "who"])
    assert rows_of(path, columns=["text_b", "_", "label", "text_a"]) == [("data.tsv:1", 0, "who", "he", 0)]


def test_without_a_qid_equal_queries_that_follow_one_another_are_a_group(write):
    path = write(
        ["text_a", "text_b", "label"], ["who", "he", "0"], ["who", "she", "1"], ["what", "it", "1"],
        ["who", "they", "1"],
    )  # fmt: skip
    assert [row[:2] for row in rows_of(path)] == [
        ("data.tsv:2", 0), ("data.tsv:2", 1), ("data.tsv:4", 0), ("data.tsv:5", 0),
    ]  # fmt: skip


def test_queries_of_one_text_are_told_apart_by_qid(write):
    path = write(["1", "who", "he", "0"], ["2", "who", "she", "1"])
    assert [row[:2] for row in rows_of(path)] == [("1", 0), ("2", 0)]


def test_a_qid_out_of_order(write):
    path = write(
        ["qid", "text_a", "text_b", "label"], ["1", "a", "b", "0"], ["2", "a", "b", "0"], ["1", "a", "c", "1"]
    )
    with pytest.raises(DataError, match=r"data.tsv:4: qid '1' comes again after another one") as error:
        list(read_ranking(path))
    assert error.value.line == 4


@pytest.mark.parametrize("label", ["-1", "0.5", "", "yes", "²", "9" * 10, "9" * 5000])
def test_a_label_that_is_no_grade(write, label):
    path = write(["1", "a", "b", "0"], ["1", "a", "b", label])
    with pytest.raises(DataError, match=r"data.tsv:2: column 'label': found .* whole number from 0"):
        list(read_ranking(path))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        ([["qid", "text_a", "label"], ["1", "a", "0"]], "no column 'text_b' or 'title'"),
        ([["one cell"]], "found 1 tab-separated cell"),
        ([["1", "a", "b", "0"], ["1", "a", "0"]], r"data.tsv:2: found 3 tab-separated cells"),
        ([["1", "a", "b", "0"], [" ", "a", "b", "0"]], r"data.tsv:2: qid is empty"),
    ],
)
def test_malformed_files(write, rows, message):
    with pytest.raises(DataError, match=message):
        list(read_ranking(write(*rows)))


def test_empty_lines_do_not_shift_the_numbers_of_lines(write):
    header = ["Text_A", "Text_B", "Label"]
    path = write(header, ["who", "he", "0"], [], ["what", "it", "1"], [], ["what", "she", "0"])
    assert [row[:2] for row in rows_of(path)] == [("data.tsv:2", 0), ("data.tsv:4", 0), ("data.tsv:4", 1)]
    with pytest.raises(DataError, match="data.tsv:5: the query '1' has another text"):
        list(read_pairs(write(["1", "who", "he", "1"], [], [], [], ["1", "what", "it", "0"])))
    with pytest.raises(DataError, match="data.tsv:3: text_b is empty"):
        list(read_pairs(write(["who", "he"], [], ["what", ""])))


def test_files_without_labels(write):
    path = write(["qid", "text_a", "text_b"], ["1", "a", "b"])
    assert not has_labels(path) and has_labels(write(["1", "a", "b", "0"], name="other.tsv"))
    assert rows_of(path, labelled=False) == [("1", 0, "a", "b", None)]
    with pytest.raises(DataError, match="no column 'label'"):
        read_ranking(path)


def test_a_file_that_lacks_more_than_labels(write):
    with pytest.raises(DataError, match="data.tsv:1: the header has no column 'text_b'"):
        has_labels(write(["qid", "text_a", "txt_b", "label"], ["1", "a", "b", "0"]))
    with pytest.raises(DataError, match="data.tsv:1: found 1 tab-separated cell"):
        has_labels(write(["alone"]))


def test_wikiqa(real_data):
    rows = list(read_ranking(real_data / "wikiqa" / "dev.tsv"))
    assert len(rows) == 1130 and len({row["qid"] for row in rows}) == 126
    assert sum(row["candidate"] == 0 for row in rows) == 126
    assert len(list(read_pairs(real_data / "wikiqa" / "dev.tsv"))) == 126


# What a dual encoder learns from


def test_pairs(write):
    path = write(["who", "he"], ["who", "she"], ["who", "she"], ["what", "it"])
    assert list(read_pairs(path)) == [
        {"text_a": "who", "positives": ["he", "she"], "negatives": []},
        {"text_a": "what", "positives": ["it"], "negatives": []},
    ]


@pytest.mark.parametrize("header", [[], [["query", "passage", "negative"]]])
def test_pairs_with_hard_negatives(write, header):
    path = write(*header, ["who", "he", "it"], ["what", "it", ""])
    assert list(read_pairs(path)) == [
        {"text_a": "who", "positives": ["he"], "negatives": ["it"]},
        {"text_a": "what", "positives": ["it"], "negatives": []},
    ]


@pytest.mark.parametrize(
    "rows",
    [
        [["qid", "text_a", "text_b", "label"], ["1", "who", "he", "1"], ["1", "who", "it", "0"]],
        [["1", "who", "he", "2"], ["1", "who", "it", "0"]],
        [["who", "he", "1"], ["who", "it", "0"]],
    ],
)
def test_passages_with_labels(write, rows):
    rows.append(["2", "what", "he", "0"] if len(rows[0]) == 4 else ["what", "he", "0"])
    assert list(read_pairs(write(*rows))) == [
        {"text_a": "who", "positives": ["he"], "negatives": ["it"]},
        {"text_a": "what", "positives": [], "negatives": ["he"]},
    ]


def test_pairs_whose_columns_are_named(write):
    path = write(["he", "who", "12"])
    assert list(read_pairs(path, columns=["text_b", "text_a", "negative"])) == [
        {"text_a": "who", "positives": ["he"], "negatives": ["12"]}
    ]


def test_candidates_without_labels_are_no_right_pairs(write):
    path = write(["qid", "text_a", "text_b"], ["1", "who", "he"])
    assert lacks_labels(path) and not lacks_labels(path, columns=["_", "text_a", "text_b"])
    with pytest.raises(DataError, match="data.tsv:1: has a column for the qid.* but none for labels"):
        read_pairs(path)
    assert not lacks_labels(write(["qid", "text_a", "text_b", "label"], ["1", "who", "he", "1"]))
    assert lacks_labels(write(["QID", "text_a", "text_b"], ["1", "who", "he"]))
    path = write(["query_id", "query", "positive"], ["1", "who", "he"])
    assert not lacks_labels(path)
    assert list(read_pairs(path)) == [{"text_a": "who", "positives": ["he"], "negatives": []}]


def test_bad_pairs(write):
    with pytest.raises(DataError, match="data.tsv:2: text_b is empty"):
        list(read_pairs(write(["who", "he"], ["what", ""])))
    with pytest.raises(DataError, match="data.tsv:2: the query '1' has another text in its row 2"):
        list(read_pairs(write(["1", "who", "he", "1"], ["1", "what", "it", "0"])))
    with pytest.raises(DataError, match="found 1 tab-separated cell"):
        list(read_pairs(write(["alone"])))

"""Files of labelled sentences and pairs in the forms of public data sets."""

from __future__ import annotations

import gzip
import json
import logging

import pytest

from ernie.tasks.classification_files import (
    Layout,
    begins_with_example,
    label_text,
    read_classification,
    read_parts,
)
from propeller.errors import DataError


@pytest.fixture
def read(tmp_path):
    """`read(text, layout, name=..., labelled=...)` gives the raw examples of a file with this text."""

    def call(text, layout=None, *, name="x.tsv", labelled=True):
        (tmp_path / name).write_text(text, "utf-8")
        return list(read_classification(tmp_path / name, layout, labelled=labelled))

    return call


class TestTables:
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
            (
                "premise\thypo\tlabel\na\tb\tcontradictory\n",
                {"text_a": "a", "text_b": "b", "label": "contradiction"},
            ),
        ],
    )
    def test_public_files(self, read, text, expected):
        assert read(text) == [expected]

    def test_pair_or_not_is_what_was_said(self, read):
        with pytest.raises(DataError, match="x.tsv:1: .*text_b"):
            read("label\ttext_a\n1\tgood\n", Layout(pair=True))
        found = read("text_b\ttext_a\tlabel\nb\ta\t1\n", Layout(pair=False))
        assert found == [{"text_a": "a", "label": "1"}]

    def test_without_labels(self, read):
        single, pair = Layout(pair=False), Layout(pair=True)
        assert read("index\tsentence\n0\tgood\n", single, labelled=False) == [{"text_a": "good"}]
        assert read("a\tb\n", pair, labelled=False) == [{"text_a": "a", "text_b": "b"}]
        with pytest.raises(DataError, match="x.tsv:1: the header has no column 'label'"):
            read("index\tsentence\n0\tgood\n", single)

    def test_names_of_cells(self, read):
        layout = Layout(cells=("_", "label", "text_a"))
        assert read("id\t1\tgood\n", layout) == [{"text_a": "good", "label": "1"}]

    def test_any_number_of_labels(self, read):
        text = "label\ttext_a\na, b\tx\n\ty\nb\tz\n"
        assert [raw["label"] for raw in read(text, Layout(separator=","))] == [["a", "b"], [], ["b"]]
        assert [raw["label"] for raw in read(text.replace(", ", "|"), Layout(separator="|"))][0] == ["a", "b"]
        with pytest.raises(DataError, match="x.tsv:2: the label is empty"):
            read("label\ttext_a\na,,b\tx\n", Layout(separator=","))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "x.tsv: is empty"),
            ("label\ttext_a\n", "x.tsv: is empty after 1 header line"),
            ("label\ttext_a\n1\ta\n \tb\n", "x.tsv:3: the label is empty"),
            ("label\ttext_a\n1\ta\n1\n", "x.tsv:3: found 1 tab-separated cell"),
            ("label\tidx\n1\ta\n", "x.tsv:1: the header has no column 'text_a'"),
        ],
    )
    def test_malformed(self, read, text, message):
        with pytest.raises(DataError, match=message):
            read(text)


class TestLeftOut:
    def test_pairs_without_a_gold_label(self, read, caplog):
        text = "premise\thypo\tlabel\n" + "a\tb\tneutral\na\tb\t-\n" * 3
        with caplog.at_level(logging.INFO, "ernie"):
            assert len(read(text, name="nli.tsv")) == len(read(text, name="nli.tsv")) == 3
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.endswith("nli.tsv: left out 3 pairs without a gold label ('-')")
        assert len(read(text, labelled=False)) == 6, "of what is to be predicted every row counts"
        found = read(text, Layout(separator=","), name="several.tsv")
        assert [raw["label"] for raw in found] == [["neutral"]] * 3

    def test_a_minus_may_be_the_label_of_a_sentence(self, read):
        assert [raw["label"] for raw in read("good\t+\nbad\t-\n")] == ["+", "-"]

    def test_malformed_rows(self, read, caplog):
        layout = Layout(skips_malformed=True)
        text = "id\tquestion1\tquestion2\tis_duplicate\n0\ta\tb\t1\n1\ta\n2\tc\td\t0\n\n3\te\tf\t1\t2\n"
        with caplog.at_level(logging.INFO, "ernie"):
            assert [raw["text_a"] for raw in read(text, layout, name="qqp.tsv")] == ["a", "c"]
        assert "left out 3 malformed rows, with other than 4 cells" in caplog.text
        with pytest.raises(DataError, match="qqp.tsv:3: found 2"):
            read(text, layout, name="qqp.tsv", labelled=False)
        with pytest.raises(DataError, match="qqp.tsv:1: .* no column 'label'"):
            read("id\tquestion1\tquestion2\n", layout, name="qqp.tsv")

    def test_other_languages(self, read, caplog):
        layout = Layout(("premise", "sentence1"), ("hypo", "sentence2"), ("gold_label",), language="zh")
        header = "language\tgold_label\tsentence1\tsentence2\n"
        text = header + "ar\tneutral\ta\tb\nzh\tentailment\tc\td\nzh\t-\te\tf\n"
        with caplog.at_level(logging.INFO, "ernie"):
            assert read(text, layout, name="xnli.tsv") == [
                {"text_a": "c", "text_b": "d", "label": "entailment"}
            ]
        assert "left out 1 rows in other languages than 'zh'" in caplog.text
        without = read("premise\thypo\tlabel\na\tb\tneutral\n", layout)
        assert without == [{"text_a": "a", "text_b": "b", "label": "neutral"}]


class TestJson:
    @pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.txt", "x.tsv"])
    def test_lines(self, read, name):
        rows = [
            {"sentence1": "a\tb", "sentence2": "c", "label": "0"},
            {"sentence1": "d", "sentence2": "e", "label": 1, "idx": 7},
        ]
        assert read("\n".join(map(json.dumps, rows)) + "\n\n", name=name) == [
            {"text_a": "a\tb", "text_b": "c", "label": "0"},
            {"text_a": "d", "text_b": "e", "label": "1"},
        ]

    def test_sentences_with_other_fields(self, read):
        """As TNEWS and IFLYTEK."""
        rows = [
            {"label": "108", "label_desc": "news_edu", "sentence": "题目", "keywords": "高考"},
            {"label": "0", "label_des": "打车", "sentence": "应用"},
        ]
        found = read("\n".join(map(json.dumps, rows)), name="x.json")
        assert found == [{"text_a": "题目", "label": "108"}, {"text_a": "应用", "label": "0"}]

    def test_labels(self, read):
        values = ["a", 3, 3.5, True, ["b", 2], []]
        text = "\n".join(json.dumps({"text": "x", "label": value}) for value in values)
        assert [raw["label"] for raw in read(text)] == ["a", "3", "3.5", "true", ["b", "2"], []]

    def test_pairs_without_a_gold_label(self, read):
        """As OCNLI."""
        row = {"sentence1": "a", "sentence2": "b", "label": "-", "label0": "neutral"}
        text = json.dumps(row) + "\n" + json.dumps({**row, "label": "neutral"})
        assert [raw["label"] for raw in read(text, name="ocnli.json")] == ["neutral"]

    @pytest.mark.parametrize("indent", [None, 1])
    def test_an_array(self, read, tmp_path, indent):
        rows = [
            {"sentence": "a\tb", "label": 1},
            {"sentence": "c", "label": 0},
            {"sentence": "d", "label": 1},
        ]
        expected = [{"text_a": row["sentence"], "label": str(row["label"])} for row in rows]
        assert read(json.dumps(rows, indent=indent), name="x.json") == expected
        dataset = read_classification(tmp_path / "x.json")
        (_, position), *_ = dataset.iterate()
        assert [raw for raw, _ in dataset.iterate(position)] == expected[1:]
        assert dataset.signature() == read_classification(tmp_path / "x.json").signature()

    def test_gzipped(self, tmp_path):
        path = tmp_path / "x.jsonl.gz"
        path.write_bytes(gzip.compress(b'{"sentence": "a", "label": 1}\n'))
        assert list(read_classification(path)) == [{"text_a": "a", "label": "1"}]

    def test_a_brace_in_a_table(self, read):
        assert read("{x}\t1\n") == [{"text_a": "{x}", "label": "1"}]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                '{"sentence": "a", "label": 1}\n{"sentence": "b", "lab\n',
                "x.json:2: the line is no JSON: .*ends",
            ),
            ('{"sentence": "a", "label": 1}\n["b", 1]\n', "x.json:2: the line is a JSON list; expected"),
            ('{"sentence": "a", "lable": 1}', "x.json:1: the object has no 'label' .*Did you mean 'label'"),
            ('{"label": 1}', "x.json:1: the object has no 'text_a'"),
            ('{"sentence": null, "label": 1}', "x.json:1: the object has no 'text_a'"),
            ('{"sentence": 5, "label": 1}', "x.json:1: 'text_a' is 5; expected a text"),
            ('{"sentence": "a", "label": {}}', "x.json:1: the label is {}; expected a text or a number"),
            ('{"sentence": "a", "label": ""}', "x.json:1: the label is empty"),
            ("sentence\tlabel\n", "x.json:1: the line is no JSON: .* Expected one object a line"),
            ('[{"sentence": "a"}]', "x.json, object:1: the object has no 'label'"),
            ('[{"sentence": "a", "label": 1},\n{"sen', "x.json:2: no JSON: .* was it cut short"),
            ('["a"]', "x.json: item 1 of the array is 'a'; expected an object"),
            ("[]", "x.json: holds no object"),
            ("", "x.json: is empty"),
        ],
    )
    def test_malformed(self, read, text, message):
        with pytest.raises(DataError, match=message):
            read(text, name="x.json")


def test_parts_one_after_the_other(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    (folder / "part-0").write_text("a\t1\n")
    (folder / "part-1").write_text("b\t0\n")
    assert [raw["text_a"] for raw in read_parts(folder, read_classification)] == ["a", "b"]
    (folder / "part-2").write_text("c\td\t0\n")
    with pytest.raises(DataError, match="part-2: has the columns text_a, text_b, label, the examples before"):
        list(read_parts(folder, read_classification))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a\t1\n", True), ("review\tsentiment\n", True), ("Text\tLABEL\n", False), ('{"text": "a"}\n', False)],
)
def test_whether_a_file_begins_with_an_example(tmp_path, text, expected):
    (tmp_path / "x").write_text(text)
    assert begins_with_example(tmp_path / "x", Layout()) is expected


def test_a_resume_goes_on_behind_what_was_left_out(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("a\tb\t1\na\tb\t-\nc\td\t0\n")
    dataset = read_classification(path)
    (_, position), (second, _) = dataset.iterate()
    assert [raw for raw, _ in dataset.iterate(position)] == [second]
    assert dataset.signature() == read_classification(path).signature()


def test_label_text_of_nothing():
    with pytest.raises(DataError, match="the label is None"):
        label_text(None)

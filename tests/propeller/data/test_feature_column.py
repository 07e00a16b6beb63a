"""Tables: which cell is which column, what it becomes, and what a malformed line says."""

from __future__ import annotations

import gzip
import logging
import subprocess
import sys

import numpy as np
import pytest

from propeller.data import FeatureColumns, LabelColumn, RawColumn, TextColumn, TextIDColumn
from propeller.errors import ConfigError, DataError

TEXT_A = ("sentence", "sentence1", "#1 String")
TEXT_B = ("sentence2", "#2 String")
LABEL = ("Quality", "score")


def columns(label=None, *, optional_label=False, pair=None, file_columns=None):
    """text_a, text_b (optional unless `pair` is set), label."""
    text_b = [] if pair is False else [RawColumn("text_b", aliases=TEXT_B, optional=pair is None)]
    label = label or LabelColumn("label", aliases=LABEL, optional=optional_label)
    return FeatureColumns([RawColumn("text_a", aliases=TEXT_A), *text_b, label], file_columns=file_columns)


def file_of(tmp_path, *lines, name="a.tsv"):
    data = "".join(line + "\n" for line in lines).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


FORMATS = {
    "ChnSentiCorp: header, label first": (
        ["label\ttext_a", "1\t选择珠江花园", '0\t"不太好 ~'],
        [{"text_a": "选择珠江花园", "label": 1}, {"text_a": '"不太好 ~', "label": 0}],
    ),
    "LCQMC: no header": (
        ["开初婚未育证明？\t怎么开？\t1", "谁知道\t爱情\t0"],
        [
            {"text_a": "开初婚未育证明？", "text_b": "怎么开？", "label": 1},
            {"text_a": "谁知道", "text_b": "爱情", "label": 0},
        ],
    ),
    "SST-2: other names": (
        ["sentence\tlabel", "it 's a charming journey . \t1"],
        [{"text_a": "it 's a charming journey . ", "label": 1}],
    ),
    "SST-2 as another tool writes it: CRLF": (["sentence\tlabel\r", "a\t0\r"], [{"text_a": "a", "label": 0}]),
    "MRPC: byte order mark, columns to skip, quotes": (
        ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t7\t8\tcalled " the witness " ,\t" only'],
        [{"text_a": 'called " the witness " ,', "text_b": '" only', "label": 1}],
    ),
    "names in another case": (["Text_A\tLabel", "a\t1"], [{"text_a": "a", "label": 1}]),
    "names in two cases": (["LABEL\tlabel\tTEXT_A", "7\t1\ta"], [{"text_a": "a", "label": 1}]),
    "two columns without a header": (["fine\t1"], [{"text_a": "fine", "label": 1}]),
    "empty lines at the end": (["a\t1", "", ""], [{"text_a": "a", "label": 1}]),
    "line separators of Unicode are data": (
        ["a\u2028b\x85\x0b\t1"],
        [{"text_a": "a\u2028b\x85\x0b", "label": 1}],
    ),
}


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("end", ["tsv", "gz"])
def test_formats(tmp_path, name, end):
    lines, examples = FORMATS[name]
    dataset = columns().read(file_of(tmp_path, *lines, name=f"a.{end}"))
    assert list(dataset) == list(dataset) == examples
    assert [list(example) for example in dataset] == [list(example) for example in examples]


def test_regression_and_named_labels(tmp_path):
    lines = ["index\tgenre\tsentence1\tsentence2\tscore", "0\tx\tA plane .\tAn air plane .\t3.800"]
    score = LabelColumn("label", dtype="float32", aliases=LABEL)
    (example,) = columns(score).read(file_of(tmp_path, *lines))
    assert example["label"] == np.float32(3.8) and example["label"].dtype == np.float32
    lines = ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\tnot_entailment"]
    for vocab in (["entailment", "not_entailment"], {"entailment": 0, "not_entailment": 1}):
        (example,) = columns(LabelColumn("label", vocab)).read(file_of(tmp_path, *lines))
        assert example == {"text_a": "a", "text_b": "b", "label": 1} and example["label"].dtype == np.int64


@pytest.mark.parametrize(
    "make, line, names",
    [
        ({}, "a\tb\t1", ["text_a", "text_b", "label"]),
        ({}, "a\t1", ["text_a", "label"]),
        ({"optional_label": True}, "a\tb", ["text_a", "text_b"]),
        ({"optional_label": True}, "a", ["text_a"]),
        ({"pair": False}, "a\t1", ["text_a", "label"]),
        ({"pair": True, "optional_label": True}, "a\tb", ["text_a", "text_b"]),
    ],
)
def test_cells_by_position(make, line, names):
    layout = columns(**make).layout(line)
    assert list(layout.convert(line)) == names
    assert not layout.has_header


@pytest.mark.parametrize("line, make", [("a\tb\tc\td", {}), ("a", {}), ("a\tb", {"pair": True})])
def test_a_first_line_that_fits_no_way(tmp_path, line, make):
    with pytest.raises(
        DataError, match=r"a\.tsv:1: found \d tab-separated cells? and no header; expected the col"
    ):
        columns(**make).read(file_of(tmp_path, line))


def test_file_columns_name_cells_in_order(tmp_path):
    cola = columns(file_columns=["_", "label", "_", "text_a"], optional_label=True)
    assert list(cola.read(file_of(tmp_path, "gj04\t1\t\tThe sailors ."))) == [
        {"text_a": "The sailors .", "label": 1}
    ]
    # CoLA's test file has a header, and other cells.
    assert list(cola.read(file_of(tmp_path, "index\tsentence", "0\tBill ."))) == [{"text_a": "Bill ."}]
    # They win over a header of as many cells, which is left out all the same.
    swapped = columns(file_columns=["text_b", "text_a", "label"])
    (example,) = swapped.read(file_of(tmp_path, "text_a\ttext_b\tlabel", "a\tb\t1"))
    assert example == {"text_a": "b", "text_b": "a", "label": 1}
    wanted = r"a\.tsv:1: found 2 .*; expected 3, as the columns given are text_b, text_a, label$"
    with pytest.raises(DataError, match=wanted):
        swapped.read(file_of(tmp_path, "a\t1"))


def test_a_name_wins_over_its_aliases(tmp_path):
    lines = ["sentence1\tsentence\ttext_a\tlabel", "x\ty\tz\t1"]
    assert list(columns().read(file_of(tmp_path, *lines))) == [{"text_a": "z", "label": 1}]


def test_header_without_a_required_column(tmp_path):
    wanted = r"a\.tsv:1: the header has no column 'label' or 'Quality' or 'score'; it has .* \(--columns, or "
    with pytest.raises(DataError, match=wanted):
        columns().read(file_of(tmp_path, "index\tsentence", "0\ta"))


@pytest.mark.parametrize(
    "lines, message",
    [
        (
            ["a\t1", "b\t1\tc"],
            r":2: found 3 tab-separated cells \('b\\t1\\tc'\); expected 2 .*: text_a, label$",
        ),
        (["a\t1", "b"], r":2: found 1 tab-separated cell \('b'\); expected 2"),
        (["text_a\tlabel", "a\t1", "", "b"], r":4: found 1 tab-separated cell \('b'\); expected 2"),
        (["a\tone"], r":1: column 'label': expected an integer, found 'one'"),
        (["label\tx\ttext_a", "1\t\ta", "1.5\t\tb"], r":3: column 'label': expected an integer, found '1.5'"),
        (["a\t99999999999999999999"], r":1: column 'label': expected an integer"),
    ],
)
@pytest.mark.parametrize("name", ["a.tsv", "a.gz"])
def test_malformed_lines_are_named(tmp_path, lines, message, name):
    path = file_of(tmp_path, *lines, name=name)
    with pytest.raises(DataError, match=message) as caught:
        list(columns().read(path).buffered(2))
    assert str(caught.value).startswith(f"{path}:")


@pytest.mark.parametrize("text, hint", [("fair", r" Did you mean 'fail'\?"), ("", "")])
def test_unknown_label_lists_those_known(tmp_path, text, hint):
    message = rf"a\.tsv:1: column 'label': unknown label '{text}'; known are 'good', 'bad', 'fail'\.{hint}$"
    with pytest.raises(DataError, match=message):
        list(columns(LabelColumn("label", ["good", "bad", "fail"])).read(file_of(tmp_path, f"a\t{text}")))


def test_many_labels_are_not_all_listed():
    with pytest.raises(DataError, match=r"'l19' and 80 more\."):
        LabelColumn("label", [f"l{k}" for k in range(100)]).convert("zzz")


@pytest.mark.parametrize("text", ["nan", "inf", "", "x"])
def test_numbers_must_be_finite(text):
    with pytest.raises(DataError, match="expected a (finite )?number"):
        LabelColumn("label", dtype="float32").convert(text)


@pytest.mark.parametrize("lines", [[], ["label\ttext_a"]])
def test_empty_files_are_errors(tmp_path, lines):
    with pytest.raises(DataError, match=r"a\.tsv: is empty"):
        list(columns().read(file_of(tmp_path, *lines)).repeat())


def test_text_columns(tmp_path):
    table = FeatureColumns(
        [TextColumn("text", str.split, {"a": 5, "b": 6}, unk_id=1), TextIDColumn("ids"), RawColumn("raw")]
    )
    example, empty = table.read(file_of(tmp_path, "a x b\t3 -1  7\t a ", "\t\t"))
    assert {name: getattr(value, "dtype", str) for name, value in example.items()} == (
        {"text": np.int64, "ids": np.int64, "raw": str}
    )
    assert (example["text"].tolist(), example["ids"].tolist(), example["raw"]) == (
        [5, 1, 6],
        [3, -1, 7],
        " a ",
    )
    assert (empty["text"].tolist(), empty["ids"].tolist(), empty["raw"]) == ([], [], "")
    with pytest.raises(DataError, match=r"a\.tsv:1: column 'ids': expected integers and spaces, found '1 x'"):
        list(table.read(file_of(tmp_path, "a\t1 x\tr")))


def test_empty_lines_of_a_single_column_are_examples(tmp_path):
    dataset = FeatureColumns([RawColumn("text_a")]).read(file_of(tmp_path, "text_a", "a", "", "b", ""))
    assert [example["text_a"] for example in dataset] == ["a", "", "b", ""]


def test_empty_lines_between_others_are_counted(tmp_path, caplog):
    dataset = columns().read(file_of(tmp_path, "label\ttext_a", "", "1\ta", "  ", "0\tb", "", ""))
    with caplog.at_level(logging.INFO, "propeller"):
        entries = list(dataset.iterate())
        assert [example for example, _ in entries] == [
            {"text_a": "a", "label": 1},
            {"text_a": "b", "label": 0},
        ]
        assert [example for example, _ in dataset.iterate(entries[0][1])] == [entries[1][0]]
        list(columns().read(tmp_path / "a.tsv"))
    (record,) = caplog.records
    assert record.getMessage() == f"{tmp_path / 'a.tsv'}: left out 2 empty lines"


@pytest.mark.parametrize("file_columns", [None, ["text_a", "label"]])
def test_commas_are_no_tabs(tmp_path, file_columns):
    table = columns(file_columns=file_columns)
    with pytest.raises(
        DataError, match=r"a\.tsv:1: found 1 .*comma-separated file\? .*< FILE.csv > FILE.tsv$"
    ):
        table.read(file_of(tmp_path, "text,label", "a,1"))
    for line in ("no comma", '{"text": "a", "label": 1}'):
        with pytest.raises(DataError) as caught:
            table.read(file_of(tmp_path, line))
        assert "comma" not in str(caught.value).removeprefix(str(tmp_path)).replace(line, "")


def test_what_makes_a_table_of_commas_one_of_tabs(tmp_path):
    with pytest.raises(DataError) as caught:
        columns().layout("text,label")
    command = str(caught.value).partition("tab-separated one: ")[2]
    (tmp_path / "FILE.csv").write_text('text_a,label\n"good,\n\tvery ""nice""",1\n\nbad,0\n', "utf-8")
    command = command.replace("python ", f"{sys.executable} ")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert [example["text_a"] for example in columns().read(tmp_path / "FILE.tsv")] == [
        'good, very "nice"', "bad",
    ]  # fmt: skip


def test_a_tokenizer_that_fails_names_the_line(tmp_path):
    table = FeatureColumns([TextColumn("text", lambda text: [text[3]], {}, unk_id=0)])
    with pytest.raises(DataError, match=r"a\.tsv:2: .*IndexError") as caught:
        list(table.read(file_of(tmp_path, "long enough", "no")))
    assert isinstance(caught.value.__cause__, IndexError)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FeatureColumns([]), "no column"),
        (lambda: FeatureColumns([RawColumn("a"), RawColumn("b", aliases=["a"])]), "two columns go by 'a'"),
        (lambda: FeatureColumns([RawColumn("a"), RawColumn("A")]), "two columns go by 'A'"),
        (lambda: RawColumn("_"), "stands for a cell to skip"),
        (
            lambda: columns(file_columns=["text_a", "labl"]),
            "given are text_a, labl; for 'labl' expected one of .* Did you mean 'label'",
        ),
        (lambda: columns(file_columns=["text_a", "text_b"]), "given are text_a, text_b, without 'label'"),
        (
            lambda: columns(file_columns=["text_a", "label", "label"]),
            "given are text_a, label, label, with 'label' twice",
        ),
        (lambda: LabelColumn("label", dtype="int32"), "expected 'int64' or 'float32'"),
        (lambda: LabelColumn("label", ["a"], dtype="float32"), "a vocab and dtype 'float32'"),
    ],
)
def test_columns_that_make_no_sense(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("tokenizer", [str.lower, lambda text: {"input_ids": [1, 2]}])
def test_a_tokenizer_that_gives_no_tokens(tmp_path, tokenizer):
    table = FeatureColumns([TextColumn("text", tokenizer, {"a": 1}, unk_id=0)])
    with pytest.raises(
        DataError, match=r"a\.tsv:1: .*the tokenizer of column 'text' gave a (str|dict); expected"
    ):
        list(table.read(file_of(tmp_path, "a b")))


def test_reading_resumes_at_its_line(tmp_path):
    dataset = columns().read(file_of(tmp_path, "label\ttext_a", "1\ta", "0\tb", "1\tc", ""))
    entries = list(dataset.iterate())
    for index, (_, position) in enumerate(entries):
        assert list(dataset.iterate(position)) == entries[index + 1 :]


def test_parts_with_and_without_a_header_are_refused(tmp_path):
    """By position the columns of the second could be swapped, and nobody would notice."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.tsv").write_text("label\ttext_a\n0\tgood\n", "utf-8")
    (tmp_path / "train" / "b.tsv").write_text("1\tbad\n", "utf-8")
    columns = FeatureColumns([RawColumn("text_a"), RawColumn("label")])
    with pytest.raises(DataError, match=r"b.tsv:1: has no header, but a.tsv beside it has one"):
        columns.build_dataset("train", data_dir=tmp_path, cache_dir=tmp_path / "cache")

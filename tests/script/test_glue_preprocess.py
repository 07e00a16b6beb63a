"""`script/en_glue/preprocess`: a downloaded GLUE folder to tables with a header."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ernie.tasks.classification_files import read_classification
from ernie.tasks.glue import find_task, set_files


@pytest.fixture
def cvt(root, tmp_path):
    """`cvt(*args)` runs the script in `tmp_path`; gives exit code and standard error."""

    def run(*args):
        done = subprocess.run(
            ["sh", root / "script/en_glue/preprocess/cvt.sh", *map(str, args)],
            cwd=tmp_path,
            env={**os.environ, "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stderr

    return run


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), "utf-8")


def test_original_files(cvt, tmp_path):
    glue, out = tmp_path / "glue", tmp_path / "glue_data_processed"
    write(glue / "CoLA/train.tsv", 'gj04\t1\t\tA "quote', "gj04\t0\t*\tb")
    write(glue / "CoLA/dev.tsv", "gj04\t0\t*\tb")
    write(glue / "CoLA/test.tsv", "index\tsentence", "0\tc")
    header = "index\tpromptID\tsentence1\tsentence2"
    for name in ("train", "dev_matched", "dev_mismatched"):
        write(glue / f"MNLI/{name}.tsv", f"{header}\tgold_label", "0\t1\ta\tb\tneutral", "1\t1\ta\tb\t-")
    write(glue / "MNLI/test_matched.tsv", header, "0\t1\ta\tb")
    write(glue / "diagnostic/diagnostic.tsv", "index\tsentence1\tsentence2", "0\ta\tb")
    write(
        glue / "QQP/train.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "0\t1\t2\ta\tb\t1",
        "1\t1\t2\ta",
    )
    code, err = cvt(glue)
    assert code == 0, err
    found = {str(path.relative_to(out)): path.read_text("utf-8") for path in out.rglob("*.tsv")}
    assert found == {
        "CoLA/train.tsv": 'text_a\tlabel\nA "quote\t1\nb\t0\n',
        "CoLA/dev.tsv": "text_a\tlabel\nb\t0\n",
        "CoLA/test.tsv": "text_a\nc\n",
        "MNLI/train.tsv": "text_a\ttext_b\tlabel\na\tb\tneutral\n",
        "MNLI/m/dev.tsv": "text_a\ttext_b\tlabel\na\tb\tneutral\n",
        "MNLI/mm/dev.tsv": "text_a\ttext_b\tlabel\na\tb\tneutral\n",
        "MNLI/m/test.tsv": "text_a\ttext_b\na\tb\n",
        "MNLI/diagnostic.tsv": "text_a\ttext_b\na\tb\n",
        "QQP/train.tsv": "text_a\ttext_b\tlabel\na\tb\t1\n",
    }
    assert "left out 1 malformed rows, with other than 6 cells" in err
    assert err.count("left out 1 pairs without a gold label") == 3
    assert "not there: SST-2, MRPC, STS-B, QNLI, RTE, WNLI" in err
    names = ["train", "dev_matched", "dev_mismatched", "test_matched", "test_ax"]
    assert list(set_files(find_task("mnli"), out / "MNLI")) == names, "which are found again"


def test_real_files(cvt, tmp_path, real_data):
    code, err = cvt(real_data / "glue", tmp_path / "out")
    assert code == 0, err
    for folder in ("CoLA", "MRPC", "RTE", "SST-2", "STS-B"):
        task = find_task(folder)
        before, after = (set_files(task, place / folder) for place in (real_data / "glue", tmp_path / "out"))
        assert list(after) == list(before) == ["train", "dev", "test"]
        for name in before:
            labelled = name != "test"
            one, other = (
                read_classification(files[name], task.layout, labelled=labelled) for files in (before, after)
            )
            assert list(one) == list(other)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ((), 2, "GLUE_DATA"),
        (("nowhere",), 2, "error: nowhere is no folder"),
        (("empty",), 2, "empty holds no task; expected some of CoLA/, SST-2/"),
        (("bad",), 1, "train.tsv:3: found 1 tab-separated cell"),
    ],
)
def test_what_cannot_be_used(cvt, tmp_path, args, code, message):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "bad/SST-2/train.tsv", "sentence\tlabel", "a\t1", "b")
    found, err = cvt(*args)
    assert found == code
    assert message in err
    assert not list(tmp_path.glob("glue_data_processed/**/*.tsv"))

"""GLUE's files in their original form, where they are found, and what its server takes."""

from __future__ import annotations

import argparse
import collections

import pytest

from ernie.tasks.classification_files import read_classification
from ernie.tasks.glue import TASKS, find_task, set_files, task_files, write_submission
from propeller.errors import ConfigError, DataError

MNLI = "index promptID pairID genre parse1 parse2 parse3 parse4 sentence1 sentence2"
STSB = "index genre filename year old_index source1 source2 sentence1 sentence2"
FULL = "Lexical Semantics;Predicate-Argument Structure;Logic;Knowledge;Domain;Premise;Hypothesis;Label"

# Task, whether it has labels, lines of its file (blanks stand for tabs), and the raw examples.
FILES = {
    "CoLA": ("cola", True, ["gj04 1 _ x", "gj04 0 * y"], [("x", "1"), ("y", "0")]),
    "CoLA test": ("cola", False, ["index sentence", "0 x"], [("x",)]),
    "SST-2": ("sst-2", True, ["sentence label", "x 1"], [("x", "1")]),
    "SST-2 test": ("sst-2", False, ["index sentence", "0 x"], [("x",)]),
    "MRPC": ("mrpc", True, ["\ufeffQuality #1ID #2ID #1_String #2_String", "1 7 8 x y"], [("x", "y", "1")]),
    "MRPC test": ("mrpc", False, ["index #1ID #2ID #1_String #2_String", "0 7 8 x y"], [("x", "y")]),
    "STS-B": ("sts-b", True, [f"{STSB} score", "0 g f 2012 1 s t x y 3.800"], [("x", "y", "3.800")]),
    "STS-B test": ("sts-b", False, [STSB, "0 g f 2012 1 s t x y"], [("x", "y")]),
    "QQP": ("qqp", True, ["id qid1 qid2 question1 question2 is_duplicate", "0 1 2 x y 0"], [("x", "y", "0")]),
    "QQP test": ("qqp", False, ["id question1 question2", "0 x y"], [("x", "y")]),
    "MNLI": (
        "mnli",
        True,
        [
            f"{MNLI} label1 gold_label",
            "0 1 2 g p q r s x y neutral entailment",
            "1 1 2 g p q r s x y neutral -",
        ],
        [("x", "y", "entailment")],
    ),
    "MNLI test": ("mnli", False, [MNLI, "0 1 2 g p q r s x y"], [("x", "y")]),
    "AX": ("mnli", False, ["index sentence1 sentence2", "0 x y"], [("x", "y")]),
    "AX with labels": (
        "mnli",
        True,
        [FULL.replace(" ", "_").replace(";", " "), "a b c d e x y contradiction"],
        [("x", "y", "contradiction")],
    ),
    "QNLI": (
        "qnli",
        True,
        ["index question sentence label", "0 x y not_entailment"],
        [("x", "y", "not_entailment")],
    ),
    "QNLI test": ("qnli", False, ["index question sentence", "0 x y"], [("x", "y")]),
    "RTE": ("rte", True, ["index sentence1 sentence2 label", "0 x y entailment"], [("x", "y", "entailment")]),
    "WNLI": ("wnli", True, ["index sentence1 sentence2 label", "0 x y 1"], [("x", "y", "1")]),
    "XNLI": (
        "xnli",
        True,
        ["premise hypo label", "x y contradictory", "x y -"],
        [("x", "y", "contradiction")],
    ),
    "XNLI dev": (
        "xnli",
        True,
        ["language gold_label parse1 sentence1 sentence2", "ar neutral p x y", "zh neutral p z w"],
        [("z", "w", "neutral")],
    ),
    "converted": ("qnli", True, ["text_a text_b label", "x y entailment"], [("x", "y", "entailment")]),
}


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line.replace(" ", "\t").replace("_S", " S") + "\n" for line in lines), "utf-8")
    return path


@pytest.mark.parametrize(("name", "labelled", "lines", "expected"), FILES.values(), ids=FILES)
def test_original_files(tmp_path, name, labelled, lines, expected):
    path = write(tmp_path / "x.tsv", lines)
    rows = read_classification(path, find_task(name).layout, labelled=labelled)
    assert [tuple(row.values()) for row in rows] == expected


ROWS = {
    "CoLA": ((8551, 1043, 1063), {"0": 2528, "1": 6023}),
    "SST-2": ((67349, 872, 1821), {"0": 29780, "1": 37569}),
    "MRPC": ((3667, 408, 1725), {"0": 1194, "1": 2473}),
    "STS-B": ((5749, 1500, 1379), None),
    "RTE": ((2490, 277, 3000), {"entailment": 1249, "not_entailment": 1241}),
}


@pytest.mark.parametrize("folder", ROWS)
def test_real_files(real_data, folder):
    (task,) = (task for task in TASKS.values() if task.folder == folder)
    sizes, labels = ROWS[folder]
    files = set_files(task, real_data / "glue" / folder)
    found = {
        name: list(read_classification(path, task.layout, labelled=name != "test"))
        for name, path in files.items()
    }
    assert tuple(map(len, found.values())) == sizes
    counts = collections.Counter(raw["label"] for raw in found["train"])
    assert labels in (None, counts)
    assert {len(raw) for raw in found["dev"]} == {3 if task.layout.pair else 2}
    assert all("label" not in raw for raw in found["test"])


def test_find_task():
    assert find_task("MRPC").name == "mrpc" and find_task("sst2") is find_task("SST-2") is TASKS["sst-2"]
    with pytest.raises(ConfigError, match="--task mrpcc is not known. Did you mean 'mrpc'.*cola, sst-2"):
        find_task("mrpcc")
    with pytest.raises(ConfigError, match="AX is a set of mnli"):
        find_task("AX")


class TestFiles:
    def arguments(self, folder=None, **sets):
        sets = {f"{name}_set": sets.get(name) for name in ("train", "dev", "test")}
        return argparse.Namespace(data_dir=folder and str(folder), **sets)

    @pytest.mark.parametrize("names", [("dev_matched", "dev_mismatched"), ("m/dev", "mm/dev")])
    def test_mnli(self, tmp_path, names):
        for name in ("train", *names, "test_matched", "diagnostic"):
            write(tmp_path / f"{name}.tsv", ["x"])
        found = task_files(find_task("mnli"), self.arguments(tmp_path))
        assert list(found) == ["train", "dev_matched", "dev_mismatched", "test_matched", "test_ax"]
        assert [found[name] for name in list(found)[1:3]] == [tmp_path / f"{name}.tsv" for name in names]

    def test_mnli_by_flags(self, tmp_path):
        paths = {name: str(write(tmp_path / name, ["x"])) for name in ("train", "dev")}
        assert list(task_files(find_task("mnli"), self.arguments(**paths))) == ["train", "dev"]

    def test_xnli_as_downloaded(self, tmp_path):
        for name in ("multinli.train.zh", "xnli.dev"):
            write(tmp_path / f"{name}.tsv", ["x"])
        test = write(tmp_path / "other.tsv", ["x"])
        found = task_files(find_task("xnli"), self.arguments(tmp_path, test=test))
        assert [path.name for path in found.values()] == [
            "multinli.train.zh.tsv",
            "xnli.dev.tsv",
            "other.tsv",
        ]

    def test_what_is_missing_is_named(self, tmp_path):
        write(tmp_path / "train.tsv", ["x"])
        with pytest.raises(
            ConfigError, match="No dev_matched data of mnli in .* dev_matched.tsv or m/dev.tsv"
        ):
            task_files(find_task("mnli"), self.arguments(tmp_path))
        with pytest.raises(ConfigError, match="No dev data: name it"):
            task_files(find_task("mrpc"), self.arguments(tmp_path))
        with pytest.raises(ConfigError, match="nowhere is no folder"):
            task_files(find_task("mnli"), self.arguments("nowhere"))


class TestSubmission:
    def test_labels(self, tmp_path):
        path = tmp_path / "submission" / "RTE.tsv"
        write_submission(path, find_task("rte"), [{"label": "entailment"}, {"label": "not_entailment"}])
        assert path.read_text() == "index\tprediction\n0\tentailment\n1\tnot_entailment\n"

    def test_values_are_within_the_range(self, tmp_path):
        write_submission(
            tmp_path / "x", find_task("sts-b"), ({"value": value} for value in (-0.3, 2.1234567, 5.2))
        )
        assert (tmp_path / "x").read_text() == "index\tprediction\n0\t0.000000\n1\t2.123457\n2\t5.000000\n"

    def test_an_error_is_no_answer(self, tmp_path):
        with pytest.raises(DataError, match="too bad"):
            write_submission(
                tmp_path / "x", find_task("rte"), [{"label": "entailment"}, DataError("too bad")]
            )
        assert not (tmp_path / "x").exists()

    def test_names(self):
        names = {name for task in TASKS.values() for name in task.submissions.values()}
        assert names == {
            "AX.tsv", "CoLA.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "MRPC.tsv", "QNLI.tsv", "QQP.tsv", "RTE.tsv",
            "SST-2.tsv", "STS-B.tsv", "WNLI.tsv",
        }  # fmt: skip

    def test_where_it_cannot_be_written(self, tmp_path):
        with pytest.raises(DataError, match="cannot be written"):
            write_submission(tmp_path, find_task("rte"), [])

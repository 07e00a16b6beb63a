"""`example/finetune_classifier.py` on GLUE and JSON, with any number of labels, weights, thresholds."""

from __future__ import annotations

import gzip
import json
import random
import re

import pytest

from propeller.bundle import read_bundle


@pytest.fixture
def exported(tmp_path):
    """Reads what `finetune` exported."""
    return lambda: read_bundle(tmp_path / "output" / "best" / "inference")


@pytest.fixture
def train(finetune, tmp_path):
    """`train(*flags, **settings)` fine-tunes on the files in `tmp_path / "data"`, without an error."""

    def run(*flags, **settings):
        result = finetune("--data_dir", tmp_path / "data", *flags, **settings)
        assert result.code == 0, result.err
        return result

    return run


def evaluated(result):
    """The metrics that were logged, by set."""
    lines = re.findall(r"\[(\w+) evaluation\] loss: \S+, (.*), n: (\d+)", result.err)
    return {name: ([pair.split(":")[0] for pair in text.split(", ")], int(n)) for name, text, n in lines}


class TestTasks:
    def test_mrpc(self, train, tmp_path, write, texts, exported):
        header = "#1 ID\t#2 ID\t#1 String\t#2 String"
        for name in ("train", "dev"):
            rows = (f"{label}\t1\t2\t{text}\t{text}差" for label, text in texts(12, seed=1))
            write(tmp_path / f"data/{name}.tsv", f"\ufeffQuality\t{header}", *rows)
        write(tmp_path / "data/test.tsv", f"index\t{header}", "0\t1\t2\t好\t差", '1\t1\t2\t"好\t好')
        result = train("--task", "MRPC")
        assert evaluated(result) == {"dev": (["f1", "acc"], 12)}
        assert exported().metadata["processor"]["settings"]["task"] == "mrpc"
        submission = (tmp_path / "output/best/submission/MRPC.tsv").read_text("utf-8")
        assert re.fullmatch(r"index\tprediction\n0\t[01]\n1\t[01]\n", submission)

    def test_mnli(self, train, tmp_path, write, exported):
        """Two sets to evaluate on, the first decides; rows without a gold label are counted."""
        labels = ["neutral", "entailment", "contradiction", "-"] * 3
        rows = [f"{i}\t好 {i}\t差\t{label}" for i, label in enumerate(labels)]
        for name in ("train", "dev_matched", "dev_mismatched"):
            write(tmp_path / f"data/{name}.tsv", "index\tsentence1\tsentence2\tgold_label", *rows)
        for name in ("test_matched", "test_mismatched", "diagnostic"):
            write(tmp_path / f"data/{name}.tsv", "index\tsentence1\tsentence2", "0\t好\t差")
        result = train("--task", "mnli")
        metrics = ["acc", "mcc"]
        assert evaluated(result) == {"dev_matched": (metrics, 9), "dev_mismatched": (metrics, 9)}
        assert result.err.count("left out 3 pairs without a gold label") == 3
        assert exported().processor().labels == ["contradiction", "entailment", "neutral"]
        folder = tmp_path / "output/best/submission"
        assert sorted(path.name for path in folder.iterdir()) == ["AX.tsv", "MNLI-m.tsv", "MNLI-mm.tsv"]
        (answer,) = (folder / "AX.tsv").read_text().splitlines()[1:]
        assert answer.split("\t")[1] in exported().processor().labels

    def test_cola_and_sts_b(self, train, finetune, tmp_path, write, texts):
        for name in ("train", "dev"):
            write(
                tmp_path / f"data/{name}.tsv",
                *(f"gj04\t{label}\t*\t{text}" for label, text in texts(8, seed=2)),
            )
        write(tmp_path / "data/test.tsv", "index\tsentence", "0\t好")
        assert evaluated(train("--task", "cola")) == {"dev": (["mcc"], 8)}
        assert (tmp_path / "output/best/submission/CoLA.tsv").exists()
        header = "index\tgenre\tsentence1\tsentence2"
        for name in ("train", "dev"):
            rows = (f"{i}\tg\t{text}\t好\t{i % 5}.5" for i, (_, text) in enumerate(texts(8, seed=2)))
            write(tmp_path / f"data/{name}.tsv", f"{header}\tscore", *rows)
        write(tmp_path / "data/test.tsv", header, "0\tg\t好\t差")
        assert evaluated(train("--task", "sts-b", "--restart")) == {"dev": (["pearson", "spearman"], 8)}
        text = (tmp_path / "output/best/submission/STS-B.tsv").read_text()
        assert re.fullmatch(r"index\tprediction\n0\t[0-5]\.\d{6}\n", text)

    def test_a_test_set_without_a_row_of_the_language(self, finetune, tmp_path, write):
        for name, language in (("train", "zh"), ("dev", "zh"), ("test", "en")):
            rows = (f"{language}\t{label}\t好\t差" for label in ("neutral", "entailment"))
            write(tmp_path / f"data/{name}.tsv", "language\tgold_label\tsentence1\tsentence2", *rows)
        result = finetune("--data_dir", tmp_path / "data", "--task", "xnli")
        assert result.code == 1
        assert result.errors == [
            f"error: {tmp_path}/data/test.tsv: every row was left out; expected examples"
        ]

    @pytest.mark.parametrize(
        ("flags", "hparam", "code", "message"),
        [
            (("--task", "mrcp"), {}, 2, "--task mrcp is not known. Did you mean 'mrpc'"),
            (("--task", "rte"), {}, 1, "train.tsv:2: found"),
            (("--task", "sst-2"), {"num_label": 3}, 2, "num_label is 3, but sst-2 has 2"),
            (("--task", "sts-b", "--multi_label"), {}, 2, "A regression has no labels"),
        ],
    )
    def test_what_cannot_be_used(self, finetune, tmp_path, write, flags, hparam, code, message):
        for name in ("train", "dev"):
            write(tmp_path / f"data/{name}.tsv", "sentence1\tsentence2\tlabel", "a\tb")
        if "sst-2" in flags or "sts-b" in flags:
            head = {"sst-2": "sentence\tlabel", "sts-b": "sentence1\tsentence2\tscore"}[flags[1]]
            for name in ("train", "dev"):
                write(tmp_path / f"data/{name}.tsv", head, "\t".join("1" * (head.count("\t") + 1)))
        result = finetune("--data_dir", tmp_path / "data", *flags, hparam=hparam)
        assert result.code == code
        (error,) = result.errors
        assert message in error


class TestHeaders:
    """A first line of other names is no example."""

    @pytest.fixture
    def data(self, tmp_path, write, texts):
        def make(header):
            for name in ("train", "dev"):
                rows = (f"{text}\t{label}" for label, text in texts(24, seed=3))
                write(tmp_path / f"data/{name}.tsv", header, "", *rows)

        return make

    def test_names_in_another_case(self, train, data, exported):
        data("Text_A\tLABEL")
        assert train().err.count("tsv: left out 1 empty lines") == 2
        assert exported().processor().labels == ["0", "1"]

    def test_unknown_names_are_refused(self, finetune, data, tmp_path):
        data("review\tsentiment")
        result = finetune("--data_dir", tmp_path / "data")
        (error,) = result.errors
        assert result.code == 1 and "train.tsv:1: the label 'sentiment' stands in no other line" in error
        assert "--columns text_a,label" in error


class TestJson:
    def test_pairs(self, finetune, tmp_path, texts, exported):
        """As AFQMC; its test set has no labels, and training data may be gzipped."""
        lines = [
            json.dumps({"sentence1": text, "sentence2": text[::-1], "label": label}, ensure_ascii=False)
            for label, text in texts(20, seed=3)
        ]
        (tmp_path / "train.json.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
        (tmp_path / "dev.json").write_text("\n".join(lines[:8]) + "\n", "utf-8")
        (tmp_path / "test.json").write_text('{"id": 0, "sentence1": "好", "sentence2": "差"}\n', "utf-8")
        sets = (("--train_set", "train.json.gz"), ("--dev_set", "dev.json"), ("--test_set", "test.json"))
        result = finetune(*(item for flag, name in sets for item in (flag, tmp_path / name)))
        assert result.code == 0, result.err
        assert evaluated(result) == {"dev": (["acc", "f1"], 8)}
        assert "test has no labels and is left out" in result.err
        assert exported().metadata["processor"]["settings"] == {
            "labels": ["0", "1"], "max_seqlen": 32, "pair": True,
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"sentence": "b", "label": "7"}', "dev.json:2: unknown label '7'"),
            ('{"sentence": "b", "label"', "dev.json:2: the line is no JSON"),
            ('{"sentence": "b"}', "dev.json:2: the object has no 'label'"),
        ],
    )
    def test_a_bad_line_is_named_before_training_starts(self, finetune, tmp_path, line, message):
        good = '{"sentence": "a", "label": 0}\n{"sentence": "b", "label": 1}\n'
        (tmp_path / "train.json").write_text(good)
        (tmp_path / "dev.json").write_text(good.splitlines()[0] + "\n" + line + "\n")
        result = finetune("--train_set", tmp_path / "train.json", "--dev_set", tmp_path / "dev.json")
        assert result.code == 1
        (error,) = result.errors
        assert message in error
        assert not (tmp_path / "output" / "checkpoints").exists()


def marked(count, seed):
    """Texts, and for each which of two words stand in it."""
    rng = random.Random(seed)
    for _ in range(count):
        words = [word for word in ("good", "bad") if rng.random() < 0.5]
        yield " ".join(["hotel", *words, "the"]), words


class TestManyLabels:
    LEARNS = {
        "run_config": {"max_steps": 60},
        "hparam": {"hidden_dropout_prob": 0.0, "initializer_range": 0.2, "num_label": 2},
    }

    def check(self, result, exported, call):
        assert evaluated(result) == {"dev": (["micro_f1", "macro_f1", "exact_match"], 40)}
        metrics = exported().metrics["dev"]
        assert metrics["micro_f1"] > 0.9 and metrics["exact_match"] > 0.8
        assert re.search(
            r"^train: .*; labels: bad \d+, good \d+; \d\.\d\d a row, \d+ rows without$", result.err, re.M
        )
        folder = exported().folder
        lines = "hotel bad good the\nhotel the\n"
        plain = call("--do_predict", "--bundle", folder, stdin=lines.encode()).out.splitlines()
        answers = call("--do_predict", "--bundle", folder, "--format", "jsonl", stdin=lines.encode()).out
        answers = [json.loads(line) for line in answers.splitlines()]
        assert [answer["labels"] for answer in answers] == [["bad", "good"], []]
        for line, answer in zip(plain, answers, strict=True):
            probabilities = answer["probabilities"].values()
            assert [float(value) for value in line.split("\t")] == pytest.approx(list(probabilities))

    def test_table(self, train, tmp_path, write, exported, call):
        for seed, name in enumerate(("train", "dev")):
            rows = (f"{'|'.join(words)}\t{text}" for text, words in marked(40, seed))
            write(tmp_path / f"data/{name}.tsv", "label\ttext_a", *rows)
        self.check(train("--label_separator", "|", **self.LEARNS), exported, call)

    def test_json_says_it_by_itself(self, finetune, tmp_path, exported, call):
        for seed, name in enumerate(("train", "dev")):
            rows = ({"text": text, "labels": words} for text, words in marked(40, seed))
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ("--train_set", tmp_path / "train.jsonl", "--dev_set", tmp_path / "dev.jsonl")
        result = finetune(*flags, "--tune_threshold", **self.LEARNS)
        assert result.code == 0, result.err
        self.check(result, exported, call)
        assert set(exported().processor().thresholds) == {"bad", "good"}


class TestClassWeights:
    def test_balanced(self, train, tmp_path, write):
        rows = ["0\tgood"] * 9 + ["1\tbad"] * 3
        for name in ("train", "dev"):
            write(tmp_path / f"data/{name}.tsv", "label\ttext_a", *rows)
        train(hparam={"class_weights": "balanced"})
        run = json.loads((tmp_path / "output" / "run.json").read_text("utf-8"))
        assert run["hparams"]["class_weights"] == pytest.approx([12 / 18, 2.0])

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"class_weights": "balance"}, "class_weights must be 'balanced'"),
            ({"class_weights": {"2": 1.0}}, "class_weights names '2'; expected some of 0, 1"),
            ({"class_weight": [1, 2]}, "Did you mean 'class_weights'"),
        ],
    )
    def test_what_cannot_be_used(self, finetune, given, message):
        result = finetune(hparam=given)
        assert result.code == 2
        (error,) = result.errors
        assert message in error


class TestThreshold:
    def test_tuned_and_kept(self, train, tmp_path, write, exported, call):
        """Few positives and little training: at the usual threshold none is found."""
        rows = (["0\tgood the", "0\thotel", "0\tthe is"] * 8) + ["1\tbad is"] * 3
        for name in ("train", "dev", "test"):
            write(tmp_path / f"data/{name}.tsv", "label\ttext_a", *rows)
        result = train("--tune_threshold", run_config={"max_steps": 6}, hparam={"hidden_dropout_prob": 0.0})
        before = float(re.search(r"\[dev evaluation\] .* f1: (\S+),", result.err)[1])
        settings = exported().metadata["processor"]["settings"]
        assert list(settings["thresholds"]) == ["1"]
        assert exported().metrics["dev"]["f1"] >= before and exported().metrics["dev"]["f1"] > 0.9
        assert exported().metrics["test"]["f1"] == exported().metrics["dev"]["f1"]
        best = json.loads((exported().folder / "best.json").read_text())
        assert best["results"]["dev"]["f1"] == pytest.approx(before, abs=1e-6)
        flags = ("--do_predict", "--format", "jsonl", "--bundle", exported().folder)
        labels = [
            json.loads(line)["label"] for line in call(*flags, stdin=b"bad is\nhotel\n").out.splitlines()
        ]
        assert labels == ["1", "0"]

    def test_three_labels_have_none(self, finetune, tmp_path, write):
        for name in ("train", "dev"):
            write(tmp_path / f"data/{name}.tsv", "label\ttext_a", "0\ta", "1\tb", "2\tc")
        result = finetune("--data_dir", tmp_path / "data", "--tune_threshold")
        assert result.code == 2
        assert "--tune_threshold is for two labels" in result.errors[0]

"""`example/finetune_mrc.py` as a user runs it: training, the three files, lines of standard input."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import random
import re
import shutil
import sys

import pytest

from propeller import cli
from propeller.bundle import read_bundle

PLACES = ("paris", "rome", "oslo", "lima")
FILLERS = ("the", "cat", "sat", "on", "a", "mat", ",", "and", "slept")
CHINESE = "猫坐在垫子上睡觉了"
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
VOCABULARY = (*SPECIAL, "where", "?", *PLACES, *FILLERS, *CHINESE, "京", "沪")
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}


def questions(count, seed, *, negative=0.0, places=PLACES, fillers=FILLERS, blank=" "):
    """Paragraphs that name one place, which is the answer, or none; some longer than a window."""
    rng = random.Random(seed)
    paragraphs = []
    for number in range(count):
        words = rng.choices(fillers, k=rng.randint(2, 40))
        is_impossible = rng.random() < negative
        answers = []
        if not is_impossible:
            place = rng.randrange(len(words))
            words[place] = rng.choice(places)
            answers = [{"text": words[place], "answer_start": len("".join(w + blank for w in words[:place]))}]
        question = {"id": f"{seed}-{number}", "question": "where ?", "answers": answers}
        if negative:
            question["is_impossible"] = is_impossible
        paragraphs.append({"context": blank.join(words), "qas": [question]})
    return {"version": "v2.0" if negative else "1.1", "data": [{"title": "a", "paragraphs": paragraphs}]}


def flat(content):
    """Questions by id, each with its context."""
    return {
        question["id"]: {**question, "context": paragraph["context"]}
        for article in content["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    }


@pytest.fixture(scope="module")
def script(root):
    """The script as a module."""
    path = root / "example" / "finetune_mrc.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def call(script, tmp_path_factory):
    """`call(*flags, stdin=b"")` runs the script in this process: exit code, output, log."""

    def run(*flags, stdin=b""):
        lines = tmp_path_factory.mktemp("stdin") / "lines"
        lines.write_bytes(stdin)
        out, err = io.StringIO(), io.StringIO()
        loggers = [logging.getLogger(name) for name in ("propeller", "ernie")]
        before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
        try:
            with (
                pytest.MonkeyPatch.context() as patch,
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                open(lines, encoding="utf-8") as source,
                pytest.raises(SystemExit) as stop,
            ):
                patch.setattr(sys, "argv", ["finetune_mrc.py", *map(str, flags)])
                patch.setattr(sys, "stdin", source)
                cli.run(script.main)
        finally:
            for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
                logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate
        return stop.value.code, out.getvalue(), err.getvalue()

    return run


@pytest.fixture(scope="module")
def finetune(call, tmp_path_factory):
    """`finetune(contents, *flags, max_steps=2)` trains on files of these contents; its folder and its log."""

    def run(contents, *flags, max_steps=2):
        folder = tmp_path_factory.mktemp("mrc")
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", "utf-8")
        sets = []
        for name, content in contents.items():
            (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
            sets += [f"--{name}_set", folder / f"{name}.json"]
        config = {"model_dir": str(folder / "output"), "max_steps": max_steps, "eval_steps": 1000}
        hparams = {**SIZES, "learning_rate": 0.03, "batch_size": 16}
        code, _, err = call(
            *sets, "--vocab_file", folder / "vocab.txt", "--cache_dir", folder / "cache",
            "--max_seqlen", 24, "--max_query_length", 4, "--doc_stride", 8,
            "--run_config", json.dumps(config), "--hparam", json.dumps(hparams), *flags,
        )  # fmt: skip
        return code, folder, err

    return run


@pytest.fixture(scope="module")
def trained(finetune, tmp_path_factory):
    """A model that has learnt to find places, from data in which a third of the questions has no answer."""
    dev = questions(60, 1, negative=0.3)
    test = questions(5, 2)
    for question in test["data"][0]["paragraphs"]:
        del question["qas"][0]["answers"]
    lines = tmp_path_factory.mktemp("dev") / "dev.jsonl"
    contents = {"train": questions(300, 0, negative=0.3), "dev": dev, "test": test}
    code, folder, err = finetune(contents, "--dev_predictions", lines, max_steps=80)
    assert code == 0, err
    lines.rename(folder / "dev.jsonl")
    return folder, err, flat(dev)


@pytest.fixture(scope="module")
def bundle(trained):
    return trained[0] / "output" / "best" / "inference"


def files_of(folder):
    names = ("predictions.json", "nbest_predictions.json", "null_odds.json")
    return [json.loads((folder / name).read_text("utf-8")) for name in names]


class TestTraining:
    def test_learns_and_reports(self, trained):
        _, err, dev = trained
        (line,) = re.findall(r"\[dev evaluation\] (.*)", err)
        scores = dict(re.findall(r"(\w+): (-?[\d.]+)", line))
        assert float(scores["em"]) > 90 and float(scores["f1"]) >= float(scores["em"])
        assert int(scores["total"]) == len(dev) < int(scores["n"])  # questions, windows
        assert float(scores["best_f1"]) >= float(scores["f1"]) and "best_f1_thresh" in scores
        assert "test has no answers with a place in its texts and is left out" in err
        assert "[test evaluation]" not in err

    def test_what_data_tells_is_in_the_bundle(self, bundle):
        settings = read_bundle(bundle).metadata["processor"]["settings"]
        assert isinstance(settings["search"].pop("null_score_diff_threshold"), float)
        assert settings["search"] == {"n_best_size": 20, "max_answer_length": 30, "with_negative": True}
        assert settings["score"] == "squad"

    def test_dev_predictions_lie_beside_the_bundle(self, trained, bundle):
        _, err, dev = trained
        predictions, nbest, null_odds = files_of(bundle.parent)
        assert list(predictions) == list(nbest) == list(null_odds) == list(dev)
        right = [
            predictions[name] == (question["answers"][0]["text"] if question["answers"] else "")
            for name, question in dev.items()
        ]
        exported = read_bundle(bundle)
        metrics, threshold = exported.metrics["dev"], exported.processor().search.null_score_diff_threshold
        assert 100 * sum(right) / len(right) == pytest.approx(metrics["em"])
        assert metrics["f1"] == pytest.approx(metrics["best_f1"]) and metrics["best_f1_thresh"] <= threshold
        for name, question in dev.items():
            assert predictions[name] in question["context"]
            assert {"text", "probability", "start_logit", "end_logit"} == set(nbest[name][0])
            assert sum(entry["probability"] for entry in nbest[name]) == pytest.approx(1)
            assert (predictions[name] == "") == (null_odds[name] > threshold)
        lines = [json.loads(line) for line in (trained[0] / "dev.jsonl").read_text("utf-8").splitlines()]
        assert {line["id"]: line["prediction"]["text"] for line in lines} == predictions
        assert f"null_score_diff_threshold in {bundle}: {threshold:.4f}, with f1 100.00 on dev" in err
        assert "the answers to dev score em: 100.00, f1: 100.00, " in err

    def test_the_best_is_chosen_by_what_the_best_threshold_gives(self, bundle):
        assert json.loads((bundle / "best.json").read_text("utf-8"))["metric"] == "best_f1"

    def test_a_threshold_that_is_given_stays(self, finetune):
        contents = {"train": questions(30, 0, negative=0.5), "dev": questions(30, 1, negative=0.5)}
        code, folder, err = finetune(contents, "--null_score_diff_threshold", -1e6)
        assert code == 0, err
        exported = read_bundle(folder / "output/best/inference")
        assert exported.processor().search.null_score_diff_threshold == -1e6
        assert set(files_of(folder / "output/best")[0].values()) == {""}
        assert exported.metrics["dev"]["NoAns_f1"] == 100 and exported.metrics["dev"]["HasAns_f1"] == 0
        assert json.loads((exported.folder / "best.json").read_text("utf-8"))["metric"] == "f1"
        assert "null_score_diff_threshold in" not in err

    def test_chinese_without_impossible_questions(self, finetune):
        contents = {
            name: questions(40, seed, places=("京", "沪"), fillers=CHINESE, blank="")
            for seed, name in enumerate(("train", "dev"))
        }
        # One answer stands twice, and not where it says: nothing to train on, but a question of dev.
        for content in contents.values():
            content["data"][0]["paragraphs"][0] = {
                "context": "京猫京",
                "qas": [{"id": "x", "question": "?", "answers": [{"text": "京", "answer_start": 1}]}],
            }
        code, folder, err = finetune(contents)
        assert code == 0, err
        processor = read_bundle(folder / "output/best/inference").processor()
        assert processor.score == "cmrc" and processor.search.max_answer_length == 100
        assert not processor.search.with_negative
        assert re.search(r"\[dev evaluation\] .*em: \S+, f1: \S+, avg: \S+, question_num: 40, ", err)
        rows = dict(re.findall(r"(train|dev) (\d+)", re.search("windows: (.*)", err)[1]))
        for name, content in contents.items():
            lengths = [len(p["context"]) for p in content["data"][0]["paragraphs"][name == "train" :]]
            # Room for 19 tokens, a stride of 8.
            windows = sum(1 + max(0, -(-(length - 19) // 8)) for length in lengths)
            assert int(rows[name]) == windows

    def test_bundle_of_another_task(self, call, bundle, tmp_path):
        other = tmp_path / "other"
        shutil.copytree(bundle, other)
        text = (other / "bundle.json").read_text("utf-8")
        settings = re.search(r'"settings": \{.*?\n    \}\n', text, re.DOTALL)[0]
        changed = '"settings": {"labels": null, "max_seqlen": 24, "pair": false}\n'
        text = text.replace('"name": "mrc"', '"name": "classification"').replace(settings, changed)
        (other / "bundle.json").write_text(text, "utf-8")
        import ernie.tasks.classification  # noqa: F401  # registers its processor

        code, _, err = call(
            "--do_predict", "--bundle", other, "--predict_file", "x.json", "--output_dir", tmp_path
        )
        assert code == 2 and "is a model for classification: expected one for mrc" in err

    def test_wrong_flags(self, finetune, call, tmp_path):
        contents = {"train": questions(4, 0), "dev": questions(4, 1)}
        code, _, err = finetune(contents, "--max_query_length", 40)
        assert code == 2 and "error: max_seqlen 24 leaves no room" in err
        code, _, err = finetune(contents, "--columns", "question,context")
        assert code == 2 and "the files of mrc are JSON" in err
        code, _, err = call("--do_predict", "--predict_file", "x.json")
        assert code == 2 and "--predict_file needs --output_dir" in err
        code, _, err = finetune(contents, "--predict_file", "x.json")
        assert code == 2 and "--predict_file is for prediction: add --do_predict" in err
        file = tmp_path / "file"
        file.write_text("")
        code, _, err = call("--do_predict", "--predict_file", "x.json", "--output_dir", file / "out")
        assert code == 2 and f"--output_dir {file}/out cannot be made: Not a directory." in err
        code, _, err = call("--do_predict", "--n_best_size", 3)
        assert code == 2 and "--n_best_size with --do_predict: these need --predict_file" in err

    def test_bad_data_is_named(self, finetune):
        code, folder, err = finetune({"train": {"data": []}, "dev": questions(4, 1)})
        assert code == 1 and f"error: {folder}/train.json: holds no question" in err

    def test_question_in_two_parts_is_named(self, finetune, tmp_path):
        for part in ("a.json", "b.json"):
            (tmp_path / part).write_text(json.dumps(questions(4, 1)))
        code, _, err = finetune({"train": questions(4, 0)}, "--dev_set", tmp_path)
        assert code == 1 and f"b.json: the question id '1-0' stands in {tmp_path}/a.json, too" in err

    @pytest.mark.parametrize("name", ["train", "dev"])
    def test_data_without_a_place_for_an_answer_is_named(self, finetune, name):
        contents = {"train": questions(4, 0), "dev": questions(4, 1)}
        for paragraph in contents[name]["data"][0]["paragraphs"]:
            paragraph["qas"][0]["answers"] = [{"text": "lost", "answer_start": 0}]
        code, folder, err = finetune(contents)
        assert code == 1 and f"error: {folder}/{name}.json: none of its questions has an answer with a" in err
        assert not (folder / "output").exists()


class TestPrediction:
    def test_file(self, call, bundle, trained, tmp_path):
        folder, _, dev = trained
        code, out, err = call(
            "--do_predict",
            "--bundle",
            bundle,
            "--predict_file",
            folder / "dev.json",
            "--output_dir",
            tmp_path / "out",
        )
        assert (code, out) == (0, ""), err
        assert files_of(tmp_path / "out") == files_of(bundle.parent)
        assert f"the answers to {folder}/dev.json score em: 100.00, " in err

    def test_file_without_answers_and_other_settings(self, call, bundle, trained, tmp_path):
        folder, _, _ = trained
        code, _, err = call(
            "--do_predict", "--bundle", bundle, "--predict_file", folder / "test.json",
            "--output_dir", tmp_path, "--null_score_diff_threshold", -1e6, "--n_best_size", 2,
        )  # fmt: skip
        assert code == 0 and " score " not in err, err
        predictions, nbest, _ = files_of(tmp_path)
        assert set(predictions.values()) == {""} and len(predictions) == 5
        assert all(len(entries) in (2, 3) for entries in nbest.values())

    def test_lines(self, call, bundle):
        context = "the cat sat , " * 6 + "and slept on a mat on oslo"
        lines = [
            f"where ?\t{context}",
            json.dumps({"question": "where ?", "context": "rome and the cat"}),
            "where ?",
            "where ?\t",
        ]
        code, out, _ = call("--do_predict", "--bundle", bundle, stdin="\n".join(lines).encode())
        assert code == 0
        assert out.split("\n") == [
            "oslo", "rome", "#error\texpected question<TAB>context, or a JSON object, found 1 cells", "", ""
        ]  # fmt: skip
        code, out, _ = call("--do_predict", "--bundle", bundle, "--format", "jsonl", stdin=lines[0].encode())
        answer = json.loads(out)
        assert answer["text"] == context[answer["start"] : answer["end"]] == "oslo"
        assert 0.5 < answer["score"] <= 1 and answer["null_odds"] < 0

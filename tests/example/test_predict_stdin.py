"""`--do_predict`: lines of standard input answered by the model that the older command exported."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess

import numpy as np
import pytest

from ernie.config import ErnieConfig
from ernie.tasks.classification_model import ClassificationModel
from propeller.bundle import read_bundle
from propeller.data import Dataset
from propeller.paddle import Predictor, stream
from propeller.paddle.train.learner import Learner
from propeller.types import HParams, RunConfig

PREDICT = "$PYTHON $EXAMPLE --do_predict"

# A line, and whether it has an answer. Only \n ends a line, and \r\n as Windows writes it.
LINES = [
    ("这家酒店非常好".encode(), True),
    (b"", True),
    (b"the hotel is good\r", True),
    ("\u2028好\x85差\x0b\x0c\x1c".encode(), True),
    (b"one\ttwo", False),
    (b"\xff\xfe", False),
    ("\ufeff酒店".encode(), True),
    (b"a\rb", True),
    (b"\x00 nul", True),
    ("好".encode() * 5000, True),
    ("最后一行没有换行".encode(), True),
]
MIXED = b"\n".join(line for line, _ in LINES)


def numbers(line):
    return [float(cell) for cell in line.split("\t")]


def is_probabilities(values):
    return all(0 <= value <= 1 for value in values) and sum(values) == pytest.approx(1, abs=1e-6)


@pytest.fixture(scope="module")
def predictor(bundle):
    return Predictor(bundle)


@pytest.fixture
def start(environment, bundle, tmp_path):
    """Starts the script on a pipe; ends it in any case."""
    started = []

    def run(*flags):
        process = subprocess.Popen(
            [environment["PYTHON"], environment["EXAMPLE"], "--do_predict", "--bundle", bundle, *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=tmp_path,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def ask(process, line):
    """Sends one line and waits for its answer."""
    process.stdin.write(line + b"\n")
    process.stdin.flush()
    assert select.select([process.stdout], [], [], 60)[0], "no answer"
    return process.stdout.readline().decode()


class TestOneLineForEach:
    def test_tsv(self, call, bundle):
        result = call("--do_predict", "--bundle", bundle, stdin=MIXED)
        assert (result.code, result.errors) == (0, [])
        assert result.out.endswith("\n")
        answers = result.out.removesuffix("\n").split("\n")
        assert len(answers) == len(LINES)
        for answer, (line, good) in zip(answers, LINES, strict=True):
            if good:
                assert is_probabilities(numbers(answer)), line
            else:
                assert answer.startswith("#error\t") and len(answer.split("\t")) == 2
        assert answers[4] == "#error\texpected one text without a tab, found 2 cells"
        assert answers[5].startswith("#error\tline 6 is not UTF-8 (")
        assert "2 lines could not be answered: 5, 6\n" in result.err

    def test_jsonl_strict(self, call, bundle):
        result = call("--do_predict", "--bundle", bundle, "--format", "jsonl", "--strict", stdin=MIXED)
        assert (result.code, result.errors) == (1, [])
        answers = [json.loads(line) for line in result.out.removesuffix("\n").split("\n")]
        assert len(answers) == len(LINES)
        for answer, (line, good) in zip(answers, LINES, strict=True):
            if good:
                assert answer["label"] in ("0", "1"), line
                assert answer["probability"] == max(answer["probabilities"].values())
                assert is_probabilities(answer["probabilities"].values())
            else:
                assert list(answer) == ["error"]

    def test_strict_is_content_with_good_lines(self, call, bundle):
        result = call("--do_predict", "--bundle", bundle, "--strict", stdin=b"good\nbad")
        assert result.code == 0 and result.out.count("\n") == 2

    def test_no_line_at_all(self, call, bundle):
        result = call("--do_predict", "--bundle", bundle)
        assert (result.code, result.out, result.errors) == (0, "", [])

    def test_many_lines_as_one_chunk_at_a_time(self, call, bundle, predictor, texts):
        """However the lines fall into chunks and batches, the answers are the same, and in order."""
        several = [text for _, text in texts(500, seed=8)]
        lines = [several[(i * 7919) % 500] for i in range(20_000)]
        result = call("--do_predict", "--bundle", bundle, stdin="\n".join(lines).encode())
        assert result.code == 0
        found = np.array([numbers(line) for line in result.out.splitlines()])
        processor = predictor.bundle.processor()
        answers = stream.answer_all(predictor, processor, [processor.parse(text) for text in several])
        expected = {
            text: list(answer["probabilities"].values())
            for text, answer in zip(several, answers, strict=True)
        }
        np.testing.assert_allclose(found, [expected[line] for line in lines], atol=1e-6)
        assert np.ptp(found[:, 0]) > 0.5  # they do differ

    def test_equals_the_live_model_on_dev(self, trained, workplace, predictor, call, bundle):
        """The checkpoint's weights in a Learner, standard input, and `--dev_predictions` agree."""
        processor = predictor.bundle.processor()
        raws = list(processor.read(workplace / "data/chnsenticorp/dev.tsv"))
        config = ErnieConfig.from_file(workplace / "model" / "ernie_config.json")
        learner = Learner(
            lambda *given: ClassificationModel(*given, config=config, processor=processor),
            RunConfig(model_dir=str(trained[1] / "output"), max_steps=30),
            HParams(),
        )
        batches = Dataset.from_list(processor.prepare(raws)).padded_batch(5)
        logits = np.array([row["logits"] for row in learner.predict(batches, ckpt=-1)])
        live = [list(answer["probabilities"].values()) for answer in processor.finish({"logits": logits})]
        lines = "".join(raw["text_a"] + "\n" for raw in raws)
        piped = call("--do_predict", "--bundle", bundle, stdin=lines.encode()).out.splitlines()
        np.testing.assert_allclose([numbers(line) for line in piped], live, atol=1e-4)
        kept = (trained[1] / "predictions/dev.jsonl").read_text("utf-8").splitlines()
        kept = [list(json.loads(line)["prediction"]["probabilities"].values()) for line in kept]
        np.testing.assert_allclose(kept, live, atol=1e-4)


class TestProcess:
    def test_from_another_folder_with_nothing_but_the_bundle(self, shell, bundle, tmp_path):
        """It was moved, the command knows neither vocabulary nor data, the locale knows no Chinese."""
        folder = shutil.copytree(bundle, tmp_path / "moved")
        description = json.loads((folder / "bundle.json").read_text("utf-8"))
        description["processor"]["settings"]["labels"] = ["差评", "好评\ud83d"]  # half a character
        (folder / "bundle.json").write_text(json.dumps(description), "utf-8")
        (tmp_path / "elsewhere").mkdir()
        result = shell(
            PREDICT + " --bundle ../moved --format jsonl",
            cwd=tmp_path / "elsewhere",
            stdin="酒店非常好\n非常差\n".encode(),
            PYTHONIOENCODING="ascii",
            HOME=str(tmp_path / "nobody"),
        )
        assert (result.code, result.err) == (0, "")
        assert [json.loads(line)["label"] for line in result.out.splitlines()] == ["好评\ud83d", "差评"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "moved"]
        assert not any((tmp_path / "elsewhere").iterdir())

    def test_answers_at_once_and_ends_quietly_at_ctrl_c(self, start):
        process = start()
        first = ask(process, "这家酒店非常好".encode())
        assert is_probabilities(numbers(first))
        assert ask(process, b"a\tb").startswith("#error\t")
        assert ask(process, "这家酒店非常好".encode()) == first
        process.send_signal(signal.SIGINT)  # while it waits for the next line
        assert process.wait(60) == 128 + signal.SIGINT
        assert process.stderr.read() == b""

    def test_a_reader_that_went_away(self, start):
        """While more could come: nothing is said, and the exit code is 0."""
        process = start()
        ask(process, b"good")
        process.stdout.close()
        process.stdin.write(b"good\n" * 3000)
        process.stdin.flush()
        assert process.wait(60) == 0
        assert process.stderr.read() == b""

    def test_head(self, shell, bundle, tmp_path):
        (tmp_path / "lines").write_bytes(b"good\n" * 20_000)
        script = PREDICT + ' --bundle "$1" < lines | head -1; echo "${PIPESTATUS[@]}"'
        result = shell(script, bundle, cwd=tmp_path)
        answer, status = result.out.splitlines()
        assert is_probabilities(numbers(answer))
        assert (status, result.err) == ("0 0", "")


class TestBadBundle:
    def test_default_is_the_best_export_of_model_dir(self, call, trained):
        config = json.dumps({"model_dir": str(trained[1] / "output")})
        assert call("--do_predict", "--run_config", config, stdin=b"good").code == 0

    def test_none_there(self, call, tmp_path):
        result = call("--do_predict", "--run_config", json.dumps({"model_dir": str(tmp_path)}), stdin=b"x")
        assert (result.code, result.out) == (1, "")
        (error,) = result.errors
        assert f"{tmp_path}/best/inference is no bundle: it has no bundle.json" in error

    @pytest.mark.parametrize("name", ["model.pdiparams", "model.json", "vocab.txt", "probe.npz"])
    def test_damaged(self, call, bundle, tmp_path, name):
        folder = shutil.copytree(bundle, tmp_path / "damaged")
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        result = call("--do_predict", "--bundle", folder, stdin=b"x")
        assert (result.code, result.out) == (1, "")
        (error,) = result.errors
        assert "is damaged" in error and name in error and "Export the model again" in error

    def test_incomplete(self, call, bundle, tmp_path):
        folder = shutil.copytree(bundle, tmp_path / "incomplete")
        os.remove(folder / "vocab.txt")
        result = call("--do_predict", "--bundle", folder, stdin=b"x")
        assert result.code == 1 and "vocab.txt" in result.errors[0]

    def test_of_an_unknown_task(self, call, bundle, tmp_path):
        folder = shutil.copytree(bundle, tmp_path / "other")
        text = (folder / "bundle.json").read_text("utf-8")
        (folder / "bundle.json").write_text(text.replace('"classification"', '"clasification"'), "utf-8")
        result = call("--do_predict", "--bundle", folder, stdin=b"x")
        assert result.code == 1
        assert (
            "No processor is registered as 'clasification'. Did you mean 'classification'?"
            in result.errors[0]
        )


def test_bundle_holds_what_prediction_needs(bundle):
    found = read_bundle(bundle)
    assert [spec.name for spec in found.inputs] == ["input_ids", "token_type_ids"]
    assert found.metadata["processor"] == {
        "name": "classification",
        "settings": {"labels": ["0", "1"], "max_seqlen": 32, "pair": False},
    }

"""`example/finetune_classifier.py` as a user trains with it: flags, file formats, logs, bad input."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from ernie.pretrained import load_pretrained_state
from propeller.bundle import read_bundle

EVALUATION = (
    r"\[{} evaluation\] loss: \d+\.\d{{6}}, acc: (\d\.\d{{6}}), f1: \d\.\d{{6}}, "
    r"n: {}, elapsed: \d+\.\d s, step: {}$"
)


@pytest.fixture
def exported(tmp_path):
    """Reads what `finetune` exported."""
    return lambda: read_bundle(tmp_path / "output" / "best" / "inference")


def rows_of(result):
    """Rows by set, as the report before the training tells them."""
    return {name: int(rows) for name, rows in re.findall(r"^(\w+): (\d+) rows", result.err, re.MULTILINE)}


def labels_of(result, name="train"):
    """What the report says of a set's labels."""
    return re.search(rf"^{name}: .*; labels: (.*)$", result.err, re.MULTILINE)[1]


class TestOlderCommand:
    def test_trains_evaluates_at_the_last_step_and_exports(self, trained, bundle, workplace):
        result, _ = trained
        assert (result.code, result.out, result.errors) == (0, "", [])
        assert rows_of(result) == {"train": 96, "dev": 24, "test": 16}
        # 30 steps, and an evaluation is due every 100.
        assert result.err.count(" evaluation] ") == 2
        (accuracy,) = re.findall(EVALUATION.format("dev", 24, 30), result.err, re.MULTILINE)
        assert len(re.findall(EVALUATION.format("test", 16, 30), result.err, re.MULTILINE)) == 1
        assert float(accuracy) > 0.9
        exported = read_bundle(bundle)
        assert exported.metrics["dev"]["acc"] == pytest.approx(float(accuracy), abs=1e-6)
        assert exported.metadata["processor"]["settings"]["labels"] == ["0", "1"]
        assert (bundle / "vocab.txt").read_bytes() == (workplace / "vocab.txt").read_bytes()

    def test_warm_start_is_reported(self, trained):
        (line,) = re.findall(r"warm start: (.*)", trained[0].err)
        names = r"head\.[\w.]+, head\.[\w.]+"
        assert re.fullmatch(rf"\d+ tensors loaded: [\w., ]+; new: {names}; left over: none", line)

    def test_resolved_configuration_is_kept(self, trained):
        run = json.loads((trained[1] / "output" / "run.json").read_text("utf-8"))
        assert run["run_config"]["max_steps"] == 30 and run["run_config"]["model_dir"] == "output"
        assert run["hparams"]["sent_type_vocab_size"] is None and run["hparams"]["use_task_id"] is False
        assert run["hparams"]["hidden_size"] == 16  # of the file

    def test_dev_predictions(self, trained, bundle, workplace):
        lines = (trained[1] / "predictions" / "dev.jsonl").read_text("utf-8").splitlines()
        rows = (workplace / "data/chnsenticorp/dev.tsv").read_text("utf-8").splitlines()[1:]
        answers = [json.loads(line) for line in lines]
        assert [f"{answer['label']}\t{answer['text_a']}" for answer in answers] == rows
        right = [answer["prediction"]["label"] == answer["label"] for answer in answers]
        assert np.mean(right) == pytest.approx(read_bundle(bundle).metrics["dev"]["acc"])
        assert all(set(answer["prediction"]["probabilities"]) == {"0", "1"} for answer in answers)

    def test_the_same_command_again_has_nothing_to_do(self, older_command, trained, bundle):
        before = bundle.resolve()
        again = older_command(cwd=trained[1])
        assert again.code == 0
        assert "nothing to do: step 30 is already reached" in again.err and "cached" not in again.err
        assert bundle.resolve() == before

    @pytest.mark.parametrize("depth", ["", "params"])
    def test_old_parameter_files_are_told_apart(self, older_command, tmp_path, write, depth):
        for name in ("word_embedding", "pos_embedding", "encoder_layer_0_multi_head_att_query_fc.w_0"):
            write(tmp_path / "params" / name, "raw floats")
        result = older_command(cwd=tmp_path, WARM_START_FROM=str(tmp_path / depth))
        assert result.code == 1
        (line,) = result.err.splitlines()
        assert line.startswith("error: ") and "Fluid" in line and "converter is not there yet" in line


class TestFiles:
    def test_pairs_in_folders_of_parts_without_header(self, finetune, tmp_path, write, texts, exported):
        """As LCQMC; the test set has no labels."""
        rows = [f"{text}\t{text[::-1]}\t{label}" for label, text in texts(40, seed=3)]
        write(tmp_path / "data/train/part-0", *rows[:15])
        (tmp_path / "data/train/part-1.gz").write_bytes(gzip.compress("\n".join(rows[15:30]).encode()))
        write(tmp_path / "data/dev/part-0", *rows[30:])
        write(tmp_path / "data/test.tsv", "好\t差", "差\t好")
        result = finetune("--data_dir", tmp_path / "data")
        assert result.code == 0, result.err
        assert rows_of(result) == {"train": 30, "dev": 10}
        assert "test has no labels and is left out" in result.err
        assert "[test evaluation]" not in result.err
        assert exported().metadata["processor"]["settings"]["pair"] is True

    def test_files_by_name_gzipped(self, finetune, tmp_path, write, texts, exported):
        """As SST-2: a header `sentence<TAB>label`; quotes are data. Its test set has no labels."""
        rows = ["sentence\tlabel", *(f'" {text} ""\t{label}' for label, text in texts(30, seed=4))]
        (tmp_path / "a.tsv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
        dev = write(tmp_path / "b.tsv", *rows[:11])
        test = write(tmp_path / "c.tsv", "index\tsentence", "0\t好", "1\t差")
        result = finetune("--train_set", tmp_path / "a.tsv.gz", "--dev_set", dev, "--test_set", test)
        assert result.code == 0, result.err
        assert rows_of(result) == {"train": 30, "dev": 10}
        assert "warning: 10 of 10 texts of dev also stand in train" in result.err
        assert exported().metadata["processor"]["settings"]["pair"] is False

    def test_mrpc(self, finetune, tmp_path, texts, exported):
        """A byte order mark, names of its own, other columns between, Windows line ends."""
        rows = [f"{label}\t1\t2\t{text}\t{text}差" for label, text in texts(20, seed=5)]
        header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
        for name in ("train", "dev"):
            (tmp_path / f"{name}.tsv").write_bytes("\r\n".join([header, *rows]).encode())
        result = finetune("--data_dir", tmp_path)
        assert result.code == 0, result.err
        assert rows_of(result) == {"train": 20, "dev": 20}
        settings = exported().metadata["processor"]["settings"]
        assert (settings["pair"], settings["labels"]) == (True, ["0", "1"])

    def test_regression(self, finetune, call, tmp_path, write, texts, exported):
        """As STS-B."""
        rows = [f"{i}\t{text}\t好\t{2.5 + i % 3}" for i, (_, text) in enumerate(texts(20, seed=6))]
        for name in ("train", "dev"):
            write(tmp_path / f"{name}.tsv", "index\tsentence1\tsentence2\tscore", *rows)
        result = finetune("--data_dir", tmp_path, hparam={"num_label": 1})
        assert result.code == 0, result.err
        assert labels_of(result) == "2.5 to 4.5, mean 3.450"
        assert re.search(r"\[dev evaluation\] loss: \S+, pearson: \S+, spearman: \S+, n: 20,", result.err)
        assert exported().metadata["processor"]["settings"]["labels"] is None
        answers = call("--do_predict", "--bundle", exported().folder, stdin="好\t差\n好\n".encode())
        value, error = answers.out.splitlines()
        assert np.isfinite(float(value)) and error.startswith("#error\t")

    @pytest.mark.parametrize(
        ("label_map", "labels"),
        [(None, ["0", "2", "10"]), ({"10": 0, "0": 1, "2": 2, "7": 3}, ["10", "0", "2", "7"])],
        ids=["numerically sorted", "label_map.json"],
    )
    def test_numbers_of_labels(self, finetune, tmp_path, write, exported, label_map, labels):
        for name in ("train", "dev"):  # a blank beside a label is none of it
            write(tmp_path / f"{name}.tsv", "label\ttext_a", "10\t好", "2 \t差", " 0\t酒店", "2\t价格")
        if label_map is not None:
            write(tmp_path / "label_map.json", json.dumps(label_map))
        result = finetune("--data_dir", tmp_path, hparam={"num_label": len(labels)})
        assert result.code == 0, result.err
        counts = {"10": 1, "2": 2, "0": 1, "7": 0}
        assert labels_of(result) == ", ".join(f"{label} {counts[label]}" for label in labels)
        assert exported().metadata["processor"]["settings"]["labels"] == labels
        assert list(exported().metrics["dev"]) == ["loss", "acc", "macro_f1", "n"]

    def test_columns_by_flag(self, finetune, tmp_path, write, texts, exported):
        """As CoLA: no header, four columns of which two count."""
        rows = [f"gj04\t{label}\t*\t{text}" for label, text in texts(12, seed=7)]
        for name in ("train", "dev", "test"):
            write(tmp_path / f"{name}.tsv", *rows)
        result = finetune("--data_dir", tmp_path, "--columns", "_,label,_,text_a")
        assert result.code == 0, result.err
        assert rows_of(result) == {"train": 12, "dev": 12, "test": 12}
        assert "[test evaluation]" in result.err
        assert exported().metadata["processor"]["settings"]["labels"] == ["0", "1"]


class TestModel:
    def test_hugging_face_folder_and_flags_over_it(self, call, root, workplace, tmp_path, exported):
        """Its vocabulary and its configuration are read, and its weights; `--hparam` wins."""
        golden, folder = root / "tests" / "data" / "bert_tiny", tmp_path / "bert"
        shutil.copytree(golden, folder)
        shutil.copy(workplace / "vocab.txt", folder)
        result = call(
            "--data_dir", workplace / "data/chnsenticorp", "--warm_start_from", folder, "--max_seqlen", 12,
            "--run_config", json.dumps({"model_dir": str(tmp_path / "output"), "max_steps": 1}),
            "--hparam", folder / "config.json",  # as it is, with keys of other programs in it
            # Of one step all is warm-up, so its rate is 0 and the weights stay.
            "--hparam", '{"hidden_dropout_prob": 0.0, "warmup_proportion": 1, "batch_size": 8, "mine": 1}',
        )  # fmt: skip
        assert result.code == 0, result.err
        assert "hyper-parameters not used: architectures, bos_token_id, " in result.err
        run = json.loads((tmp_path / "output" / "run.json").read_text("utf-8"))
        assert run["hparams"]["hidden_dropout_prob"] == 0.0 and run["hparams"]["mine"] == 1
        assert exported().metadata["processor"]["settings"]["max_seqlen"] == 12
        saved = load_file(tmp_path / "output/checkpoints/step_00000001/model.safetensors")
        _, state = load_pretrained_state(golden)
        assert re.search(rf"warm start: {len(state)} tensors loaded: [\w., ]+; new: head\.", result.err)
        for name, array in state.items():
            np.testing.assert_array_equal(saved[f"encoder.{name}"], array, err_msg=name)

    def test_num_epochs_and_first_evaluations(self, finetune):
        """96 rows in batches of 40 make 3 steps an epoch; the first evaluation exports whatever its value."""
        config = {"max_steps": None, "eval_steps": 1}
        result = finetune(run_config=config, hparam={"num_epochs": 1, "batch_size": 40})
        assert result.code == 0, result.err
        assert re.findall(r"\[dev evaluation\] .* step: (\d+)", result.err) == ["1", "2", "3"]
        assert "exported the best model so far, of step 1," in result.err


BAD = {
    "near miss of a hyper-parameter": ({"hparam": {"learning_rat": 1e-3}}, 2, "'learning_rate'"),
    "near miss of a model's key": ({"hparam": {"hiden_size": 16}}, 2, "'hidden_size'"),
    "near miss in run_config": ({"run_config": {"eval_step": 1}}, 2, "Did you mean 'eval_steps'"),
    "wrong type": ({"hparam": {"learning_rate": "5e-5"}}, 2, "learning_rate must be a number, got '5e-5'"),
    "no such schedule": ({"hparam": {"lr_schedule": "line"}}, 2, "Did you mean 'linear'"),
    "fp16": ({"hparam": {"use_fp16": 1}}, 2, "precision fp16 needs a GPU"),
    "no batch": ({"hparam": {"batch_size": 0}}, 2, "batch_size must be a whole number of at least 1"),
    "no length": ({"run_config": {"max_steps": None}}, 2, "Set max_steps in --run_config, or num_epochs"),
    "wrong epochs": (
        {"run_config": {"max_steps": None}, "hparam": {"num_epochs": "3"}},
        2,
        "num_epochs must be a number above 0, got '3'",
    ),
    "wrong num_label": ({"hparam": {"num_label": 3}}, 2, "num_label is 3, but there are 2 labels: 0, 1"),
    "small model": ({"hparam": {"vocab_size": 9}}, 2, "entries, the model only 9"),
    "other padding": ({"hparam": {"pad_token_id": 3}}, 2, "pads with id 0, the model with pad_token_id 3"),
    "long": ({"flags": ("--max_seqlen", 33)}, 2, "--max_seqlen 33 is beyond the 32 positions"),
    "short": ({"flags": ("--max_seqlen", 2)}, 2, "max_seqlen 2 leaves no room"),
    "no data": ({"flags": ("--data_dir", "nowhere")}, 2, "--data_dir nowhere is no folder"),
    "no file": ({"flags": ("--train_set", "nowhere")}, 2, "--train_set nowhere does not exist"),
    "no folder": ({"flags": ("--warm_start_from", "nowhere")}, 1, "nowhere is not a folder"),
    "no vocabulary": ({"flags": ("--vocab_file", "nowhere")}, 2, "Vocabulary nowhere cannot be read"),
    "no such column": ({"flags": ("--columns", "lable,text_a")}, 2, "Did you mean 'label'"),
    "no such flag": ({"flags": ("--epochs", "3")}, 2, "unrecognized arguments: --epochs 3"),
    "neither JSON nor literal": ({"flags": ("--hparam", "{batch_size: 3}")}, 2, "is neither JSON"),
}

TRAIN = b"label\ttext_a\n1\t\xe5\xa5\xbd\n0\t\xe5\xb7\xae\n"
BAD_FILES = {
    "unknown label": ({"dev.tsv": TRAIN + b"2\tx\n"}, 1, "/dev.tsv:4: unknown label '2'; known are '0', '1'"),
    "malformed line": ({"train.tsv": TRAIN + b"1\n"}, 1, "/train.tsv:4: found 1 tab-separated cell"),
    "not UTF-8": ({"train.tsv": TRAIN + b"1\t\xff\n"}, 1, "/train.tsv:4: byte 3 of the line is not UTF-8"),
    "empty": ({"train.tsv": b""}, 1, "/train.tsv: is empty"),
    "only a header": ({"train.tsv": b"label\ttext_a\n"}, 1, "/train.tsv: is empty after 1 header line"),
    "no part": ({"train.tsv": None, "train/.hidden": b""}, 1, "/train: the folder holds no file"),
    "two of one name": ({"train.tsv.gz": b""}, 2, "holds train.tsv and train.tsv.gz"),
    "dev without labels": ({"dev.tsv": b"text_a\nx\n"}, 1, "/dev.tsv:1: the header has no column 'label'"),
    "one label": ({"train.tsv": b"label\ttext_a\n1\tx\n"}, 2, "needs at least two labels, got ['1']"),
    "map of nothing": ({"label_map.json": b"{"}, 2, "label_map.json cannot be read as JSON"),
    "map with a gap": ({"label_map.json": b'{"0": 0, "1": 2}'}, 2, "from 0 without gaps, got {'0': 0, "),
    "list": ({"label_map.json": b'["0", "1"]'}, 2, "must be an object"),
    "map of others": ({"label_map.json": b'{"a": 0, "b": 1}'}, 1, "/train.tsv:2: unknown label '1'; known"),
}


class TestBadInput:
    @pytest.mark.parametrize(("given", "code", "message"), BAD.values(), ids=BAD)
    def test_settings(self, finetune, tmp_path, given, code, message):
        changes = dict(given)
        result = finetune(*changes.pop("flags", ()), **changes)
        assert result.code == code, result.err
        (error,) = result.errors
        assert message in error
        assert not (tmp_path / "output" / "checkpoints").exists()

    @pytest.mark.parametrize(("files", "code", "message"), BAD_FILES.values(), ids=BAD_FILES)
    def test_files(self, finetune, tmp_path, files, code, message):
        for name, content in {"train.tsv": TRAIN, "dev.tsv": TRAIN, **files}.items():
            if content is not None:
                (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "data" / name).write_bytes(content)
        result = finetune("--data_dir", tmp_path / "data")
        assert result.code == code, result.err
        (error,) = result.errors
        assert message in error

    def test_predictions_that_cannot_be_written_lose_no_training(self, finetune, tmp_path, exported):
        result = finetune("--dev_predictions", tmp_path)
        assert result.code == 1
        assert result.errors == [f"error: {tmp_path}: cannot be written: Is a directory"]
        assert exported().metrics["dev"]["n"] == 24

    def test_without_a_traceback(self, shell, tmp_path):
        """One of them in a process of its own, before Paddle is loaded."""
        result = shell("$PYTHON $EXAMPLE --data_dir nowhere --hparam '{\"learning_rat\": 1}'", cwd=tmp_path)
        assert result.code == 2
        assert result.err == "error: Unknown hyper-parameter 'learning_rat'. Did you mean 'learning_rate'?\n"


def test_help_needs_no_paddle(environment, tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", environment["EXAMPLE"], "--help"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    for flag in ("--data_dir", "--run_config", "--hparam", "--do_predict", "--dev_predictions"):
        assert flag in done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "propeller" in imported and not imported & {"paddle", "matplotlib", "scipy", "torch"}

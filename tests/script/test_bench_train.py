"""The benchmark of training: a real round of our own, beside stand-ins for the peers."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "friendly", "place", "never", "again"]

# Stands in for a peer's interpreter: trains 4 examples in 10,000 s, which no machine fails to beat.
PEER = f"""#!{sys.executable}
import json, sys
job, out = (sys.argv[sys.argv.index(flag) + 1] for flag in ("--job", "--out"))
job = json.load(open(job))
assert len(job["examples"]) == job["num_steps"] * job["batch_size"] == 6
json.dump(dict(
    seconds=1e4, examples=4, tokens=12, cells=16, loss=0.5, num_parameters={{parameters}},
    peak_bytes=1 << 20, versions={{{{"peer": "1"}}}},
), open(out, "w"))
"""


@pytest.fixture
def bench(root: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the benchmark on a tiny model and six sentences of two lengths."""
    init, data = tmp_path / "peer/init", tmp_path / "data/SST-2"
    shutil.copytree(root / "tests/data/bert_tiny", init)
    (init / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    tensors = safetensors.numpy.load_file(init / "model.safetensors")
    hidden = len(tensors["pooler.dense.bias"])
    head = {
        "classifier.weight": np.zeros((2, hidden), np.float32),
        "classifier.bias": np.zeros(2, np.float32),
    }
    safetensors.numpy.save_file({**tensors, **head}, init / "model.safetensors", {"format": "pt"})
    (tmp_path / "peer/batches.json").write_text("[[5, 0], [1, 2], [3, 4]]")
    data.mkdir(parents=True)
    rows = ["a friendly place\t1", "never\t0"] * 3
    (data / "train.tsv.gz").write_bytes(gzip.compress("\n".join(["sentence\tlabel", *rows, ""]).encode()))

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, root / "script/bench/train.py", "--data", data.parent, "--peer", init.parent,
             "--rounds", "2", "--steps", "2", "--uncounted-steps", "1", "--batch-size", "2", "--ranks", "1",
             *flags],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    return run


def peer(folder: Path, text: str) -> str:
    """Writes an interpreter."""
    path = folder / "python"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def table(output: str) -> dict[str, list[str]]:
    """The cells of each row but the heading by the first."""
    rows = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in rows[1:]}


def num_parameters(tmp_path: Path) -> int:
    """Of the tiny model with its head."""
    tensors = safetensors.numpy.load_file(tmp_path / "peer/init/model.safetensors")
    return sum(tensor.size for tensor in tensors.values())


def test_beside_the_baseline(bench, tmp_path):
    python = peer(tmp_path, PEER.format(parameters=num_parameters(tmp_path)))
    done = bench("--transformers-python", python)
    assert (done.returncode, done.stderr) == (0, "")
    assert "left out: PaddleNLP" in done.stdout and "left out: Transformers" not in done.stdout
    rows = table(done.stdout)
    assert list(rows) == ["propeller", "propeller, own batches", "Transformers fp32", "Transformers bf16"]
    speed, to_speed, tokens, padding, _, to_memory, loss = rows["Transformers fp32"]
    assert (speed, to_speed, tokens, padding, to_memory, loss) == (
        "0.0 (0.0 to 0.0)", "1.00", "0", "25.0%", "1.00", "0.5000"
    )  # fmt: skip
    _, to_speed, _, padding, memory, to_memory, loss = rows["propeller"]
    assert padding == "20.0%", "steps 2 and 3 of each round have sentences of 3 and of 5 tokens"
    assert float(to_speed) > 100
    assert float(to_memory) == pytest.approx(float(memory.removesuffix(" MB")), abs=1)
    assert float(loss) == pytest.approx(np.log(2), abs=0.1)


def test_another_model_is_said(bench, tmp_path):
    python = peer(tmp_path, PEER.format(parameters=7))
    done = bench("--transformers-python", python, "--rounds", "1", "--only", "own batches")
    assert done.returncode == 1
    assert f"not the same model: [7, {num_parameters(tmp_path)}] parameters" in done.stdout


def test_one_length(bench):
    done = bench("--seq-len", "5")
    assert (done.returncode, done.stderr) == (0, "")
    assert "left out: Transformers" in done.stdout
    (row,) = table(done.stdout).items()
    assert row[0] == "propeller"
    assert row[1][1:4:2] == ["-", "0.0%"], "no baseline, no padding"


def test_a_trainer_that_fails_is_left_out_and_said(bench, tmp_path):
    python = peer(tmp_path, "#!/bin/sh\necho no such luck\nexit 3\n")
    done = bench("--paddlenlp-python", python, "--only", "all cores")
    assert done.returncode == 1
    assert "PaddleNLP, the same, all cores ended with 3:\nno such luck" in done.stderr
    assert "failed and left out: PaddleNLP, the same, all cores" in done.stdout


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--rounds", "0"), "--rounds 0: expected at least 1"),
        (("--uncounted-steps", "0"), "--uncounted-steps 0: expected at least 1"),
        (("--seq-len", "2"), "--seq-len 2: expected 3 to 512"),
        (("--only", "nobody"), "--only 'nobody': expected a part of one of ['propeller', "),
    ],
)
def test_bad_flags(bench, flags, message):
    done = bench(*flags)
    assert done.returncode != 0
    assert message in done.stderr


def test_the_job_is_what_trainers_are_given(root, tmp_path):
    # In a process of its own: scripts are no packages.
    code = f"""
import json, pathlib, sys
sys.path.insert(0, {str(root / "script/bench")!r})
from train_job import Job, Recorder, Report, peak_bytes, read_report, write_report
job = Job("init", [], 2, num_steps=3, num_uncounted_steps=1, seed=0)
recorder = Recorder(job)
for width in (9, 4, 6, 8):
    recorder.batch(2, width, width)
recorder.step_end()
try:
    recorder.report(0.0, 1, {{}})
except RuntimeError as error:
    print(error)
recorder.step_end(), recorder.step_end()
path = pathlib.Path({str(tmp_path)!r})
write_report(recorder.report(0.5, 1, {{}}), path / "report.json")
(path / "report.rank1").write_text("100")
report, both = (read_report(path / "report.json", ranks) for ranks in ([], [path / "report.rank1"]))
print(report.examples, report.tokens, report.cells, both.peak_bytes - report.peak_bytes, report.seconds > 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["1 steps of 4 batches; expected 3", "4 10 20 100 True"]
    assert json.loads((tmp_path / "report.json").read_text())["loss"] == 0.5

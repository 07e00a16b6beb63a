"""`python -m propeller.tools.ckpt_inspector show|dump`, as a user runs it."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from propeller import manifest


@pytest.fixture
def inspect(root):
    """Runs the command; returns exit code, standard output and standard error."""

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "propeller.tools.ckpt_inspector", *map(str, arguments)],
            capture_output=True, text=True, cwd=root, timeout=60,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def checkpoint(tmp_path):
    """A folder as the checkpointer writes it."""
    folder = tmp_path / "step_00000007"
    folder.mkdir()
    weights = np.array([[1.0, -2.0], [3.0, 6.0]], np.float32)
    bad = np.array([0.5, np.nan, np.inf], np.float32)
    save_file({"out.weight": weights, "out.bias": bad, "empty": np.zeros((0, 2), np.float32)},
              folder / "model.safetensors")  # fmt: skip
    save_file({"out.weight|moment1": np.arange(4, dtype=np.int64)}, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps({"run": {"step": 7}, "position": [1, "NaN"]}))
    manifest.write(folder)
    return folder


def write_bf16(path):
    """A safetensors file by hand, since numpy has no bfloat16: 1.0, -2.0, 0.5."""
    data = np.array([0x3F80, 0xC000, 0x3F00], "<u2").tobytes()
    header = json.dumps({"w": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_show_a_checkpoint(inspect, checkpoint):
    code, output, errors = inspect("show", checkpoint)
    assert (code, errors) == (0, "")
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert lines == [
        "model.safetensors",
        "empty F32 [0, 2]",
        "out.bias F32 [3] mean +nan std nan min +nan max +nan NOT FINITE: 2",
        "out.weight F32 [2, 2] mean +2.000e+00 std 2.915e+00 min -2.000e+00 max +6.000e+00",
        "7 values",
        "optimizer.safetensors",
        "out.weight|moment1 I64 [4] mean +1.500e+00 std 1.118e+00 min +0.000e+00 max +3.000e+00",
        "4 values",
        "state.json",
        'run: {"step": 7}',
        'position: [1, "NaN"]',
        "manifest.json: all checksums of 3 files match",
    ]


def test_dump(inspect, checkpoint, tmp_path):
    code, output, _ = inspect("dump", checkpoint, "--name", "out.weight", "--name", "out.weight|moment1")
    assert code == 0
    assert output == "# out.weight [2, 2]\n1 -2\n3 6\n# out.weight|moment1 [4]\n0\n1\n2\n3\n"
    code, output, errors = inspect("dump", checkpoint, "--name", "out.weigth")
    assert (code, output) == (2, "")
    assert errors == "error: No tensor 'out.weigth'. Did you mean 'out.weight'?\n"
    file = tmp_path / "weights.safetensors"
    values = np.array([0.1, np.pi], np.float32)
    save_file({"scalar": np.array(2.5, np.float32), "many": np.stack([values, -values])}, file)
    _, output, _ = inspect("dump", file)
    blocks = dict(block.split("\n", 1) for block in output.split("# ")[1:])
    assert blocks["scalar []"] == "2.5\n"
    again = np.array([row.split() for row in blocks["many [2, 2]"].splitlines()], np.float32)
    np.testing.assert_array_equal(again, [values, -values], "nine digits give every float32 back")


def test_bf16_without_a_manifest(inspect, tmp_path):
    file = tmp_path / "weights.safetensors"
    write_bf16(file)
    code, output, errors = inspect("show", file)
    assert (code, errors) == (0, "")
    assert "w BF16 [3] mean -1.667e-01" in " ".join(output.split())
    assert output.endswith("no manifest: nothing to verify\n")
    assert inspect("dump", file)[1] == "# w [3]\n1\n-2\n0.5\n"


def test_damage_is_named(inspect, checkpoint):
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    code, output, errors = inspect("show", checkpoint)
    assert code == 1 and "all checksums" not in output
    assert errors == f"error: {file} is damaged: its bytes do not match their sha256.\n"
    file.write_bytes(data[:-20])
    code, _, errors = inspect("show", checkpoint)
    assert code == 1
    assert errors == f"error: {file} has {len(data) - 20} bytes where {len(data)} were written.\n"
    (checkpoint / "optimizer.safetensors").unlink()
    code, _, errors = inspect("dump", checkpoint)
    assert code == 1 and str(file) in errors


def test_nothing_to_look_at(inspect, tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        code, output, errors = inspect("show", path)
        assert (code, output) == (1, "")
        assert errors == (
            f"error: {path} is neither a .safetensors file, nor a folder that holds one, nor that of a run "
            "with checkpoints.\n"
        )


@pytest.fixture
def run(tmp_path):
    """A model_dir with three checkpoints and a best of step 20, as a run leaves them."""
    model_dir = tmp_path / "run"
    for step in (10, 20, 100_000_000):
        folder = model_dir / f"checkpoints/step_{step:08d}"
        folder.mkdir(parents=True)
        save_file({"w": np.zeros(step // 10 if step < 100 else 500_000, np.float32)},
                  folder / "model.safetensors")  # fmt: skip
        (folder / "state.json").write_text("{}")
        manifest.write(folder)
    (model_dir / "checkpoints/.step_00000030.abc").mkdir()  # being written
    (model_dir / "checkpoints/notes.txt").write_text("not a checkpoint")
    version = model_dir / "best/.inference/step_00000020"
    version.mkdir(parents=True)
    results = {"dev": {"loss": 0.25, "acc": 0.9, "n": 40, "table": [[1, 0]]}, "test": {"loss": "NaN"}}
    (version / "best.json").write_text(json.dumps({"step": 20, "results": results}))
    (model_dir / "best/inference").symlink_to(".inference/step_00000020")
    return model_dir


def sizes(run):
    return [
        sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        for folder in sorted((run / "checkpoints").glob("step_*"), key=lambda folder: int(folder.name[5:]))
    ]


def test_show_a_run(inspect, run):
    small, second, big = sizes(run)
    expected = (
        f"step_00000010 {small:12,.3f} MB  whole\n"
        f"step_00000020 {second:12,.3f} MB  whole\n"
        f"step_100000000 {big:12,.3f} MB  whole\n"
        "best/inference: step 20; dev: loss 0.250000, acc 0.900000, n 40, table [[1, 0]]; test: loss NaN\n"
    )
    assert big > 2
    for path in (run, run / "checkpoints"):
        assert inspect("show", path) == (0, expected, "")


def test_show_a_damaged_run(inspect, run):
    """Each checkpoint gets its verdict, whatever the others are like."""
    first, second, third = (
        run / f"checkpoints/step_{step}" for step in ("00000010", "00000020", "100000000")
    )
    (first / "manifest.json").unlink()
    data = bytearray((third / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (third / "model.safetensors").write_bytes(data)
    code, output, errors = inspect("show", run)
    assert (code, errors) == (1, "")
    lines = output.splitlines()
    assert f"DAMAGED: {first / 'manifest.json'} cannot be read" in lines[0]
    assert lines[1].endswith("MB  whole")
    assert lines[2].endswith(
        f"DAMAGED: {third / 'model.safetensors'} is damaged: its bytes do not match their sha256."
    )
    assert lines[3].startswith("best/inference: step 20; dev: loss 0.25")
    (second / "state.json").unlink()
    assert f"DAMAGED: {second / 'state.json'} is missing." in inspect("show", run)[1]


def test_a_run_without_a_best(inspect, run):
    file = run / "best/inference/best.json"
    file.write_text('{"step": 20}')
    code, output, errors = inspect("show", run)
    assert code == 1 and output.count("whole") == 3
    assert errors == f"error: {file} cannot be read (KeyError('results')).\n"
    (run / "best/inference").unlink()
    code, output, errors = inspect("show", run)
    assert (code, errors) == (0, "")
    assert output.splitlines()[3] == f"nothing was exported as the best below {run}"


def test_dump_needs_one_checkpoint(inspect, run):
    newest = run / "checkpoints/step_100000000"
    code, output, errors = inspect("dump", run)
    assert (code, output) == (2, "")
    assert errors == f"error: {run} is a whole run; name one of its checkpoints: {newest}.\n"
    assert inspect("dump", run / "checkpoints/step_00000010")[1] == "# w [1]\n0\n"

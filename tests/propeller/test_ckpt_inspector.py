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
        assert errors == f"error: {path} is neither a .safetensors file nor a folder that holds one.\n"

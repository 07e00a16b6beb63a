"""The Predictor: inputs checked, modes, self-test at load with fallback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import propeller.paddle as propeller
from propeller.bundle import read_bundle
from propeller.errors import ConfigError, DataError, ExportError
from propeller.paddle.runtime import paddle
from propeller.paddle.train.exporter import export_bundle
from propeller.types import HParams, RunConfig, RunMode


@pytest.fixture(scope="module")
def model(toy):
    class TwoInputs(toy):
        inputs = (
            propeller.ArraySpec("input_ids", "int64", ("batch", "seq_len"), max_value=49),
            propeller.ArraySpec("weight", "float32", ("batch", "seq_len")),
            propeller.ArraySpec("group", "int64", ("batch", 2)),
        )
        axis_limits = {"seq_len": 12}

        def forward(self, features):
            weighted = self.table(features["input_ids"]) * features["weight"].unsqueeze(-1)
            return {"logits": self.out(self.norm(weighted.sum(1))) + features["group"].astype("float32")}

    paddle.seed(1)
    return TwoInputs(HParams(), RunMode.PREDICT, RunConfig())


def make_arrays(rows, length, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "input_ids": rng.integers(1, 50, (rows, length)),
        "weight": rng.random((rows, length), np.float32),
        "group": rng.integers(0, 3, (rows, 2)),
    }


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle")
    export_bundle(path, model, make_arrays(4, 6), processor=None, metrics={})
    return path


@pytest.fixture(scope="module")
def wide_folder(toy, tmp_path_factory):
    """A bundle whose weights, 16 MB, are one matrix."""

    class Wide(toy):
        inputs = (propeller.ArraySpec("x", "float32", ("batch", 2048)),)

        def __init__(self, hparams, mode, run_config):
            super().__init__(hparams, mode, run_config)
            self.wide = paddle.nn.Linear(2048, 2048)

        def forward(self, features):
            return {"logits": paddle.nn.functional.relu(self.wide(features["x"]))}

    path = tmp_path_factory.mktemp("wide")
    model = Wide(HParams(), RunMode.PREDICT, RunConfig())
    export_bundle(path, model, {"x": np.ones((2, 2048), np.float32)}, processor=None, metrics={})
    return path


@pytest.fixture(scope="module")
def predictor(folder):
    return propeller.Predictor(folder, num_threads=1)


def live(model, arrays):
    tensors = {name: paddle.to_tensor(array) for name, array in arrays.items()}
    return model(tensors)["logits"].numpy()


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (5, 9), (33, 2)])
def test_equals_the_live_model(predictor, model, rows, length):
    assert predictor.mode == "onednn"
    arrays = make_arrays(rows, length, seed=rows)
    outputs = predictor.predict(arrays)
    assert outputs.keys() == {"logits"} and outputs["logits"].dtype == np.float32
    np.testing.assert_allclose(outputs["logits"], live(model, arrays), atol=1e-4)


def test_what_is_cast_and_what_may_be_strange(predictor):
    arrays = make_arrays(3, 4)
    expected = predictor.predict(arrays)["logits"]
    strange = {
        "group": arrays["group"].tolist(),
        "input_ids": arrays["input_ids"].astype(np.float32)[..., None],
        "weight": np.asfortranarray(arrays["weight"].astype(np.float64)),
    }
    np.testing.assert_array_equal(predictor.predict(strange)["logits"], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": None}, "Input 'weight' is missing"),
        ({"input_ids": np.full((3, 4), 50)}, "'input_ids' holds the id 50 in row 0; expected 0 to 49"),
        ({"input_ids": np.full((3, 4), -1)}, "holds the id -1"),
        (
            {"input_ids": np.ones((3, 13), np.int64), "weight": np.ones((3, 13), np.float32)},
            "'input_ids' is too long: axis 'seq_len' has 13; expected at most 12",
        ),
        ({"weight": np.ones((3, 5), np.float32)}, "axis 'seq_len' in 'input_ids' has 4"),
    ],
)
def test_inputs_that_do_not_fit(predictor, changes, message):
    """They are checked by `check_inputs`, with what the bundle says."""
    arrays = {**make_arrays(3, 4), **changes}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    with pytest.raises(DataError, match=message):
        predictor.predict(arrays)
    assert predictor.predict(make_arrays(3, 4))["logits"].shape == (3, 2), "the next one is served"


def test_plain_is_without_onednn(predictor):
    """Paddle has it on by default, so that a fallback that only leaves it alone would be none."""
    enabled = {mode: predictor._config(mode).mkldnn_enabled() for mode in ("onednn", "bf16", "plain")}
    assert enabled == {"onednn": True, "bf16": True, "plain": False}


_NEW_SHAPES = """
import sys
import numpy as np
from propeller.paddle import Predictor

def resident_mb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024

predictor = Predictor(sys.argv[1], num_threads=1, bf16=sys.argv[2] == "bf16")
for rows in (1, 40):
    predictor.predict({"x": np.ones((rows, 2048), np.float32)})
before = resident_mb()
for rows in range(2, 40):
    predictor.predict({"x": np.ones((rows, 2048), np.float32)})
print(resident_mb() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory in use from /proc")
@pytest.mark.parametrize(
    ("mode", "copies"),
    [("fp32", 4), pytest.param("bf16", 16, id="bf16, which keeps a few")],
)
def test_a_new_shape_costs_no_copy_of_the_weights(wide_folder, mode, copies):
    """38 shapes of a model of 16 MB: with a copy for each it would be 600 MB, in bf16 half of that."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _NEW_SHAPES, str(wide_folder), mode],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.split()[-1]) < 16 * copies


def test_bf16_is_close(folder, model):
    """bf16 where the CPU has it; where it has not, Paddle computes the same in fp32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        predictor = propeller.Predictor(folder, bf16=True)
    assert predictor.mode in ("bf16", "onednn")
    arrays = make_arrays(8, 5)
    expected = live(model, arrays)
    np.testing.assert_allclose(
        predictor.predict(arrays)["logits"], expected, atol=0.05 * np.abs(expected).max()
    )


@pytest.fixture
def failing_modes(monkeypatch):
    """Makes loading fail in some modes, as some models do under oneDNN."""

    def install(**failures):
        load = propeller.Predictor._load

        def fail(self, mode):
            if mode in failures:
                raise failures[mode]
            load(self, mode)

        monkeypatch.setattr(propeller.Predictor, "_load", fail)

    return install


def test_falls_back_with_a_warning(folder, model, failing_modes):
    failing_modes(onednn=RuntimeError("first line\nno kernel for it"), bf16=ExportError("differs by 7"))
    with pytest.warns(RuntimeWarning, match="runs as plain, since .*: onednn: no kernel for it") as caught:
        predictor = propeller.Predictor(folder)
    assert caught[0].filename == __file__, "it points at who made the predictor"
    assert predictor.mode == "plain"
    arrays = make_arrays(3, 4)
    np.testing.assert_allclose(predictor.predict(arrays)["logits"], live(model, arrays), atol=1e-4)
    with pytest.warns(RuntimeWarning, match="bf16: differs by 7; onednn: no kernel for it"):
        assert propeller.Predictor(folder, bf16=True).mode == "plain"


def test_nothing_works(folder, failing_modes):
    failing_modes(onednn=RuntimeError(""), plain=OSError("no such file"))
    with pytest.raises(ExportError, match="cannot be run: onednn: .*; plain: no such file"):
        propeller.Predictor(folder)


def test_a_probe_of_another_model_is_refused(folder, tmp_path, model):
    """Its files are whole, but it does not give what was exported."""
    other = tmp_path / "other"
    export_bundle(other, model, make_arrays(4, 6), processor=None, metrics={})
    bundle = read_bundle(other)
    inputs, outputs = bundle.probe()
    for wrong, message in ((outputs["logits"] + 0.01, "differs .* by 0.01"), (outputs["logits"][:3], "was")):
        np.savez(
            other / "probe.npz",
            **{f"input.{name}": array for name, array in inputs.items()},
            **{"output.logits": wrong},
        )
        with pytest.raises(ExportError, match=f"cannot be run: onednn: output logits .*{message}"):
            propeller.Predictor(bundle)


def test_a_damaged_bundle_is_named(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = copy / "model.pdiparams"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ExportError, match=r"model\.pdiparams is damaged"):
        propeller.Predictor(copy)
    with pytest.raises(ExportError, match="is no bundle"):
        propeller.Predictor(tmp_path)


def test_devices(folder, caplog):
    with caplog.at_level("INFO", logger="propeller"):
        assert propeller.Predictor(folder, device="xpu:0").mode == "onednn"
    assert "does not run on xpu:0: predicting on the CPU" in caplog.text
    with pytest.raises(ConfigError, match="bf16 is for the CPU"):
        propeller.Predictor(folder, device="gpu", bf16=True)


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="this Paddle has GPU support")
@pytest.mark.parametrize("device", ["gpu", "gpu:0", "gpu:x"])
def test_a_gpu_never_becomes_the_cpu(folder, device):
    with pytest.raises(ConfigError, match=f"device is '{device}', but this Paddle .* has no GPU support"):
        propeller.Predictor(folder, device=device)


@pytest.mark.parametrize(("device", "cards"), [("gpu:2", 2), ("gpu:x", 1), ("gpu", 0)])
def test_a_card_that_is_not_there(folder, monkeypatch, device, cards):
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: cards)
    with pytest.raises(ConfigError, match=f"device is '{device}', but Paddle sees {cards} cards here"):
        propeller.Predictor(folder, device=device)

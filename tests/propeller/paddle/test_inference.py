"""The Predictor: inputs checked, modes, self-test at load with fallback."""

from __future__ import annotations

import shutil
import warnings

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
            propeller.ArraySpec("input_ids", "int64", ("batch", "seq_len")),
            propeller.ArraySpec("weight", "float32", ("batch", "seq_len")),
            propeller.ArraySpec("group", "int64", ("batch", 2)),
        )

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


def test_what_is_cast_and_what_may_be_strange(predictor, model):
    arrays = make_arrays(3, 4)
    expected = predictor.predict(arrays)["logits"]
    strange = {
        "input_ids": arrays["input_ids"].astype(np.int32),
        "weight": np.asfortranarray(arrays["weight"].astype(np.float64)),
        "group": arrays["group"].tolist(),
        "label": np.zeros(3),
    }
    np.testing.assert_array_equal(predictor.predict(strange)["logits"], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": None}, r"Input 'weight' is missing; got \['group', 'input_ids'\]"),
        ({"input_ids": np.ones(3, np.int64)}, r"'input_ids' must have the axes .* got the shape \(3,\)"),
        ({"input_ids": np.ones((3, 4, 1), np.int64)}, r"got the shape \(3, 4, 1\)"),
        ({"input_ids": np.ones((3, 4))}, "'input_ids' must be int64, got float64"),
        ({"input_ids": np.full((3, 4), "x")}, "'input_ids' must be int64, got <U1"),
        ({"weight": np.ones((3, 4), complex)}, "'weight' must be float32, got complex128"),
        (
            {"weight": np.ones((2, 4), np.float32)},
            r"'weight' has the shape \(2, 4\) .* 'batch' in 'input_ids' has 3",
        ),
        ({"weight": np.ones((3, 5), np.float32)}, "axis 'seq_len' in 'input_ids' has 4"),
        ({"group": np.ones((3, 3), np.int64)}, "axis 2 is fixed at 2"),
    ],
)
def test_inputs_that_do_not_fit(predictor, changes, message):
    arrays = {**make_arrays(3, 4), **changes}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    with pytest.raises(DataError, match=message):
        predictor.predict(arrays)
    assert predictor.predict(make_arrays(3, 4))["logits"].shape == (3, 2), "the next one is served"


def test_no_rows(predictor):
    with pytest.raises(DataError, match="The batch has no rows"):
        predictor.predict(make_arrays(0, 4))


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

"""What is best, that it survives a restart, and that exporting changes nothing."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import propeller.paddle as propeller
from propeller.bundle import read_bundle
from propeller.errors import ConfigError, ExportError
from propeller.paddle import inference
from propeller.paddle.runtime import paddle
from propeller.types import HParams, RunConfig, RunMode, RunState


@pytest.fixture
def model(toy):
    return toy(HParams(), RunMode.TRAIN, RunConfig())


@pytest.fixture
def columns(dev_data):
    return next(iter(dev_data))


@pytest.fixture
def offer(model, tmp_path, columns):
    """Gives an exporter one evaluation after the other; returns the steps that were exported."""

    def run(exporter, evaluations, *, first_step=1):
        exporter.begin(RunState(step=first_step - 1))
        exported = []
        for step, results in enumerate(evaluations, start=first_step):
            sets = results if isinstance(results, dict) else {"dev": {"acc": results, "loss": results}}
            exporter.export(model, RunState(step=step), sets, columns)
            best = json.loads((exporter.link / "best.json").read_text("utf-8"))
            if best["step"] == step:
                exported.append(step)
        return exported

    return run


@pytest.mark.parametrize(
    ("options", "values", "exported"),
    [
        ({"metric": "acc"}, [0.0, 0.0, 0.5, 0.4, 0.5, 0.6], [1, 3, 6]),
        ({"metric": "loss"}, [9.0, 9.0, 0.5, 0.6, 0.5, 0.4], [1, 3, 6]),
        ({"metric": "acc", "greater_is_better": False}, [0.5, 0.6, 0.4], [1, 3]),
        ({"metric": "loss", "greater_is_better": True}, [0.5, 0.4, 0.6], [1, 3]),
        ({"metric": "acc"}, [math.nan, 0.1, math.nan, 0.2], [1, 2, 4]),
        ({"metric": "loss"}, [math.inf, 5.0, math.nan], [1, 2]),
        ({"metric": "acc"}, [-1.0, -2.0], [1]),
        ({"cmp_fn": lambda old, new: new["dev"]["acc"] >= old["dev"]["acc"]}, [0.5, 0.5, 0.4], [1, 2]),
    ],
)
def test_what_is_better(tmp_path, offer, options, values, exported):
    assert offer(propeller.BestExporter(tmp_path, **options), values) == exported
    # The same with a restart between any two evaluations.
    for restart in range(1, len(values)):
        folder = tmp_path / f"restart_{restart}"
        before = offer(propeller.BestExporter(folder, **options), values[:restart])
        after = offer(propeller.BestExporter(folder, **options), values[restart:], first_step=restart + 1)
        assert before + after == exported, f"after a restart behind {restart}"


def test_cmp_fn_gets_old_and_new_numbers_also_after_a_restart(tmp_path, offer):
    seen = []

    def compare(old, new):
        seen.append((old["dev"]["acc"], new["dev"]["acc"], old["dev"]["loss"]))
        return False

    results = [{"dev": {"acc": 0.5, "loss": math.nan}}, {"dev": {"acc": 0.6, "loss": 1.0}}]
    offer(propeller.BestExporter(tmp_path, compare), results)
    offer(propeller.BestExporter(tmp_path, compare), results[1:], first_step=2)
    assert [(old, new) for old, new, _ in seen] == [(0.5, 0.6), (0.5, 0.6)]
    assert all(isinstance(loss, float) and math.isnan(loss) for _, _, loss in seen)


def test_the_evaluation_set_can_be_named(tmp_path, offer):
    sets = [
        {"dev": {"acc": dev}, "test": {"acc": test}} for dev, test in [(0.5, 0.5), (0.6, 0.4), (0.4, 0.6)]
    ]
    assert offer(propeller.BestExporter(tmp_path / "a", metric="acc"), sets) == [1, 2]
    assert offer(propeller.BestExporter(tmp_path / "b", metric="acc", dataset="test"), sets) == [1, 3]


def test_a_run_that_starts_anew_forgets_the_best(tmp_path, offer):
    for _ in range(3):
        assert offer(propeller.BestExporter(tmp_path, metric="acc"), [0.9, 0.1]) == [1]
        assert offer(propeller.BestExporter(tmp_path, metric="acc"), [0.5, 0.6]) == [1, 2]
    versions = [path.name for path in (tmp_path / ".weights").iterdir()]
    assert len(versions) == 2, "the version before stays for those who are reading it, no more"


def test_a_place_that_cannot_be_written_and_one_that_was_copied(tmp_path, offer):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"Could not export to .*file/weights: .*Not a directory"):
        offer(propeller.BestExporter(tmp_path / "file", metric="acc"), [0.5])
    copied = tmp_path / "copied/weights"  # as `cp -rL` leaves it
    copied.mkdir(parents=True)
    (copied / "model.safetensors").write_text("old")
    offer(propeller.BestExporter(tmp_path / "copied", metric="acc"), [0.5])
    assert copied.is_symlink() and (copied / "best.json").exists()
    assert (tmp_path / "copied/.weights/copied/model.safetensors").read_text() == "old"


def test_a_wrong_name_shows_at_the_first_evaluation(tmp_path, offer):
    for exporter, message in (
        (propeller.BestExporter(tmp_path, metric="ac"), "No metric 'ac' .* Did you mean 'acc'"),
        (propeller.BestExporter(tmp_path, metric="acc", dataset="tset"), "No evaluation set 'tset'"),
    ):
        with pytest.raises(ConfigError, match=message):
            offer(exporter, [0.5])
    assert not (tmp_path / "weights").exists()
    with pytest.raises(ConfigError, match="either cmp_fn or metric"):
        propeller.BestExporter(tmp_path)
    with pytest.raises(ConfigError, match="either cmp_fn or metric"):
        propeller.BestInferenceModelExporter(tmp_path, lambda old, new: True, metric="acc")


def test_the_best_weights_are_those_of_the_best_step(toy, run_config, train_data, dev_data, tmp_path):
    exporter = propeller.BestExporter(tmp_path / "best", metric="acc")
    config = run_config(eval_steps=5, save_steps=5, max_ckpt=20)
    learner = propeller.train_and_eval(toy, {}, config, train_data, dev_data, exporters=[exporter])
    best = json.loads((tmp_path / "best/weights/best.json").read_text("utf-8"))
    scores = {step: learner.evaluate(dev_data, ckpt=step)["acc"] for step in range(5, 65, 5)}
    assert best["results"]["eval"]["acc"] == max(scores.values())
    assert best["step"] == min(step for step, score in scores.items() if score == max(scores.values()))
    weights = safetensors.numpy.load_file(tmp_path / "best/weights/model.safetensors")
    learner.evaluate(dev_data, ckpt=best["step"])
    for name, tensor in learner.model.state_dict().items():
        np.testing.assert_array_equal(weights[name], tensor.numpy())


def test_exporting_leaves_training_as_it_is(
    toy, run_config, train_data, dev_data, tmp_path, weights_of, assert_same_bits, metrics_of
):
    weights, losses = [], []
    for name, exporters in (
        ("without", []),
        ("with", [propeller.BestInferenceModelExporter(tmp_path / "best", lambda old, new: True)]),
    ):
        config = run_config(name, max_steps=12, eval_steps=3, log_steps=1)
        learner = propeller.train_and_eval(
            toy, {"dropout": 0.3}, config, train_data, dev_data, exporters=exporters
        )
        assert learner.model.mode is RunMode.TRAIN and learner.model.dropout.training
        weights.append(weights_of(learner.model))
        losses.append([line["loss"] for line in metrics_of(config)])
    assert_same_bits(*weights)
    assert losses[0] == losses[1]
    assert read_bundle(tmp_path / "best/inference").folder.name == "step_00000012"


@pytest.fixture
def exporter(tmp_path):
    return propeller.BestInferenceModelExporter(tmp_path / "best", metric="acc")


def live(model, ids):
    before, model.mode = model.mode, RunMode.PREDICT
    outputs = {name: tensor.numpy() for name, tensor in model({"input_ids": paddle.to_tensor(ids)}).items()}
    model.mode = before
    return outputs


def test_bundle_and_live_model_agree_on_any_shape(toy, exporter, offer, examples, tmp_path):
    offer(exporter, [{"dev": {"acc": 0.5, "auc": math.nan}}])
    bundle = read_bundle(tmp_path / "best/inference")
    assert bundle.outputs == (propeller.ArraySpec("logits", "float32", ("batch", 2)),)
    assert bundle.metrics == {"dev": {"acc": 0.5, "auc": "NaN"}}
    assert bundle.metadata["versions"]["paddle"] == paddle.__version__
    inputs, outputs = bundle.probe()
    assert inputs["input_ids"].shape[0] == 8, "the probe is the head of the real batch"
    np.testing.assert_allclose(
        propeller.Predictor(bundle).predict(inputs)["logits"], outputs["logits"], atol=1e-4
    )


def test_other_shapes_and_several_outputs(toy, columns, tmp_path):
    """An output that depends on another one must not overwrite it; any order, flags and infinities."""

    class Several(toy):
        def forward(self, features):
            logits = super().forward(features)["logits"]
            sequence = self.table(features["input_ids"]).sum(-1)
            return {
                "zebra": logits,
                "masked": paddle.where(logits > 0, logits, logits - math.inf),
                "flags": logits[:, 0] > 0,
                "alpha": sequence,
                **{f"more_{number}": logits * number for number in range(10)},
            }

        def loss(self, predictions, labels):
            return super().loss({"logits": predictions["zebra"]}, labels)

    model = Several(HParams(dropout=0.5), RunMode.TRAIN, RunConfig())
    exporter = propeller.BestInferenceModelExporter(tmp_path, metric="acc")
    exporter.begin(RunState())
    exporter.export(model, RunState(step=1), {"dev": {"acc": 0.5}}, columns)
    predictor = propeller.Predictor(tmp_path / "inference")
    rng = np.random.default_rng(3)
    for shape in ((1, 1), (3, 40), (17, 5)):
        ids = rng.integers(0, 50, shape)
        found, expected = predictor.predict({"input_ids": ids}), live(model, ids)
        assert list(found) == list(expected)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, atol=1e-4, err_msg=f"{name} {shape}")
    axes = {spec.name: (spec.dtype, spec.axes) for spec in predictor.bundle.outputs}
    assert axes["alpha"] == ("float32", ("batch", "seq_len"))
    assert axes["flags"] == ("bool", ("batch",))
    assert axes["zebra"] == ("float32", ("batch", 2))
    assert model.mode is RunMode.TRAIN


def test_an_export_that_differs_keeps_the_old_bundle(toy, exporter, columns, tmp_path):
    """A branch on the batch is taken once when the graph is made: the bundle is another model."""

    class Fickle(toy):
        calls = 0

        def forward(self, features):
            self.calls += 1
            predictions = super().forward(features)
            return {"logits": predictions["logits"] + (0.0 if self.calls < 3 else 1e-3 * self.calls)}

    model = Fickle(HParams(), RunMode.TRAIN, RunConfig())
    exporter.begin(RunState())
    exporter.export(model, RunState(step=1), {"dev": {"acc": 0.5}}, columns)
    good = read_bundle(tmp_path / "best/inference")
    with pytest.raises(ExportError, match=r"cannot be run: onednn: output logits differs .* by 0\.001"):
        exporter.export(model, RunState(step=2), {"dev": {"acc": 0.6}}, columns)
    assert read_bundle(tmp_path / "best/inference") == good
    assert [path.name for path in good.folder.parent.iterdir()] == ["step_00000001"]
    assert model.mode is RunMode.TRAIN
    again = propeller.BestInferenceModelExporter(tmp_path / "best", metric="acc")
    again.begin(RunState(step=2))
    again.export(model, RunState(step=3), {"dev": {"acc": 0.5}}, columns)
    assert read_bundle(tmp_path / "best/inference") == good, "the failed one is not what is best"


def test_the_tolerance_is_one_in_ten_thousand(toy, exporter, columns, monkeypatch):
    predict = inference.Predictor.predict

    def shifted(self, arrays, shift):
        return {name: array + np.float32(shift) for name, array in predict(self, arrays).items()}

    model = toy(HParams(), RunMode.TRAIN, RunConfig())
    model.out.weight.set_value(model.out.weight * 0.01)  # outputs below 1; larger ones have more room
    exporter.begin(RunState())
    monkeypatch.setattr(inference.Predictor, "predict", lambda self, arrays: shifted(self, arrays, 5e-5))
    exporter.export(model, RunState(step=1), {"dev": {"acc": 0.5}}, columns)
    monkeypatch.setattr(inference.Predictor, "predict", lambda self, arrays: shifted(self, arrays, 3e-4))
    with pytest.raises(ExportError, match=r"by 0\.0003 on the probe batch"):
        exporter.export(model, RunState(step=2), {"dev": {"acc": 0.6}}, columns)
    monkeypatch.setattr(inference.Predictor, "predict", lambda self, arrays: shifted(self, arrays, math.nan))
    with pytest.raises(ExportError, match="by nan on the probe batch"):
        exporter.export(model, RunState(step=2), {"dev": {"acc": 0.6}}, columns)


def test_a_model_that_declares_no_inputs(toy, exporter, columns):
    class Plain(toy):
        inputs = None

    exporter.begin(RunState())
    with pytest.raises(ExportError, match="Plain cannot be exported: .* Declare inputs ="):
        exporter.export(
            Plain(HParams(), RunMode.TRAIN, RunConfig()), RunState(1), {"dev": {"acc": 1.0}}, columns
        )
    assert not exporter.link.exists()


def test_a_model_that_cannot_be_traced(toy, exporter, columns):
    class Unused(toy):
        inputs = (*toy.inputs, propeller.ArraySpec("label", "int64", ("batch",)))

    class Eager(toy):
        def forward(self, features):
            if not paddle.in_dynamic_mode():
                raise KeyError("only for living models")
            return super().forward(features)

    exporter.begin(RunState())
    for cls, message in (
        (Unused, "must use every declared input: input_ids, label"),
        (Eager, "only for living"),
    ):
        model = cls(HParams(), RunMode.TRAIN, RunConfig())
        with pytest.raises(ExportError, match=rf"(?s){cls.__name__} cannot be exported: .*{message}"):
            exporter.export(model, RunState(step=1), {"dev": {"acc": 1.0}}, columns)
        assert model.mode is RunMode.TRAIN
    assert list(exporter.folder.rglob("*")) == [exporter.folder / ".inference"]


def test_a_home_that_cannot_be_written(offer, exporter, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file/home"))
    assert offer(exporter, [0.5]) == [1]
    assert os.environ["HOME"] == str(tmp_path / "file/home")


def test_what_the_disk_says_is_not_put_down_to_the_model(offer, exporter, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(paddle.jit, "save", full)
    with pytest.raises(ExportError, match="No space left on device") as raised:
        offer(exporter, [0.5])
    assert "forward" not in str(raised.value)


def test_the_processor_travels_with_the_bundle(model, columns, tmp_path):
    class Words:
        name = "words"

        def save(self, folder):
            (folder / "vocab.txt").write_text("a\nb\n")
            return {"max_seqlen": 7}

    exporter = propeller.BestInferenceModelExporter(tmp_path, metric="acc", processor=Words())
    exporter.begin(RunState())
    exporter.export(model, RunState(step=1), {"dev": {"acc": 0.5}}, columns)
    bundle = read_bundle(tmp_path / "inference")
    assert bundle.metadata["processor"] == {"name": "words", "settings": {"max_seqlen": 7}}
    assert (bundle.folder / "vocab.txt").read_text() == "a\nb\n"
    assert Path(tmp_path / "inference").is_symlink()


def test_export_of_a_run_survives_its_restart(toy, run_config, train_data, dev_data, tmp_path):
    """The best of the first session is not replaced by something worse of the second."""
    first = run_config(run_steps=40, eval_steps=20)
    exporters = [propeller.BestExporter(tmp_path / "best", metric="loss")]
    propeller.train_and_eval(toy, {}, first, train_data, dev_data, exporters=exporters)
    best = (tmp_path / "best/weights/best.json").read_bytes()
    assert json.loads(best)["step"] == 40
    worse = [propeller.BestExporter(tmp_path / "best", metric="loss")]
    propeller.train_and_eval(toy, {"loss_scale": 100.0}, run_config(), train_data, dev_data, exporters=worse)
    assert (tmp_path / "best/weights/best.json").read_bytes() == best


def test_a_learner_exports_a_checkpoint(toy, train_data, dev_data, run_config, tmp_path):
    learner = propeller.Learner(toy, run_config(max_steps=20))
    learner.train(train_data)
    bundle = learner.export(tmp_path / "bundle", dev_data, ckpt=20)
    batch = next(iter(dev_data))
    outputs = propeller.Predictor(bundle).predict({"input_ids": batch["input_ids"]})
    live = [row["logits"] for row in learner.predict(dev_data)][: len(batch["label"])]
    np.testing.assert_allclose(outputs["logits"], live, atol=1e-4)
    with pytest.raises(ExportError, match="already there"):
        learner.export(tmp_path / "bundle", dev_data)

"""What a run that is taken up again may have changed, what it may not, and a run that begins anew."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import propeller.paddle as propeller
from propeller.data import Dataset
from propeller.errors import CheckpointError, ConfigError, PropellerError

HPARAMS = {"dropout": 0.3}


def contents(config):
    """All that a run has written, but for its lock."""
    return contents_of(Path(config.model_dir))


def contents_of(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.read_bytes() for path in files}


def changes_logged(caplog):
    head = "changed since this run was last started: "
    return [message.removeprefix(head) for message in caplog.messages if message.startswith(head)]


@pytest.fixture
def begun(toy, run_config, train_data):
    """A run of 4 steps out of 8, and its configuration."""
    config = run_config(max_steps=8)
    propeller.Learner(toy, dataclasses.replace(config, run_steps=4), HPARAMS).train(train_data)
    return config


MAY_CHANGE = {
    "max_steps": 10,
    "run_steps": 2,
    "save_steps": 1,
    "eval_steps": 3,
    "eval_max_steps": 1,
    "log_steps": 2,
    "skip_steps": 5,
    "max_ckpt": 7,
    "micro_batches": 4,
    "ema_decay": 0.5,
    "check_numerics": True,
    "profile": True,
}


@pytest.mark.parametrize("name", MAY_CHANGE)
def test_what_may_change_is_said(begun, toy, train_data, dev_data, caplog, name):
    begun = dataclasses.replace(begun, run_steps=4)
    config = dataclasses.replace(begun, **{name: MAY_CHANGE[name]})
    caplog.set_level("WARNING", logger="propeller")
    state = propeller.Learner(toy, config, HPARAMS).train(train_data, eval_datasets={"dev": dev_data})
    assert state.step == (6 if name == "run_steps" else 8)
    assert changes_logged(caplog) == [f"run_config.{name}: {getattr(begun, name)!r} -> {MAY_CHANGE[name]!r}"]
    stored = json.loads((Path(config.model_dir) / "run.json").read_text("utf-8"))
    assert stored["run_config"] == config.to_dict()


def test_hyper_parameters_may_change(begun, toy, train_data, recorder, caplog):
    """A learning rate counts from the first step on, and the schedule is laid out over the new length."""
    hook = recorder()
    config = dataclasses.replace(begun, max_steps=16)
    caplog.set_level("WARNING", logger="propeller")
    learner = propeller.Learner(toy, config, {"learning_rate": 0.1, "dropout": 0.0})
    learner.train(train_data, hooks=[hook])
    rates = [result.learning_rate for result in hook.results]
    np.testing.assert_allclose(rates, [0.1 * (16 - step) / 16 for step in range(4, 16)], rtol=1e-12)
    assert changes_logged(caplog) == [
        "run_config.max_steps: 8 -> 16",
        "run_config.run_steps: 4 -> None",
        "hparams.dropout: 0.3 -> 0.0",
        "hparams.learning_rate: None -> 0.1",
    ]


def test_nothing_is_said_where_nothing_changed(begun, toy, train_data, caplog):
    config = dataclasses.replace(begun, run_steps=4)
    caplog.set_level("WARNING", logger="propeller")
    propeller.Learner(toy, config, HPARAMS).train(train_data)
    assert changes_logged(caplog) == []


def text_data(path, batch_size=16, seed=None, pipeline=lambda data: data):
    def parse(line):
        ids = np.array([int(word) for word in line.split()], np.int64)
        return {"input_ids": ids, "label": int((ids % 2 == 0).mean() > 0.5)}

    data = Dataset.from_file(path).map(parse)
    return pipeline(data).shuffle(64, seed=seed).repeat().padded_batch(batch_size)


@pytest.fixture
def lines(tmp_path, examples):
    """A text file with one example a line."""
    path = tmp_path / "train.txt"
    rows = (" ".join(map(str, row["input_ids"])) for row in examples(64, seed=1))
    path.write_text("".join(f"{row}\n" for row in rows), "utf-8")
    return path


def other_line(path):
    data = path.read_bytes()
    path.write_bytes(data[:-2] + (b"3" if data[-2:-1] != b"3" else b"4") + b"\n")


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        (other_line, {}, r"files\[1\]\.sha256 \w{12}\.\. -> \w{12}\.\."),
        (lambda path: path.write_text("1 2 3\n" * 99), {}, r"files\[1\]\.bytes \d+ -> 594"),
        (None, {"batch_size": 8}, "padded_batch: batch_size 16 -> 8"),
        (None, {"seed": 7}, "shuffle: seed 0 -> 7"),
        (None, {"pipeline": lambda data: data.take(40)}, r"the steps of the pipeline: .* -> .*take"),
    ],
    ids=["a-byte", "lines", "batch-size", "shuffle-seed", "pipeline"],
)
def test_other_data_is_refused(toy, run_config, lines, change, settings, said):
    config = run_config(max_steps=8)
    propeller.Learner(toy, dataclasses.replace(config, run_steps=4)).train(text_data(lines))
    before = contents(config)
    if change is not None:
        change(lines)
    other = dataclasses.replace(config, log_steps=1)
    with pytest.raises(ConfigError) as caught:
        propeller.Learner(toy, other).train(text_data(lines, **settings))
    message = str(caught.value)
    assert message.startswith(f"The run in {config.model_dir} cannot go on from step 4: its training data or")
    assert message.endswith("or begin anew with --restart, which keeps this folder aside.")
    assert re.search(rf"its batches \(.*{said}.*\) changed", message), message
    assert contents(config) == before, "nothing was written, the run's own configuration neither"


def test_data_that_was_moved_is_the_same_data(toy, run_config, lines):
    config = run_config(max_steps=8)
    propeller.Learner(toy, dataclasses.replace(config, run_steps=4)).train(text_data(lines))
    moved = lines.rename(lines.with_name("elsewhere.txt"))
    assert propeller.Learner(toy, config).train(text_data(moved).buffered(3)).step == 8


def test_another_seed_is_refused(begun, toy, train_data):
    """The data would go on at the same place of another order: examples twice, others never."""
    before = contents(begun)
    with pytest.raises(ConfigError, match=r"its training data or its batches \(order: seed 0 -> 5\) changed"):
        propeller.Learner(toy, dataclasses.replace(begun, seed=5), HPARAMS).train(train_data)
    assert contents(begun) == before


def test_another_list_is_refused(begun, toy, train_data, examples):
    other = Dataset.from_list(examples(256, seed=3)).shuffle().repeat().padded_batch(16)
    before = contents(begun)
    with pytest.raises(ConfigError, match=r"its training data or its batches \(list: .*sha256 .*\) changed"):
        propeller.Learner(toy, begun, HPARAMS).train(other)
    assert contents(begun) == before
    assert propeller.Learner(toy, begun, HPARAMS).train(train_data).step == 8, "its own data still does"


@pytest.fixture
def headed(toy):
    """The toy model, with heads: another number of them fits the same weights."""

    class Headed(toy):
        def __init__(self, *args):
            super().__init__(*args)
            self.identity = {"num_heads": self.hparams.get("num_heads", 2), "labels": ("a", "b")}

    return Headed


def test_another_model_is_refused(headed, toy, run_config, train_data, examples):
    config = run_config(max_steps=8)
    propeller.Learner(headed, dataclasses.replace(config, run_steps=4)).train(train_data)
    before = contents(config)
    with pytest.raises(ConfigError, match=r"from step 4: its model \(num_heads: 2 -> 4\) changed\."):
        propeller.Learner(headed, config, {"num_heads": 4}).train(train_data)
    with pytest.raises(ConfigError, match=r"its model \(labels: \['a', 'b'\] -> None\) and its model \(num_"):
        propeller.Learner(toy, config).train(train_data)
    smaller = Dataset.from_list(examples(256, seed=1)).shuffle().repeat().padded_batch(8)
    with pytest.raises(
        ConfigError, match=r"batch_size 16 -> 8\) and its model \(num_heads: 2 -> 4\) changed"
    ):
        propeller.Learner(headed, config, {"num_heads": 4}).train(smaller)
    assert contents(config) == before
    assert propeller.Learner(headed, config).train(train_data).step == 8


def test_weights_of_another_shape_are_refused(begun, toy, train_data):
    before = contents(begun)
    with pytest.raises(CheckpointError, match=r"out\.weight: \[16, 2\] where the model has \[16, 5\]"):
        propeller.Learner(toy, begun, {"num_label": 5}).train(train_data)
    assert contents(begun) == before


def test_begin_anew_and_keep_what_was_there(begun, toy, run_config, train_data, weights_of, assert_same_bits):
    """The old folder is `.1`, the next time `.2`; the new run is that of a new folder."""
    undisturbed = propeller.Learner(toy, run_config("undisturbed", max_steps=8), HPARAMS)
    undisturbed.train(train_data)
    kept = []
    for number in (1, 2):
        before = contents(begun)
        learner = propeller.Learner(toy, begun, HPARAMS)
        assert learner.train(train_data, restart=True).step == 8
        assert_same_bits(weights_of(learner.model), weights_of(undisturbed.model))
        kept.append(Path(f"{begun.model_dir}.{number}"))
        aside = {path.relative_to(kept[-1]): data for path, data in contents_of(kept[-1]).items()}
        assert aside == {path.relative_to(begun.model_dir): data for path, data in before.items()}
    assert sorted(Path(begun.model_dir).parent.glob("run*")) == [Path(begun.model_dir), *kept]
    older = dataclasses.replace(begun, model_dir=str(kept[0]))
    assert propeller.Learner(toy, older, HPARAMS).train(train_data).step == 8, "it can still go on"


def test_begin_anew_over_other_data_or_another_model(begun, toy, examples, caplog):
    """What a resume refuses; and nothing is compared with the run before."""
    other = Dataset.from_list(examples(64, seed=3)).padded_batch(8).repeat()
    caplog.set_level("WARNING", logger="propeller")
    learner = propeller.Learner(toy, begun, {"num_label": 5})
    assert learner.train(other, restart=True).step == 8
    assert changes_logged(caplog) == []


def test_begin_anew_where_nothing_is(toy, run_config, train_data, tmp_path):
    config = run_config(max_steps=2)
    assert propeller.Learner(toy, config).train(train_data, restart=True).step == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_begin_anew_with_a_learner_that_has_learnt(
    toy, run_config, train_data, dev_data, weights_of, assert_same_bits
):
    """Not on from its live weights, whether it trained or loaded them."""
    learner = propeller.Learner(toy, run_config(max_steps=4), HPARAMS)
    learner.train(train_data)
    expected = weights_of(learner.model)
    learner.train(train_data, restart=True)
    assert_same_bits(weights_of(learner.model), expected)
    loaded = propeller.Learner(toy, run_config(max_steps=4), HPARAMS)
    loaded.evaluate(dev_data, ckpt=-1)
    loaded.train(train_data, restart=True)
    assert_same_bits(weights_of(loaded.model), expected)


def test_begin_anew_is_refused_while_another_process_works_there(
    begun, toy, train_data, weights_of, assert_same_bits
):
    learner = propeller.Learner(toy, begun, HPARAMS)
    learner.train(train_data)
    before, weights = contents(begun), weights_of(learner.model)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, begun.model_dir],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(propeller.__file__).parents[2])},
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "holding\n"
        with pytest.raises(PropellerError, match=f"run is in use by process {holder.pid}\\."):
            learner.train(train_data, restart=True)
    finally:
        holder.communicate("\n")
    assert contents(begun) == before
    assert not Path(f"{begun.model_dir}.1").exists()
    assert_same_bits(weights_of(learner.model), weights)
    assert learner.train(train_data, restart=True).step == 8
    assert Path(f"{begun.model_dir}.1").is_dir()


HOLD = """
import sys
from pathlib import Path
from propeller.atomic import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("holding", flush=True)
    sys.stdin.readline()
"""

"""Hooks: signatures, names, stopping, the end of a run; early stopping."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import pkgutil

import pytest

import propeller as package
import propeller.paddle as propeller
from propeller import atomic
from propeller.errors import ConfigError
from propeller.paddle.train.hooks import EarlyStopping, Hook, check_hooks, find_result
from propeller.types import RunState


class Crash(Exception):
    pass


def subclasses(cls):
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def test_every_hook_has_the_signatures_of_the_base():
    for module in pkgutil.walk_packages(package.__path__, "propeller."):
        importlib.import_module(module.name)
    found = list(subclasses(Hook))
    assert {"EarlyStopping", "LoggingHook", "ProgressHook", "SummaryHook", "CurvesHook"} <= {
        cls.__name__ for cls in found
    }
    methods = [name for name, value in vars(Hook).items() if inspect.isfunction(value)]
    assert len(methods) == 8
    for cls in found:
        for name in methods:
            ours, base = (list(inspect.signature(getattr(c, name)).parameters) for c in (cls, Hook))
            assert ours == base, f"{cls.__name__}.{name}{ours} differs from Hook.{name}{base}"
        public = {name for name in vars(cls) if not name.startswith("_") and callable(vars(cls)[name])}
        if cls.__module__.startswith("propeller."):
            assert public <= set(methods), f"{cls.__name__} has methods that nobody calls"


def test_names_must_be_unique(toy, run_config, train_data, recorder):
    check_hooks([recorder("a"), recorder("b")])
    learner = propeller.Learner(toy, run_config())
    for hooks, message in (
        ([recorder("twice"), recorder("twice")], "needs a unique name, got 'twice'"),
        ([recorder("logging")], "got 'logging'; names here: logging, progress, summary, curves, logging"),
        ([Hook()], "needs a unique name, got ''"),
        ([EarlyStopping("acc"), EarlyStopping("acc")], "got 'early_stopping::acc'"),
    ):
        with pytest.raises(ConfigError, match=message):
            learner.train(train_data, hooks=hooks)
    check_hooks([EarlyStopping("acc"), EarlyStopping("loss"), EarlyStopping("acc", dataset="dev")])


@pytest.mark.parametrize("event", ["step_end", "eval_end"])
def test_a_hook_may_ask_to_stop(toy, run_config, train_data, dev_data, recorder, caplog, event):
    asking = recorder("asking", lambda name, state: "enough" if name == event and state.step == 7 else None)
    watching = recorder("watching")
    config = run_config(eval_steps=7)
    with caplog.at_level("INFO", logger="propeller"):
        learner = propeller.train_and_eval(
            toy, {}, config, train_data, dev_data, train_hooks=[asking, watching]
        )
    assert watching.steps_of("step_end")[-1] == 7
    assert watching.steps_of("eval_end") == watching.steps_of("checkpoint_saved") == [7]
    assert "stopped at step 7: enough" in caplog.text
    assert learner.evaluate(dev_data, ckpt=7) == learner.evaluate(dev_data)


def test_train_end_runs_after_a_crash_and_the_crash_is_what_is_seen(
    toy, run_config, train_data, recorder, caplog
):
    def crash(event, state):
        if event == "step_end" and state.step == 3:
            raise Crash("in step 3")

    def fail(event, state):
        if event == "train_end":
            raise OSError("while closing")

    hooks = [recorder("first", crash), recorder("second", fail), recorder("third")]
    config = run_config()
    with pytest.raises(Crash, match="in step 3"):
        propeller.Learner(toy, config).train(train_data, hooks=hooks)
    for hook in hooks:
        event, step, error = hook.events[-1]
        assert (event, step, type(error)) == ("train_end", 3, Crash)
    assert "train_end of the hook second failed: OSError('while closing')" in caplog.text
    assert propeller.Learner(toy, config).train(train_data).step == 60, "the lock is free again"


def test_every_train_end_runs_and_the_first_failure_is_raised(toy, run_config, train_data, recorder):
    def failing(message):
        def act(event, state):
            if event == "train_end":
                raise OSError(message)

        return act

    hooks = [recorder("a", failing("one")), recorder("b", failing("two")), recorder("c")]
    with pytest.raises(OSError, match="one"):
        propeller.Learner(toy, run_config(max_steps=1)).train(train_data, hooks=hooks)
    assert [hook.events[-1] for hook in hooks] == [("train_end", 1, None)] * 3


def test_only_what_began_is_ended(toy, run_config, train_data, recorder):
    def act(event, state):
        if event == "train_begin":
            raise Crash

    hooks = [recorder("a"), recorder("b", act), recorder("c")]
    with pytest.raises(Crash):
        propeller.Learner(toy, run_config()).train(train_data, hooks=hooks)
    assert [[entry[0] for entry in hook.events] for hook in hooks] == [
        ["train_begin", "train_end"],
        ["train_begin"],
        [],
    ]


def test_find_result():
    results = {"dev": {"loss": 1, "acc": 0.5, "table": [[1]]}, "test": {"acc": 0.25}}
    assert find_result(results, "acc", None) == 0.5
    assert find_result(results, "acc", "test") == 0.25
    assert find_result(results, "loss", "dev") == 1.0
    for metric, dataset, message in (
        ("ac", None, r"No metric 'ac' in the evaluation of 'dev'. Did you mean 'acc'. Metrics: \['loss'"),
        ("acc", "tset", r"No evaluation set 'tset'. Did you mean 'test'. Sets: \['dev', 'test'\]"),
        ("table", None, "Metric 'table' is no number to compare by, but list"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_result(results, metric, dataset)


def stops_at(hook, values):
    """The 1-based evaluation at which `hook` asks to stop, None if it does not."""
    for number, value in enumerate(values, start=1):
        if hook.eval_end(RunState(), {"dev": {hook.metric: value}}) is not None:
            return number
    return None


@pytest.mark.parametrize(
    ("metric", "options", "values", "stop"),
    [
        ("acc", {"patience": 2}, [0.5, 0.6, 0.6, 0.59], 4),
        ("acc", {"patience": 2}, [0.5, 0.4, 0.6, 0.5, 0.61, 0.5], None),
        ("loss", {"patience": 2}, [0.5, 0.6, 0.4, 0.4, 0.4], 5),
        ("loss", {"patience": 1}, [0.5, 0.4, 0.3, 0.31], 4),
        ("perplexity", {"patience": 1, "greater_is_better": False}, [5, 4, 3], None),
        ("perplexity", {"patience": 1}, [5, 4, 3], 2),
        ("loss", {"patience": 1, "greater_is_better": True}, [5, 4, 3], 2),
        ("acc", {"patience": 1, "min_delta": 0.1}, [0.5, 0.59], 2),
        ("acc", {"patience": 1, "min_delta": 0.1}, [0.5, 0.61, 0.72], None),
        ("acc", {"patience": 2}, [math.nan, 0.5, 0.6, 0.7], None),
        ("acc", {"patience": 2}, [0.5, math.nan, 0.6, math.nan, math.nan], 5),
        ("acc", {"patience": 3}, [math.nan] * 3, 3),
        ("loss", {"patience": 2}, [math.inf, 3.0, 2.0], None),
    ],
)
def test_early_stopping(metric, options, values, stop):
    assert stops_at(EarlyStopping(metric, **options), values) == stop
    # The same with a restart (through a checkpoint's JSON) between any two evaluations.
    for restart in range(len(values)):
        first, second = EarlyStopping(metric, **options), EarlyStopping(metric, **options)
        stopped = stops_at(first, values[:restart])
        if stopped is None:
            second.load_state_dict(json.loads(atomic.to_json(first.state_dict())))
            later = stops_at(second, values[restart:])
            stopped = None if later is None else later + restart
        assert stopped == stop, f"after a restart behind {restart}"


def test_early_stopping_says_why():
    hook = EarlyStopping("acc", patience=2, dataset="dev")
    reasons = [hook.eval_end(RunState(), {"other": {}, "dev": {"acc": value}}) for value in (0.5, 0.4, 0.5)]
    assert reasons == [None, None, "acc has not improved on 0.500000 for 2 evaluations"]


def test_early_stopping_ends_a_run(toy, run_config, train_data, dev_data, recorder):
    hook = recorder()
    propeller.train_and_eval(
        toy, {"learning_rate": 1e-9}, run_config(eval_steps=2), train_data, dev_data,
        train_hooks=[EarlyStopping("acc", patience=3), hook],
    )  # fmt: skip
    assert hook.steps_of("step_end")[-1] == 8
    again = recorder()
    propeller.train_and_eval(
        toy, {"learning_rate": 1e-9}, run_config(eval_steps=2), train_data, dev_data,
        train_hooks=[EarlyStopping("acc", patience=3), again],
    )  # fmt: skip
    assert again.steps_of("step_end") == []  # it had been stopped, and stays so
    with pytest.raises(ConfigError, match="No metric 'ac' in the evaluation of 'eval'"):
        propeller.train_and_eval(
            toy,
            {},
            run_config("other", eval_steps=2),
            train_data,
            dev_data,
            train_hooks=[EarlyStopping("ac")],
        )
    with pytest.raises(ConfigError, match="patience of at least 1, got 0"):
        EarlyStopping("acc", patience=0)

"""A small model on small data, learnt in a second."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest

import propeller.paddle as propeller
from propeller.data import Dataset
from propeller.metrics import Acc
from propeller.paddle import optimization
from propeller.paddle.runtime import paddle


class Bags(propeller.Model):
    """Classifies a bag of words; the label is whether there are more even than odd ids."""

    inputs = (propeller.ArraySpec("input_ids", "int64", ("batch", "seq_len")),)

    def __init__(self, hparams, mode, run_config):
        super().__init__(hparams, mode, run_config)
        self.table = paddle.nn.Embedding(50, 16, padding_idx=0)
        self.norm = paddle.nn.LayerNorm(16)
        self.dropout = paddle.nn.Dropout(hparams.get("dropout", 0.0))
        self.out = paddle.nn.Linear(16, hparams.get("num_label", 2))

    def forward(self, features):
        return {"logits": self.out(self.dropout(self.norm(self.table(features["input_ids"]).sum(1))))}

    def loss(self, predictions, labels):
        loss = paddle.nn.functional.cross_entropy(predictions["logits"], labels, reduction="sum")
        propeller.summary.scalar("loss_sum", loss)
        return loss * self.hparams.get("loss_scale", 1.0), len(labels)

    def optimizer(self):
        return optimization.adamw(
            self,
            learning_rate=self.hparams.get("learning_rate", 0.01),
            max_steps=self.run_config.max_steps,
            schedule="linear" if self.run_config.max_steps else "constant",
        )

    def metrics(self):
        return {"acc": Acc()}


class Recorder(propeller.Hook):
    """Writes down what it was told; `act(event, state)` may answer or raise."""

    def __init__(self, name="recorder", act=lambda event, state: None):
        self.name = name
        self.act = act
        self.events: list[tuple] = []
        self.results: list[propeller.StepResult] = []

    def _note(self, event, state, *more):
        self.events.append((event, state.step, *more))
        return self.act(event, state)

    def train_begin(self, run_config, state, last_step):
        self._note("train_begin", state, last_step)

    def step_begin(self, state):
        self._note("step_begin", state)

    def step_end(self, state, result):
        self.results.append(result)
        return self._note("step_end", state)

    def eval_end(self, state, results):
        return self._note("eval_end", state)

    def checkpoint_saved(self, state, path):
        self._note("checkpoint_saved", state)

    def train_end(self, state, error):
        self._note("train_end", state, error)

    def steps_of(self, event):
        """The steps at which `event` came."""
        return [entry[1] for entry in self.events if entry[0] == event]


@pytest.fixture(scope="session")
def toy():
    """The model class."""
    return Bags


@pytest.fixture
def recorder():
    """The class of a hook that writes down what it was told."""
    return Recorder


def make_examples(count: int, seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        ids = rng.integers(1, 50, size=rng.integers(3, 12), dtype=np.int64)
        rows.append({"id": f"row {number}", "input_ids": ids, "label": int((ids % 2 == 0).mean() > 0.5)})
    return rows


@pytest.fixture
def examples():
    """`examples(count, seed)` gives rows of the toy task."""
    return make_examples


def make_train_data() -> Dataset:
    return Dataset.from_list(make_examples(256, seed=1)).shuffle().repeat().padded_batch(16)


def make_dev_data() -> Dataset:
    return Dataset.from_list(make_examples(100, seed=2)).padded_batch(32)


@pytest.fixture
def train_data() -> Dataset:
    return make_train_data()


@pytest.fixture
def dev_data() -> Dataset:
    return make_dev_data()


@pytest.fixture
def run_config(tmp_path):
    """Makes a RunConfig in a folder of the test's own; `model_dir` is taken below it."""

    def make(model_dir="run", **changes):
        values = {"max_steps": 60, "eval_steps": 20, "save_steps": 20, "log_steps": 10}
        return propeller.RunConfig(model_dir=str(tmp_path / model_dir), **{**values, **changes})

    return make


# The beginning of a script that trains the toy in a process of its own; `toy` is this file.
CHILD = """
import importlib.util, json, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("toy_of_test", sys.argv[1])
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)
import propeller.paddle as propeller
from propeller import cli
"""


@pytest.fixture
def start_child(tmp_path, root):
    """`start_child(code, config, argument)` runs code that finds the two in `sys.argv[2:]`.

    What else it gets is `Popen`'s, in place of pipes for the standard streams.
    """
    processes = []

    def start(code, config, argument, **options):
        script = tmp_path / "child.py"
        script.write_text(CHILD + code, "utf-8")
        process = subprocess.Popen(
            [sys.executable, script, __file__, json.dumps(config.to_dict()), str(argument)],
            text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)},
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def metrics_of():
    """Reads `metrics.jsonl` of a run, strictly."""

    def read(config, event=None):
        lines = (Path(config.model_dir) / "metrics.jsonl").read_text("utf-8").splitlines()
        parsed = [json.loads(line) for line in lines]
        return [line for line in parsed if event in (None, line["event"])]

    return read


@pytest.fixture
def weights_of():
    """Copies the weights of a layer to numpy."""
    return lambda layer: {name: tensor.numpy().copy() for name, tensor in layer.state_dict().items()}


@pytest.fixture
def assert_same_bits():
    """Compares two dictionaries of arrays bit by bit."""

    def compare(first, second):
        assert first.keys() == second.keys()
        for name, array in first.items():
            np.testing.assert_array_equal(array, second[name], err_msg=name)

    return compare


class Ranks:
    """Processes that do one job together.

    Args:
        context: what forks them.
        main: what each does, `rank_jobs.main`.
        folder: for their logs.
        size: how many.
        job: a function's name, see `rank_jobs`.
        arguments: the function's.
    """

    # How long a rank may be silent; and how long all may take to end, when one has failed or all are done.
    silence_s, end_s = 60, 15

    def __init__(self, context, main, folder, size, job, arguments):
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(size)]
        addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
        for one in sockets:
            one.close()
        folder.mkdir()
        self._logs = [folder / f"log.{rank}" for rank in range(size)]
        self.processes, self._pipes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments_of_main = (rank, addresses, theirs, self._logs[rank], job, arguments)
            process = context.Process(target=main, args=arguments_of_main)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def next(self, rank, wanted):
        """Waits until the rank reports `wanted`; returns what with. Other reports are passed over."""
        while True:
            assert self._pipes[rank].poll(self.silence_s), f"rank {rank} is silent: {self._all_logs()}"
            try:
                event, *more = self._pipes[rank].recv()
            except EOFError:
                raise AssertionError(f"rank {rank} ended before {wanted!r}: {self._all_logs()}") from None
            if event == wanted:
                return more[0]

    def results(self):
        """What the job returned on each rank."""
        found = [self.next(rank, "result") for rank in range(len(self.processes))]
        assert self.codes() == [0] * len(found)
        return found

    def codes(self):
        """Waits for all; their exit codes, None for one that has not ended."""
        for process in self.processes:
            process.join(self.end_s)
        return [process.exitcode for process in self.processes]

    def log(self, rank):
        """What the rank has written on its standard output and error."""
        return self._logs[rank].read_text("utf-8")

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        """Kills those that still live."""
        for process, pipe in zip(self.processes, self._pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()

    def _all_logs(self):
        return "\n".join(f"rank {rank}: {self.log(rank)}" for rank in range(len(self._logs)))


@pytest.fixture(scope="session")
def fork_ranks():
    """`with fork_ranks(folder, size, job, **arguments) as ranks:` starts ranks.

    They are forked from a process that has loaded Paddle, which takes seconds, and done nothing else.
    """
    here = Path(__file__).parent
    path = [str(here), str(here.parents[2]), os.environ.get("PYTHONPATH", "")]
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(here))
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in list(os.environ):
            if name.startswith(("PADDLE_", "PROPELLER_", "FLAGS_")):
                patch.delenv(name)
        context.set_forkserver_preload(["rank_jobs"])
        forkserver.ensure_running()
        import rank_jobs

    def fork(folder, size, job, /, **arguments):
        return Ranks(context, rank_jobs.main, folder, size, job, arguments)

    return fork


@pytest.fixture
def start_ranks(fork_ranks, tmp_path):
    """`start_ranks(size, job, **arguments)` starts ranks; killed at the end if they still live."""
    with contextlib.ExitStack() as stack:
        numbers = itertools.count()

        def start(size, job, /, **arguments):
            ranks = fork_ranks(tmp_path / f"ranks.{next(numbers)}", size, job, **arguments)
            return stack.enter_context(ranks)

        yield start

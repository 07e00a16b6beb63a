"""What the ranks of the tests do. Each is a process of its own, forked from one that has loaded Paddle.

A job is a function here or in `rank_exchanges`: `job(report, **arguments)`. What it returns, and what it
reports before, the test gets by rank.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import rank_exchanges
from tqdm import tqdm

import propeller.paddle as propeller
from propeller import atomic, cli, launch, manifest
from propeller.data import Dataset
from propeller.errors import DataError
from propeller.metrics import AUC, F1, Acc, Metric, Pearson, Spearman
from propeller.paddle import distributed, optimization
from propeller.paddle.runtime import paddle
from propeller.paddle.train import reporting
from propeller.paddle.train.adversarial import Fgm
from propeller.paddle.train.learner import Learner
from propeller.paddle.train.step import plain_step

import safetensors.paddle  # isort: skip  (imports Paddle by itself)


def main(rank, addresses, pipe, log, job, arguments):
    """One rank: joins the others as the older launcher starts ranks, and does the job."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if len(addresses) > 1:
        cluster = {"chief": addresses[:1], "worker": addresses[1:]}
        task = {"type": "worker", "index": rank - 1} if rank else {"type": "chief", "index": 0}
        os.environ["PROPELLER_DISCONFIG"] = json.dumps({"cluster": cluster, "task": task})
        launch.apply_disconfig()
    if rank:
        _await_listener(int(addresses[0].rpartition(":")[2]))
    reporting.draw_curves = lambda lines, path: None  # takes longer than all else
    tqdm.set_lock(threading.RLock())  # its own would be a semaphore that a kill leaves behind
    cli.setup_logging()
    cli.run(lambda: pipe.send(("result", _job(job)(lambda *event: pipe.send(event), **arguments))))


def _job(name):
    return getattr(rank_exchanges, name, None) or globals()[name]


def _await_listener(port):
    """Waits for rank 0: Paddle, which comes too early, tries again after 3 s only."""
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    listening = re.compile(rf":{port:04X} \S+ 0A ")  # the state of one that listens
    while all(table.exists() for table in tables) and not any(
        listening.search(table.read_text()) for table in tables
    ):
        time.sleep(0.01)


class Bags(propeller.Model):
    """Classifies a bag of words, or each of its words; hyper-parameters say how the loss weighs them."""

    label_names = ("label", "weight")
    inputs = tuple(
        propeller.ArraySpec(name, "int64", axes)
        for name, axes in (("input_ids", ("batch", "seq_len")), ("row", ("batch",)))
    )

    def __init__(self, hparams, mode, run_config):
        super().__init__(hparams, mode, run_config)
        self.table = paddle.nn.Embedding(50, 16, padding_idx=0)
        self.norm = paddle.nn.BatchNorm1D(16) if hparams.get("batch_norm") else paddle.nn.LayerNorm(16)
        self.dropout = paddle.nn.Dropout(hparams.get("dropout", 0.0))
        self.out = paddle.nn.Linear(16, 2)
        self.unused = paddle.nn.Linear(3, 3)
        self.odd = paddle.nn.Linear(16, 2)
        if hparams.get("freeze"):
            self.table.weight.stop_gradient = True
        self.seen, self.masks = [], []

    def forward(self, features):
        ids, row = features["input_ids"], features["row"]
        words = self.table(ids)
        if self.training:
            self.seen.append(row.tolist())
            self.masks.append(self.dropout(paddle.ones([64])).numpy().astype(bool).tolist())
        if self.hparams.get("loss") == "words":
            return {"logits": self.out(self.norm(words)), "ids": ids}
        bags = self.dropout(self.norm(words.sum(1)))
        logits = self.out(bags)
        if self.hparams.get("odd"):
            odd = paddle.nonzero(row % 2).flatten()
            if len(odd):  # where this rank has none it does not use the layer
                logits = paddle.scatter(logits, odd, logits[odd] + self.odd(bags[odd]))
        return {"logits": logits, "score": logits[:, 1] - logits[:, 0]}

    def loss(self, predictions, labels):
        logits, kind = predictions["logits"], self.hparams.get("loss", "sum")
        each = functools.partial(paddle.nn.functional.cross_entropy, reduction="none")
        if kind == "words":  # of which each rank has another number
            counted = ((predictions["ids"] % 3 > 0) & (predictions["ids"] > 0)).astype("float32")
            return (each(logits, predictions["ids"] % 2).squeeze(-1) * counted).sum(), counted.sum()
        losses = each(logits, labels["label"]).squeeze(-1)
        if kind == "mean":
            return losses.mean()
        weights = labels["weight"] if kind == "weighted" else paddle.ones_like(losses)
        return (losses * weights).sum(), weights.sum()

    def optimizer(self):
        return optimization.adamw(
            self, learning_rate=0.01, max_steps=self.run_config.max_steps, schedule="linear"
        )

    def metrics(self):
        kinds = {"acc": Acc(), "f1": F1(), "auc": AUC("score"), "pearson": Pearson("score"),
                 "spearman": Spearman("score")}  # fmt: skip
        return {name: OfLabel(metric) for name, metric in kinds.items()}


class OfLabel(Metric):
    """A metric of the column `label` alone."""

    def __init__(self, metric):
        self._metric = metric

    def update(self, predictions, labels, features):
        self._metric.update(predictions, labels["label"], features)

    def reset(self):
        self._metric.reset()

    def compute(self):
        return self._metric.compute()

    def state(self):
        return self._metric.state()

    def merge(self, state):
        self._metric.merge(state)


def rows(count, seed=1):
    """Examples; `weight` is 0 for what the second of two ranks gets of batches in order."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        ids = rng.integers(1, 50, size=rng.integers(3, 12), dtype=np.int64)
        label = int((ids % 2 == 0).mean() > 0.5)
        found.append(
            {"input_ids": ids, "row": number, "label": label, "weight": (1.0, 0.0, 0.5, 0.0)[number % 4]}
        )
    return found


def dataset(kind="padded", count=256):
    """Batches of 16, or of 100 tokens, made in one of several ways."""
    data = Dataset.from_list(rows(count))
    if kind == "in order":
        return data.padded_batch(16).repeat()
    data = data.shuffle()
    if kind == "padded":
        return data.repeat().padded_batch(16)
    if kind == "uneven":
        return data.padded_batch(16).repeat()
    if kind == "tokens":
        return data.token_batch(100, key="input_ids").repeat()
    return data.bucket(batch_size=16, pool_size=64, key="input_ids").repeat()


def learner_of(model_dir, hparams=None, **config):
    """A learner of the toy task whose last step is 20, unless that is said otherwise."""
    values = {"max_steps": 20, "eval_steps": 1000, "log_steps": 10, "device": "cpu", **config}
    return Learner(Bags, propeller.RunConfig(model_dir=str(model_dir), **values), hparams)


def weights(learner):
    return {name: tensor.numpy().copy() for name, tensor in learner.model.state_dict().items()}


def train_all(report, folder, variants):
    """Trains each of the variants; `folder` is rank 0's, another's would be beside it."""
    found = {}
    rank = distributed.join("cpu").rank
    for number, (name, variant) in enumerate(variants.items()):
        learner = learner_of(
            f"{folder}/{number}/rank{rank}", variant.get("hparams"), **variant.get("config", {})
        )
        strategy = Fgm("table.weight", 0.5) if variant.get("fgm") else plain_step
        hook = Recorder()
        learner.train(dataset(**variant.get("data", {})), step_strategy=strategy, hooks=[hook])
        found[name] = {"weights": weights(learner), "losses": hook.losses, "examples": hook.examples}
    return found


class Recorder(propeller.Hook):
    """Writes down the losses; `act(event, state)` may answer or raise."""

    name = "recorder"

    def __init__(self, act=lambda event, state: None):
        self.act, self.losses, self.examples = act, [], []

    def step_end(self, state, result):
        self.losses.append(result.loss)
        self.examples.append(result.num_examples)
        return self.act("step_end", state)

    def eval_end(self, state, results):
        return self.act("eval_end", state)

    def train_end(self, state, error):
        self.act("train_end", state)


def train(report, model_dir, *, data=None, hparams=None, act=None, broken=None, export=False, kill=None,
          **config):  # fmt: skip
    """Trains once, with an evaluation set.

    Args:
        act: `(event, step, answer)`: what a hook answers then, at any step if that is None. "wait" waits to
            be killed, "SIGTERM" sends that to its own process.
        broken: `(rank, step)`: where the data fails.
        export: has an exporter that fails at step 4.
        kill: `(rank, how, when)`: how a rank ends; see `_killed`.
    """
    learner = learner_of(model_dir, hparams, **config)
    rank = learner.ranks.rank
    report("pid", os.getpid())

    def do(event, state):
        if event == "step_end":
            report("step", state.step)
        if act is not None and event == act[0] and act[1] in (None, state.step):
            if act[2] == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
            if act[2] == "wait":
                report("held", os.getpid())
                signal.pause()
            return act[2]

    batches = dataset(**(data or {}))
    if broken is not None:  # the same pipeline on all ranks, as it must be
        batches = batches.map(_failing_at(broken[1] if broken[0] == rank else None))
    with _killed(report, *kill[1:]) if kill and kill[0] == rank else contextlib.nullcontext():
        state = learner.train(
            batches, hooks=[Recorder(do)], eval_datasets={"dev": dev_set()},
            exporters=[FailingExporter()] if export else [],
        )  # fmt: skip
    return {
        "step": state.step,
        "examples": state.examples,
        "weights": weights(learner),
        "seen": learner.model.seen,
        "masks": learner.model.masks,
    }


def _failing_at(step):
    count = itertools.count(1)

    def check(batch):
        if step is not None and next(count) >= step:
            raise DataError("a label is 7; expected 0 or 1", path="train.tsv", line=step)
        return batch

    return check


class FailingExporter(propeller.Exporter):
    """Has no room from step 4 on."""

    def begin(self, state):
        pass

    def export(self, model, state, results, columns):
        if state.step >= 4:
            raise OSError("no room for the export")


# Where a save can be held: the function, which of its arguments is the path, whether it is held after it.
PLACES = {
    "weights": (safetensors.paddle, "save_file", 1, False),
    "manifest": (manifest, "write", 0, False),
    "sync": (atomic, "_sync", 0, False),
    "rename": (Path, "rename", 0, False),
    "renamed": (Path, "rename", 0, True),
    "removal": (shutil, "rmtree", 0, False),
    "half removed": (os, "rmdir", 0, False),
}


@contextlib.contextmanager
def _killed(report, how, when):
    """Has this process killed.

    Args:
        how: `seconds`: by itself, while all goes on; `step`: by the test, which gets to know the step; a name
            in `PLACES`: by the test, when a save is held there.
        when: after so many seconds; or the how-manieth time it comes there.
    """
    if how == "seconds":
        timer = threading.Timer(when, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
        yield
        timer.cancel()
    elif how == "step":
        yield
    else:
        owner, name, of_path, after = PLACES[how]
        original, count = getattr(owner, name), itertools.count(1)

        @functools.wraps(original)
        def held(*args, **options):
            hold = "step_" in str(args[of_path]) and next(count) == when
            found = original(*args, **options) if after or not hold else None
            if hold:
                report("held", os.getpid())
                signal.pause()
            return found

        setattr(owner, name, held)
        yield
        setattr(owner, name, original)


def dev_set(count=100):
    return Dataset.from_list(rows(count, seed=2)).padded_batch(16)


def evaluate_all(report, cases):
    """Evaluates each of the cases, `(examples, eval_max_steps)`; all ranks with the same random weights."""
    found = []
    for count, max_steps in cases:
        learner = learner_of("nowhere", eval_max_steps=max_steps)
        learner.ranks.broadcast_tensors(list(learner.model.state_dict().values()))
        learner._has_weights = True  # random ones will do here
        try:
            found.append(learner.evaluate(dev_set(count)))
        except DataError as error:
            found.append(str(error))
    return found

"""The tasks of `finetune.py`: what is trained, by the project's own readers, processors and models."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from ernie.pretrained import load_pretrained_state
from ernie.tasks.answer_metric import AnswerMetric
from ernie.tasks.classification import ClassificationProcessor
from ernie.tasks.classification_model import ClassificationModel
from ernie.tasks.glue import find_task, set_files
from ernie.tasks.models import TaskModel
from ernie.tasks.mrc import MrcProcessor, is_trainable
from ernie.tasks.mrc_model import MrcModel
from ernie.tasks.processor import TextProcessor
from ernie.tasks.ranking import RankingProcessor
from ernie.tasks.ranking_model import RankingModel
from ernie.tokenizing import Tokenizer
from propeller.errors import DataError

TASKS = ("cola", "sst2", "mrpc", "rte", "stsb", "wikiqa", "squad")
TEXT_SEQLEN = 128
WINDOW_SEQLEN, DOC_STRIDE = 256, 128

Examples = list[dict[str, Any]]


@dataclass(frozen=True)
class Work:
    """A task ready to run.

    Attributes:
        processor, model: the task's.
        train, dev: their examples.
        labels: the peer's name of each label -> ours.
    """

    processor: TextProcessor
    model: type[TaskModel]
    train: Examples
    dev: Examples
    labels: Mapping[str, str]


def make_work(task: str, tokenizer: Tokenizer, data: Path, peer: Path) -> Work:
    """Reads and tokenises train and dev.

    Args:
        task: one of `TASKS`.
        tokenizer: the model's.
        data: the folder with the task's files.
        peer: the peer's folder, where SQuAD's halves lie; of other tasks as many rows of train are taken as
            the peer has.
    """
    processor: TextProcessor
    if task == "squad":
        processor = MrcProcessor(
            tokenizer, max_seqlen=WINDOW_SEQLEN, doc_stride=DOC_STRIDE, search={"with_negative": True}
        )
        train = processor.prepare(list(filter(is_trainable, processor.read(peer / "train.json"))))
        dev = processor.prepare(list(processor.read(peer / "dev.json")))
        names = {"start_positions": "start_position", "end_positions": "end_position"}
        return Work(processor, MrcModel, train, dev, names)
    model: type[TaskModel] = ClassificationModel
    if task == "wikiqa":
        files = {name: data / f"{name}.tsv" for name in ("train", "dev")}
        processor, model = RankingProcessor(tokenizer, max_seqlen=TEXT_SEQLEN), RankingModel
    else:
        known = find_task(task)
        files = set_files(known, data / known.folder)
        processor = ClassificationProcessor(
            tokenizer, known.labels, max_seqlen=TEXT_SEQLEN, pair=bool(known.layout.pair), task=known.name
        )
    num_rows = len(np.load(peer / "features.npz")["splits"]) - 1
    train, dev = (
        processor.prepare(list(itertools.islice(processor.read(files[name]), limit)))
        for name, limit in (("train", num_rows), ("dev", None))
    )
    return Work(processor, model, train, dev, {"labels": "label"})


def check_features(work: Work, peer: Path) -> None:
    """Compares the examples of train with the peer's `features.npz`.

    Raises:
        DataError: some are not the same.
    """
    theirs = dict(np.load(peer / "features.npz"))
    splits = theirs.pop("splits")
    if len(splits) - 1 != len(work.train):
        raise DataError(
            f"{peer}: the peer has {len(splits) - 1} inputs of train, here are {len(work.train)}."
        )
    different = np.zeros(len(work.train), dtype=bool)
    for name, values in theirs.items():
        if name in work.labels:
            own = np.array([example[work.labels[name]] for example in work.train], np.float32)
            different |= own != values.astype(np.float32)
        else:
            rows = zip(work.train, np.split(values, splits[1:-1]), strict=True)
            different |= [not np.array_equal(example[name], row) for example, row in rows]
    if different.any():
        raise DataError(
            f"{peer}: {different.sum()} of {len(different)} inputs of train are not the peer's, the first "
            f"is {np.flatnonzero(different)[0]} (from 0)."
        )


def initial_tensors(init: str | Path) -> dict[str, np.ndarray]:
    """The peer's first weights, of encoder and head, under our names."""
    _, encoder = load_pretrained_state(init)
    weights = safetensors.numpy.load_file(Path(init) / "model.safetensors")
    is_mrc = "qa_outputs.weight" in weights
    theirs, ours = ("qa_outputs", "head") if is_mrc else ("classifier", "head.classifier")
    return {
        **{f"encoder.{name}": array for name, array in encoder.items()},
        f"{ours}.weight": weights[f"{theirs}.weight"].T.copy(),
        f"{ours}.bias": weights[f"{theirs}.bias"],
    }


def peer_metrics(work: Work, peer: Path) -> dict[str, float]:
    """What the peer's dev predictions score; for SQuAD by the search of this side, from the peer's logits."""
    result = json.loads((peer / "result.json").read_text())
    metrics = {name.removeprefix("dev_"): result[name] for name in result if name.startswith("dev_")}
    if not isinstance(work.processor, MrcProcessor) or not (peer / "dev_logits.npy").is_file():
        return metrics
    metric = AnswerMetric(work.processor, work.processor.scores)
    for example, (starts, ends) in zip(work.dev, np.load(peer / "dev_logits.npy"), strict=True):
        length = len(example["input_ids"])
        in_context = example["token_type_ids"].copy()
        in_context[-1] = 0
        logits = {"start_logits": starts[:length], "end_logits": ends[:length], "in_context": in_context}
        rows = {name: values[np.newaxis] for name, values in logits.items()}
        metric.update(rows, {}, {name: [value] for name, value in example.items()})
    return {**metric.compute()}

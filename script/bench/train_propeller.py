"""One round of `train.py` with propeller, as one process or as one of several ranks."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from finetune import initial_tensors
from train_job import Job, Recorder, Report, parse_job, peak_bytes, write_report

import propeller.paddle as propeller
from ernie.pretrained import load_pretrained_config
from ernie.tasks.classification import ClassificationProcessor
from ernie.tasks.classification_model import ClassificationModel
from ernie.tokenizing import load_tokenizer
from propeller.data import Dataset
from propeller.paddle.runtime import paddle


class Steps(propeller.Hook):
    """Tells the recorder, and keeps the losses."""

    name = "steps"

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.losses: list[float] = []

    def step_end(self, state: propeller.RunState, result: propeller.StepResult) -> None:
        self.losses.append(result.loss)
        self._recorder.step_end()


def batches(job: Job, recorder: Recorder, processor: ClassificationProcessor, own: bool) -> Dataset:
    """The job's batches, or, with `own`, those of like lengths that the project's scripts make."""
    pad = processor.pad_values

    def seen(batch: dict[str, Any]) -> dict[str, Any]:
        num_tokens = int((batch["input_ids"] != pad["input_ids"]).sum())
        recorder.batch(*batch["input_ids"].shape, num_tokens)
        return batch

    dataset = Dataset.from_list(
        [
            {
                "input_ids": np.array(example["input_ids"]),
                "token_type_ids": np.zeros(len(example["input_ids"]), np.int64),
                "label": example["label"],
            }
            for example in job.examples
        ]
    )
    if own:
        dataset = dataset.shuffle().bucket(batch_size=job.batch_size, pad_values=pad, key="input_ids")
        dataset = dataset.repeat()
    else:
        dataset = dataset.padded_batch(job.batch_size, pad)
    return dataset.map(seen).buffered(16)


def train(job: Job, model_dir: Path, own_batches: bool) -> Report | None:
    """Trains one round; only the first rank has a report, since hooks run there alone."""
    processor = ClassificationProcessor(load_tokenizer(job.init), ["0", "1"], max_seqlen=512, pair=False)
    recorder = Recorder(job)
    steps = Steps(recorder)
    learner = propeller.Learner(
        functools.partial(
            ClassificationModel, config=load_pretrained_config(job.init), processor=processor
        ),
        propeller.RunConfig(model_dir=str(model_dir), max_steps=job.num_steps, seed=job.seed),
        {"learning_rate": job.learning_rate, "weight_decay": job.weight_decay},
        propeller.WarmStartSetting(source=lambda: initial_tensors(job.init)),
    )
    learner.train(batches(job, recorder, processor, own_batches), hooks=[steps])
    if not steps.losses:
        return None
    num_parameters = sum(parameter.size for parameter in learner.model.parameters())
    loss = sum(steps.losses) / len(steps.losses)
    return recorder.report(loss, num_parameters, {"paddle": paddle.__version__})


def main() -> None:
    """Parses the flags."""
    job, args = parse_job(__doc__, "--own-batches")
    report = train(job, args.out.with_suffix(""), args.own_batches)
    if report is None:
        rank = os.environ["PADDLE_TRAINER_ID"]
        args.out.with_suffix(f".rank{rank}").write_text(str(peak_bytes()))
    else:
        write_report(report, args.out)


if __name__ == "__main__":
    main()

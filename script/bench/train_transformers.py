"""One round of `train.py` with Transformers' Trainer, in the environment of requirements-peers.txt."""

from __future__ import annotations

import os
import tempfile
from typing import Any

# Transformers reads this at its own import; the weights are local.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from train_job import Job, Recorder, Report, parse_job, write_report  # noqa: E402
from transformers import (  # noqa: E402
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class InOrder(Trainer):
    """The Trainer without its shuffle: the examples come in the order of the job."""

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class StepEnds(TrainerCallback):
    """Tells the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._recorder.step_end()


def train(job: Job, bf16: bool) -> Report:
    """Trains one round."""
    recorder = Recorder(job)
    pad = DataCollatorWithPadding(AutoTokenizer.from_pretrained(job.init))

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = pad(examples)
        recorder.batch(*batch["input_ids"].shape, int(batch["attention_mask"].sum()))
        return batch

    model = BertForSequenceClassification.from_pretrained(job.init)
    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrder(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                bf16=bf16,
                use_cpu=True,
                dataloader_pin_memory=False,
                **job.training_arguments(),
            ),
            train_dataset=[
                {
                    "input_ids": example["input_ids"],
                    "token_type_ids": [0] * len(example["input_ids"]),
                    "attention_mask": [1] * len(example["input_ids"]),
                    "labels": example["label"],
                }
                for example in job.examples
            ],
            data_collator=collate,
            callbacks=[StepEnds(recorder)],
        )
        loss = trainer.train().training_loss
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return recorder.report(loss, sum(parameter.numel() for parameter in model.parameters()), versions)


def main() -> None:
    """Parses the flags."""
    job, args = parse_job(__doc__, "--bf16")
    write_report(train(job, args.bf16), args.out)


if __name__ == "__main__":
    main()

"""One round of `train.py` with PaddleNLP's Trainer, in the environment of requirements-paddlenlp.txt."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import paddle
import paddlenlp
from paddlenlp.data import DataCollatorWithPadding
from paddlenlp.trainer import Trainer, TrainerCallback, TrainingArguments
from paddlenlp.transformers import BertForSequenceClassification, BertTokenizer
from train_job import Job, Recorder, Report, parse_job, write_report


class InOrder(Trainer):
    """The Trainer without its shuffle: the examples come in the order of the job."""

    def _get_train_sampler(self) -> paddle.io.BatchSampler:
        return paddle.io.BatchSampler(self.train_dataset, batch_size=self.args.per_device_train_batch_size)


class StepEnds(TrainerCallback):
    """Tells the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._recorder.step_end()


class Examples(paddle.io.Dataset):
    """The job's examples as PaddleNLP's models name them."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._examples = job.examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self._examples[index]["input_ids"]
        return {
            "input_ids": ids,
            "token_type_ids": [0] * len(ids),
            "labels": self._examples[index]["label"],
        }


def load(init: Path) -> tuple[BertForSequenceClassification, BertTokenizer]:
    """Reads a Hugging Face folder; beside it stays one of PaddleNLP's own for the next process.

    So the conversion weighs on the time and the memory of the first round alone.
    """
    own = init.with_name(init.name + "_paddlenlp")
    if not own.exists():
        model = BertForSequenceClassification.from_pretrained(str(init), convert_from_torch=True)
        model.save_pretrained(str(own))
        BertTokenizer.from_pretrained(str(init)).save_pretrained(str(own))
    model = BertForSequenceClassification.from_pretrained(str(own))
    return model, BertTokenizer.from_pretrained(str(own))


def train(job: Job) -> Report:
    """Trains one round."""
    recorder = Recorder(job)
    model, tokenizer = load(Path(job.init))
    pad = DataCollatorWithPadding(tokenizer)

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = pad(examples)
        recorder.batch(*batch["input_ids"].shape, sum(len(example["input_ids"]) for example in examples))
        return batch

    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrder(
            model=model,
            args=TrainingArguments(output_dir=folder, device="cpu", **job.training_arguments()),
            train_dataset=Examples(job),
            data_collator=collate,
            callbacks=[StepEnds(recorder)],
        )
        loss = trainer.train().training_loss
    versions = {"paddle": paddle.__version__, "paddlenlp": paddlenlp.__version__}
    return recorder.report(loss, sum(parameter.size for parameter in model.parameters()), versions)


def main() -> None:
    """Parses the flags."""
    job, args = parse_job(__doc__)
    write_report(train(job), args.out)


if __name__ == "__main__":
    main()

"""What every fine-tuning script shares: flags, files, model configuration, batches, prediction.

Paddle is imported only where it is needed, so that `--help` and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import logging
import math
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie.config import CONFIG_KEYS, ErnieConfig
from ernie.pretrained import load_pretrained_config, load_pretrained_state
from ernie.tasks.training import Training
from ernie.tokenizing import Tokenizer, load_tokenizer
from propeller import atomic
from propeller.bundle import read_bundle
from propeller.config import ArgumentParser
from propeller.data import Dataset
from propeller.errors import ConfigError, DataError, PropellerError
from propeller.launch import started_by_nproc
from propeller.processor import Processor
from propeller.run_file import read_run_file
from propeller.types import HParams, RunConfig, WarmStartSetting

if TYPE_CHECKING:
    from propeller.paddle.train.step import StepStrategy

log = logging.getLogger("ernie")

DATA_KEYS = ("batch_size", "in_tokens", "num_epochs", "num_label", "use_fp16")


def argument_parser(description: str) -> ArgumentParser:
    """The flags of every fine-tuning script."""
    parser = ArgumentParser(description, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", help="folder with train, dev and test, as folders or .tsv(.gz) files")
    for name in ("train", "dev", "test"):
        data.add_argument(f"--{name}_set", metavar="FILE", help=f"the {name} file, in place of --data_dir")
    data.add_argument("--columns", help="a file's columns in order, as text_a,text_b,label; _ skips one")
    data.add_argument("--cache_dir", help="where prepared data is kept; default: the user's cache folder")
    model = parser.add_argument_group("model")
    model.add_argument("--warm_start_from", metavar="DIR", help="pretrained folder (own or Hugging Face)")
    model.add_argument("--vocab_file", help="vocabulary; default: the warm-start folder's")
    model.add_argument("--max_seqlen", type=int, default=128, help="tokens an example has at most")
    model.add_argument("--do_lower_case", type=_boolean, default=None, help="if the folder says nothing")
    model.add_argument("--sentence_piece_model", help="SentencePiece model (ERNIE-tiny)")
    model.add_argument("--word_dict", help="word segmentation dictionary (ERNIE-tiny)")
    model.add_argument(
        "--find_learning_rate", action="store_true", help="try rising rates on the data; trains nothing"
    )
    predict = parser.add_argument_group("prediction")
    predict.add_argument("--do_predict", action="store_true", help="answer the lines of standard input")
    predict.add_argument("--bundle", metavar="DIR", help="exported model; default: model_dir/best/inference")
    predict.add_argument("--format", choices=("tsv", "jsonl"), default="tsv", help="form of an output line")
    predict.add_argument("--strict", action="store_true", help="exit with 1 if a line could not be read")
    predict.add_argument("--bf16", action="store_true", help="predict in bfloat16 (CPU)")
    predict.add_argument("--dev_predictions", metavar="FILE", help="dev with predictions, JSONL")
    return parser


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        return values[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}") from None


@dataclasses.dataclass(frozen=True)
class DataFiles:
    """Where the sets of a task lie: a file, or a folder of parts, for each that is there."""

    train: Path
    dev: Path
    test: Path | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> DataFiles:
        """Finds them by `--train_set --dev_set --test_set`, else in `--data_dir`.

        Raises:
            ConfigError: train or dev is missing, or a file that was named, or there are two of one name
                (`train/` and `train.tsv`); what was looked for is named.
        """
        train, dev = (_locate(name, args) for name in ("train", "dev"))
        if train is None or dev is None:
            name = "train" if train is None else "dev"
            raise ConfigError(
                f"No {name} data: name it with --{name}_set FILE, or put {name}/, {name}.tsv or "
                f"{name}.tsv.gz into --data_dir (now {args.data_dir})."
            )
        return cls(train, dev, _locate("test", args))

    def items(self) -> list[tuple[str, Path]]:
        """Name and place of the sets that are there."""
        return [(name, path) for name, path in dataclasses.asdict(self).items() if path is not None]


def _locate(name: str, args: argparse.Namespace) -> Path | None:
    flag = getattr(args, f"{name}_set")
    if flag is not None:
        if not Path(flag).exists():
            raise ConfigError(f"--{name}_set {flag} does not exist.")
        return Path(flag)
    if args.data_dir is None:
        return None
    if not Path(args.data_dir).is_dir():
        raise ConfigError(f"--data_dir {args.data_dir} is no folder.")
    candidates = (Path(args.data_dir) / f"{name}{end}" for end in ("", ".tsv", ".tsv.gz"))
    found = [path for path in candidates if path.exists()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise ConfigError(f"{args.data_dir} holds {names}; remove all but one, or name it by --{name}_set.")
    return found[0] if found else None


def check_hparams(hparams: HParams, known: Collection[str]) -> None:
    """Refuses slips among the hyper-parameters, and lists what is not used.

    Args:
        hparams: what was given.
        known: what the task reads, besides `DATA_KEYS` and the keys of the encoder.

    Raises:
        ConfigError: a near miss of a known key.
    """
    unused = hparams.check({*known, *DATA_KEYS, *CONFIG_KEYS})
    if unused:
        log.info("hyper-parameters not used: %s", ", ".join(unused))


def with_precision(run_config: RunConfig, hparams: HParams) -> RunConfig:
    """Sets the precision to fp16 where the hyper-parameter `use_fp16` of the older scripts asks for it.

    Raises:
        ConfigError: `use_fp16` is no switch, or the run configuration asks for another precision.
    """
    if not _switch(hparams, "use_fp16") or run_config.precision == "fp16":
        return run_config
    if run_config.precision != "fp32":
        raise ConfigError(
            f"use_fp16 is set in --hparam, but precision is {run_config.precision!r} in --run_config. Set "
            "precision alone."
        )
    return dataclasses.replace(run_config, precision="fp16")


def _switch(hparams: HParams, key: str) -> bool:
    """A hyper-parameter that is on or off, and off by default."""
    value = hparams.get(key)
    if value not in (True, False, None):  # 0 and 1 are equal to these
        raise ConfigError(f"{key} must be true or false, got {value!r}.")
    return bool(value)


def resolve_model(args: argparse.Namespace, hparams: HParams) -> tuple[ErnieConfig, Tokenizer]:
    """Resolves encoder and tokenizer: `--hparam` over the warm-start folder's over the defaults.

    Raises:
        ConfigError: no vocabulary is named, it is larger than the model's or pads otherwise, or
            `--max_seqlen` is beyond the model's positions.
    """
    folder = args.warm_start_from
    if folder is None and args.vocab_file is None and args.sentence_piece_model is None:
        raise ConfigError("No vocabulary: name --vocab_file, or a folder that has one (--warm_start_from).")
    given = {} if folder is None else load_pretrained_config(folder).to_dict()
    tokenizer = load_tokenizer(
        folder,
        vocab_file=args.vocab_file,
        do_lower_case=args.do_lower_case,
        sentence_piece_model=args.sentence_piece_model,
        word_dict=args.word_dict,
    )
    sizes = {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id}
    config = ErnieConfig.from_dict({**sizes, **given, **hparams}, ignore_others=True)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"The vocabulary has {tokenizer.vocab_size} entries, the model only {config.vocab_size}. "
            "They do not belong together."
        )
    if tokenizer.pad_id != config.pad_token_id:
        raise ConfigError(
            f"The vocabulary pads with id {tokenizer.pad_id}, the model with pad_token_id "
            f"{config.pad_token_id}. They do not belong together."
        )
    if args.max_seqlen > config.max_position_embeddings:
        raise ConfigError(
            f"--max_seqlen {args.max_seqlen} is beyond the {config.max_position_embeddings} positions "
            "of the model."
        )
    return config, tokenizer


def warm_start_setting(folder: str | None) -> WarmStartSetting | None:
    """First weights for a model's `encoder` from a pretrained folder; its `head` is new."""
    if folder is None:
        return None

    def encoder_tensors() -> Mapping[str, Any]:
        _, tensors = load_pretrained_state(folder)
        return {f"encoder.{name}": array for name, array in tensors.items()}

    return WarmStartSetting(source=encoder_tensors, new=("head.*",))


def step_batch_size(hparams: HParams, run_config: RunConfig, *, restart: bool) -> int:
    """Examples (or tokens, with `in_tokens`) that one step learns from, the same on all ranks; joins them.

    `batch_size` is that of each rank, as in the older scripts. Where `--nproc` started them it is the whole,
    so that a result does not depend on the machine. A run that goes on keeps what it began with (`run.json`
    has it), however many ranks there are now and whoever started them.

    Raises:
        ConfigError: `batch_size` is no positive whole number.
    """
    from propeller.paddle.distributed import join

    ranks = join(run_config.device)
    size = batch_size(hparams)
    whole = size if started_by_nproc() else size * ranks.size
    with ranks.telling():
        if ranks.is_main and not restart and any(Path(run_config.model_dir, "checkpoints").glob("step_*")):
            before = (read_run_file(run_config.model_dir) or {}).get("hparams")
            if isinstance(before, dict) and before.get("batch_size", 32) == size:
                whole = before.get("step_batch_size", whole)
    return int(ranks.broadcast(whole))


def step_strategy(training: Training) -> StepStrategy:
    """What makes an update: FGM where it is asked for, else a plain step."""
    from propeller.paddle.train.adversarial import Fgm
    from propeller.paddle.train.step import plain_step

    return Fgm(training.fgm_pattern, training.fgm_epsilon) if training.fgm_epsilon else plain_step


def batch_size(hparams: HParams) -> int:
    """The hyper-parameter `batch_size`.

    Raises:
        ConfigError: it is no positive whole number.
    """
    size = hparams.get("batch_size", 32)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigError(f"batch_size must be a whole number of at least 1, got {size!r}.")
    return size


def batched(dataset: Dataset, hparams: HParams, processor: Processor, *, size: int, train: bool) -> Dataset:
    """Pads to batches of like lengths: `size` examples, or with `in_tokens` so many tokens.

    Training batches come shuffled and without end; evaluation batches hold every example once.

    Raises:
        ConfigError: `in_tokens` is no switch.
    """
    budget = {"max_tokens" if _switch(hparams, "in_tokens") else "batch_size": size}
    if train:
        dataset = dataset.shuffle()
    dataset = dataset.bucket(**budget, pad_values=processor.pad_values, key="input_ids")
    if train:  # after the batches are made, so that each epoch has every example once
        dataset = dataset.repeat()
    return dataset.buffered(16)


def with_max_steps(run_config: RunConfig, hparams: HParams, *, num_examples: int, size: int) -> RunConfig:
    """Fills in `max_steps` from the hyper-parameter `num_epochs`, where it is not given.

    Args:
        run_config, hparams: as given.
        num_examples: of an epoch.
        size: examples of a step's batch, over all ranks.

    Raises:
        ConfigError: neither is there, or `num_epochs` is no positive number.
    """
    if run_config.max_steps is not None:
        return run_config
    epochs = hparams.get("num_epochs")
    if epochs is None or hparams.get("in_tokens"):
        raise ConfigError(
            "How long to train? Set max_steps in --run_config, or num_epochs in --hparam "
            "(max_steps, where in_tokens is set)."
        )
    if isinstance(epochs, bool) or not isinstance(epochs, int | float) or not 0 < epochs < math.inf:
        raise ConfigError(f"num_epochs must be a number above 0, got {epochs!r}.")
    steps = math.ceil(math.ceil(num_examples / size) * epochs)
    return dataclasses.replace(run_config, max_steps=steps)


def predict_stdin(args: argparse.Namespace, run_config: RunConfig) -> int:
    """Answers the lines of standard input by the exported model, one line for each, in order.

    Returns:
        The exit code: 1 with `--strict` if a line could not be read, else 0.
    """
    if sys.stdin is None:
        raise ConfigError("Standard input is closed: there are no lines to answer.")
    folder = Path(args.bundle or Path(run_config.model_dir) / "best" / "inference")
    bundle = read_bundle(folder)
    processor = bundle.processor()
    from propeller.paddle import stream
    from propeller.paddle.inference import Predictor
    from propeller.paddle.runtime import set_device

    predictor = Predictor(bundle, device=set_device(run_config.device), bf16=args.bf16)
    # Not sys.stdin's own buffer: a thread that waits in it keeps its lock, and then Python aborts at exit.
    lines = open(sys.stdin.fileno(), "rb", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):  # UTF-8 in, UTF-8 out, whatever the locale
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    write = stream.format_jsonl if args.format == "jsonl" else stream.format_text(processor)
    errors = stream.predict_lines(predictor, lines, sys.stdout, processor=processor, write=write)
    if errors:
        log.warning("%d lines could not be read", errors)
    return 1 if errors and args.strict else 0


def write_predictions(path: str, folder: Path, raws: Iterable[Mapping[str, Any]]) -> None:
    """Writes raw examples with the exported model's answers, a JSON object a line.

    Raises:
        DataError: the file cannot be written.
    """
    from propeller.paddle import stream
    from propeller.paddle.inference import Predictor
    from propeller.paddle.runtime import paddle

    bundle = read_bundle(folder)
    predictor = Predictor(bundle, device=paddle.get_device())  # where the training ran
    lines: list[str] = []
    examples = list(raws)
    for raw, answer in zip(
        examples, stream.answer_stream(predictor, bundle.processor(), examples), strict=True
    ):
        prediction = {"error": str(answer)} if isinstance(answer, PropellerError) else answer
        lines.append(atomic.to_json({**raw, "prediction": prediction}) + "\n")
    try:
        atomic.write_text(Path(path), "".join(lines))
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror}", path=path) from error
    log.info("wrote %d predictions to %s", len(lines), path)

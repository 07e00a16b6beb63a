"""What every fine-tuning script shares: flags, files, model configuration, batches, prediction.

Paddle is imported only where it is needed, so that `--help` and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie.config import CONFIG_KEYS, ErnieConfig
from ernie.pretrained import load_pretrained_config, load_pretrained_state
from ernie.tasks.arguments import column_names
from ernie.tasks.predicting import predict_stdin
from ernie.tasks.processor import TextProcessor
from ernie.tasks.training import Training
from ernie.tokenizing import Tokenizer, load_tokenizer
from propeller import atomic, cli, launch
from propeller.config import ArgumentParser, parse_hparam, parse_runconfig
from propeller.data import Dataset, prepare_files, source_files
from propeller.errors import ConfigError
from propeller.launch import started_by_nproc
from propeller.manifest import list_checkpoints
from propeller.processor import Processor
from propeller.run_file import read_run_file
from propeller.types import HParams, RunConfig, WarmStartSetting, as_switch

if TYPE_CHECKING:
    from ernie.tasks.models import TaskModel
    from propeller.paddle.train.step import StepStrategy

log = logging.getLogger("ernie")

DATA_KEYS = ("batch_size", "in_tokens", "num_epochs", "num_label", "use_fp16")


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
    return value is not None and as_switch(key, value)


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
    sizes = {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_token_id}
    config = ErnieConfig.from_dict({**sizes, **given, **hparams}, ignore_others=True)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"The vocabulary has {tokenizer.vocab_size} entries, the model only {config.vocab_size}. "
            "They do not belong together."
        )
    if tokenizer.pad_token_id != config.pad_token_id:
        raise ConfigError(
            f"The vocabulary pads with id {tokenizer.pad_token_id}, the model with pad_token_id "
            f"{config.pad_token_id}. They do not belong together."
        )
    if args.max_seqlen > config.max_position_embeddings:
        raise ConfigError(
            f"--max_seqlen {args.max_seqlen} is beyond the {config.max_position_embeddings} positions "
            "of the model."
        )
    return config, tokenizer


def warm_start_setting(folder: str | None) -> WarmStartSetting | None:
    """First weights for a model's `encoder` from a pretrained folder; its `head` is new.

    So is the pooler where the folder has none, as those of masked-word models and of many embeddings.
    """
    if folder is None:
        return None

    def encoder_tensors() -> Mapping[str, Any]:
        _, tensors = load_pretrained_state(folder)
        if "pooler.weight" not in tensors:
            log.info("%s has no pooler; a model that takes what a pooler gives learns it anew", folder)
        return {f"encoder.{name}": array for name, array in tensors.items()}

    return WarmStartSetting(source=encoder_tensors, new=("head.*", "encoder.pooler.*"))


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
        if ranks.is_main and not restart and list_checkpoints(run_config.model_dir):
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


def with_max_steps(run_config: RunConfig, hparams: HParams, epoch_steps: Callable[[], int]) -> RunConfig:
    """Fills in `max_steps` from the hyper-parameter `num_epochs`, where it is not given.

    Args:
        run_config, hparams: as given.
        epoch_steps: counts the steps of an epoch; called if they are needed.

    Raises:
        ConfigError: neither is there, or `num_epochs` is no positive number.
    """
    if run_config.max_steps is not None:
        return run_config
    epochs = hparams.get("num_epochs")
    if epochs is None:
        raise ConfigError("How long to train? Set max_steps in --run_config, or num_epochs in --hparam.")
    if isinstance(epochs, bool) or not isinstance(epochs, int | float) or not 0 < epochs < math.inf:
        raise ConfigError(f"num_epochs must be a number above 0, got {epochs!r}.")
    return dataclasses.replace(run_config, max_steps=math.ceil(epoch_steps() * epochs))


def count_steps(dataset: Dataset, hparams: HParams, processor: Processor, *, size: int) -> int:
    """The steps of one epoch over prepared examples.

    Batches of tokens are counted by making them once; a shuffle may make a few more or less of them.

    Raises:
        ConfigError: `in_tokens` is no switch.
    """
    if not _switch(hparams, "in_tokens"):
        return math.ceil(len(dataset) / size)
    return sum(1 for _ in batched(dataset, hparams, processor, size=size, train=False))


def prepared(
    name: str,
    path: Path,
    processor: TextProcessor,
    args: argparse.Namespace,
    *,
    read: Callable[[Path], Dataset] | None = None,
    read_key: Any = None,
) -> Dataset:
    """The prepared examples of a file, or of a folder of parts, through the cache.

    Args:
        name: of the set.
        path: where it lies.
        processor: the task's.
        args: as `main` gives them.
        read: gives the raw examples of a file; None takes the processor's own reader.
        read_key: what `read` depends on besides the processor and `--columns`; JSON.

    Raises:
        DataError: the data cannot be used; it names file and line.
    """
    columns = column_names(args)
    return prepare_files(
        name,
        source_files(name, data_dir=path),
        read or functools.partial(processor.read, columns=columns),
        read_key=atomic.to_json([columns, read_key]),
        prepare=processor.prepare,
        prepare_key=processor.fingerprint,
        cache_dir=args.cache_dir,
    )


def main(
    parser: ArgumentParser,
    train: Callable[[argparse.Namespace, RunConfig, HParams], None],
    *,
    known: Collection[str] = (),
    task: str | None = None,
) -> int:
    """Parses the flags of a fine-tuning script, and trains or predicts.

    Args:
        parser: see `arguments.argument_parser`.
        train: trains, in this process or, with `--nproc`, in each of several.
        known: hyper-parameters that the task reads, besides those of `Training`.
        task: the name of the processor whose bundles it predicts by; None: any.

    Returns:
        The exit code.
    """
    args = parser.parse_args()
    run_config, hparams = parse_runconfig(args), parse_hparam(args)
    if not args.do_predict:
        launch.apply_disconfig()
    cli.setup_logging(args.verbose)
    if args.do_predict:
        return predict_stdin(
            args.bundle or Path(run_config.model_dir) / "best" / "inference",
            device=run_config.device,
            bf16=args.bf16,
            form=args.format,
            strict=args.strict,
            task=task,
        )
    check_hparams(hparams, {*Training.keys(), *known})
    # What cannot be used is refused before any data is read.
    Training.of(hparams)
    batch_size(hparams)
    if not args.find_learning_rate:
        with_max_steps(run_config, hparams, lambda: 1)
    run_config = with_precision(run_config, hparams)
    if args.find_learning_rate and args.restart:
        raise ConfigError("--find_learning_rate trains nothing, so there is nothing to --restart.")
    code = launch.relaunch(args.nproc, run_config, restart=args.restart)
    if code is None:
        train(args, run_config, hparams)
    return code or 0


def fit(
    model: type[TaskModel],
    args: argparse.Namespace,
    run_config: RunConfig,
    hparams: HParams,
    *,
    config: ErnieConfig,
    processor: TextProcessor,
    sets: Mapping[str, Dataset],
    evaluated: Mapping[str, Dataset] | None = None,
) -> Path | None:
    """Fine-tunes, evaluates all sets but `train`, and exports the best model by its metric on dev.

    With `--find_learning_rate` it tries rates instead, and prints a table.

    Args:
        model: the task's.
        args, run_config, hparams: as `main` gives them.
        config: the encoder's.
        processor: the task's.
        sets: prepared examples, unpadded, by set name.
        evaluated: the sets but `train`, where they come in batches of their own.

    Returns:
        The bundle, in the process that wrote it; None in others, and where nothing was trained.
    """
    import propeller.paddle as propeller

    size = step_batch_size(hparams, run_config, restart=args.restart)
    if args.find_learning_rate:  # the trial has a schedule of its own
        run_config = dataclasses.replace(run_config, max_steps=run_config.max_steps or 1)
    else:
        run_config = with_max_steps(
            run_config, hparams, lambda: count_steps(sets["train"], hparams, processor, size=size)
        )
    resolved = {"batch_size": batch_size(hparams), "step_batch_size": size}
    learner = propeller.Learner(
        functools.partial(model, config=config, processor=processor),
        run_config,
        # Resolved, for run.json: a value that was a default before has not changed where it is given now.
        hparams.join(config.to_dict(), dataclasses.asdict(Training.of(hparams)), resolved),
        warm_start_setting(args.warm_start_from),
    )
    train_set = batched(sets["train"], hparams, processor, size=size, train=True)
    strategy = step_strategy(Training.of(hparams))
    if args.find_learning_rate:
        print(learner.find_learning_rate(train_set, step_strategy=strategy).table())
        return None
    best = Path(run_config.model_dir) / "best"
    learner.train(
        train_set,
        eval_datasets=evaluated
        or {
            name: batched(dataset, hparams, processor, size=batch_size(hparams), train=False)
            for name, dataset in sets.items()
            if name != "train"
        },
        exporters=[
            propeller.BestInferenceModelExporter(best, metric=processor.best_metric, processor=processor)
        ],
        step_strategy=strategy,
        restart=args.restart,
    )
    return best / "inference" if learner.ranks.is_main else None

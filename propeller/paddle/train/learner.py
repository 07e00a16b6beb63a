"""The Learner: one live model that is trained, evaluated, used and exported."""

from __future__ import annotations

import fnmatch
import json
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.paddle

from propeller import atomic
from propeller.bundle import Bundle, read_bundle
from propeller.data import Dataset
from propeller.errors import CheckpointError, ConfigError, DataError, ExportError
from propeller.paddle.runtime import paddle, set_device
from propeller.paddle.train import loop
from propeller.paddle.train.checkpoint import Checkpointer, set_weights
from propeller.paddle.train.evaluation import evaluate
from propeller.paddle.train.exporter import Exporter, export_bundle
from propeller.paddle.train.hooks import Hook
from propeller.paddle.train.model import Batch, Model, ModelFactory, build_model, to_numpy
from propeller.paddle.train.reporting import CurvesHook, LoggingHook, ProgressHook, SummaryHook
from propeller.processor import Processor
from propeller.types import HParams, RunConfig, RunMode, RunState, WarmStartSetting
from propeller.version import __version__

log = logging.getLogger("propeller")


class Learner:
    """Trains, evaluates and uses one model.

    Args:
        model_class_or_model_fn: a `Model` subclass, or a function
            `(hparams, mode, run_config) -> Model`.
        run_config: how the run goes on.
        params: the hyper-parameters that the model gets.
        warm_start_setting: first weights for a run that has no checkpoint yet.
    """

    def __init__(
        self,
        model_class_or_model_fn: type[Model] | ModelFactory,
        run_config: RunConfig,
        params: Mapping[str, Any] | None = None,
        warm_start_setting: WarmStartSetting | None = None,
    ):
        self.run_config = run_config
        self.hparams = params if isinstance(params, HParams) else HParams(params)
        self._factory = model_class_or_model_fn
        self._warm_start_setting = warm_start_setting
        self._checkpointer = Checkpointer(run_config.model_dir, run_config.max_ckpt)
        self._model: Model | None = None
        self._has_weights = False

    @property
    def model(self) -> Model:
        """The live model, built with the run's seed when it is first needed."""
        if self._model is None:
            set_device(self.run_config.device)
            paddle.seed(self.run_config.seed)
            np.random.seed(self.run_config.seed)  # for user code that draws from numpy
            self._model = build_model(self._factory, self.hparams, RunMode.TRAIN, self.run_config)
        return self._model

    def train(
        self,
        train_dataset: Dataset,
        *,
        eval_datasets: Mapping[str, Dataset] | None = None,
        hooks: Sequence[Hook] = (),
        exporters: Sequence[Exporter] = (),
        step_strategy: loop.StepStrategy = loop.plain_step,
    ) -> RunState:
        """Trains from the newest checkpoint in `model_dir`, or anew.

        Args:
            train_dataset: batches; repeated as often as wanted.
            eval_datasets: batches to evaluate, by set name.
            hooks: in addition to logging, progress bar, summaries and curves.
            exporters: called after each evaluation.
            step_strategy: what makes one update of one batch.

        Returns:
            The state reached.

        Raises:
            PropellerError: see `propeller.paddle.train.loop.train`; also if another process uses
                `model_dir`.
        """
        if exporters and not eval_datasets:
            raise ConfigError("An exporter exports after an evaluation, but there is no evaluation set.")
        model_dir = Path(self.run_config.model_dir)
        with atomic.FolderLock(model_dir):
            model = self.model
            if not self._checkpointer.steps() and self._warm_start_setting is not None:
                warm_start(model, self._warm_start_setting)
            self._write_run_file(model_dir)
            job = loop.Job(
                model=model,
                optimizer=model.optimizer(),
                run_config=self.run_config,
                train_dataset=train_dataset,
                eval_datasets=eval_datasets or {},
                hooks=[LoggingHook(), ProgressHook(), SummaryHook(), CurvesHook(), *hooks],
                exporters=exporters,
                checkpointer=self._checkpointer,
                step_strategy=step_strategy,
            )
            self._has_weights = True
            return loop.train(job)

    def evaluate(self, eval_dataset: Dataset, *, ckpt: int | None = None) -> dict[str, Any]:
        """Evaluates the live model, or the checkpoint of step `ckpt` (-1: the newest).

        Returns:
            `loss`, every metric by name, and `n`.
        """
        self._restore(ckpt)
        return evaluate(self.model, eval_dataset, self.run_config.eval_max_steps)

    def predict(self, dataset: Dataset, *, ckpt: int | None = None) -> Iterator[dict[str, Any]]:
        """Yields the outputs of each example, in order.

        Args:
            dataset: batches, without labels or with.
            ckpt: None predicts with the live model (the newest checkpoint, or the warm start, where
                nothing was trained yet); a step, or -1 for the newest, with a checkpoint.

        Raises:
            CheckpointError: there are no weights to predict with.
        """
        self._restore(ckpt)
        model = self.model
        before, model.mode = model.mode, RunMode.PREDICT
        try:
            for columns in dataset:
                with paddle.no_grad():
                    outputs = to_numpy(model(Batch.of(model, columns).features))
                rows = len(next(iter(outputs.values())))
                for row in range(rows):
                    yield {name: array[row] for name, array in outputs.items()}
        finally:
            model.mode = before

    def export(
        self,
        folder: str | Path,
        dataset: Dataset,
        *,
        ckpt: int | None = None,
        processor: Processor | None = None,
    ) -> Bundle:
        """Writes the model as a bundle, and checks it against the live one.

        Args:
            folder: where to write; must not be there yet.
            dataset: batches; the first one is compared.
            ckpt: as in `predict`.
            processor: what turns text into the model's inputs and its outputs into answers.

        Raises:
            ExportError: the folder is there, the model declares no inputs or cannot be traced, or the
                bundle's outputs are not the model's.
        """
        self._restore(ckpt)
        columns = next(iter(dataset), None)
        if columns is None:
            raise DataError("The data to compare the export on gave no batch.")
        try:
            with atomic.new_folder(Path(folder)) as target:
                export_bundle(target, self.model, columns, processor=processor, metrics={})
        except OSError as error:
            raise ExportError(f"Could not export to {folder}: {error}.") from error
        return read_bundle(folder)

    def _restore(self, ckpt: int | None) -> None:
        """Puts weights into the live model: those of a checkpoint, or any if it has none but random ones."""
        if ckpt is None and self._has_weights:
            return
        newest = ckpt is None or ckpt == -1
        checkpoint = self._checkpointer.load_latest() if newest else self._checkpointer.load(ckpt or 0)
        if checkpoint is not None:
            set_weights(self.model, checkpoint.model, self._checkpointer.path(checkpoint.state.step))
        elif ckpt is None and self._warm_start_setting is not None:
            warm_start(self.model, self._warm_start_setting)
        else:
            raise CheckpointError(f"{self._checkpointer.folder} has no checkpoint. Train first.")
        self._has_weights = True

    def _write_run_file(self, model_dir: Path) -> None:
        resolved = {
            "run_config": self.run_config.to_dict(),
            "hparams": dict(self.hparams),
            "versions": {
                "ernie-propeller": __version__,
                "paddle": paddle.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "device": paddle.get_device(),
        }
        text = atomic.to_json(resolved, indent=1)
        if self._checkpointer.steps() and (model_dir / "run.json").exists():
            _log_changes(json.loads((model_dir / "run.json").read_text("utf-8")), json.loads(text))
        log.info("configuration: %s", atomic.to_json(resolved))
        atomic.write_text(model_dir / "run.json", text + "\n")


def _log_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Says what of the configuration is another than when the run began."""
    for part in ("run_config", "hparams", "versions"):
        for key in sorted({*before[part], *now[part]}):
            old, new = (values[part].get(key) for values in (before, now))
            if old != new:
                log.warning("changed since this run was last started: %s.%s: %r -> %r", part, key, old, new)


def warm_start(model: Model, setting: WarmStartSetting) -> None:
    """Loads first weights and logs what was loaded, missing and left over.

    Raises:
        CheckpointError: a tensor is missing or has another shape and is not named as new, or the
            source cannot be read; all are listed.
    """
    tensors = setting.source() if callable(setting.source) else _read_tensors(Path(setting.source))
    loaded: dict[str, Any] = {}
    new: list[str] = []
    problems: list[str] = []
    for name, own in model.state_dict().items():
        if setting.predicate is not None and not setting.predicate(name):
            continue
        source_name = setting.mapping.get(name, name)
        found = tensors.get(source_name)
        if found is not None and list(found.shape) == list(own.shape):
            tensor = found if isinstance(found, paddle.Tensor) else paddle.to_tensor(found)
            loaded[name] = tensor.astype(own.dtype)  # a source may be half as precise
        elif any(fnmatch.fnmatchcase(name, pattern) for pattern in setting.new):
            new.append(name)
        elif found is None:
            problems.append(f"missing: {source_name}")
        else:
            problems.append(f"{name}: {list(found.shape)} where the model has {list(own.shape)}")
    unknown = sorted(set(setting.mapping) - set(model.state_dict()))
    if unknown:
        raise ConfigError(f"The warm start maps parameters the model does not have: {', '.join(unknown)}.")
    if problems:
        raise CheckpointError(
            "Warm start failed: " + "; ".join(problems) + ". Name what is meant to be new, such as a "
            "classifier head, in WarmStartSetting(new=...)."
        )
    model.set_state_dict({**model.state_dict(), **loaded})  # all names, else Paddle warns of each new one
    left = sorted(set(tensors) - {setting.mapping.get(name, name) for name in loaded})
    log.info(
        "warm start: %d tensors loaded: %s; new: %s; left over: %s",
        len(loaded),
        ", ".join(loaded),
        ", ".join(new) or "none",
        ", ".join(left) or "none",
    )


def _read_tensors(path: Path) -> Mapping[str, Any]:
    """Reads `path`, or the one `.safetensors` file of a checkpoint, export or model folder."""
    file = path / "model.safetensors" if path.is_dir() else path
    try:
        tensors: Mapping[str, Any] = safetensors.paddle.load_file(str(file))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}.") from error
    return tensors


def train_and_eval(
    model_class_or_model_fn: type[Model] | ModelFactory,
    params: Mapping[str, Any],
    run_config: RunConfig,
    train_dataset: Dataset,
    eval_dataset: Dataset | Mapping[str, Dataset],
    warm_start_setting: WarmStartSetting | None = None,
    train_hooks: Sequence[Hook] = (),
    exporters: Sequence[Exporter] = (),
) -> Learner:
    """Trains with evaluation every `eval_steps` and always at the end.

    Args:
        model_class_or_model_fn, params, run_config, warm_start_setting: see `Learner`.
        train_dataset: batches.
        eval_dataset: batches, or several sets by name.
        train_hooks: see `Learner.train`.
        exporters: see `Learner.train`.

    Returns:
        The learner, with the model as training left it.
    """
    learner = Learner(model_class_or_model_fn, run_config, params, warm_start_setting)
    sets = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval": eval_dataset}
    learner.train(train_dataset, eval_datasets=sets, hooks=train_hooks, exporters=exporters)
    return learner


__all__ = ["Learner", "train_and_eval", "warm_start"]

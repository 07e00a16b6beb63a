"""The Learner: one live model that is trained, evaluated, used and exported."""

from __future__ import annotations

import contextlib
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from propeller import atomic
from propeller.bundle import Bundle, read_bundle
from propeller.data import Dataset
from propeller.errors import CheckpointError, ConfigError, DataError, ExportError
from propeller.metrics import check_names
from propeller.paddle import distributed
from propeller.paddle.cpu_training import training_settings
from propeller.paddle.distributed import Ranks
from propeller.paddle.runtime import paddle, set_device
from propeller.paddle.train import loop, saving
from propeller.paddle.train.checkpoint import Checkpointer, set_weights
from propeller.paddle.train.evaluation import evaluate
from propeller.paddle.train.exporter import Exporter, export_bundle
from propeller.paddle.train.hooks import Hook, check_hooks
from propeller.paddle.train.job import Job
from propeller.paddle.train.lr_finder import Trial, find_learning_rate
from propeller.paddle.train.model import Batch, Model, ModelFactory, build_model, to_numpy
from propeller.paddle.train.precision import Precision
from propeller.paddle.train.profiling import Profiler
from propeller.paddle.train.reporting import CurvesHook, LoggingHook, ProgressHook, SummaryHook
from propeller.paddle.train.step import StepStrategy, plain_step
from propeller.paddle.train.warm_start import warm_start
from propeller.processor import Processor
from propeller.run_file import write_run_file
from propeller.types import HParams, RunConfig, RunMode, RunState, WarmStartSetting
from propeller.version import __version__

log = logging.getLogger("propeller")

PROFILE = "profile"


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
        self._ranks: Ranks | None = None
        self._model: Model | None = None
        self._has_weights = self._has_learnt = False

    @property
    def ranks(self) -> Ranks:
        """The processes that this run was started with; joined when they are first needed."""
        if self._ranks is None:
            self._ranks = distributed.join(self.run_config.device)
        return self._ranks

    @property
    def model(self) -> Model:
        """The live model, built with the run's seed when it is first needed."""
        if self._model is None:
            if self.ranks.size == 1:  # a rank's device is the launcher's to choose
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
        step_strategy: StepStrategy = plain_step,
        restart: bool = False,
    ) -> RunState:
        """Trains from the newest checkpoint in `model_dir`; without one anew, from first weights.

        With several ranks all call this, with the same arguments. A batch of the data is what one step
        learns from, however many they are: each takes its rows of it.

        Args:
            train_dataset: batches; repeated as often as wanted.
            eval_datasets: batches to evaluate, by set name.
            hooks: in addition to logging, progress bar, summaries and curves; rank 0 alone calls them.
            exporters: called after each evaluation, by rank 0 alone.
            step_strategy: what makes one update of one batch.
            restart: begin anew; a `model_dir` that is there is kept under another name. (A script that
                calls `launch.relaunch` gives it to that instead.)

        Returns:
            The state reached.

        Raises:
            PropellerError: see `propeller.paddle.train.loop.train`; also if another process uses
                `model_dir`.
        """
        if exporters and not eval_datasets:
            raise ConfigError("An exporter exports after an evaluation, but there is no evaluation set.")
        ranks, config = self.ranks, self.run_config
        with ranks.telling():
            self._check_device()
            if eval_datasets:
                check_names(self.model.metrics())
            with self._opened(restart):
                main_only = ranks.is_main
                job = self._job(
                    train_dataset,
                    step_strategy,
                    data=[*train_dataset.signature(), {"kind": "order", "seed": config.seed}],
                    eval_datasets=eval_datasets or {},
                    hooks=[*_own_hooks(), *hooks] if main_only else [],
                    exporters=exporters if main_only else [],
                )
                check_hooks(job.hooks)
                state, position = saving.take_up(job)
                # Not before: a run that is refused, or has nothing to do, leaves no word behind.
                if main_only and not loop.is_over(config, state):
                    write_run_file(config.model_dir, self._description(), resumed=state.step > 0)
                self._has_weights = self._has_learnt = True
                try:
                    state = loop.train(job, state, position)
                finally:
                    _show_profile(job.profiler, Path(config.model_dir) / PROFILE)
                if job.average is not None:
                    job.average.apply()  # what was evaluated and exported
                return state

    def _check_device(self) -> None:
        """Makes the model, which sets the device, and checks that it can train in the precision wanted."""
        _ = self.model
        Precision.of(self.run_config.precision, paddle.get_device())

    def _job(self, train_dataset: Dataset, step_strategy: StepStrategy, **more: Any) -> Job:
        config, device = self.run_config, paddle.get_device()
        return Job(
            model=self.model,
            optimizer=self.model.optimizer(),
            run_config=config,
            train_dataset=train_dataset,
            checkpointer=self._checkpointer,
            step_strategy=step_strategy,
            ranks=self.ranks,
            precision=Precision.of(config.precision, device),
            profiler=Profiler(config.profile, device=device, rank=self.ranks.rank),
            **more,
        )

    @contextlib.contextmanager
    def _opened(self, restart: bool) -> Iterator[None]:
        """Holds `model_dir` for this run, with first weights and what training sets in the process."""
        model_dir = Path(self.run_config.model_dir)
        with contextlib.ExitStack() as stack:
            if self.ranks.is_main:
                if restart:
                    atomic.set_aside(model_dir)
                stack.enter_context(atomic.FolderLock(model_dir))
            begins = not self._checkpointer.steps()
            if self.ranks.broadcast(begins and self._has_learnt):  # not on from what this one has learnt
                self._model, self._has_weights, self._has_learnt = None, False, False
            if begins and self.ranks.is_main and self._warm_start_setting is not None:
                warm_start(self.model, self._warm_start_setting)  # the other ranks get it from here
            stack.enter_context(training_settings())
            yield

    def find_learning_rate(
        self,
        train_dataset: Dataset,
        *,
        lowest: float = 1e-7,
        highest: float = 1.0,
        num_steps: int = 200,
        step_strategy: StepStrategy = plain_step,
    ) -> Trial:
        """Tries learning rates that rise from `lowest` to `highest` on the first weights of a run.

        Leaves no trace: weights and generators are put back, nothing is written.

        Raises:
            ConfigError: the rates do not rise, or there are fewer than 10 steps.
            DataError: the data ends after fewer than 10 batches.
            NonFiniteLossError: the loss of the first weights is not finite.
        """
        with self.ranks.telling():
            self._check_device()
            if not self._has_weights and self._warm_start_setting is not None:
                warm_start(self.model, self._warm_start_setting)
            self.ranks.broadcast_tensors(list(self.model.state_dict().values()))
            job = self._job(train_dataset, step_strategy, data=[], eval_datasets={}, hooks=[], exporters=[])
            with training_settings():
                return find_learning_rate(job, lowest=lowest, highest=highest, num_steps=num_steps)

    def _description(self) -> dict[str, Any]:
        versions = {
            "ernie-propeller": __version__,
            "paddle": paddle.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        }
        return {
            "run_config": self.run_config.to_dict(),
            "hparams": dict(self.hparams),
            "versions": versions,
            "device": paddle.get_device(),
            "ranks": self.ranks.size,
        }

    def evaluate(self, eval_dataset: Dataset, *, ckpt: int | None = None) -> dict[str, Any]:
        """Evaluates the live model, or the checkpoint of step `ckpt` (-1: the newest).

        With several ranks all call this.

        Returns:
            `loss`, every metric by name, and `n`.
        """
        with self.ranks.telling():
            if self.ranks.is_main:
                self._restore(ckpt)
            self.ranks.broadcast_tensors(list(self.model.state_dict().values()))
            self._has_weights = True
            return evaluate(self.model, eval_dataset, self.run_config.eval_max_steps, ranks=self.ranks)

    def predict(self, dataset: Dataset, *, ckpt: int | None = None) -> Iterator[dict[str, Any]]:
        """Yields the outputs of each example, in order; with several ranks, on each rank that calls this.

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
            weights = {**checkpoint.model, **(checkpoint.average if self.run_config.ema_decay else {})}
            set_weights(self.model, weights, self._checkpointer.path(checkpoint.state.step))
            self._has_learnt = True
        elif ckpt is None and self._warm_start_setting is not None:
            warm_start(self.model, self._warm_start_setting)
        else:
            raise CheckpointError(f"{self._checkpointer.folder} has no checkpoint. Train first.")
        self._has_weights = True


def _own_hooks() -> list[Hook]:
    return [LoggingHook(), ProgressHook(), SummaryHook(), CurvesHook()]


def _show_profile(profiler: Profiler, folder: Path) -> None:
    if profiler.enabled and profiler.rank == 0:
        log.info("profile, also in %s:\n%s", folder, profiler.table())
        profiler.write(folder)


def train_and_eval(
    model_class_or_model_fn: type[Model] | ModelFactory,
    params: Mapping[str, Any],
    run_config: RunConfig,
    train_dataset: Dataset,
    eval_dataset: Dataset | Mapping[str, Dataset],
    warm_start_setting: WarmStartSetting | None = None,
    train_hooks: Sequence[Hook] = (),
    **options: Any,
) -> Learner:
    """Trains with evaluation every `eval_steps` and always at the end.

    Args:
        model_class_or_model_fn, params, run_config, warm_start_setting: see `Learner`.
        train_dataset: batches.
        eval_dataset: batches, or several sets by name.
        train_hooks: see `Learner.train`.
        options: `exporters`, `step_strategy` and `restart`: likewise.

    Returns:
        The learner, with the model as training left it.
    """
    learner = Learner(model_class_or_model_fn, run_config, params, warm_start_setting)
    sets = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval": eval_dataset}
    learner.train(train_dataset, eval_datasets=sets, hooks=train_hooks, **options)
    return learner


__all__ = ["Learner", "train_and_eval"]

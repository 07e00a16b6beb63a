"""What a user writes: a network with its loss, optimizer and metrics."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from propeller.bundle import ArraySpec
from propeller.errors import ConfigError, DataError
from propeller.metrics import Metric
from propeller.paddle.runtime import paddle
from propeller.types import HParams, RunConfig, RunMode

Tensors = dict[str, "paddle.Tensor"]


class Model(paddle.nn.Layer, abc.ABC):
    """A network, its loss, its optimizer and its metrics. One live instance trains, evaluates, predicts.

    Attributes:
        inputs: what `forward` takes, by name, dtype and axes; an export needs it. None hands every
            numeric column but the labels to `forward`.
        axis_limits: how long a named axis of the inputs can be, such as `{"seq_len": 512}`.
        label_names: the columns that `loss` and the metrics get. They may be absent in prediction.
        identity: what must stay as it is while a run goes on, besides the shapes of the weights: the number
            of attention heads, say. JSON must hold it; a resume compares it.
        hparams: the hyper-parameters.
        run_config: the run configuration.
    """

    inputs: tuple[ArraySpec, ...] | None = None
    axis_limits: Mapping[str, int] = {}
    label_names: tuple[str, ...] = ("label",)
    identity: Mapping[str, Any] = {}

    def __init__(self, hparams: HParams, mode: RunMode, run_config: RunConfig):
        super().__init__()
        self.hparams = hparams
        self.run_config = run_config
        self.mode = mode

    @property
    def mode(self) -> RunMode:
        """TRAIN, EVAL or PREDICT; setting it switches dropout and the like."""
        return self._mode

    @mode.setter
    def mode(self, mode: RunMode) -> None:
        self._mode = mode
        if mode is RunMode.TRAIN:
            self.train()
        else:
            self.eval()

    @abc.abstractmethod
    def forward(self, features: Tensors) -> Tensors | paddle.Tensor:
        """Computes the outputs (by name; a lone tensor is called `logits`) of a batch, rows first."""

    @abc.abstractmethod
    def loss(self, predictions: Any, labels: Any) -> tuple[paddle.Tensor, Any] | paddle.Tensor:
        """Computes the loss of a batch.

        Args:
            predictions: what `forward` returned.
            labels: the label tensor, or with several `label_names` a dictionary of them.

        Returns:
            `(sum, weight)`: the summed loss and what to divide it by (examples, or tokens), so that
            the parts of a batch, on several ranks or one after the other, divide once, by the whole
            weight. Or a scalar, taken as the mean over the examples.
        """

    @abc.abstractmethod
    def optimizer(self) -> paddle.optimizer.Optimizer:
        """Builds the optimizer, its schedule and clipping over `self.parameters()`."""

    def metrics(self) -> dict[str, Metric]:
        """New, empty metrics by name; none by default."""
        return {}


ModelFactory = Callable[[HParams, RunMode, RunConfig], Model]


def build_model(
    factory: type[Model] | ModelFactory, hparams: HParams, mode: RunMode, run_config: RunConfig
) -> Model:
    """Calls the user's class or function.

    Raises:
        ConfigError: it returned something that is no `Model`.
    """
    model = factory(hparams, mode, run_config)
    if not isinstance(model, Model):
        raise ConfigError(f"{factory!r} returned {type(model).__name__}, expected a propeller Model.")
    model.mode = mode  # once more, for the layers that were made after the base class
    return model


@dataclasses.dataclass(frozen=True)
class Batch:
    """A padded batch, split into what `forward`, `loss` and only the host need.

    Attributes:
        columns: everything, as numpy arrays and lists.
        features: tensors for `forward`.
        labels: tensors by label name; empty where the data has none.
        num_examples: rows.
        num_tokens: input positions that are no padding (rows, for inputs without a length).
    """

    columns: Mapping[str, Any]
    features: Tensors
    labels: Tensors
    num_examples: int
    num_tokens: int

    @classmethod
    def of(cls, model: Model, columns: Mapping[str, Any]) -> Batch:
        """Moves what the model needs of a batch to its device.

        Raises:
            DataError: a column that the model's `inputs` name is missing.
        """
        if model.inputs is None:
            wanted = [
                name
                for name, value in columns.items()
                if isinstance(value, np.ndarray) and name not in model.label_names
            ]
        else:
            wanted = [spec.name for spec in model.inputs]
        missing = [name for name in wanted if name not in columns]
        if missing or not wanted:
            raise DataError(
                f"The batch has the columns {sorted(columns)}, but the model's inputs are "
                f"{wanted or 'any numeric column'}; missing: {missing}."
            )
        first = columns[wanted[0]]
        return cls(
            columns=columns,
            features={name: paddle.to_tensor(columns[name]) for name in wanted},
            labels={name: paddle.to_tensor(columns[name]) for name in model.label_names if name in columns},
            num_examples=len(first),
            num_tokens=_num_tokens(model, columns, first),
        )


def part_of(columns: Mapping[str, Any], part: int, num_parts: int) -> dict[str, Any]:
    """Every `num_parts`-th row of a batch, from row `part` on; there may be none.

    Raises:
        DataError: the columns do not have the same number of rows.
    """
    rows = {name: len(value) if np.ndim(value) or isinstance(value, list) else None
            for name, value in columns.items()}  # fmt: skip
    if len(set(rows.values())) != 1 or None in rows.values():
        raise DataError(
            f"A batch is cut into {num_parts} parts by its rows, but its columns have {rows} rows; expected "
            "the same number in all."
        )
    return {name: value[part::num_parts] for name, value in columns.items()}


def _num_tokens(model: Model, columns: Mapping[str, Any], first: np.ndarray) -> int:
    if "attention_mask" in columns:
        return int(np.count_nonzero(columns["attention_mask"]))
    if first.ndim < 2 or first.dtype.kind not in "iu":
        return len(first)
    pad_value = model.inputs[0].pad_value if model.inputs else 0
    return int(np.count_nonzero(first != pad_value))


def run_loss(model: Model, predictions: Any, batch: Batch) -> tuple[paddle.Tensor, float]:
    """Calls `loss` and brings its result into the form `(sum, weight)`.

    Raises:
        DataError: the batch has no labels, or its weight is negative or no number.
    """
    missing = [name for name in model.label_names if name not in batch.labels]
    if missing:
        raise DataError(f"The batch has no column {missing} to learn from; it has {sorted(batch.columns)}.")
    labels = batch.labels if len(batch.labels) != 1 else next(iter(batch.labels.values()))
    result = model.loss(predictions, labels)
    if not isinstance(result, tuple):
        return result * batch.num_examples, float(batch.num_examples)
    total, weight = result
    weight = float(weight.item() if hasattr(weight, "item") else weight)
    if not weight >= 0:
        raise DataError(f"The loss of a batch has the weight {weight}; expected a number of 0 or more.")
    return total, weight


def to_numpy(predictions: Any) -> dict[str, np.ndarray]:
    """Brings the result of `forward` to the host, by name."""
    if not isinstance(predictions, Mapping):
        predictions = {"logits": predictions}
    return {name: tensor.numpy() for name, tensor in predictions.items()}

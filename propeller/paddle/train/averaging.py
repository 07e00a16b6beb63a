"""An exponential moving average of the weights, which often evaluates better than the weights themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from propeller.errors import CheckpointError, ConfigError
from propeller.paddle.runtime import paddle


class WeightAverage:
    """Averages the parameters of a model that are trained: floating, and not frozen.

    Buffers and frozen parameters are not averaged. The average starts as a copy of the weights, so make it
    after a warm start and before the first step. It stays on the device, and takes the memory of the
    weights once more.

    Args:
        model: the live model.
        decay: how much of the average stays at each update, such as 0.999; between 0 and 1.

    Raises:
        ConfigError: `decay` is out of range, or nothing is trained.

    Source: Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging", for averages of
    weights; their exponential form with `min(decay, (1 + t) / (10 + t))` for the first updates is that of
    TensorFlow's `tf.train.ExponentialMovingAverage(decay, num_updates=t)`.
    """

    def __init__(self, model: paddle.nn.Layer, decay: float):
        if not 0.0 < decay < 1.0:
            raise ConfigError(
                f"ema_decay must be between 0 and 1, both excluded, got {decay}. Usual: 0.99 to 0.9999."
            )
        self.decay = decay
        self.num_updates = 0
        self._weights: dict[str, paddle.Tensor] = {
            name: parameter
            for name, parameter in model.named_parameters()
            if not parameter.stop_gradient and parameter.is_floating_point()
        }
        if not self._weights:
            raise ConfigError("There is nothing to average: the model has no parameter that is trained.")
        self._averages = self._copies()

    def _copies(self) -> dict[str, paddle.Tensor]:
        with paddle.no_grad():
            return {name: weight.clone() for name, weight in self._weights.items()}

    def update(self) -> None:
        """Takes in the weights: `average = d * average + (1 - d) * weight`, `d = min(decay, (1+t)/(10+t))`.

        To be called after each optimizer step; `t` counts the calls before this one.
        """
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        with paddle.no_grad():
            for name, weight in self._weights.items():
                # As a number it is a vector of one to Paddle, which would make one of a scalar average.
                step = paddle.full([], 1.0 - decay, weight.dtype)
                self._averages[name].lerp_(weight, step)
        self.num_updates += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the averages into the live model for the block, and the trained weights back after it.

        The parameters stay the same objects. The weights come back bit for bit, after an error as well.
        """
        trained = self._copies()
        try:
            _copy(self._averages, self._weights)
            yield
        finally:
            _copy(trained, self._weights)

    def apply(self) -> None:
        """Puts the averages into the live model for good."""
        _copy(self._averages, self._weights)

    def tensors(self) -> dict[str, paddle.Tensor]:
        """The averages by the structured names of their parameters; the next `update` changes them."""
        return dict(self._averages)

    def load(self, tensors: Mapping[str, paddle.Tensor], num_updates: int) -> None:
        """Goes on from what `tensors` and `num_updates` were.

        Raises:
            CheckpointError: a name is missing or left over, or a shape or dtype differs; all are listed.
                Nothing was loaded then.
        """
        own = self._averages
        problems = [f"missing: {name}" for name in own if name not in tensors]
        problems += [f"left over: {name}" for name in tensors if name not in own]
        problems += [
            f"{name}: {_kind(tensors[name])} where the model has {_kind(average)}"
            for name, average in own.items()
            if name in tensors and _kind(tensors[name]) != _kind(average)
        ]
        if num_updates < 0:
            problems.append(f"num_updates: {num_updates}, which must not be negative")
        if problems:
            raise CheckpointError(
                "The saved averages of the weights do not fit the parameters that are trained (were others "
                "frozen then?): " + "; ".join(problems)
            )
        _copy(tensors, own)
        self.num_updates = num_updates


def _copy(sources: Mapping[str, paddle.Tensor], targets: Mapping[str, paddle.Tensor]) -> None:
    with paddle.no_grad():
        for name, target in targets.items():
            target.copy_(sources[name], True)


def _kind(tensor: paddle.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('paddle.')}"

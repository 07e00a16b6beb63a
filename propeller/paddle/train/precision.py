"""float32, float16 and bfloat16 training: automatic casts, and a loss scale for float16.

Source: Micikevicius et al., "Mixed Precision Training", section 3.2: gradients below 2**-24 are zero in
float16, so the loss is multiplied before the backward pass and the gradients are divided after it, by a
factor that grows while all is well and falls when something overflowed.

The casts themselves were not run on a GPU by this project's tests. The loss scale is tested on a CPU;
`paddle.amp.GradScaler`, which does the same, switches itself off there.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from propeller.errors import CheckpointError, ConfigError, did_you_mean
from propeller.paddle.runtime import paddle

log = logging.getLogger("propeller")

_DTYPES: dict[str, str | None] = {"fp32": None, "fp16": "float16", "bf16": "bfloat16"}

# Powers of two only, so that a gradient that is not lost is the same to the bit with and without a scale.
INITIAL_SCALE = 2.0**15
GROWTH_STEPS = 1000


class Precision:
    """In what precision a model is trained; made by `Precision.of`. The weights stay float32.

    One step:

        with precision.autocast():
            ...forward and loss...
        precision.scaled(loss).backward()
        # gradients are summed over micro-batches and ranks
        finite = precision.unscale(parameters)
        if finite:
            ...clip and optimizer...
        precision.update(finite)

    This class is fp32 and bf16, which need no scale: what concerns it does nothing.

    Attributes:
        name: `fp32`, `fp16` or `bf16`.
        may_overflow: a loss or gradient that is not finite can be the precision's doing, so that the step
            is skipped and not the run ended.
    """

    may_overflow = False

    def __init__(self, name: str):
        self.name = name
        self._dtype = _DTYPES[name]

    @staticmethod
    def of(name: str, device: str) -> Precision:
        """Makes the precision `name` for a device.

        Args:
            name: `fp32`, `fp16` or `bf16`.
            device: Paddle's name of the device that the process uses, as `paddle.get_device()` gives it.

        Raises:
            ConfigError: there is no such precision, or the device cannot train in it.
        """
        if name not in _DTYPES:
            raise ConfigError(
                f"Unknown precision {name!r}.{did_you_mean(name, _DTYPES)} Known: {', '.join(_DTYPES)}."
            )
        if name == "fp32":
            return Precision(name)
        if device.partition(":")[0] == "cpu":
            raise ConfigError(
                f"precision {name} needs a GPU or another accelerator, and the device is {device}. On a CPU "
                "Paddle's automatic casts do nothing, and its eager operators have no bfloat16. Train in "
                "fp32; prediction has bfloat16 on a CPU, with --bf16."
            )
        half = name == "fp16"
        supported = paddle.amp.is_float16_supported if half else paddle.amp.is_bfloat16_supported
        if not supported(device):
            raise ConfigError(
                f"{device} cannot train in {name}, says this build of Paddle. Take "
                f"{'fp32' if half else 'fp16 or fp32'}."
            )
        return _Fp16() if half else Precision(name)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context for forward and loss: Paddle casts what gains by it (level O1, its own lists).

        Outputs can come as the half type; numpy has no bfloat16, so cast them before `numpy()`.
        """
        if self._dtype is None:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = paddle.amp.auto_cast(dtype=self._dtype, level="O1")
        return context

    def scaled(self, loss: paddle.Tensor) -> paddle.Tensor:
        """What to call `backward` on."""
        return loss

    def unscale(self, parameters: Iterable[paddle.Tensor]) -> bool:
        """Divides the gradients by the scale, in place; those missing are passed over.

        Call it when they are summed over the ranks: then one rank's overflow is every rank's, and all
        answer alike.

        Returns:
            Whether all are finite. If not, none of them is of use any more.
        """
        return True

    def update(self, finite: bool) -> None:
        """Adapts the scale to what `unscale` said.

        Raises:
            FloatingPointError: the gradients overflow at a scale of 1 as well.
        """

    def state(self) -> dict[str, Any]:
        """JSON-able state for the checkpoint."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave; that of a run in another precision changes nothing.

        Raises:
            CheckpointError: it is damaged.
        """


class _Fp16(Precision):
    """float16 with a dynamic loss scale.

    Attributes:
        scale: what the loss is multiplied by; a power of two, at least 1.
    """

    may_overflow = True

    def __init__(self) -> None:
        super().__init__("fp16")
        self.scale = INITIAL_SCALE
        self._good_steps = 0  # since the scale was last changed

    def scaled(self, loss: paddle.Tensor) -> paddle.Tensor:
        return loss.astype("float32") * self.scale  # in float16 the product itself would overflow

    def unscale(self, parameters: Iterable[paddle.Tensor]) -> bool:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return True
        if any(gradient.dtype != paddle.float32 for gradient in gradients):
            found = sorted({str(gradient.dtype).removeprefix("paddle.") for gradient in gradients})
            raise ConfigError(
                f"precision fp16 casts by itself and needs float32 parameters; the gradients here are "
                f"{', '.join(found)}. Leave the model's parameters in float32."
            )
        # One kernel over all of them, and the one that Paddle's own scaler calls.
        _, overflow = paddle._C_ops.check_finite_and_unscale_(gradients, paddle.to_tensor([self.scale]))
        return not overflow.item()

    def update(self, finite: bool) -> None:
        if not finite:
            if self.scale <= 1.0:
                raise FloatingPointError(
                    "The gradients are not finite although the loss scale of fp16 fell to 1, so it is not "
                    "the scale that is wrong,"
                )
            self.scale /= 2.0
            self._good_steps = 0
            log.info("fp16: the gradients overflowed; step skipped, loss scale now %g", self.scale)
            return
        self._good_steps += 1
        if self._good_steps >= GROWTH_STEPS:
            self.scale *= 2.0
            self._good_steps = 0

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale, "good_steps": self._good_steps}

    def load(self, state: Mapping[str, Any]) -> None:
        if not state:  # of a run that was not in fp16 so far
            return
        try:
            scale, good_steps = float(state["scale"]), int(state["good_steps"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"The saved loss scale cannot be read: {error!r} in {dict(state)}."
            ) from error
        if not (math.isfinite(scale) and scale >= 1.0 and good_steps >= 0):
            raise CheckpointError(f"The saved loss scale is damaged: {dict(state)}; a scale is at least 1.")
        self.scale, self._good_steps = scale, good_steps

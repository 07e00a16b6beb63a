"""Runs a bundle through Paddle Inference: oneDNN on a CPU, bf16 on request."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from propeller import bundle
from propeller.bundle import Bundle
from propeller.errors import ConfigError, ExportError
from propeller.inputs import check_inputs
from propeller.paddle.runtime import available_cores, check_card, paddle

log = logging.getLogger("propeller")

# oneDNN keeps what it prepared for so many shapes, the least recently used one goes first. In bf16 that
# includes a copy of most weights for each shape.
_SHAPE_CACHE = {"onednn": 256, "bf16": 8}
_FP32_TOLERANCE = 1e-4
_BF16_TOLERANCE = 5e-2


class Predictor:
    """A loaded bundle: `predict(arrays) -> arrays`, row by row.

    At load it runs the bundle's own probe batch. Some models crash oneDNN or differ under it; then
    it falls back to plain Paddle Inference with a warning.

    Args:
        source: a bundle, or its folder.
        device: any device Paddle knows; what Paddle Inference does not run on becomes `cpu`, with a
            line in the log. A GPU must be there.
        num_threads: threads for the math; None takes `OMP_NUM_THREADS`, which is the cores this process
            may use where nobody set it.
        bf16: compute in bfloat16 on a CPU (needs oneDNN).

    Raises:
        ExportError: no bundle, a damaged one, or one whose outputs are not the exported model's.
        ConfigError: a GPU that is not there, or bf16 on a GPU.
    """

    def __init__(
        self,
        source: Bundle | str | Path,
        *,
        device: str = "cpu",
        num_threads: int | None = None,
        bf16: bool = False,
    ):
        self.bundle = source if isinstance(source, Bundle) else bundle.read_bundle(source)
        kind = device.partition(":")[0]
        if kind not in ("cpu", "gpu"):
            log.info("Paddle Inference does not run on %s: predicting on the CPU", device)
            kind = device = "cpu"
        self._device, self._num_threads = device, num_threads or _default_threads()
        if bf16 and kind != "cpu":
            raise ConfigError("bf16 is for the CPU predictor; got a GPU.")
        if kind == "gpu":
            check_card(device)
        modes = ["onednn", "plain"] if kind == "cpu" else ["gpu"]
        if bf16:
            modes.insert(0, "bf16")
        self.mode = self._first_that_works(modes)

    def _first_that_works(self, modes: list[str]) -> str:
        problems = []
        for mode in modes:
            try:
                self._load(mode)
                self._check_probe(_BF16_TOLERANCE if mode == "bf16" else _FP32_TOLERANCE)
            except (RuntimeError, ValueError, OSError, ExportError) as error:
                problems.append(f"{mode}: {(str(error).strip() or repr(error)).splitlines()[-1]}")
                continue
            if problems:
                warnings.warn(
                    f"{self.bundle.folder} runs as {mode}, since its self-test failed: "
                    + "; ".join(problems),
                    RuntimeWarning,
                    stacklevel=3,
                )
            return mode
        raise ExportError(f"{self.bundle.folder} cannot be run: " + "; ".join(problems))

    def _load(self, mode: str) -> None:
        self._predictor = paddle.inference.create_predictor(self._config(mode))
        # By name: an input that the model does not really use is not in the graph.
        self._inputs = {
            name: self._predictor.get_input_handle(name) for name in self._predictor.get_input_names()
        }
        self._outputs = [
            self._predictor.get_output_handle(name) for name in self._predictor.get_output_names()
        ]

    def _config(self, mode: str) -> paddle.inference.Config:
        model = self.bundle.folder / bundle.MODEL
        config = paddle.inference.Config(f"{model}.json", f"{model}.pdiparams")
        config.disable_glog_info()
        if mode == "gpu":
            index = self._device.partition(":")[2] or "0"
            config.enable_use_gpu(256, int(index))
        else:
            config.disable_gpu()
            config.set_cpu_math_library_num_threads(self._num_threads)
        if mode in _SHAPE_CACHE:
            config.enable_mkldnn()
            config.set_mkldnn_cache_capacity(_SHAPE_CACHE[mode])
        if mode == "plain":
            config.disable_mkldnn()  # it is on by default
        if mode == "onednn":
            # Fused with its bias, a matrix product keeps a reordered copy of its weights for each shape of
            # the input: 10 GB for 250 shapes of a model of 90 MB. Without the fusion memory stays flat, a new
            # shape is prepared in half the time, and all others take 2 % longer, a lone short row 7 %. In
            # bf16 that would be up to 30 %.
            config.delete_pass("matmul_add_act_fuse_pass")
        if mode == "bf16":
            config.enable_mkldnn_bfloat16()
        # No enable_memory_optim(): it crashes with PIR models (Paddle 3.3.1). And no computing in place:
        # an output that another one is made of can be overwritten. It costs no speed.
        config.delete_pass("inplace_pass")
        return config

    def _check_probe(self, tolerance: float) -> None:
        inputs, expected = self.bundle.probe()
        outputs = self.predict(inputs)
        for name, array in expected.items():
            if outputs[name].shape != array.shape:
                raise ExportError(f"output {name} is {outputs[name].shape}, was {array.shape} at export")
            scale = max(1.0, float(np.abs(array[np.isfinite(array)]).max(initial=0)))
            # isclose also takes bool, and infinities, which are equal to themselves; NaN never fits.
            close = np.isclose(outputs[name], array, rtol=0.0, atol=tolerance * scale)
            if not close.all():
                found, wanted = (values[~close].astype(np.float64) for values in (outputs[name], array))
                with np.errstate(invalid="ignore"):
                    difference = np.abs(found - wanted).max()
                raise ExportError(
                    f"output {name} differs from the exported model's by {difference:.2g} on the probe batch"
                )

    def predict(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch.

        Args:
            arrays: every input of the bundle by name; `check_inputs` says what is cast.

        Returns:
            Every output by name, with as many rows as the inputs.

        Raises:
            DataError: the inputs are not what the bundle wants; see `check_inputs`.
        """
        fitting = check_inputs(self.bundle.inputs, arrays, self.bundle.axis_limits)
        rows = len(fitting[self.bundle.inputs[0].name])
        for name, handle in self._inputs.items():
            handle.copy_from_cpu(fitting[name])
        self._predictor.run()
        outputs = {
            spec.name: handle.copy_to_cpu()
            for spec, handle in zip(self.bundle.outputs, self._outputs, strict=True)
        }
        for name, array in outputs.items():
            if len(array) != rows:
                raise ExportError(f"Output {name!r} has {len(array)} rows for {rows} of input.")
        return outputs


def _default_threads() -> int:
    """What the user, or `propeller.paddle.runtime`, put into `OMP_NUM_THREADS`."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(first) if first.isdecimal() and int(first) else available_cores()

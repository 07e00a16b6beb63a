"""Pretrained folders: what is in them, in plain arrays. No model is made here, so no Paddle is needed.

The project's own layout is `ernie_config.json`, `model.safetensors` and the files of the tokenizer.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ernie.config import ErnieConfig
from ernie.convert.huggingface import from_huggingface, is_huggingface
from ernie.convert.torch_pickle import read_torch_file
from propeller.atomic import new_file, to_json, write_text
from propeller.errors import CheckpointError, ConfigError, did_you_mean
from propeller.tensors import read_safetensors

log = logging.getLogger("ernie")

CONFIG_FILE = "ernie_config.json"
WEIGHTS_FILE = "model.safetensors"
_CONFIG_FILES = (CONFIG_FILE, "config.json", "bert_config.json")
_OWN_ANCHOR = "embeddings.word.weight"


def load_pretrained_config(folder: str | Path) -> ErnieConfig:
    """Reads only the configuration of a folder that `load_pretrained_state` can read.

    Raises:
        CheckpointError: the folder is of a kind that cannot be read, or a file is missing.
        ConfigError: the configuration cannot be used.
    """
    folder = Path(folder)
    _find_weights(folder)  # a folder of old Paddle weights is told apart before its lack of files is
    return ErnieConfig.from_file(_find_config(folder))


def load_pretrained_state(folder: str | Path) -> tuple[ErnieConfig, dict[str, np.ndarray]]:
    """Reads the configuration and the weights of a pretrained folder.

    Args:
        folder: the project's own layout, or a Transformers BERT or ERNIE folder as it is:
            `config.json` with `model.safetensors` or `pytorch_model.bin`. If there are both, the
            former is read.

    Returns:
        The configuration, and the encoder's parameters by their names in `ErnieModel`; floating-point
        ones as float32. Tensors that are none of the encoder's stand beside them under the names and
        in the layout that the file has them in.

    Raises:
        CheckpointError: the folder or a file in it is missing, cannot be read, or is of a kind that
            this project does not read (yet).
        ConfigError: the configuration cannot be used.
    """
    folder = Path(folder)
    weights, read = _find_weights(folder)
    config = ErnieConfig.from_file(_find_config(folder))
    tensors = {name: _as_float32(tensor) for name, tensor in read(weights).items()}
    if _OWN_ANCHOR in tensors:
        return config, tensors
    if is_huggingface(tensors):
        return config, from_huggingface(tensors, config)
    raise CheckpointError(
        f"{weights} is no ERNIE or BERT encoder: it has neither {_OWN_ANCHOR} nor Transformers' "
        f"embeddings.word_embeddings.weight, but {_some(sorted(tensors)) or 'nothing'}."
    )


def save_pretrained_state(folder: str | Path, config: ErnieConfig, state: Mapping[str, np.ndarray]) -> None:
    """Writes configuration and weights in the project's own layout; each file replaces an older one at once.

    Args:
        folder: made if it is not there.
        config: the encoder's.
        state: its parameters, named as in `ErnieModel`.
    """
    folder = Path(folder)
    arrays = {name: np.ascontiguousarray(array) for name, array in state.items()}
    with new_file(folder / WEIGHTS_FILE) as temporary:
        save_file(arrays, temporary)
    write_text(folder / CONFIG_FILE, to_json(config.to_dict(), indent=2) + "\n")


def match_weights(
    shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, np.ndarray], *, new: Iterable[str] = ()
) -> list[str]:
    """Compares what a model needs with what a file has, and logs what is not the same.

    Args:
        shapes: the model's parameters.
        state: the file's tensors by the same names.
        new: patterns (`fnmatch`) of parameters that may be missing or of another shape in the file.

    Returns:
        The parameters to be loaded.

    Raises:
        CheckpointError: a parameter that is not named as new is missing or has another shape.
        ConfigError: a pattern of `new` names no parameter of the model.
    """
    patterns = tuple(new)
    for pattern in patterns:
        if not fnmatch.filter(shapes, pattern):
            raise ConfigError(
                f"No parameter of the model matches {pattern!r}, which was named as new."
                f"{did_you_mean(pattern, shapes)}"
            )
    fitting, unfit, problems = [], [], []
    for name, shape in shapes.items():
        found = state.get(name)
        if found is not None and found.shape == tuple(shape) and found.dtype.kind == "f":
            fitting.append(name)
        elif any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            unfit.append(name)
        elif found is None:
            problems.append(f"{name} is missing")
        else:
            problems.append(
                f"{name} is {found.dtype} {list(found.shape)} in the file, {list(shape)} in the model"
            )
    left = _some(sorted(state.keys() - shapes.keys())) or "none"
    if problems:
        raise CheckpointError(
            f"The weights do not fit the model: {_some(problems)}. Left over in the file: {left}. "
            "Use the configuration that belongs to the weights, or name these parameters as new."
        )
    log.info("%d parameters loaded; new: %s; left over: %s", len(fitting), _some(unfit) or "none", left)
    return fitting


_READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    WEIGHTS_FILE: read_safetensors,
    "pytorch_model.bin": read_torch_file,
}


def _find_weights(folder: Path) -> tuple[Path, Callable[[Path], dict[str, np.ndarray]]]:
    if not folder.is_dir():
        kind = "is a file, not" if folder.exists() else "is not"
        raise CheckpointError(f"{folder} {kind} a folder. Nothing is downloaded: give the path of one.")
    for name, read in _READERS.items():
        if (folder / name).is_file():
            return folder / name, read
    if (folder / "params").is_dir() or (folder / "word_embedding").is_file():
        raise CheckpointError(
            f"{folder} holds parameters of the old Paddle Fluid, one file each. Their converter is not "
            "there yet; a Transformers folder of the same model can be read."
        )
    foreign = sorted(folder.glob("*.pdparams"))
    if foreign:
        raise CheckpointError(
            f"{foreign[0]} holds weights as Paddle pickles them. Their converter is not there yet; a "
            "Transformers folder of the same model can be read."
        )
    raise CheckpointError(
        f"{folder} holds no weights: {' or '.join(_READERS)} was looked for, and what is there is "
        f"{_some(sorted(path.name for path in folder.iterdir())) or 'nothing'}."
    )


def _find_config(folder: Path) -> Path:
    for name in _CONFIG_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"{folder} holds weights but no configuration: {', '.join(_CONFIG_FILES)} were looked for."
    )


def _as_float32(tensor: np.ndarray) -> np.ndarray:
    return tensor.astype(np.float32, copy=False) if tensor.dtype.kind == "f" else tensor


def _some(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more

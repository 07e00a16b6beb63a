"""Pretrained folders: what is in them, in plain arrays. No model is made here, so no Paddle is needed.

The project's own layout is `ernie_config.json`, `model.safetensors` and, if there is one, `vocab.txt`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save_file

from ernie.config import ErnieConfig
from ernie.convert.huggingface import from_huggingface, is_huggingface
from ernie.convert.torch_pickle import read_torch_file, widen_bfloat16
from propeller.atomic import to_json, write_text
from propeller.errors import CheckpointError, ConfigError, did_you_mean

CONFIG_FILE = "ernie_config.json"
WEIGHTS_FILE = "model.safetensors"
VOCAB_FILE = "vocab.txt"
_CONFIG_FILES = (CONFIG_FILE, "config.json", "bert_config.json")
_OWN_ANCHOR = "embeddings.word.weight"


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """Which parameters of a model a file gave.

    Attributes:
        loaded: parameters that have the file's values now.
        missing: parameters that keep their new values, as was allowed.
        unexpected: tensors of the file that the model has no place for.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} parameters loaded"]
        if self.missing:
            lines.append(f"{len(self.missing)} new: {', '.join(self.missing)}")
        if self.unexpected:
            lines.append(f"{len(self.unexpected)} tensors left over: {', '.join(self.unexpected)}")
        return "; ".join(lines)


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


def save_pretrained_state(
    folder: str | Path,
    config: ErnieConfig,
    state: Mapping[str, np.ndarray],
    *,
    vocab_file: str | Path | None = None,
) -> None:
    """Writes the project's own layout; each file replaces an older one at once.

    Args:
        folder: made if it is not there.
        config: the encoder's.
        state: its parameters, named as in `ErnieModel`.
        vocab_file: copied to `vocab.txt`; None leaves it out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(array) for name, array in state.items()}
    _replace(folder / WEIGHTS_FILE, lambda temporary: save_file(arrays, temporary))
    if vocab_file is not None:
        _replace(folder / VOCAB_FILE, lambda temporary: shutil.copyfile(vocab_file, temporary))
    write_text(folder / CONFIG_FILE, to_json(config.to_dict(), indent=2) + "\n")


def match_weights(
    shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, np.ndarray], *, new: Iterable[str] = ()
) -> LoadReport:
    """Compares what a model needs with what a file has.

    Args:
        shapes: the model's parameters.
        state: the file's tensors by the same names.
        new: patterns (`fnmatch`) of parameters that may be missing or of another shape in the file.

    Returns:
        What to load, what stays new, and what is left over.

    Raises:
        CheckpointError: a parameter that is not named as new is missing or has another shape.
        ConfigError: a pattern of `new` names no parameter of the model.
    """
    new = tuple(new)
    for pattern in new:
        if not fnmatch.filter(shapes, pattern):
            raise ConfigError(
                f"No parameter of the model matches {pattern!r}, which was named as new."
                f"{did_you_mean(pattern, shapes)}"
            )
    fitting = [
        name
        for name, shape in shapes.items()
        if name in state and state[name].shape == tuple(shape) and state[name].dtype.kind == "f"
    ]
    unfit = [name for name in shapes if name not in fitting]
    refused = [name for name in unfit if not any(fnmatch.fnmatchcase(name, pattern) for pattern in new)]
    absent = [name for name in refused if name not in state]
    differing = [
        f"{name} {state[name].dtype} {list(state[name].shape)} in the file, {list(shapes[name])} in the model"
        for name in refused
        if name in state
    ]
    unexpected = sorted(name for name in state if name not in shapes)
    if refused:
        problems = []
        if absent:
            problems.append(f"missing: {_some(absent)}")
        if differing:
            problems.append(f"of another shape: {_some(differing)}")
        if unexpected:
            problems.append(f"left over in the file: {_some(unexpected)}")
        raise CheckpointError(
            f"The weights do not fit the model. {'; '.join(problems)}. "
            "Use the configuration that belongs to the weights, or name these parameters as new."
        )
    return LoadReport(tuple(fitting), tuple(unfit), tuple(unexpected))


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Reads all tensors of a file; bfloat16, which numpy does not know, as float32.

    Raises:
        CheckpointError: the file cannot be read, or holds a type that numpy does not have.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, "numpy") as file:
            names = list(file.keys())
            bfloat16 = {name for name in names if file.get_slice(name).get_dtype() == "BF16"}
            tensors = {name: file.get_tensor(name) for name in names if name not in bfloat16}
        if bfloat16:
            views = dict(safetensors.deserialize(path.read_bytes()))
            for name in bfloat16:
                bits = np.frombuffer(views[name]["data"], "<u2")
                tensors[name] = widen_bfloat16(bits).reshape(views[name]["shape"])
    except (OSError, TypeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as a safetensors file: {error}") from error
    return tensors


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


def _replace(target: Path, write: Callable[[Path], object]) -> None:
    """Writes beside `target` and renames, so that no reader meets half a file."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _some(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more

"""A bundle: an export with all that serving needs, in one folder.

    model.json, model.pdiparams   the Paddle inference model
    bundle.json                   inputs and outputs, processor and settings, metrics, versions, checksums
    probe.npz                     inputs of a real batch and the live model's outputs for them
    vocab.txt, ...                whatever the processor saved
    best.json                     beside what is best of a run; no answer depends on it

Written, read and checked here, without Paddle. `bundle.json` lists every other file but `best.json`, so that
nothing that is put beside them later can change an answer.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from propeller import atomic, manifest
from propeller.errors import ConfigError, ExportError
from propeller.processor import Processor, find_processor

FORMAT_VERSION = 1
DESCRIPTION = "bundle.json"
MODEL = "model"
PROBE = "probe.npz"
_REQUIRED = (f"{MODEL}.json", f"{MODEL}.pdiparams", PROBE)
_UNLISTED = frozenset({DESCRIPTION, "best.json"})
# What file systems, version control and people leave in a folder, and what no loader looks for.
_HARMLESS = re.compile(r"\..*|.*\.md|LICENSE.*", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One input or output of a model.

    Attributes:
        name: what it is called.
        dtype: a numpy dtype name, such as `int64`.
        axes: a name for each axis that varies (`batch`, `seq_len`), a number for each that does not.
        pad_value: what fills up shorter rows.
        max_value: of ids, the largest there is, such as the last row of a table of embeddings; the
            smallest is 0. None where any value may come.

    Raises:
        ConfigError: a `max_value` that is no whole number of at least 0, or not of integers.
    """

    name: str
    dtype: str
    axes: tuple[str | int, ...]
    pad_value: int | float = 0
    max_value: int | None = None

    def __post_init__(self) -> None:
        if self.max_value is None:
            return
        if type(self.max_value) is not int or self.max_value < 0 or np.dtype(self.dtype).kind not in "iu":
            raise ConfigError(
                f"The array {self.name!r} has the max_value {self.max_value!r}; expected a whole number of "
                f"at least 0, and that only for integers (it is {self.dtype})."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ArraySpec:
        """Reads what `bundle.json` holds for one array."""
        return cls(
            values["name"],
            values["dtype"],
            tuple(values["axes"]),
            values.get("pad_value", 0),
            values.get("max_value"),
        )


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An exported model that was read and checked.

    Attributes:
        folder: where it lies, links resolved, so that a swap cannot change it halfway.
        inputs: what the model takes, in order.
        outputs: what it gives, in order.
        axis_limits: the longest that the inputs' named axes may be, for those that have a limit, such as
            `seq_len`.
        metrics: evaluation results of the exported weights, by dataset and metric name.
        metadata: everything else in `bundle.json`.
        hash: sha256 of `bundle.json`, which holds all files' checksums: one hash, same answers.
    """

    folder: Path
    inputs: tuple[ArraySpec, ...]
    outputs: tuple[ArraySpec, ...]
    axis_limits: Mapping[str, int]
    metrics: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, Any]
    hash: str

    @property
    def ignores_padding(self) -> bool:
        """Whether pad values at the end of a row change nothing, so that rows of unlike length can be run
        together. It was tried when the model was exported."""
        return self.metadata.get("ignores_padding") is True

    def processor(self) -> Processor:
        """Builds the bundle's processor.

        Raises:
            ExportError: it has none, nobody here registered it, or it cannot be built from its settings.
        """
        named = self.metadata.get("processor")
        if named is None:
            raise ExportError(f"{self.folder} was exported without a processor: it takes arrays only.")
        try:
            return find_processor(named["name"]).load(self.folder, named["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise ExportError(
                f"The processor of {self.folder} cannot be built from {named!r:.200} ({error!r}). Export the "
                "model again, with the release of the processor's package that is installed here."
            ) from error

    def probe(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Inputs of a real batch, and the outputs that the live model gave for them."""
        with np.load(self.folder / PROBE, allow_pickle=False) as arrays:
            return (
                {spec.name: arrays[f"input.{spec.name}"] for spec in self.inputs},
                {spec.name: arrays[f"output.{spec.name}"] for spec in self.outputs},
            )


def write_probe(
    folder: Path, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
) -> None:
    """Stores a real batch and what the live model makes of it."""
    arrays = {f"input.{name}": array for name, array in inputs.items()}
    arrays |= {f"output.{name}": array for name, array in outputs.items()}
    np.savez(folder / PROBE, **arrays)  # type: ignore[arg-type]


def write_bundle(
    folder: Path,
    *,
    inputs: Sequence[ArraySpec],
    outputs: Sequence[ArraySpec],
    processor: Processor | None,
    metrics: Mapping[str, Mapping[str, Any]],
    metadata: Mapping[str, Any],
    axis_limits: Mapping[str, int] | None = None,
) -> Bundle:
    """Completes a bundle folder that holds the model and its probe: processor files, then `bundle.json`.

    Raises:
        ExportError: the model or its probe is not there, or `axis_limits` names an axis that no input has.
    """
    named = None
    if processor is not None:
        named = {"name": processor.name, "settings": processor.save(folder)}
    listed = [path for path in sorted(folder.iterdir()) if path.name not in _UNLISTED]
    values = {
        "format_version": FORMAT_VERSION,
        "inputs": [dataclasses.asdict(spec) for spec in inputs],
        "outputs": [dataclasses.asdict(spec) for spec in outputs],
        "axis_limits": axis_limits or {},
        "processor": named,
        "metrics": metrics,
        **metadata,
        "files": {path.name: manifest.file_entry(path) for path in listed},
    }
    (folder / DESCRIPTION).write_text(atomic.to_json(values, indent=2) + "\n", "utf-8")
    return read_bundle(folder)


def read_bundle(folder: str | Path, *, verify: bool = True) -> Bundle:
    """Reads and checks a bundle.

    Args:
        folder: the bundle, or a link to it.
        verify: compare every file with its checksum (about a second for 2 GB).

    Raises:
        ExportError: it is no bundle, of a newer format, damaged, or holds a file that it does not list;
            the file is named.
    """
    folder = Path(folder).resolve()
    description = folder / DESCRIPTION
    try:
        values = json.loads(description.read_text("utf-8"))
        version = values["format_version"]
    except FileNotFoundError:
        raise ExportError(
            f"{folder} is no bundle: it has no {DESCRIPTION}. "
            "Name the exported folder, such as model_dir/best/inference."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{description} cannot be read: {error!r}. Export the model again.") from error
    if version != FORMAT_VERSION:
        raise ExportError(
            f"{folder} has bundle format {version!r}; this release reads {FORMAT_VERSION}. "
            "Use a matching release of ernie-propeller or export the model again."
        )
    try:
        files = dict(values["files"])
        problem = manifest.mismatch(folder, files) if verify else None
        read = Bundle(
            folder=folder,
            inputs=tuple(ArraySpec.from_dict(spec) for spec in values["inputs"]),
            outputs=tuple(ArraySpec.from_dict(spec) for spec in values["outputs"]),
            axis_limits=dict(values.get("axis_limits", {})),
            metrics=values["metrics"],
            metadata=values,
            hash=atomic.sha256(description),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(f"{description} is not whole: {error!r}. Export the model again.") from error
    if problem:
        raise ExportError(f"Bundle {folder} is damaged: {problem}. Export the model again.")
    _check_listing(folder, files)
    _check_limits(read)
    return read


def _check_listing(folder: Path, files: Mapping[str, Any]) -> None:
    """Refuses files that no checksum stands for."""
    missing = [name for name in _REQUIRED if name not in files]
    if missing:
        raise ExportError(f"{folder / DESCRIPTION} lacks {', '.join(missing)}. Export the model again.")
    names = {path.name for path in folder.iterdir()} - _UNLISTED - files.keys()
    strange = sorted(name for name in names if not _HARMLESS.fullmatch(name))
    if strange:
        raise ExportError(
            f"Bundle {folder} holds {', '.join(strange)}, which {DESCRIPTION} does not list. Move what was "
            "added elsewhere, or export the model again."
        )


def _check_limits(read: Bundle) -> None:
    axes = {axis for spec in read.inputs for axis in spec.axes if isinstance(axis, str)}
    for axis, limit in read.axis_limits.items():
        if axis not in axes or type(limit) is not int or limit < 1:
            raise ExportError(
                f"{read.folder} has the axis limit {axis!r}: {limit!r}; expected a named axis of its inputs "
                f"({', '.join(sorted(axes)) or 'there is none'}) and a whole number of at least 1."
            )

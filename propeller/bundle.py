"""A bundle: an export with all that serving needs, in one folder.

    model.json, model.pdiparams   the Paddle inference model
    bundle.json                   inputs and outputs, processor and settings, metrics, versions, checksums
    probe.npz                     inputs of a real batch and the live model's outputs for them
    vocab.txt, ...                whatever the processor saved

Written, read and checked here, without Paddle.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from propeller import atomic, manifest
from propeller.errors import ExportError
from propeller.processor import Processor, find_processor

FORMAT_VERSION = 1
DESCRIPTION = "bundle.json"
MODEL = "model"
PROBE = "probe.npz"


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One input or output of a model.

    Attributes:
        name: what it is called.
        dtype: a numpy dtype name, such as `int64`.
        axes: a name for each axis that varies (`batch`, `seq_len`), a number for each that does not.
        pad_value: what fills up shorter rows.
    """

    name: str
    dtype: str
    axes: tuple[str | int, ...]
    pad_value: int | float = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ArraySpec:
        """Reads what `bundle.json` holds for one array."""
        return cls(values["name"], values["dtype"], tuple(values["axes"]), values.get("pad_value", 0))


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An exported model that was read and checked.

    Attributes:
        folder: where it lies, links resolved, so that a swap cannot change it halfway.
        inputs: what the model takes, in order.
        outputs: what it gives, in order.
        metrics: evaluation results of the exported weights, by dataset and metric name.
        metadata: everything else in `bundle.json`.
        hash: sha256 of `bundle.json`, which holds all files' checksums: one hash, same answers.
    """

    folder: Path
    inputs: tuple[ArraySpec, ...]
    outputs: tuple[ArraySpec, ...]
    metrics: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, Any]
    hash: str

    def processor(self) -> Processor:
        """Builds the bundle's processor.

        Raises:
            ExportError: it has none, or nobody here registered it.
        """
        named = self.metadata["processor"]
        if named is None:
            raise ExportError(f"{self.folder} was exported without a processor: it takes arrays only.")
        return find_processor(named["name"]).load(self.folder, named["settings"])

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
) -> Bundle:
    """Completes a bundle folder that holds the model and its probe: processor files, then `bundle.json`."""
    named = None
    if processor is not None:
        named = {"name": processor.name, "settings": processor.save(folder)}
    files = {path.name: manifest.file_entry(path) for path in sorted(folder.iterdir())}
    values = {
        "format_version": FORMAT_VERSION,
        "inputs": [dataclasses.asdict(spec) for spec in inputs],
        "outputs": [dataclasses.asdict(spec) for spec in outputs],
        "processor": named,
        "metrics": metrics,
        **metadata,
        "files": files,
    }
    (folder / DESCRIPTION).write_text(atomic.to_json(values, indent=2) + "\n", "utf-8")
    return read_bundle(folder)


def read_bundle(folder: str | Path, *, verify: bool = True) -> Bundle:
    """Reads and checks a bundle.

    Args:
        folder: the bundle, or a link to it.
        verify: compare every file with its checksum (about a second for 2 GB).

    Raises:
        ExportError: it is no bundle, of a newer format, or damaged; the file is named.
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
        problem = manifest.mismatch(folder, values["files"]) if verify else None
        read = Bundle(
            folder=folder,
            inputs=tuple(ArraySpec.from_dict(spec) for spec in values["inputs"]),
            outputs=tuple(ArraySpec.from_dict(spec) for spec in values["outputs"]),
            metrics=values["metrics"],
            metadata=values,
            hash=atomic.sha256(description),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{description} is not whole: {error!r}. Export the model again.") from error
    if problem:
        raise ExportError(f"Bundle {folder} is damaged: {problem}. Export the model again.")
    return read

"""Where a run keeps its checkpoints, and the list of a checkpoint's files with sizes and sha256.

That list is written last, and verified before anything is read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from propeller import atomic
from propeller.errors import CheckpointError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
STATE = "state.json"

CHECKPOINTS = "checkpoints"
STEP = "step_"
# A checkpoint that was saved once more has this behind its name until the first one is gone.
AGAIN = ".new"
_NAME = re.compile(rf"{STEP}(\d{{8,}})(?:{re.escape(AGAIN)})?")


def list_checkpoints(model_dir: str | Path) -> dict[int, Path]:
    """The folders of a run's checkpoints by step, ascending; of one that was saved twice the second."""
    folder = Path(model_dir) / CHECKPOINTS
    if not folder.is_dir():
        return {}
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in found if match and path.is_dir()))


def file_entry(path: Path) -> dict[str, Any]:
    """Size and checksum of one file, as manifests hold them."""
    return {"bytes": path.stat().st_size, "sha256": atomic.sha256(path)}


def write(folder: Path, **more: Any) -> None:
    """Writes the manifest of all files in `folder`, and what else the caller names."""
    files = {path.name: file_entry(path) for path in sorted(folder.iterdir())}
    manifest = {"format_version": FORMAT_VERSION, **more, "files": files}
    (folder / MANIFEST).write_text(atomic.to_json(manifest, indent=1), "utf-8")


def mismatch(folder: Path, files: dict[str, Any]) -> str | None:
    """Says what is wrong with the first file that is missing, cut or altered; None if all are whole.

    A name that leads out of the folder is not followed.
    """
    for name, expected in files.items():
        if name in ("", "..") or name != Path(name).name:
            return f"{folder} lists {name!r}, which is no plain file name"
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{path} has {path.stat().st_size} bytes where {expected['bytes']} were written"
        if atomic.sha256(path) != expected["sha256"]:
            return f"{path} is damaged: its bytes do not match their sha256"
    return None


def verify(folder: Path) -> dict[str, Any]:
    """Compares a checkpoint with its manifest and returns the manifest.

    Raises:
        CheckpointError: a file is missing, cut or altered, or the format is another one.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
        version, files = manifest["format_version"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read ({error!r}).") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {version!r}, this release reads {FORMAT_VERSION}."
        )
    try:
        problem = mismatch(folder, files)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is not whole ({error!r}).") from error
    if problem:
        raise CheckpointError(f"{problem}.")
    return manifest

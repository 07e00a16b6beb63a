"""Looks into checkpoints, exported weights and safetensors files, without Paddle.

    python -m propeller.tools.ckpt_inspector show PATH    # tensors with shapes, dtypes, statistics; state
    python -m propeller.tools.ckpt_inspector dump PATH --name encoder.pooler.weight > weight.txt

PATH is a checkpoint folder, any folder with `.safetensors` files, or one such file. Checksums are
verified wherever there is a manifest.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from propeller import atomic, cli
from propeller.errors import CheckpointError, ConfigError, did_you_mean
from propeller.manifest import MANIFEST, verify
from propeller.tensors import each_tensor

STATE = "state.json"


def main() -> None:
    """Runs the command."""
    cli.run(_main)


def _main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="list what is in it and verify checksums")
    dump = commands.add_parser("dump", help="print tensors as text, one row of the first axis a line")
    for command in (show, dump):
        command.add_argument("path", type=Path)
    dump.add_argument("--name", action="append", default=[], help="tensor to print; default: all")
    args = parser.parse_args()
    files = _tensor_files(args.path)
    if args.command == "show":
        return _show(args.path, files)
    return _dump(files, args.name)


def _tensor_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        raise CheckpointError(f"{path} is neither a .safetensors file nor a folder that holds one.")
    return files


def _show(path: Path, files: list[Path]) -> int:
    folder = path if path.is_dir() else path.parent
    verified = verify(folder) if (folder / MANIFEST).exists() else None
    for file in files:
        print(f"{file.name}")
        count = 0
        for name, dtype, array in each_tensor(file):
            count += array.size
            print(f"  {name:60} {dtype:5} {str(list(array.shape)):18} {_statistics(array)}")
        print(f"  {count:,} values")
    if (folder / STATE).exists():
        state: dict[str, Any] = json.loads((folder / STATE).read_text("utf-8"))
        print(STATE)
        for key, value in state.items():
            print(f"  {key}: {atomic.to_json(value)}")
    if verified is None:
        print("no manifest: nothing to verify")
    else:
        print(f"{MANIFEST}: all checksums of {len(verified['files'])} files match")
    return 0


def _statistics(array: np.ndarray) -> str:
    if not array.size or array.dtype.kind not in "fiu":
        return ""
    values = array.astype(np.float64)
    bad = int(np.count_nonzero(~np.isfinite(values)))
    with np.errstate(invalid="ignore"):
        mean, deviation = values.mean(), values.std()
    note = f"  NOT FINITE: {bad}" if bad else ""
    return f"mean {mean:+.3e} std {deviation:.3e} min {values.min():+.3e} max {values.max():+.3e}{note}"


def _dump(files: list[Path], names: list[str]) -> int:
    left, known = set(names), []
    for file in files:
        for name, _, array in each_tensor(file):
            known.append(name)
            if names and name not in names:
                continue
            left.discard(name)
            print(f"# {name} {list(array.shape)}")
            rows = array.reshape(len(array), -1) if array.ndim and array.size else array.reshape(1, -1)
            np.savetxt(sys.stdout, rows, fmt="%.9g" if array.dtype.kind == "f" else "%d")
    if left:
        name = min(left)
        raise ConfigError(f"No tensor {name!r}.{did_you_mean(name, known)}")
    return 0


if __name__ == "__main__":
    main()

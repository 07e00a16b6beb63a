"""Looks into runs, checkpoints, exported weights and safetensors files, without Paddle.

    python -m propeller.tools.ckpt_inspector show RUN     # its checkpoints: size, whole or damaged; its best
    python -m propeller.tools.ckpt_inspector show PATH    # tensors with shapes, dtypes, statistics; state
    python -m propeller.tools.ckpt_inspector dump PATH --name encoder.pooler.weight > weight.txt

RUN is a model_dir or its `checkpoints` folder. PATH is a checkpoint folder, any folder with `.safetensors`
files, or one such file. Checksums are verified wherever there is a manifest; damage makes the exit code 1.
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
from propeller.manifest import CHECKPOINTS, MANIFEST, STATE, list_checkpoints, verify
from propeller.tensors import each_tensor

BEST = ("weights/best.json", "inference/best.json")


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
    model_dir = args.path
    if model_dir.resolve().name == CHECKPOINTS and not (model_dir / CHECKPOINTS).is_dir():
        model_dir = model_dir.resolve().parent
    checkpoints = [*list_checkpoints(model_dir).values()]
    if checkpoints and args.command == "show":
        return _show_run(model_dir, checkpoints)
    if checkpoints:
        raise ConfigError(f"{args.path} is a whole run; name one of its checkpoints: {checkpoints[-1]}.")
    files = _tensor_files(args.path)
    if args.command == "show":
        return _show(args.path, files)
    return _dump(files, args.name)


def _tensor_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        raise CheckpointError(
            f"{path} is neither a .safetensors file, nor a folder that holds one, nor that of a run with "
            "checkpoints."
        )
    return files


def _show_run(model_dir: Path, checkpoints: list[Path]) -> int:
    """Lists checkpoints and the best exports; returns 1 if a checkpoint is damaged."""
    damaged = 0
    for folder in checkpoints:
        try:
            verify(folder)
            verdict = "whole"
        except CheckpointError as error:
            verdict, damaged = f"DAMAGED: {error}", damaged + 1
        size = sum(file.stat().st_size for file in folder.iterdir())
        # Checksums of large files take time: each line as soon as it is known.
        print(f"{folder.name} {size / 1e6:12,.3f} MB  {verdict}", flush=True)
    exports = sorted(file for pattern in BEST for file in model_dir.glob(f"*/{pattern}"))
    for file in exports:
        print(f"{file.parent.relative_to(model_dir)}: {_best(file)}")
    if not exports:
        print(f"nothing was exported as the best below {model_dir}")
    return 1 if damaged else 0


def _best(file: Path) -> str:
    """Step and results of a best export, as a best exporter wrote them."""
    try:
        best = json.loads(file.read_text("utf-8"))
        sets = [
            f"{name}: " + ", ".join(f"{metric} {_figure(value)}" for metric, value in metrics.items())
            for name, metrics in best["results"].items()
        ]
        return "; ".join([f"step {best['step']}", *sets])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error!r}).") from error


def _figure(value: Any) -> str:
    if isinstance(value, str):  # NaN and infinity, spelt out
        return value
    return f"{value:.6f}" if isinstance(value, float) else atomic.to_json(value)


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

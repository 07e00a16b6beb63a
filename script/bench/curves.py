"""Compare runs that should be equal: prints how far their losses and evaluations lie apart, and draws them.

    python script/bench/curves.py --out curves.png output/one output/two_ranks output/accumulated

The first folder is what the others are compared with. Run them with `"log_steps": 1`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from propeller.paddle.train.reporting import METRICS_FILE, read_metrics


def points(folder: Path, event: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The lines of one kind, by data set and step."""
    lines = read_metrics(folder / METRICS_FILE)
    return {(line.get("dataset", "train"), line["step"]): line for line in lines if line["event"] == event}


def main() -> None:
    """Parses the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="model_dir of each run")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    args = parser.parse_args()
    runs = {folder: points(folder, "train") for folder in args.folders}
    first = runs[args.folders[0]]
    for folder, lines in list(runs.items())[1:]:
        apart = [abs(lines[key]["loss"] - line["loss"]) for key, line in first.items() if key in lines]
        print(
            f"{folder} and {args.folders[0]}: losses of {len(apart)} steps at most {max(apart):.1e} apart, "
            f"of the first 20 {max(apart[:20]):.1e}"
        )
    for folder in args.folders:
        for (name, step), line in points(folder, "eval").items():
            shown = ", ".join(f"{key} {value:.6f}" for key, value in line.items() if isinstance(value, float))
            print(f"{folder} {name} step {step}: {shown}")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (folder, lines) in enumerate(runs.items()):
        steps, losses = zip(*((step, line["loss"]) for (_, step), line in lines.items()), strict=True)
        axes.plot(steps, losses, label=str(folder), linestyle=("-", "--", ":", "-.")[place % 4])
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend()
    figure.savefig(args.out, dpi=100)


if __name__ == "__main__":
    main()

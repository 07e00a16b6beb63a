"""Prints the quickstart's results as a table; fails if the model is no better than a majority vote."""

from __future__ import annotations

import collections
import json
import sys
from pathlib import Path


def main() -> int:
    """Prints the table."""
    out = Path(sys.argv[1])
    bundle = json.loads((out / "model/best/inference/bundle.json").read_text("utf-8"))
    labels = {name: labels_of(out / f"data/{name}.tsv") for name in ("dev", "test")}
    answers = [json.loads(line)["label"] for line in (out / "output.jsonl").read_text("utf-8").splitlines()]
    right = sum(answer == label for answer, label in zip(answers, labels["test"], strict=True))
    majority = {
        name: collections.Counter(found).most_common(1)[0][1] / len(found) for name, found in labels.items()
    }
    rows = [
        ("majority vote", majority["dev"], majority["test"]),
        ("best model, in training", bundle["metrics"]["dev"]["acc"], bundle["metrics"]["test"]["acc"]),
        ("its export, from stdin", None, right / len(answers)),
    ]
    print(f"{'':26} {'dev accuracy':>14} {'test accuracy':>14}")
    for name, *values in rows:
        print(f"{name:26} " + " ".join(f"{'' if value is None else f'{value:.1%}':>14}" for value in values))
    print(f"exported to {out / 'model/best/inference'}")
    return int(bundle["metrics"]["dev"]["acc"] <= majority["dev"])


def labels_of(path: Path) -> list[str]:
    """The label column of a file with a header."""
    return [line.split("\t")[0] for line in path.read_text("utf-8").split("\n")[1:] if line]


if __name__ == "__main__":
    sys.exit(main())

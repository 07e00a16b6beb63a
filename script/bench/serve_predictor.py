"""The bare predictor in a process of its own, for `serve.py`.

The work is an npz file of padded batches: `<number>.<input>` for each batch and input. What is timed is
`Predictor.predict`, nothing else.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from serve_job import Loaded, serve_offline

from propeller.paddle.inference import Predictor
from propeller.paddle.runtime import paddle


def load(args: argparse.Namespace) -> Loaded:
    """Loads the bundle; see `serve_offline`."""
    predictor = Predictor(args.bundle, num_threads=args.threads, bf16=args.bf16)
    outputs: list[np.ndarray] = []

    def run(path: Path) -> list[float]:
        batches: dict[int, dict[str, np.ndarray]] = {}
        with np.load(path, allow_pickle=False) as arrays:
            for key in arrays.files:
                number, _, name = key.partition(".")
                batches.setdefault(int(number), {})[name] = arrays[key]
        outputs.clear()
        seconds = []
        for _, batch in sorted(batches.items()):
            began = time.perf_counter()
            predicted = predictor.predict(batch)
            seconds.append(time.perf_counter() - began)
            outputs.append(predicted[predictor.bundle.outputs[0].name])
        return seconds

    return run, lambda: np.concatenate(outputs), {"paddle": paddle.__version__, "mode": predictor.mode}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    serve_offline(lambda: load(arguments))

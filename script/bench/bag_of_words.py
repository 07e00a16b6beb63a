"""The simplest thing that works: logistic regression on character or word counts.

    python script/bench/bag_of_words.py --data chnsenticorp

Prints the dev accuracy for a folder with train.tsv and dev.tsv (columns `label` and `text_a`), beside a
majority vote's. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from ernie.tasks.classification_files import Layout, read_classification


def main() -> None:
    """Fits and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--ngrams", type=int, default=1, help="characters a feature has at most")
    args = parser.parse_args()
    texts, labels = {}, {}
    for name in ("train", "dev"):
        rows = list(read_classification(args.data / f"{name}.tsv", Layout(pair=False)))
        texts[name] = [row["text_a"] for row in rows]
        labels[name] = np.array([row["label"] for row in rows])
    _, counts = np.unique(labels["dev"], return_counts=True)
    model = make_pipeline(
        TfidfVectorizer(analyzer="char", ngram_range=(1, args.ngrams)), LogisticRegression(max_iter=1000)
    )
    model.fit(texts["train"], labels["train"])
    print(f"majority vote: {counts.max() / counts.sum():.4f}")
    print(f"logistic regression: {model.score(texts['dev'], labels['dev']):.4f}")


if __name__ == "__main__":
    main()

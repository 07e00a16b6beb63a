"""Writes `ranking_golden.json` of `tests/propeller`: queries with scores, and what trec_eval makes of them.

Needs pytrec_eval (or pytrec-eval-terrier, which has wheels). Run from the root of the repository; the same
version gives the same file:

    python script/bench/make_golden_ranking.py tests/data
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytrec_eval

QUERIES = 24
NAMES = {
    "mrr": "recip_rank",
    "map": "map",
    "p@1": "P_1",
    "ndcg@3": "ndcg_cut_3",
    "ndcg@10": "ndcg_cut_10",
    "recall@1": "recall_1",
    "recall@3": "recall_3",
}


def make_rows() -> list[tuple[str, int, float, int]]:
    """Rows of query, candidate, score and label: graded, with many equal scores and some queries unanswered.

    Scores are eighths, which trec_eval's float32 holds exactly.
    """
    rng = random.Random(0)
    rows = []
    for number in range(QUERIES):
        highest = number % 4  # 0: nothing is relevant
        for place in range(rng.randint(1, 14)):
            label = rng.choice([0, 0, rng.randint(0, highest)])
            rows.append((f"q{number}", place, rng.randint(-8, 8) / 8, label))
    return rows


def main(folder: Path) -> None:
    """Evaluates the rows; a document's id is its place, filled up with zeros, so that ids rise with rows."""
    rows = make_rows()
    judged: dict[str, dict[str, int]] = {}
    run: dict[str, dict[str, float]] = {}
    for query, place, score, label in rows:
        judged.setdefault(query, {})[f"d{place:04d}"] = label
        run.setdefault(query, {})[f"d{place:04d}"] = score
    measures = {"recip_rank", "map", "P.1", "ndcg_cut.3,10", "recall.1,3"}
    found = pytrec_eval.RelevanceEvaluator(judged, measures).evaluate(run)
    values = {
        query: {name: found[query][theirs] for name, theirs in NAMES.items()} for query in sorted(found)
    }
    text = json.dumps({"rows": rows, "values": values}, indent=None, separators=(",", ":"))
    (folder / "ranking_golden.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

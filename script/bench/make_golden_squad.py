"""Writes `squad_golden.json` of `tests/data`: what Transformers' SQuAD metrics say of answers made up here.

Needs transformers below 5 (5 has them no more), and this project to be importable. Run from the root of the
repository, with the SQuAD 2.0 file of the tests; the golden file holds numbers only:

    python script/bench/make_golden_squad.py tests/data/squad_golden.json cs224n_dev-v2.0.json.gz
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Raw = dict[str, Any]

WORDS = (
    'the a an in of Norman don\'t U.S. 1066, (king) naïve — Élan x-ray "duke" and, 7.5% CAFÉ co-op'.split()
)
THRESHOLDS = {"low": -0.3, "high": 0.4}


def made_up(count: int, *, impossible: bool) -> list[Raw]:
    """Questions whose answers hold all that is normalised away; a few of the second kind nothing else."""
    rng = random.Random(0)
    raws = []
    for number in range(count):
        none = impossible and rng.random() < 0.4
        texts = [] if none else [" ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(3)]
        if not impossible:  # SQuAD 1.1 says otherwise of answers that are normalised away
            texts = [f"{text} king" for text in texts]
        if impossible and texts and number % 20 == 0:
            texts = ["the", "The."]
        answers = [{"text": text, "answer_start": -1} for text in texts]
        raws.append({"id": f"q{number}", "answers": answers, "is_impossible": none})
    return raws


def answer(raws: Sequence[Raw]) -> tuple[dict[str, str], dict[str, float]]:
    """Answers of every kind (right, nearly right, of another question, empty), and odds, many equal."""
    rng = random.Random(1)
    answers, odds = {}, {}
    for raw in raws:
        other = rng.choice(raws)["answers"] or [{"text": "nothing of it"}]
        texts = [found["text"] for found in raw["answers"] or other]
        text = rng.choice(texts)
        words = text.split()
        kinds = [
            text,
            text.upper(),
            f"The {text}!",
            " ".join(words[1:]),
            " ".join(words[: len(words) // 2] * 2),
            f"{text} {other[0]['text']}",
            other[0]["text"],
            "",
            "a",
        ]
        answers[raw["id"]] = rng.choice(kinds)
        odds[raw["id"]] = round(rng.gauss(0.5 if raw["is_impossible"] else -0.5, 1), rng.choice([1, 15]))
    return answers, odds


def reference(raws: Sequence[Raw]) -> dict[str, dict[str, float]]:
    """What Transformers says, without odds and with them, at several thresholds."""
    from transformers.data.metrics.squad_metrics import squad_evaluate

    answers, odds = answer(raws)
    examples = [SimpleNamespace(qas_id=raw["id"], answers=raw["answers"]) for raw in raws]
    results = {"plain": squad_evaluate(examples, answers)}
    for name, threshold in THRESHOLDS.items():
        results[name] = squad_evaluate(examples, answers, odds, threshold)
    return results


def main(target: Path, source: Path) -> None:
    """Writes the golden file."""
    from ernie.tasks.mrc_files import read_mrc

    golden = {
        "made_up_1": reference(made_up(500, impossible=False)),
        "made_up_2": reference(made_up(500, impossible=True)),
        source.name: reference(list(read_mrc(source))),
    }
    target.write_text(json.dumps(golden, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

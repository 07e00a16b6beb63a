"""Writes `entity_scores.json` for `tests/ernie`: tags, and what seqeval and conlleval.pl say of them.

Needs `seqeval==1.2.2`, perl, the script `conlleval.pl` (version 2004-01-26, of CoNLL-2003) and a folder with
`msra_ner` and `weibo_ner`. Run from the root of the repository; the same versions give the same file:

    PYTHONPATH=. python script/bench/make_golden_entities.py tests/data \
        --conlleval conlleval.pl --data_dir DATA
"""

from __future__ import annotations

import argparse
import json
import random
import re
import string
import subprocess
import warnings
from pathlib import Path
from typing import Any

import seqeval.scheme
from seqeval.metrics.sequence_labeling import precision_recall_fscore_support as default_scores
from seqeval.metrics.v1 import precision_recall_fscore_support as strict_scores

from ernie.tasks.ner_files import find_tags, read_ner

# Each scheme's letters, and seqeval's class for it. That has no `M`: it is given `I`.
SCHEMES = {
    "BIO": ("BI", seqeval.scheme.IOB2),
    "IOB1": ("BI", seqeval.scheme.IOB1),
    "BIOES": ("BIES", seqeval.scheme.IOBES),
    "BMES": ("BMES", seqeval.scheme.IOBES),
}
TYPES = ("PER", "ORG-X", "GPE.NAM")
CASES, SENTENCES, LONGEST = 20, 40, 12
REAL = ("msra_ner/dev.tsv", "weibo_ner/weiboNER_2nd_conll.dev")

Tags = list[list[str]]


def random_case(rng: random.Random, letters: str, *, num_types: int) -> tuple[Tags, Tags]:
    """Sentences of any tags, few of them well-formed, and the same with a third of the tags changed."""
    tags = ["O", "O", *letters]
    tags += [f"{letter}-{kind}" for letter in letters for kind in TYPES[:num_types] for _ in range(3)]
    gold = [[rng.choice(tags) for _ in range(rng.randrange(LONGEST))] for _ in range(SENTENCES)]
    predicted = [[rng.choice(tags) if rng.random() < 1 / 3 else tag for tag in line] for line in gold]
    return gold, predicted


def corrupted(sentences: Tags, labels: list[str]) -> Tags:
    """Changes every seventh tag; the test does it in the same way."""
    numbers = iter(range(10**9))
    return [
        [labels[i * i % len(labels)] if (i := next(numbers)) % 7 == 3 else tag for tag in line]
        for line in sentences
    ]


def by_seqeval(gold: Tags, predicted: Tags, scheme: type | None = None) -> dict[str, list]:
    """Precision, recall and F1: over all, mean over types, and of each type with its support."""

    def scores(average: str | None) -> tuple:
        if scheme is None:
            return default_scores(gold, predicted, average=average, zero_division=0)
        return strict_scores(gold, predicted, average=average, zero_division=0, scheme=scheme)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tags that are not well-formed
        micro, macro, each = scores("micro"), scores("macro"), scores(None)
    rows = zip(*(column.tolist() for column in each), strict=True)
    return {"all": [float(x) for x in micro[:3]], "macro": [float(x) for x in macro[:3]], "types": list(rows)}


def by_conlleval(gold: Tags, predicted: Tags, script: Path) -> dict[str, Any]:
    """The same by conlleval.pl, in rounded percent: over all with the number of phrases; types by name."""
    pairs = zip(gold, predicted, strict=True)
    blocks = ("".join(f"x {a} {b}\n" for a, b in zip(*pair, strict=True)) for pair in pairs)
    run = subprocess.run(
        ["perl", str(script)], input="\n".join(blocks), capture_output=True, text=True, check=True
    )
    first, *lines = run.stdout.splitlines()
    phrases = re.search(r"with (\d+) phrases", first)
    rows = [(line.split(":")[0].strip(), re.findall(r"\d+\.\d\d", line)) for line in lines]
    scores = [(name, [float(number) for number in numbers]) for name, numbers in rows]
    (_, (_accuracy, *overall)), *types = scores
    return {"all": [*overall, int(phrases[1])], "types": dict(types)}


def packed(sentences: Tags, alphabet: list[str]) -> str:
    """One character a tag, a space between sentences."""
    letters = dict(zip(alphabet, string.ascii_letters, strict=False))
    return " ".join("".join(letters[tag] for tag in line) for line in sentences)


def with_i(sentences: Tags) -> Tags:
    """`M`, which seqeval does not know, as `I`."""
    return [[re.sub("^M", "I", tag) for tag in line] for line in sentences]


def make_case(scheme: str, rng: random.Random, number: int, script: Path) -> dict:
    """One case of a scheme with its scores."""
    letters, cls = SCHEMES[scheme]
    gold, predicted = random_case(rng, letters, num_types=1 + number % len(TYPES))
    alphabet = sorted({tag for line in gold + predicted for tag in line})
    case = {
        "scheme": scheme,
        "alphabet": alphabet,
        "gold": packed(gold, alphabet),
        "predicted": packed(predicted, alphabet),
        "default": by_seqeval(with_i(gold), with_i(predicted)),
        "strict": by_seqeval(with_i(gold), with_i(predicted), cls),
    }
    if letters == "BI":  # conlleval does not know the others
        case["conlleval"] = by_conlleval(gold, predicted, script)
    return case


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--conlleval", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, required=True)
    args = parser.parse_args()
    rng = random.Random(0)
    cases = [make_case(scheme, rng, i, args.conlleval) for scheme in SCHEMES for i in range(CASES)]
    real = {}
    for name in REAL:
        path = args.data_dir / name
        gold = [raw["labels"] for raw in read_ner(path)]
        predicted = corrupted(gold, sorted(find_tags(path).labels))
        real[name] = {
            "default": by_seqeval(gold, predicted),
            "strict": by_seqeval(gold, predicted, seqeval.scheme.IOB2),
            "conlleval": by_conlleval(gold, predicted, args.conlleval),
        }
    text = json.dumps({"cases": cases, "real": real}, separators=(",", ":"))
    (args.folder / "entity_scores.json").write_text(text.replace('{"scheme"', '\n{"scheme"') + "\n", "utf-8")


if __name__ == "__main__":
    main()

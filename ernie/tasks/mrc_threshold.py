"""The threshold for "no answer", found on dev, and put into the bundle that was exported."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from ernie.tasks.mrc import MrcProcessor, best_texts, is_labelled
from ernie.tasks.mrc_scores import find_null_threshold
from ernie.tasks.thresholds import publish
from propeller.bundle import read_bundle
from propeller.processor import Answer, Raw

log = logging.getLogger("ernie")

Answered = tuple[Sequence[Raw], Sequence[Answer]]


def tune_null_threshold(link: Path, sets: Mapping[str, Answered]) -> MrcProcessor:
    """Finds the `null_score_diff_threshold` with the best f1 on the first set, and puts it into a bundle.

    The metrics in the bundle become those with the threshold, for all sets; see `publish` for the rest.

    Args:
        link: the bundle.
        sets: questions and what the bundle answers to them, by set name.

    Returns:
        The processor that stands in the bundle now.

    Raises:
        DataError: nobody answered a question of the first set.
        ExportError: the bundle cannot be read.
    """
    bundle = read_bundle(link)
    processor: MrcProcessor = bundle.processor()  # type: ignore[assignment]
    first = next(iter(sets))
    labelled = [row for row in zip(*sets[first], strict=True) if is_labelled(row[0])]
    raws = [raw for raw, _ in labelled]
    threshold, f1 = find_null_threshold(raws, *best_texts(raws, [answer for _, answer in labelled]))
    tuned = processor.with_null_threshold(threshold)
    metrics = {name: dict(values) for name, values in bundle.metrics.items()}
    for name, (questions, answers) in sets.items():
        metrics[name] = {**metrics.get(name, {}), **tuned.scores(questions, answers)}
    publish(link, bundle, tuned, metrics)
    log.info("null_score_diff_threshold in %s: %.4f, with f1 %.2f on %s", link, threshold, f1, first)
    return tuned

"""How good answers to questions on texts are: SQuAD 1.1 and 2.0, CMRC2018 and DRCD. All in percent.

Answers are given by question id. A question without one counts as answered wrongly; the log says how many.
"""

from __future__ import annotations

import collections
import logging
import math
import re
import string
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

from ernie.tasks.mixed_segments import remove_ignored, segments
from propeller.errors import ConfigError, DataError
from propeller.processor import Raw

log = logging.getLogger("propeller")

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class _Score(NamedTuple):
    """One question: its scores if it is answered, from 0 to 1, and its part in the search for a threshold.

    Attributes:
        em: whether the answer is right to the letter.
        f1: how much of it is.
        has_answer: whether the question has an answer.
        is_empty: whether the empty answer was given.
        null_odds: how much speaks against an answer.
    """

    em: float
    f1: float
    has_answer: bool
    is_empty: bool
    null_odds: float

    def at(self, name: str, threshold: float) -> float:
        """`em` or `f1` where the answer is empty if `null_odds` exceeds the threshold."""
        return float(not self.has_answer) if self.null_odds > threshold else getattr(self, name)


def squad_scores(
    raws: Sequence[Raw],
    answers: Mapping[str, str],
    null_odds: Mapping[str, float] | None = None,
    threshold: float = math.inf,
) -> dict[str, float]:
    """Scores answers as SQuAD does: by their words, without case, punctuation, articles.

    Where no question is impossible the definition is that of SQuAD 1.1, else that of SQuAD 2.0: they differ
    in answers of which nothing is left without articles.

    Args:
        raws: labelled questions, as `read_mrc` gives them.
        answers: texts by question id; `""` says that there is none.
        null_odds: by question id, how much speaks against an answer: a probability, or a difference of
            scores.
        threshold: with `null_odds`, the answer counts as empty where these exceed it. (The official script
            has 1.0, which no probability exceeds, either.)

    Returns:
        `em` and `f1` in percent, and `total`, the number of questions. If some are impossible, also
        `HasAns_exact`, `HasAns_f1`, `HasAns_total` over those with an answer and `NoAns_...` over the others.
        With `null_odds` also `best_exact` and `best_f1`, what the best thresholds would give, and
        `best_exact_thresh` and `best_f1_thresh`, these thresholds. As the official script, the search takes
        questions of equal odds one by one, and names 0 where no answer at all is best; for a threshold to
        use see `find_null_threshold`.

    Raises:
        DataError: there is no question, or one has no answer and is not marked as impossible, or has no
            `null_odds`.

    Source: `evaluate-v1.1.py` and `evaluate-v2.0.py` of rajpurkar/SQuAD-explorer, where `em` is called
        `exact_match` and `exact`.
    """
    scores = _squad_each(raws, answers, null_odds)
    result = _means(scores, threshold, ("em", "f1", "total"))
    with_answer = [score for score in scores if score.has_answer]
    if len(with_answer) < len(scores):
        without = [score for score in scores if not score.has_answer]
        for prefix, part in (("HasAns", with_answer), ("NoAns", without)):
            if part:
                names = (f"{prefix}_exact", f"{prefix}_f1", f"{prefix}_total")
                result |= _means(part, threshold, names)
    if null_odds is not None:
        for name, shown in (("em", "exact"), ("f1", "f1")):
            best, at = _official_search(scores, name)
            result |= {f"best_{shown}": best, f"best_{shown}_thresh": at}
    return result


def find_null_threshold(
    raws: Sequence[Raw], answers: Mapping[str, str], null_odds: Mapping[str, float], *, metric: str = "f1"
) -> tuple[float, float]:
    """Finds the `null_score_diff_threshold` that scores best: an answer is empty where its odds exceed it.

    Args:
        raws: labelled questions, as `read_mrc` gives them.
        answers: the best text that is not empty for each, by question id.
        null_odds: see `squad_scores`.
        metric: `f1` or `em`.

    Returns:
        The threshold, and the score in percent that `squad_scores` gives with it. It lies in the middle
        between the odds of two questions, so that no rounding of theirs makes a difference, or well beyond
        all odds if it is best to answer nothing, or everything.

    Raises:
        ConfigError: there is no such metric.
        DataError: see `squad_scores`.
    """
    if metric not in ("em", "f1"):
        raise ConfigError(f"There is no metric {metric!r} of answers; expected 'f1' or 'em'.")
    scores = _squad_each(raws, answers, null_odds)
    ordered = sorted(scores, key=lambda score: score.null_odds)
    odds = [score.null_odds for score in ordered]
    beyond = 1 + max(abs(odds[0]), abs(odds[-1]))
    best = current = float(sum(not score.has_answer for score in scores))
    threshold = odds[0] - beyond
    for score, following in zip(ordered, [*odds[1:], odds[-1] + 2 * beyond], strict=True):
        current += getattr(score, metric) - float(not score.has_answer)
        # Between questions of equal odds no threshold lies.
        if following > score.null_odds and current > best:
            middle = (score.null_odds + following) / 2
            best, threshold = current, min(middle, math.nextafter(following, -math.inf))
    return threshold, 100.0 * sum(score.at(metric, threshold) for score in scores) / len(scores)


def cmrc_scores(raws: Sequence[Raw], answers: Mapping[str, str]) -> dict[str, float]:
    """Scores answers as CMRC2018 does, for DRCD too: by their Chinese characters and the words between them.

    Of two texts, without case and punctuation, the F1 is that of their longest common piece. A question that
    is impossible, which CMRC2018 does not have, is answered rightly by the empty text alone.

    Args:
        raws: labelled questions, as `read_mrc` gives them.
        answers: texts by question id.

    Returns:
        `em` and `f1` in percent, `avg`, their mean, and `question_num`, the number of questions.

    Raises:
        DataError: there is no question, or one has no answer and is not marked as impossible.

    Source: `cmrc2018_evaluate.py` of ymcui/cmrc2018; see `mixed_segments` for the words.
    """
    em = f1 = 0.0
    for right, given in _pairs(raws, answers):
        if given is not None:
            plain = remove_ignored(given)
            is_right = any(remove_ignored(text) == plain for text in right)
            em += is_right
            cut = segments(given)
            f1 += max(_piece_f1(segments(text), cut) for text in right) if any(right) else is_right
    em, f1 = 100.0 * em / len(raws), 100.0 * f1 / len(raws)
    return {"em": em, "f1": f1, "avg": (em + f1) * 0.5, "question_num": len(raws)}


def _pairs(raws: Sequence[Raw], answers: Mapping[str, str]) -> list[tuple[list[str], str | None]]:
    """The right answers, `[""]` for a question without one, and the given one (or None) for each question."""
    if not raws:
        raise DataError("There is no question to score the answers of; expected at least one.")
    pairs = []
    for raw in raws:
        right = [answer["text"] for answer in raw.get("answers") or ()]
        if not right and not raw.get("is_impossible"):
            raise DataError(
                f"The question {raw['id']!r} has no answer and is not marked as impossible, so that none can "
                "be scored. Test sets without answers are for prediction only."
            )
        pairs.append((right or [""], answers.get(raw["id"])))
    missing = sum(given is None for _, given in pairs)
    if missing:
        log.warning("%d of %d questions were not answered and count as wrong", missing, len(raws))
    return pairs


def _squad_each(
    raws: Sequence[Raw], answers: Mapping[str, str], null_odds: Mapping[str, float] | None
) -> list[_Score]:
    pairs = _pairs(raws, answers)
    is_second = any(raw.get("is_impossible") for raw in raws)
    scores = []
    for raw, (right, given) in zip(raws, pairs, strict=True):
        if null_odds is not None and raw["id"] not in null_odds:
            raise DataError(f"The question {raw['id']!r} has no null_odds; expected them for every question.")
        em = f1 = 0.0
        if given is not None:
            em, f1 = _squad_score([_normalized(text) for text in right], _normalized(given), is_second)
        odds = 0.0 if null_odds is None else null_odds[raw["id"]]
        scores.append(_Score(em, f1, not raw.get("is_impossible"), given == "", odds))
    return scores


def _squad_score(right: list[str], given: str, is_second: bool) -> tuple[float, float]:
    """EM and F1 of one answer; all texts are normalized."""
    if is_second:
        # What nothing is left of counts as no answer.
        right = list(filter(None, right)) or [""]
    return float(given in right), max(_words_f1(text, given, is_second) for text in right)


def _normalized(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _words_f1(right: str, given: str, is_second: bool) -> float:
    ours, theirs = given.split(), right.split()
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    if not common:
        return float(is_second and ours == theirs)
    return _f1(common, len(ours), len(theirs))


def _piece_f1(right: list[str], given: list[str]) -> float:
    match = SequenceMatcher(None, right, given, autojunk=False).find_longest_match()
    return _f1(match.size, len(given), len(right)) if match.size else 0.0


def _f1(common: int, given: int, right: int) -> float:
    precision, recall = common / given, common / right
    return 2 * precision * recall / (precision + recall)


def _means(scores: Sequence[_Score], threshold: float, names: tuple[str, str, str]) -> dict[str, float]:
    """EM and F1 in percent, and the number of questions, under `names`."""
    means = [
        100.0 * sum(score.at(name, threshold) for score in scores) / len(scores) for name in ("em", "f1")
    ]
    return dict(zip(names, [*means, len(scores)], strict=True))


def _official_search(scores: Sequence[_Score], name: str) -> tuple[float, float]:
    """The best score in percent, and its threshold, as `evaluate-v2.0.py` finds them."""
    best = current = float(sum(not score.has_answer for score in scores))
    threshold = 0.0
    for score in sorted(scores, key=lambda score: score.null_odds):
        # Whatever was answered is wrong there, also what is normalised away.
        current += getattr(score, name) if score.has_answer else -float(not score.is_empty)
        if current > best:
            best, threshold = current, score.null_odds
    return 100.0 * best / len(scores), threshold

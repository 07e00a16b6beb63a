"""Precision, recall and F1 of entities: seqeval's two ways of counting, and conlleval's."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypedDict

from ernie.tasks.tagging import OUTSIDE, Tag, check_scheme, entities_of
from propeller.errors import ConfigError, DataError, did_you_mean

MODES = ("default", "strict", "conlleval")

# Letters of two neighbouring units, between which conlleval ends or begins a chunk even if the types are one.
_CHUNK_ENDS = frozenset({"BB", "BO", "IB", "IO", "EE", "EI", "EO"})
_CHUNK_BEGINS = frozenset({"BB", "IB", "OB", "OI", "EE", "EI", "OE"})


class TypeScores(TypedDict):
    """The scores of one type; `support` is the number of its entities in the data."""

    precision: float
    recall: float
    f1: float
    support: int


class EntityScores(TypedDict):
    """Scores over all entities, their unweighted means over the types (`macro_`), and those of each type."""

    precision: float
    recall: float
    f1: float
    support: int
    macro_precision: float
    macro_recall: float
    macro_f1: float
    types: dict[str, TypeScores]


class _Counts(NamedTuple):
    """Numbers of entities by type."""

    correct: collections.Counter[str]
    predicted: collections.Counter[str]
    gold: collections.Counter[str]


def entity_scores(
    gold_tags: Iterable[Sequence[str]],
    predicted_tags: Iterable[Sequence[str]],
    *,
    scheme: str | None = None,
    mode: str = "default",
) -> EntityScores:
    """Compares predicted entities with those of the data; one is correct if type, start and end are.

    Args:
        gold_tags: the tags of each example in the data, one for each unit.
        predicted_tags: the same as predicted. Tags that are not well-formed are fine.
        scheme: of the tags; only `strict` needs it.
        mode: `default` reads tags leniently and fits every scheme; `strict` counts only what is well-formed
            in `scheme`; `conlleval` reads them as that script does, which knows `B`, `I`, `E` and `O`.

    Returns:
        Fractions, not percent; 0.0 where one would be divided by zero.

    Raises:
        ConfigError: another mode or scheme, or `strict` without a scheme.
        DataError: there are more examples, or units in one, on one side than on the other.

    Source: seqeval 1.2.2, `precision_recall_fscore_support` (`mode=None` and `mode="strict"`) with averages
    `None`, `micro` and `macro` and `zero_division=0`; conlleval.pl of 2004-01-26, CoNLL-2000 and 2003.
    """
    if mode not in MODES:
        raise ConfigError(f"mode is {mode!r}; expected {', '.join(MODES)}.{did_you_mean(mode, MODES)}")
    if mode == "strict" and scheme is None:
        raise ConfigError("Strict scores need the scheme of the tags: BIO, IOB1, BIOES or BMES.")
    strict_scheme = check_scheme(scheme) if scheme is not None and mode == "strict" else None
    counts = _Counts(collections.Counter(), collections.Counter(), collections.Counter())
    for gold, predicted in _aligned(gold_tags, predicted_tags):
        if mode == "conlleval":
            _count_chunks(counts, gold, predicted)
        else:
            _count_entities(counts, gold, predicted, strict_scheme)
    return _scores(counts)


def _aligned(
    gold_tags: Iterable[Sequence[str]], predicted_tags: Iterable[Sequence[str]]
) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    """Pairs the examples of both sides, and checks that they are of one length."""
    pairs = itertools.zip_longest(gold_tags, predicted_tags)
    for number, (gold, predicted) in enumerate(pairs, start=1):
        if gold is None or predicted is None:
            more, fewer = ("gold", "predicted") if predicted is None else ("predicted", "gold")
            raise DataError(
                f"Only {number - 1} examples have {fewer} tags, more have {more} ones; expected as many."
            )
        if len(gold) != len(predicted):
            raise DataError(
                f"Example {number} has {len(gold)} gold tags and {len(predicted)} predicted ones; expected "
                "one of each for each unit."
            )
        yield gold, predicted


def _count_entities(
    counts: _Counts, gold: Sequence[str], predicted: Sequence[str], scheme: str | None
) -> None:
    """Counts an example's entities as `entities_of` reads them."""
    wanted, found = entities_of(gold, scheme), entities_of(predicted, scheme)
    counts.gold.update(entity.type for entity in wanted)
    counts.predicted.update(entity.type for entity in found)
    counts.correct.update(entity.type for entity in set(wanted).intersection(found))


def _count_chunks(counts: _Counts, gold: Sequence[str], predicted: Sequence[str]) -> None:
    """Counts an example's entities as conlleval does: where they begin and end, unit by unit.

    One is correct if both sides begin it at one unit, with one type, and end it at one unit.
    """
    outside = Tag(OUTSIDE, "")
    before = (outside, outside)
    alike = False  # both sides are in an entity that they began together
    for texts in zip([*gold, OUTSIDE], [*predicted, OUTSIDE], strict=True):
        now = (_conlleval_tag(texts[0]), _conlleval_tag(texts[1]))
        ends = [_chunk_ends(was, tag) for was, tag in zip(before, now, strict=True)]
        begins = [_chunk_begins(was, tag) for was, tag in zip(before, now, strict=True)]
        same_type = now[0].type == now[1].type
        if alike and all(ends):
            counts.correct[before[0].type] += 1
        alike = (alike and not any(ends) or all(begins)) and same_type
        for tag, begin, counter in zip(now, begins, (counts.gold, counts.predicted), strict=True):
            if begin:
                counter[tag.type] += 1
        before = now


def _conlleval_tag(text: str) -> Tag:
    letter, _, kind = text.partition("-")
    return Tag(letter, kind)


def _chunk_ends(before: Tag, tag: Tag) -> bool:
    """conlleval's `endOfChunk`; letters other than `B I E O` tell by their type alone."""
    if before.letter != OUTSIDE and before.type != tag.type:
        return True
    return before.letter + tag.letter in _CHUNK_ENDS


def _chunk_begins(before: Tag, tag: Tag) -> bool:
    """conlleval's `startOfChunk`."""
    if tag.letter != OUTSIDE and before.type != tag.type:
        return True
    return before.letter + tag.letter in _CHUNK_BEGINS


def _scores(counts: _Counts) -> EntityScores:
    kinds = sorted({*counts.gold, *counts.predicted})
    types = {kind: _type_scores(*(counter[kind] for counter in counts)) for kind in kinds}
    overall = _type_scores(*(counter.total() for counter in counts))
    return EntityScores(
        **overall,
        macro_precision=_mean(scores["precision"] for scores in types.values()),
        macro_recall=_mean(scores["recall"] for scores in types.values()),
        macro_f1=_mean(scores["f1"] for scores in types.values()),
        types=types,
    )


def _type_scores(correct: int, predicted: int, gold: int) -> TypeScores:
    precision, recall = _ratio(correct, predicted), _ratio(correct, gold)
    f1 = _ratio(2 * precision * recall, precision + recall)
    return TypeScores(precision=precision, recall=recall, f1=f1, support=gold)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return _ratio(sum(numbers), len(numbers))

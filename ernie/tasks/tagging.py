"""Tags of units and the entities they spell, in the schemes that data sets use.

A tag is `O`, or a letter, a hyphen and a type (`B-PER`, `I-PER.NAM`); a letter alone has the type `_`.

| scheme | one unit | several units | after a neighbour of its type |
|---|---|---|---|
| BIO (IOB2) | `B` | `B I I` | the same |
| IOB1 | `I` | `I I I` | `B`, `B I I` |
| BIOES | `S` | `B I E` | the same |
| BMES | `S` | `B M E` | the same |

What a model predicts need not be well-formed. Nothing here raises on it: a tag that is none counts as `O`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from propeller.errors import ConfigError, DataError, did_you_mean

# The letters of each scheme, `O` aside.
SCHEMES = {"BIO": "BI", "IOB1": "BI", "BIOES": "BIES", "BMES": "BMES"}
_OTHER_NAMES = {"IOB2": "BIO", "IOBES": "BIOES"}

OUTSIDE = "O"
_NO_TYPE = "_"

# Tags are few, and each is met a million times.
_CACHED = 4096


class Entity(NamedTuple):
    """Units `start` (from 0) up to and without `end`, which are one entity."""

    type: str
    start: int
    end: int


class Tag(NamedTuple):
    """A tag taken apart; `O`, and what is no tag, has the letter `O` and no type.

    `M` is read as `I`: both say "inside".
    """

    letter: str
    type: str


_O = Tag(OUTSIDE, "")


def check_scheme(name: str) -> str:
    """Returns the name of a scheme as `SCHEMES` has it.

    Raises:
        ConfigError: there is no such scheme.
    """
    upper = name.upper()
    scheme = _OTHER_NAMES.get(upper, upper)
    if scheme not in SCHEMES:
        known = [*SCHEMES, *_OTHER_NAMES]
        raise ConfigError(
            f"{name!r} is no tagging scheme; expected one of {', '.join(known)}.{did_you_mean(upper, known)}"
        )
    return scheme


@functools.lru_cache(maxsize=_CACHED)
def is_tag(text: str, scheme: str | None = None) -> bool:
    """Whether `text` is a tag of a scheme, or (None) of any of them.

    Raises:
        ConfigError: there is no such scheme.
    """
    letters = "BIMES" if scheme is None else SCHEMES[check_scheme(scheme)]
    return text == OUTSIDE or (text != "" and text[0] in letters and text[1:2] in ("", "-"))


@functools.lru_cache(maxsize=_CACHED)
def parse_tag(text: str) -> Tag:
    """Takes a tag apart."""
    if not is_tag(text) or text == OUTSIDE:
        return _O
    return Tag("I" if text[0] == "M" else text[0], text[2:] or _NO_TYPE)


def find_scheme(sequences: Iterable[Sequence[str]]) -> str:
    """Recognises the scheme that tags are in.

    `M`, `E` and `S` tell. Without them a data set is BIO if each `I` goes on with what is before it, and IOB1
    if each `B` parts an entity from one of its type before it; where neither holds throughout, what is
    broken less often, and BIO where that is equal.

    Args:
        sequences: the tags of each example.

    Raises:
        ConfigError: a tag is none, or the letters are of no one scheme.
    """
    letters: set[str] = set()
    breaks = {"BIO": 0, "IOB1": 0}
    for tags in sequences:
        before = _O
        for text in tags:
            if not is_tag(text):
                raise ConfigError(
                    f"{text!r} is no tag; expected O, or one of B, I, M, E, S with a type, as in B-PER."
                )
            tag = parse_tag(text)
            letters.add(text[0])
            goes_on = before.letter != OUTSIDE and before.type == tag.type
            breaks["BIO"] += tag.letter == "I" and not goes_on
            breaks["IOB1"] += tag.letter == "B" and not goes_on
            before = tag
    if letters <= set("BIO"):
        return min(breaks, key=lambda scheme: breaks[scheme])
    if {"I", "M"} <= letters:
        raise ConfigError("The tags have both I and M, which no scheme has; expected one of the two.")
    return "BMES" if "M" in letters else "BIOES"


def entities_of(tags: Sequence[str], scheme: str | None = None) -> list[Entity]:
    """Reads the entities that tags spell, in order; they do not overlap.

    Args:
        tags: one for each unit.
        scheme: None reads leniently, whatever the scheme is: an entity begins at `B` or `S`, and at any
            other letter that does not go on with an entity of its type; it goes up to the next beginning or
            `O`, and not beyond `E` or `S`. With a scheme, strictly: only what is well-formed in it counts.

    Raises:
        ConfigError: there is no such scheme.

    Source: seqeval 1.2.2, `metrics.sequence_labeling.get_entities` (with `M` read as `I`), and
    `scheme.Entities` of its `mode="strict"`.
    """
    parsed = [parse_tag(text) for text in tags]
    if scheme is None:
        return _lenient(parsed)
    scheme = check_scheme(scheme)
    own = [tag if is_tag(text, scheme) else _O for tag, text in zip(parsed, tags, strict=True)]
    return _strict_iob1(own) if scheme == "IOB1" else _strict(own, ends=scheme != "BIO")


def _lenient(tags: Sequence[Tag]) -> list[Entity]:
    entities: list[Entity] = []
    start = 0
    before = _O
    for index, tag in enumerate([*tags, _O]):
        begins = tag.letter in "BS" or before.letter in "OES" or before.type != tag.type
        if before.letter != OUTSIDE and (tag.letter == OUTSIDE or begins):
            entities.append(Entity(before.type, start, index))
        if begins:
            start = index
        before = tag
    return entities


def _strict(tags: Sequence[Tag], *, ends: bool) -> list[Entity]:
    """`B I*`; where entities have an end, `S` and `B I* E`."""
    entities: list[Entity] = []
    index = 0
    while index < len(tags):
        first = tags[index]
        end = index + 1
        if first.letter == "B":
            while tags[end : end + 1] == [Tag("I", first.type)]:
                end += 1
        whole = first.letter == ("S" if ends else "B")
        if ends and first.letter == "B" and tags[end : end + 1] == [Tag("E", first.type)]:
            end += 1
            whole = True
        if whole:
            entities.append(Entity(first.type, index, end))
        index = end
    return entities


def _strict_iob1(tags: Sequence[Tag]) -> list[Entity]:
    """`I+`, or `B I*` directly after a unit of its type.

    A `B` elsewhere is no entity and does not belong to one; an `I` after it begins one.
    """
    entities: list[Entity] = []
    index = 0
    while index < len(tags):
        first, before = tags[index], tags[index - 1] if index else _O
        end = index + 1
        if first.letter == OUTSIDE or (first.letter == "B" and first.type != before.type):
            index = end
            continue
        while tags[end : end + 1] == [Tag("I", first.type)]:
            end += 1
        last, after = tags[end - 1], tags[end] if end < len(tags) else _O
        # seqeval does not let an entity of `B` alone end before a `B` of another type.
        if not (last.letter == after.letter == "B" and last.type != after.type):
            entities.append(Entity(first.type, index, end))
        index = end
    return entities


def tags_of(entities: Iterable[Entity], length: int, scheme: str) -> list[str]:
    """Writes entities as tags, one for each of `length` units.

    Raises:
        ConfigError: there is no such scheme.
        DataError: an entity is empty, lies outside the units, or overlaps another one.
    """
    scheme = check_scheme(scheme)
    tags = [OUTSIDE] * length
    inside = "M" if scheme == "BMES" else "I"
    before = Entity("", -1, -1)
    for entity in sorted(entities, key=lambda each: each.start):
        if not max(0, before.end) <= entity.start < entity.end <= length:
            raise DataError(
                f"{entity} is empty, outside {length} units or overlaps the entity before it ({before}); "
                "expected entities apart from one another."
            )
        size = entity.end - entity.start
        letters = ["B"] + [inside] * (size - 1)
        if scheme in ("BIOES", "BMES"):
            letters = ["S"] if size == 1 else [*letters[:-1], "E"]
        elif scheme == "IOB1" and (before.end, before.type) != (entity.start, entity.type):
            letters[0] = "I"
        suffix = "" if entity.type == _NO_TYPE else f"-{entity.type}"
        tags[entity.start : entity.end] = [letter + suffix for letter in letters]
        before = entity
    return tags

"""Tags to entities and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie.tasks.tagging import (
    SCHEMES,
    Entity,
    check_scheme,
    entities_of,
    find_scheme,
    is_tag,
    parse_tag,
    tags_of,
)
from propeller.errors import ConfigError, DataError

# One sentence in each scheme: two entities of a type side by side, one of another type, one alone.
ENTITIES = [Entity("A", 0, 1), Entity("A", 1, 4), Entity("B", 4, 6), Entity("A", 7, 8)]
TAGS = {
    "BIO": "B-A B-A I-A I-A B-B I-B O B-A",
    "IOB1": "I-A B-A I-A I-A I-B I-B O I-A",
    "BIOES": "S-A B-A I-A E-A B-B E-B O S-A",
    "BMES": "S-A B-A M-A E-A B-B E-B O S-A",
}


@st.composite
def entities(draw):
    """Entities apart from one another, and the number of units."""
    found = []
    end = 0
    for _ in range(draw(st.integers(0, 5))):
        start = end + draw(st.integers(0, 2))
        end = start + draw(st.integers(1, 4))
        found.append(Entity(draw(st.sampled_from(["PER", "PER.NAM", "A-B", "_"])), start, end))
    return found, end + draw(st.integers(0, 2))


class TestWellFormed:
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_reads(self, scheme):
        tags = TAGS[scheme].split()
        assert entities_of(tags, scheme) == entities_of(tags) == ENTITIES

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_writes(self, scheme):
        assert tags_of(reversed(ENTITIES), 8, scheme) == TAGS[scheme].split()

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_recognises(self, scheme):
        assert find_scheme([TAGS[scheme].split()]) == scheme

    @given(entities(), st.sampled_from(sorted(SCHEMES)))
    def test_comes_back(self, drawn, scheme):
        found, length = drawn
        tags = tags_of(found, length, scheme)
        assert len(tags) == length and all(is_tag(tag, scheme) for tag in tags)
        assert entities_of(tags, scheme) == entities_of(tags) == found


# What seqeval gives for these, with its end (inclusive) made exclusive.
ILL_FORMED = {
    "I at the beginning": ("I-A I-A O", [("A", 0, 2)], "BIO", []),
    "I of another type": ("B-A I-B I-B", [("A", 0, 1), ("B", 1, 3)], "BIO", [("A", 0, 1)]),
    "no end": ("B-A I-A O S-B", [("A", 0, 2), ("B", 3, 4)], "BIOES", [("B", 3, 4)]),
    "end alone": ("O E-A E-A", [("A", 1, 2), ("A", 2, 3)], "BIOES", []),
    "I after the end": ("B-A E-A I-A", [("A", 0, 2), ("A", 2, 3)], "BIOES", [("A", 0, 2)]),
    "end of another type": ("B-A E-B", [("A", 0, 1), ("B", 1, 2)], "BIOES", []),
    "E after S": ("S-A E-A", [("A", 0, 1), ("A", 1, 2)], "BIOES", [("A", 0, 1)]),
    "no end in BMES": ("B-A M-A S-A", [("A", 0, 2), ("A", 2, 3)], "BMES", [("A", 2, 3)]),
    "letters of another scheme": ("B-A I-A E-A", [("A", 0, 3)], "BIO", [("A", 0, 2)]),
    "B where IOB1 has none": ("O B-A I-A", [("A", 1, 3)], "IOB1", [("A", 2, 3)]),
    "B of another type": ("I-A B-B", [("A", 0, 1), ("B", 1, 2)], "IOB1", [("A", 0, 1)]),
    "B of B of another type": (
        "I-A B-A B-B I-B",
        [("A", 0, 1), ("A", 1, 2), ("B", 2, 4)],
        "IOB1",
        [("A", 0, 1), ("B", 3, 4)],
    ),
    "letters alone": ("B I O S", [("_", 0, 2), ("_", 3, 4)], "BIOES", [("_", 3, 4)]),
    "no tags": ("B-A [CLS] I-A BAD -", [("A", 0, 1), ("A", 2, 3)], "BIO", [("A", 0, 1)]),
}


@pytest.mark.parametrize(("tags", "lenient", "scheme", "strict"), ILL_FORMED.values(), ids=ILL_FORMED)
def test_ill_formed(tags, lenient, scheme, strict):
    assert entities_of(tags.split()) == lenient
    assert entities_of(tags.split(), scheme) == strict


@given(st.lists(st.text(max_size=4)), st.sampled_from([None, *SCHEMES]))
def test_nothing_raises(tags, scheme):
    end = 0
    for entity in entities_of(tags, scheme):
        assert end <= entity.start < entity.end <= len(tags)
        end = entity.end


@pytest.mark.parametrize(
    ("text", "letter", "kind"),
    [
        ("B-PER.NAM", "B", "PER.NAM"),
        ("M-A-B", "I", "A-B"),
        ("O", "O", ""),
        ("S-", "S", "_"),
        ("BPER", "O", ""),
    ],
)
def test_parse_tag(text, letter, kind):
    assert parse_tag(text) == (letter, kind)


class TestFindScheme:
    @pytest.mark.parametrize(
        ("sentences", "scheme"),
        [
            ([], "BIO"),
            (["O O"], "BIO"),
            (["B-A", "O B-A"], "BIO"),
            (["O I-A I-A"], "IOB1"),
            (["I-A B-A", "I-B I-A"], "IOB1"),
            # one slip does not make a data set IOB1, nor BIO
            (["B-A I-A O B-A", "O I-A"], "BIO"),
            (["I-A I-A O I-A", "O B-A"], "IOB1"),
            (["S-A O"], "BIOES"),
            (["B-A E-A"], "BIOES"),
            (["B M E S"], "BMES"),
        ],
    )
    def test_finds(self, sentences, scheme):
        assert find_scheme(line.split() for line in sentences) == scheme

    def test_two_schemes(self):
        with pytest.raises(ConfigError, match="both I and M"):
            find_scheme([["B-A", "I-A"], ["B-A", "M-A"]])

    def test_no_tag(self):
        with pytest.raises(ConfigError, match="'NN' is no tag; expected O, or one of B, I, M, E, S"):
            find_scheme([["O", "NN"]])


class TestErrors:
    @pytest.mark.parametrize(
        "call",
        [
            lambda name: check_scheme(name),
            lambda name: is_tag("O", name),
            lambda name: entities_of([], name),
            lambda name: tags_of([], 0, name),
        ],
    )
    def test_scheme(self, call):
        with pytest.raises(ConfigError, match=r"'BIOS' is no tagging scheme; .* Did you mean 'BIO"):
            call("BIOS")

    @pytest.mark.parametrize(("name", "scheme"), [("iob2", "BIO"), ("IOBES", "BIOES"), ("bmes", "BMES")])
    def test_other_names(self, name, scheme):
        assert check_scheme(name) == scheme

    @pytest.mark.parametrize("wrong", [(-1, 1), (2, 2), (3, 2), (1, 3), (4, 6)])
    def test_entities(self, wrong):
        with pytest.raises(DataError, match="is empty, outside 5 units or overlaps"):
            tags_of([Entity("A", 0, 2), Entity("B", *wrong)], 5, "BIO")

"""Chinese text as the CMRC2018 evaluation cuts it: single Chinese characters, and words between them.

Source: `cmrc2018_evaluate.py` (ymcui/cmrc2018) has NLTK's `word_tokenize` cut what stands between Chinese
    characters. The same words come out here without NLTK and its model of sentences (3.10 was compared), but
    for what hardly occurs: that model knows more abbreviations (initials such as `s.g.`, states of the USA),
    which keep their period where a text goes on after them; of 44,887 answers of CMRC2018, DRCD and
    SQuAD one is cut otherwise. Releases of NLTK differ, too: older ones leave `1890–1895` whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# What the evaluation counts for nothing.
IGNORED = "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』"

_IGNORED = str.maketrans("", "", IGNORED)
_RUN = re.compile("[\u4e00-\u9fa5]|[^\u4e00-\u9fa5]+")
# Words keep commas and periods within, as in 3,000 and 4.5, and a period at their end.
_PIECE = re.compile(
    r"""
      \.{2,} | ''
    | [;@#$%&?!()\[\]{}<>«»‘„"\u2012-\u2015]
    | ,(?!\d)
    | (?: [^\s;@#$%&?!()\[\]{}<>«»‘„"\u2012-\u2015.,'] | ,(?=\d) | \.(?!\.) | '(?!') )+
    """,
    re.VERBOSE,
)
_BREAKS = r""")\]}(\[{"';@?!‘«»"""
_SENTENCE_END = re.compile(rf"[.?!](?=[{_BREAKS}]|\s+\S)")
_LAST_WORD = re.compile(rf"['?!‘«»]?[^\s{_BREAKS}]*\Z")
_LONGEST_WORD = 32
_FINAL_PERIOD = re.compile(r"[^.]\.\Z")
_CLOSING = re.compile(r"""["')\]}]+(?=\s|\Z)""")
_NUMBER = re.compile(r"-?[.,]?\d[\d,.-]*")
_BLANK = re.compile(r"\s")
_NOT_BLANK = re.compile(r"\S")
_BEFORE_OPENING_QUOTE = frozenset(" ([{<«‘„")
_OPENING_APOSTROPHE = re.compile(r"'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)")
_CLITIC = re.compile(r"(?<=[^'])(?:'(?:s|m|d|ll|re|ve)?|n't)$")
_CONTRACTIONS = dict.fromkeys(["cannot", "gimme", "gonna", "gotta", "lemme", "wanna"], 3)
_ABBREVIATIONS = frozenset(
    "c d e f g h k l m n p r s t v w mr mrs ms dr prof st jr sr gen col lt sen rep inc ltd co corp bros vs "
    "ft u.s u.k u.n u.s.a u.s.s.r d.c n.y l.a a.m p.m a.d ph.d jan feb aug sep sept oct nov dec".split()
)


def remove_ignored(text: str) -> str:
    """Returns a text in lower case, without blanks around it and what counts for nothing.

    Two texts are an exact match if this is the same of both.
    """
    return text.lower().strip().translate(_IGNORED)


def segments(text: str) -> list[str]:
    """Returns what a text consists of, in lower case: Chinese characters (U+4E00 to U+9FA5) and words."""
    found: list[str] = []
    for run in _RUN.findall(remove_ignored(text)):
        if "\u4e00" <= run[0] <= "\u9fa5":
            found.append(run)
        else:
            found.extend(_words(run))
    return found


def _words(run: str) -> Iterator[str]:
    """Yields the words of a text in lower case that holds nothing that counts for nothing.

    Source: the conventions of the Penn Treebank, as NLTK's `word_tokenize` has them.
    """
    for sentence in _sentences(run):
        last_end = len(sentence.rstrip("])}>\"'» "))
        opened = False
        for match in _PIECE.finditer(sentence):
            piece, start = match[0], match.start()
            if piece in ('"', "''"):
                # A second quotation mark right at the beginning of a sentence counts as opening, too.
                opens = _opens(sentence, start, piece) or (opened and start == 1)
                opened = opens and start == 0
                yield "``" if opens else "''"
            elif match.end() >= last_end and _FINAL_PERIOD.search(piece):
                yield from _parts(piece[:-1])
                yield "."
            else:
                yield from _parts(piece)


def _opens(sentence: str, start: int, mark: str) -> bool:
    return sentence[start - 1] in _BEFORE_OPENING_QUOTE if start else mark == '"'


def _sentences(run: str) -> Iterator[str]:
    """Yields the sentences of a text in lower case; only their ends matter, where a period is a word.

    Source: Kiss and Strunk 2006 (Punkt), for texts without capitals.
    """
    begin = 0
    ends = list(_SENTENCE_END.finditer(run))
    for place, match in enumerate(ends):
        end = match.end()
        if place + 1 < len(ends) and not _BLANK.search(run, end, ends[place + 1].start()):
            continue  # what has no blank within ends at most one sentence
        if match[0] == "." and not _ends_sentence(run, end):
            continue
        closing = _CLOSING.match(run, end)
        end = closing.end() if closing else end
        yield run[begin:end].strip()
        begin = end
    yield run[begin:].strip()


def _ends_sentence(run: str, end: int) -> bool:
    """Whether the period before `end` is not that of an ellipsis, abbreviation, initial or ordinal."""
    last = _LAST_WORD.search(run, max(0, end - _LONGEST_WORD), end - 1)
    word = last[0] if last else ""
    if word.endswith(".") or word in _ABBREVIATIONS:
        return False
    is_initial = len(word) == 1 and word.isalpha()
    if not (is_initial or _NUMBER.fullmatch(word)):
        return True
    following = _NOT_BLANK.search(run, end)
    return following is None or not (following[0].islower() or following[0] in ";?!")


def _parts(word: str) -> Iterator[str]:
    """Yields a word, an apostrophe before it, and what is contracted at its end."""
    if _OPENING_APOSTROPHE.match(word):
        yield "'"
        word = word[1:]
    clitic = _CLITIC.search(word)
    stem = word[: clitic.start()] if clitic else word
    cut = _CONTRACTIONS.get(stem, 0)
    yield from filter(None, (stem[:cut], stem[cut:], clitic and clitic[0]))

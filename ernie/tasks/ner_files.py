r"""Files of sequence labelling: units with a tag each.

| format | what it looks like |
|---|---|
| `tsv` | `text_a<TAB>label`, with or without a header; units and tags joined by `\x02` or by single spaces |
| `conll` | a unit a line, its tag in the last column, an empty line after each sentence, `-DOCSTART-` lines |
| `weibo` | `conll` with each unit's position in its word stuck to it (`科0`, `技1`) |
| `json` | `{"tokens": [...], "ner_tags": [...]}` a line, or an array of these; lists, or texts as in `tsv` |

Format, columns and scheme are recognised by what a file holds. All of them may be gzipped, begin with a byte
order mark and have Windows line ends.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ernie.tasks.conll import Sentences, find_layout, split_columns
from ernie.tasks.json_files import is_json, read_objects
from ernie.tasks.label_map import read_label_map
from ernie.tasks.tagging import OUTSIDE, check_scheme, find_scheme, is_tag
from propeller.data import Dataset, FeatureColumns, PathLike, RawColumn, source_files
from propeller.errors import ConfigError, DataError, did_you_mean

FORMATS = ("tsv", "conll", "weibo", "json")

# What joins units where a space may be one.
JOINT = "\x02"

_TEXT_NAMES = ("text", "tokens")
_LABEL_NAMES = ("labels", "tags", "ner_tags")
_HEAD_LINES = 1000
_LABELS_SHOWN = 20
# Of the units of a data set in Chinese; numbers and foreign words may be one unit each. English has 1 in 5.
_BY_CHARACTER = 0.9


class NerTags(NamedTuple):
    """What training data tell of their tags.

    Attributes:
        labels: the tags by id.
        scheme: the scheme they are in; a key of `ernie.tasks.tagging.SCHEMES`.
        by_character: whether nearly all units are one character.
    """

    labels: list[str]
    scheme: str
    by_character: bool


def read_ner(
    path: PathLike,
    *,
    columns: Sequence[str] | None = None,
    format: str | None = None,
    scheme: str | None = None,
    labels: Iterable[str] | None = None,
) -> Dataset:
    r"""Streams over the sentences of a file.

    Args:
        path: the file.
        columns: names of its columns in order, `text_a` and `label`, `_` for one to skip. None: as a header
            says; without one, the only two of `tsv`, the first and the last of `conll`. Those of `json` have
            names.
        format: one of `FORMATS`. None: `json` if it is called so or begins with an object; `tsv` if its first
            1000 lines have a header, `\x02`, or spaces between tags in one cell, else `conll`; `weibo` if all
            of their units end with a number, which is 0 at the beginning of each sentence.
        scheme: the tags must be of this one; None: of any.
        labels: the tags there may be, by id; None: all.

    Returns:
        `{"units": [...], "labels": [...], "separator": "\x02" | " " | ""}` for each sentence: a tag for each
        unit, and what joins the units in the file. A text without separators is one unit. Of `conll` and of
        lists it is a space between words, nothing where more than half of the first units are one character.
        A tag of `json` may be its id, if `labels` are given.

    Raises:
        ConfigError: there is no such format or scheme, or `columns` has other names.
        DataError: the file cannot be read, is empty, or its first line does not fit; when iterated: a line
            is malformed, its tags are not as many as its units, or one is unknown. It names file and line.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(
            f"The format is {format!r}; expected {', '.join(FORMATS)}.{did_you_mean(format, FORMATS)}"
        )
    path = Path(path)
    check = _TagCheck(labels, scheme)
    if format == "json" or (format is None and is_json(path)):
        rows = read_objects(path)
        return rows.map(functools.partial(_read_object, check=check, separator=_separator(rows)))
    lines = Dataset.from_file(path)
    head = _head(lines)
    if format == "tsv" or (format is None and _is_tsv(head, columns)):
        cells = [RawColumn("text_a", aliases=_TEXT_NAMES), RawColumn("label", aliases=_LABEL_NAMES)]
        rows = FeatureColumns(cells, file_columns=columns).read(path)
        return rows.map(functools.partial(_read_row, check=check))
    positions = None if format is None else format == "weibo"
    try:
        layout = find_layout(head, columns=columns, positions=positions)
    except DataError as error:
        raise DataError(str(error), path=path, line=1) from error
    return lines.apply(lambda source: Sentences(source, layout, check))


def has_labels(path: PathLike, *, columns: Sequence[str] | None = None) -> bool:
    """Whether a file has a column of tags: by its header; without one, if a line has more than one column.

    Args:
        path: the file.
        columns: see `read_ner`.

    Raises:
        DataError: the file cannot be read, or is empty.
    """
    if is_json(Path(path)):
        return any(_value(row, "label", _LABEL_NAMES) is not None for row in _head(read_objects(Path(path))))
    head = _head(Dataset.from_file(path))
    if columns is not None:
        return "label" in columns
    first = _cells(head[0])
    if _is_header(first):
        return not {"label", *_LABEL_NAMES}.isdisjoint(map(str.casefold, first))
    return any(len(split_columns(line, tabs="\t" in line)) > 1 for line in head)


def find_tags(
    train: PathLike,
    *,
    columns: Sequence[str] | None = None,
    format: str | None = None,
    scheme: str | None = None,
) -> NerTags:
    """Reads all training data once, and tells what tags there are.

    Args:
        train: the training file, or a folder of parts. `label_map.json` beside it gives the tags by id;
            otherwise they are those found in it, `O` first, the others sorted.
        columns: see `read_ner`.
        format: see `read_ner`.
        scheme: see `read_ner`; None recognises it.

    Raises:
        ConfigError: as `read_ner`; `label_map.json` is none; or the tags are of no one scheme.
        DataError: as `read_ner`; a tag that `label_map.json` does not have is unknown.
    """
    train = Path(train)
    label_map = train.parent / "label_map.json"
    labels = read_label_map(label_map) if label_map.exists() else None
    seen = _Seen()
    sequences = (
        tags
        for part in source_files(train.name, data_dir=train)
        for tags in seen.watch(read_ner(part, columns=columns, format=format, scheme=scheme, labels=labels))
    )
    if scheme is None:
        try:
            scheme = find_scheme(sequences)
        except ConfigError as error:
            raise ConfigError(f"{train}: {error}") from error
    else:
        scheme = check_scheme(scheme)
        for _ in sequences:
            pass
    if labels is None:
        labels = sorted(seen.tags, key=lambda tag: (tag != OUTSIDE, tag))
    return NerTags(labels, scheme, by_character=seen.characters >= _BY_CHARACTER * seen.units)


class _Seen:
    """What went by of the sentences of a data set."""

    def __init__(self) -> None:
        self.tags: set[str] = set()
        self.units = 0
        self.characters = 0

    def watch(self, raws: Iterable[dict[str, Any]]) -> Iterator[list[str]]:
        """Yields the tags of each sentence."""
        for raw in raws:
            self.tags.update(raw["labels"])
            self.units += len(raw["units"])
            self.characters += sum(len(unit) == 1 for unit in raw["units"])
            yield raw["labels"]


class _TagCheck:
    """Refuses tags that are not among the labels, or none of the scheme."""

    def __init__(self, labels: Iterable[str] | None, scheme: str | None):
        self._labels = None if labels is None else list(labels)
        self._scheme = None if scheme is None else check_scheme(scheme)
        self._good: set[str] = set()

    def name(self, tag: Any) -> str:
        """The tag that JSON has, by name or by id."""
        if isinstance(tag, str):
            return tag
        if type(tag) is not int:
            raise DataError(f"a label is {tag!r:.80}; expected a tag, such as B-PER")
        if self._labels is None:
            raise DataError(
                f"a label is the number {tag}; expected a tag, such as B-PER. Write tags (Hugging Face has "
                "their names in features['ner_tags'].feature.names), or number them in label_map.json beside "
                'the training data: {"O": 0, "B-PER": 1, ...}'
            )
        if not 0 <= tag < len(self._labels):
            raise DataError(f"a label is the number {tag}, but there are {len(self._labels)} labels")
        return self._labels[tag]

    def __call__(self, tag: str) -> None:
        if tag in self._good:
            return
        if self._labels is not None and tag not in self._labels:
            shown = ", ".join(self._labels[:_LABELS_SHOWN])
            more = len(self._labels) - _LABELS_SHOWN
            raise DataError(
                f"unknown label {tag!r:.80}; known are {shown}{f' and {more} more' if more > 0 else ''}."
                f"{did_you_mean(tag, self._labels)} They come from the training data, or from label_map.json "
                "beside it."
            )
        if not is_tag(tag, self._scheme):
            kind = "no tag" if self._scheme is None else f"no tag of the scheme {self._scheme}"
            raise DataError(f"{tag!r:.80} is {kind}; expected O, or a letter and a type, such as B-PER")
        self._good.add(tag)


def _head(lines: Dataset) -> list[Any]:
    """The first lines, or objects, of a file."""
    return list(itertools.islice(lines, _HEAD_LINES))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("\t")]


def _is_header(cells: Sequence[str]) -> bool:
    """Whether cells of a first line are names of columns."""
    names = {"text_a", "label", *_TEXT_NAMES, *_LABEL_NAMES}
    return not names.isdisjoint(map(str.casefold, cells)) and not any(map(is_tag, cells))


def _is_tsv(head: Sequence[str], columns: Sequence[str] | None) -> bool:
    """Whether lines hold whole sentences."""
    first = _cells(head[0])
    if len(first) > 1 and _is_header(first):
        return True
    label = columns.index("label") if columns is not None and "label" in columns else -1
    for line in head:
        cells = line.split("\t")
        if JOINT in line:
            return True
        if len(cells) > 1 and label < len(cells) and " " in cells[label].strip(" "):
            return True
    return False


def _read_row(row: dict[str, str], *, check: _TagCheck) -> dict[str, Any]:
    """Parts a row into units and tags."""
    units, separator = split_units(_stripped(row["text_a"]))
    tags, _ = split_units(_stripped(row["label"]))
    return _checked(units, tags, separator, check)


def _read_object(row: Mapping[str, Any], *, check: _TagCheck, separator: str) -> dict[str, Any]:
    """The units and tags of an object; `separator` joins those of a list."""
    units, tags = _required(row, "text_a", _TEXT_NAMES), _required(row, "label", _LABEL_NAMES)
    if isinstance(units, str):
        units, separator = split_units(_stripped(units))
    elif not all(isinstance(unit, str) for unit in units):
        raise DataError(f"the units are {units!r:.80}; expected texts")
    tags = split_units(_stripped(tags))[0] if isinstance(tags, str) else list(map(check.name, tags))
    return _checked(units, tags, separator, check)


def _value(row: Mapping[str, Any], field: str, others: Sequence[str]) -> Any:
    return next((row[name] for name in (field, *others) if row.get(name) is not None), None)


def _required(row: Mapping[str, Any], field: str, others: Sequence[str]) -> Any:
    value = _value(row, field, others)
    if value is None:
        raise DataError(
            f"the object has no {field!r} (or {', '.join(map(repr, others))}); it has "
            f"{', '.join(map(repr, row)) or 'nothing'}"
        )
    if not isinstance(value, str | list):
        raise DataError(f"{field!r} is {value!r:.80}; expected a list, or a text of what spaces part")
    return value


def _separator(rows: Dataset) -> str:
    """What joins units that come as lists."""
    lists = (_value(row, "text_a", _TEXT_NAMES) for row in _head(rows))
    units = [unit for found in lists if isinstance(found, list) for unit in found]
    return "" if 2 * sum(len(str(unit)) == 1 for unit in units) > len(units) else " "


def _checked(units: list[str], tags: list[str], separator: str, check: _TagCheck) -> dict[str, Any]:
    if units in ([], [""]):
        raise DataError("the text is empty; expected a unit at least")
    if len(units) != len(tags):
        raise DataError(
            f"found {len(units)} units ({_shown(units)}) and {len(tags)} labels ({_shown(tags)}); expected "
            r"one label for each unit. In a text they are joined by \x02, or by single spaces."
        )
    for tag in tags:
        check(tag)
    return {"units": units, "labels": tags, "separator": separator}


def split_units(text: str) -> tuple[list[str], str]:
    r"""Parts a line of text into units: at `\x02`, else at each space; without either it is one unit.

    Returns:
        The units, and what joins them: `"\x02"`, `" "` or `""`.
    """
    if JOINT in text:
        return text.split(JOINT), JOINT
    return (text.split(" "), " ") if " " in text else ([text], "")


def _stripped(cell: str) -> str:
    return cell if JOINT in cell else cell.strip(" ")


def _shown(cells: Sequence[str]) -> str:
    return " ".join(cells[:5]) + (" ..." if len(cells) > 5 else "")

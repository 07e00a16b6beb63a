"""Files of queries with candidates: for ranking, and for training retrieval.

A row holds a query (`text_a`), a candidate (`text_b`) and a label, a whole number from 0 that says how
relevant the candidate is. Rows are grouped by `qid`; in a file without that column rows with the same query
that follow one another are a group, as in NLPCC-DBQA.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from propeller.data import Column, Dataset, FeatureColumns, RawColumn, as_parts, first_line
from propeller.errors import DataError
from propeller.processor import Raw

log = logging.getLogger("ernie")

_RIGHT_NAME = "positive"
# What the public data sets call these columns; WikiQA's own files begin with a capital.
_QID_NAMES = ("query_id", "question_id", "QuestionID")
_QUERY_NAMES = ("query", "question", "Question", "sentence1", "anchor")
_CANDIDATE_NAMES = ("title", "passage", "document", "answer", "Sentence", "sentence2", _RIGHT_NAME)
_LABEL_NAMES = ("relevance", "Label", "labels")
_NEGATIVE_NAMES = ("text_c", "hard_negative")

_MAX_DIGITS = 9  # of a label: relevance is a grade, and grades are few


def read_ranking(path: Path, *, columns: Sequence[str] | None = None, labelled: bool = True) -> Dataset:
    """Reads queries with candidates.

    Args:
        path: a tab-separated file, with or without a header, plain or gzipped.
        columns: names of the cells of a file without a header; by position they are `qid` (where there are
            four), `text_a`, `text_b`, `label`.
        labelled: whether there must be labels.

    Returns:
        Raw examples `{"qid", "candidate", "text_a", "text_b", "label"}`, a label where there is one.
        `candidate` counts the rows of a query from 0. Without a column `qid` it is the file's name and the
        line at which the query begins.

    Raises:
        DataError: the file cannot be read or its first line does not fit; when iterated: a row is malformed,
            a label is no whole number from 0, or a `qid` comes again after another one. It names the line.
    """
    rows = _ranking_columns(columns, labelled).read(path)
    return Dataset.from_generator_func(functools.partial(_numbered, rows, path)).map(_row)


def has_labels(path: Path, *, columns: Sequence[str] | None = None) -> bool:
    """Whether a file of queries with candidates has labels.

    Raises:
        DataError: the file cannot be read, or lacks another column than that of the labels.
    """
    line = first_line(path, None)
    try:
        _ranking_columns(columns, labelled=True).layout(line)
    except DataError:
        if columns is None:  # what lacks more than labels is malformed
            read_ranking(path, labelled=False)
        return False
    return True


def lacks_labels(path: Path, *, columns: Sequence[str] | None = None) -> bool:
    """Whether a file holds candidates of which nothing says that they are right.

    Such a file has a header with a `qid`, but neither labels nor a column `positive`.

    Raises:
        DataError: as `has_labels`.
    """
    if columns is not None or has_labels(path):
        return False
    names = {name.strip().casefold() for name in first_line(path, None).split("\t")}
    return not names.isdisjoint(map(str.casefold, ("qid", *_QID_NAMES))) and _RIGHT_NAME not in names


def read_pairs(path: Path, *, columns: Sequence[str] | None = None) -> Dataset:
    """Reads what a dual encoder is trained on: queries with passages that are right for them, or wrong.

    The file has labels, as `read_ranking` reads it: a passage with a label above 0 is right, another is a
    hard negative. Or it holds right pairs, `text_a` and `text_b`, perhaps with a hard negative in a third
    column, `negative`, whose cells may be empty. Without a header three cells are right pairs with a
    negative, unless the third of the first line is a whole number.

    Returns:
        Raw examples `{"text_a", "positives", "negatives"}`, one for each query: of right pairs one for each
        run of rows with the same `text_a`. Either list may be empty.

    Raises:
        DataError: as `read_ranking`; or a query has two texts, or a right pair lacks its passage, or there
            are candidates, known by a column `qid` (and none `positive`), without labels.
    """
    if _is_labelled(path, columns):
        log.info("%s: passages with labels", path)
        rows = _ranking_columns(columns, labelled=True).read(path)
        return Dataset.from_generator_func(functools.partial(_labelled_groups, rows, path))
    if lacks_labels(path, columns=columns):
        raise DataError(
            "has a column for the qid, as files of candidates have, but none for labels, which say what is "
            f"right. Add it; if all are right, call the column of the candidates {_RIGHT_NAME!r}.",
            path=path,
            line=1,
        )
    log.info("%s: right pairs", path)
    cells: list[Column] = [
        RawColumn("text_a", aliases=_QUERY_NAMES),
        RawColumn("text_b", aliases=_CANDIDATE_NAMES),
        RawColumn("negative", aliases=_NEGATIVE_NAMES, optional=True),
    ]
    rows = FeatureColumns(cells, file_columns=columns).read(path)
    return Dataset.from_generator_func(functools.partial(_pair_groups, rows, path))


def _ranking_columns(names: Sequence[str] | None, labelled: bool) -> FeatureColumns:
    cells: list[Column] = [
        RawColumn("qid", aliases=_QID_NAMES, optional=True),
        RawColumn("text_a", aliases=_QUERY_NAMES),
        RawColumn("text_b", aliases=_CANDIDATE_NAMES),
        _GradeColumn("label", aliases=_LABEL_NAMES, optional=not labelled),
    ]
    return FeatureColumns(cells, file_columns=names)


class _GradeColumn(Column):
    """How relevant a candidate is: a whole number from 0."""

    def convert(self, text: str) -> int:
        label = text.strip()
        if not (label.isascii() and label.isdigit()) or len(label) > _MAX_DIGITS:
            raise DataError(
                f"column {self.name!r}: found {text!r:.80}; expected a whole number from 0 of at most "
                f"{_MAX_DIGITS} digits, where 0 is not relevant"
            )
        return int(label)

    def signature(self) -> str | None:
        return "_GradeColumn"


def _with_lines(rows: Dataset) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row of a table with the number of its line."""
    for row, position in rows.iterate():
        yield as_parts(position, 3)[2], row


def _numbered(rows: Dataset, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Gives each row its query and its place in it; yields it with the number of its line."""
    seen: set[str] = set()
    current: tuple[str, str] | None = None
    qid, candidate = "", 0
    for line, row in _with_lines(rows):
        key = ("qid", row["qid"]) if "qid" in row else ("text", row["text_a"])
        if key != current:
            qid, candidate = row.get("qid", f"{path.name}:{line}"), 0
            if not qid.strip():
                raise DataError("qid is empty; expected what names the query", path=path, line=line)
            if qid in seen:
                raise DataError(
                    f"qid {qid!r} comes again after another one; expected the rows of a query to stand "
                    "together. Sort the file by qid.",
                    path=path,
                    line=line,
                )
            seen.add(qid)
            current = key
        yield line, {**row, "qid": qid, "candidate": candidate}
        candidate += 1


def _is_labelled(path: Path, columns: Sequence[str] | None) -> bool:
    if columns is not None:
        return "label" in columns
    if not has_labels(path):
        return False
    line = first_line(path, None)
    layout, cells = _ranking_columns(None, labelled=True).layout(line), line.split("\t")
    return layout.has_header or len(cells) > 3 or cells[2].strip().isdigit()


def _row(numbered: tuple[int, dict[str, Any]]) -> dict[str, Any]:
    return numbered[1]


def _labelled_groups(rows: Dataset, path: Path) -> Iterator[Raw]:
    group: dict[str, Any] | None = None
    for line, row in _numbered(rows, path):
        if row["candidate"] == 0:
            if group is not None:
                yield group
            group = {"text_a": row["text_a"], "positives": [], "negatives": []}
        elif group is None or row["text_a"] != group["text_a"]:
            raise DataError(
                f"the query {row['qid']!r} has another text in its row {row['candidate'] + 1} than in its "
                f"first: {row['text_a']!r:.80}; expected one text for each qid",
                path=path,
                line=line,
            )
        group["positives" if row["label"] > 0 else "negatives"].append(row["text_b"])
    if group is not None:
        yield group


def _pair_groups(rows: Dataset, path: Path) -> Iterator[Raw]:
    group: dict[str, Any] | None = None
    for line, row in _with_lines(rows):
        if not row["text_b"]:
            raise DataError("text_b is empty; expected the passage for the query", path=path, line=line)
        if group is None or row["text_a"] != group["text_a"]:
            if group is not None:
                yield group
            group = {"text_a": row["text_a"], "positives": [], "negatives": []}
        for name, text in (("positives", row["text_b"]), ("negatives", row.get("negative", ""))):
            if text and text not in group[name]:
                group[name].append(text)
    if group is not None:
        yield group

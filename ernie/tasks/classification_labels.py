"""The labels of a classification: which there are, how they are numbered, what each weighs."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie.tasks.classification_files import label_text
from ernie.tasks.label_map import read_label_map
from propeller.errors import ConfigError, DataError, did_you_mean
from propeller.processor import Raw

log = logging.getLogger("ernie")

_MAX_DIGITS = 100
# Of a label: so often it stands in the data where it belongs to them.
_OFTEN = 10
# Fewer labels than these are never taken for texts.
_MANY = 10


@dataclasses.dataclass(frozen=True)
class LabelCounts:
    """How often each label stands in labelled raw examples, and how many examples there are."""

    counts: Mapping[str, int]
    rows: int

    @classmethod
    def of(cls, raws: Iterable[Raw]) -> LabelCounts:
        """Counts them."""
        counts: collections.Counter[str] = collections.Counter()
        rows = 0
        for raw in raws:
            label = raw["label"]
            counts.update(label if isinstance(label, list) else [label])
            rows += 1
        return cls(counts, rows)


def find_labels(
    train: Path, found: LabelCounts, wanted: Any = None, *, firsts: Mapping[Path, str] | None = None
) -> list[str] | None:
    """Label texts by id: as `label_map.json` beside the training data says, else sorted as found in it.

    Logs a warning where they look like texts.

    Args:
        train: the training file, or folder of parts.
        found: its labels.
        wanted: the number of labels there should be; 1 is a regression, None takes what is there.
        firsts: files that begin with an example, unless their first line is a header that is not known as
            one; and the label in this line.

    Returns:
        None for a regression.

    Raises:
        DataError: such a line is a header: its label is no number and stands nowhere else, and the others are
            numbers, or stand in 10 rows at least. (Of fewer, a warning is logged.)
        ConfigError: `label_map.json` is none, the number of labels is not the wanted one, or two labels
            are spellings of one (`1` and `01`, `yes` and `Yes`).
    """
    if wanted == 1:
        return None
    label_map = train.parent / "label_map.json"
    if label_map.exists():
        labels = _as_read(read_label_map(label_map), label_map)
    else:
        labels = number_labels(found.counts)
        if wanted != len(labels):
            _check_first_lines(found, firsts or {}, label_map)
        if len(labels) >= _MANY and 2 * len(labels) > found.rows:
            log.warning(
                "%s: %d labels in %d rows look like texts (%r, ...). If the label stands in another column, "
                "name the columns in order, such as --columns label,text_a",
                train, len(labels), found.rows, f"{labels[-1]:.40}",
            )  # fmt: skip
        if wanted is None and all(map(_is_number, labels)) and not all(map(_is_whole, labels)):
            raise ConfigError(
                f"The labels of {train} are numbers such as {labels[0]}. For a regression set num_label "
                "to 1; to take each for a class, set it to their number."
            )
        _check_spellings(found.counts, train)
    if wanted is not None and wanted != len(labels):
        raise ConfigError(f"num_label is {wanted!r}, but there are {len(labels)} labels: {shown(labels)}.")
    return labels


def number_labels(found: Iterable[str]) -> list[str]:
    """Label texts in the order of their ids: by value if all are whole numbers, else sorted as text."""
    texts = sorted(set(found))
    if all(map(_is_whole, texts)):
        return sorted(texts, key=int)
    return texts


def class_weights(
    wanted: Any, labels: Sequence[str] | None, found: LabelCounts, *, multi_label: bool
) -> list[float] | None:
    """What the loss of each label weighs, in the order of their ids.

    Args:
        wanted: `balanced`; or a number for each label, as a list in the order of their ids or as a mapping,
            in which those not named have 1; None for no weights.
        labels: label texts by id; None for a regression.
        found: the labels of the training data.
        multi_label: whether an example may have any number of labels. `balanced` then gives each label as
            much weight where it stands as where it does not, otherwise all labels the same as a whole,
            with the mean weight 1 over the examples.

    Source: `sklearn.utils.class_weight.compute_class_weight("balanced")`; for several labels the
        `pos_weight` that the documentation of PyTorch's `BCEWithLogitsLoss` recommends.

    Raises:
        ConfigError: not one of these; or `balanced`, and a label does not occur; or a regression.
    """
    if wanted is None:
        return None
    if labels is None:
        raise ConfigError("class_weights weigh labels, and a regression has none.")
    if wanted == "balanced":
        missing = [label for label in labels if not found.counts.get(label)]
        if missing:
            raise ConfigError(
                f"class_weights is 'balanced', but the training data has no example of {shown(missing)}. "
                "Give a number for each label instead."
            )
        if multi_label:
            return [(found.rows - found.counts[label]) / found.counts[label] for label in labels]
        return [found.rows / (len(labels) * found.counts[label]) for label in labels]
    if isinstance(wanted, Mapping):
        for name in wanted:
            if name not in labels:
                raise ConfigError(
                    f"class_weights names {name!r}; expected some of {shown(labels)}."
                    f"{did_you_mean(str(name), labels)}"
                )
        wanted = [wanted.get(label, 1.0) for label in labels]
    numbers = isinstance(wanted, list | tuple) and all(type(item) in (int, float) for item in wanted)
    if not numbers or len(wanted) != len(labels) or not all(0 < item < math.inf for item in wanted):
        raise ConfigError(
            f"class_weights must be 'balanced', a number above 0 for each of the {len(labels)} labels "
            f"({shown(labels)}), or a mapping of label to number; got {wanted!r:.200}."
        )
    return [float(item) for item in wanted]


def shown(labels: Sequence[str]) -> str:
    """The first ten, for a message."""
    return ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")


def _as_read(labels: Sequence[str], path: Path) -> list[str]:
    """Labels as the files are read: without blanks around them, XNLI's other name for one as that."""
    try:
        return [label_text(label) for label in labels]
    except DataError as error:
        raise ConfigError(f"{path}: {error}") from error


def _check_first_lines(found: LabelCounts, firsts: Mapping[Path, str], label_map: Path) -> None:
    """Refuses an unknown header, of which an example with a label of its own would be made."""
    heads = collections.Counter(firsts.values())
    lone = {label for label, count in heads.items() if found.counts.get(label) == count}
    others = {label: count for label, count in found.counts.items() if label not in lone}
    least = min(others.values(), default=0)
    is_sure = bool(others) and (all(map(_is_number, others)) or least >= _OFTEN)
    for path, label in firsts.items():
        if label not in lone or _is_number(label) or not (is_sure or least > 1):
            continue
        message = (
            f"the label {label!r:.80} stands in no other line, so this looks like a header. If it is one, "
            "call its columns text_a, text_b (of pairs) and label, or delete it and name them in order, such "
            f"as --columns text_a,label. If it is an example, number the labels in {label_map}."
        )
        if is_sure:
            raise DataError(message, path=path, line=1)
        log.warning("%s:1: %s", path, message)


def _check_spellings(counts: Mapping[str, int], train: Path) -> None:
    """Refuses labels that differ in spelling only, since each would become a class of its own."""
    spelt: dict[str, str] = {}
    for label in counts:
        plain = unicodedata.normalize("NFKC", label).strip().lower()
        other = spelt.setdefault(str(int(plain)) if _is_whole(plain) else plain, label)
        if other != label:
            raise ConfigError(
                f"{train} has the labels {other!r} ({counts[other]} rows) and {label!r} ({counts[label]} "
                "rows), two spellings of one. Correct the data; if they are meant to be two, number them "
                f"in {train.parent / 'label_map.json'}."
            )


def _is_whole(text: str) -> bool:
    # A text of more digits names something, it does not count; `int` reads 4300 at most.
    return text.removeprefix("-").isdecimal() and len(text) <= _MAX_DIGITS


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False

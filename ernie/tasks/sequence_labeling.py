"""Sequence labelling: units (words, characters) in, a tag for each and the entities out; no Paddle.

A text that is longer than the model is read in windows of whole units, `[CLS] piece [SEP]` each, that share
some units with their neighbours. A unit's tag comes from the window in which it stands furthest from an edge
behind which the text goes on. In training it is learnt in every window that holds it, since the chain of a
CRF would have a hole otherwise.

A unit of several tokens has its label on the first; one with more tokens than a window is cut to those that
fit. A unit without any token, a blank for example, is not seen by the model: between two units of an entity
it is inside that, elsewhere its tag is `O`.

Source: Devlin et al. 2019 (BERT), section 5.3, for the labels of first tokens; `_check_is_max_context` in the
    `run_squad.py` of google-research/bert for the choice among windows.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ernie import crf
from ernie.encoding import Encoding
from ernie.tasks.answer_metric import AnswerMetric, with_answer_columns
from ernie.tasks.entity_scores import MODES, entity_scores
from ernie.tasks.ner_files import JOINT, read_ner, split_units
from ernie.tasks.processor import TextProcessor
from ernie.tasks.tagging import OUTSIDE, Entity, check_scheme, entities_of, tags_of
from ernie.tokenizing import Tokenizer
from propeller.data import Dataset
from propeller.errors import ConfigError, DataError, did_you_mean
from propeller.metrics import Metric
from propeller.processor import Answer, Raw, register_processor

# The label of tokens that begin no unit, and of padding.
NO_LABEL = -100

_SPECIAL_TOKENS = 2
_SEPARATORS = (JOINT, " ", "")
_WORD = re.compile(r"\S+")
_FAR = np.iinfo(np.int64).max


class _Text(NamedTuple):
    """The units of a raw example, in order.

    Attributes:
        units: the units.
        starts: where each begins, in characters of `whole`.
        whole: the text that they are of.
    """

    units: Sequence[str]
    starts: Sequence[int]
    whole: str


@register_processor
class SequenceLabelingProcessor(TextProcessor):
    """Units in; tags and entities with scores out.

    A raw example is `{"units": [...]}`, or `{"text_a": ...}` for free text, which is cut into units at blanks
    or, with `by_character`, into all its characters, blanks included, so that a tag has the place of its
    character. Labelled ones have `labels`, one for each unit. `separator` says what stood between the units
    where they come from: `\\x02` (which is no part of the text), a blank, or nothing.

    Args:
        tokenizer: the model's tokenizer.
        labels: tags by id.
        max_seqlen: tokens of a window at most, special ones included.
        scheme: of the tags; see `tagging.SCHEMES`.
        doc_stride: tokens between the beginnings of two windows; never more than a window has room for, so
            that none is left out. None is three quarters of that room.
        by_character: whether each character of free text is a unit.
        score: how entities are counted: `default`, `strict` or `conlleval`; see `entity_scores`.

    Raises:
        ConfigError: fewer than two labels, an unknown scheme or score, or a value out of range.
    """

    name = "sequence_labeling"

    def __init__(
        self,
        tokenizer: Tokenizer,
        labels: Sequence[str],
        *,
        max_seqlen: int,
        scheme: str,
        doc_stride: int | None = None,
        by_character: bool = False,
        score: str = "default",
    ):
        super().__init__(tokenizer, max_seqlen=max_seqlen)
        self._room = max_seqlen - _SPECIAL_TOKENS
        if self._room < 1:
            raise ConfigError(f"max_seqlen {max_seqlen} leaves no room for a unit: expected 3 or more.")
        if len(set(labels)) != len(labels) or len(labels) < 2:
            raise ConfigError(f"At least two different labels are needed, got {list(labels)}.")
        if doc_stride is None:
            doc_stride = self._room - self._room // 4
        if type(doc_stride) is not int or doc_stride < 1:
            raise ConfigError(f"doc_stride must be a whole number of at least 1, got {doc_stride!r}.")
        if score not in MODES:
            raise ConfigError(
                f"There is no score {score!r}.{did_you_mean(str(score), MODES)} Known: {', '.join(MODES)}."
            )
        self.labels = list(labels)
        self.scheme = check_scheme(scheme)
        self.doc_stride = doc_stride
        self.by_character = by_character
        self.score = score
        self._ids = {label: index for index, label in enumerate(self.labels)}

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "labels": self.labels,
            "max_seqlen": self.max_seqlen,
            "scheme": self.scheme,
            "doc_stride": self.doc_stride,
            "by_character": self.by_character,
            "score": self.score,
        }

    @property
    def pad_values(self) -> dict[str, int | float]:
        return {**super().pad_values, "units": -1, "label": NO_LABEL}

    def prepare(self, raws: Sequence[Raw]) -> list[dict[str, Any]]:
        """Tokenises a batch into windows; labelled ones keep what `AnswerMetric` needs. See `windows`."""
        return [
            example
            for raw, examples in zip(raws, self.windows(raws), strict=True)
            for example in (with_answer_columns(raw, examples) if "labels" in raw else examples)
        ]

    def windows(self, raws: Sequence[Raw]) -> list[list[dict[str, Any]]]:
        """Tokenises a batch.

        Returns:
            For each raw example its windows: `input_ids` and `token_type_ids` (int64 `[seq_len]`), `units`
            (int64 `[seq_len]`: the index of the unit that begins with this token, else -1), and of a labelled
            example `label` (int64 `[seq_len]`: the label where a unit begins, else -100).

        Raises:
            DataError: an example has no units or text, or another separator, there are more labels than units
                or fewer, or a label is unknown.
        """
        units = [self._units(raw) for raw in raws]
        labels = [self._label_ids(raw, len(found)) for raw, found in zip(raws, units, strict=True)]
        encodings = self.tokenizer.encode_units_batch(units)
        return [self._examples(*found) for found in zip(encodings, labels, strict=True)]

    def _label_ids(self, raw: Raw, num_units: int) -> np.ndarray | None:
        """The labels, int64 `[units + 1]`, of which the last, found by index -1, is that of no unit."""
        if "labels" not in raw:
            return None
        labels = raw["labels"]
        if not isinstance(labels, list | tuple):
            raise DataError(f"The labels are {labels!r:.40}; expected a list, one for each unit.")
        if len(labels) != num_units:
            raise DataError(f"{len(labels)} labels came with {num_units} units; expected one for each.")
        try:
            return np.array([*map(self._ids.__getitem__, labels), NO_LABEL], dtype=np.int64)
        except (KeyError, TypeError):
            label = next(label for label in labels if label not in self.labels)
            raise DataError(
                f"unknown label {label!r}.{did_you_mean(str(label), self._ids)} Known are: "
                f"{', '.join(self.labels)}."
            ) from None

    def _examples(self, encoding: Encoding, labels: np.ndarray | None) -> list[dict[str, Any]]:
        """The windows of a text; see `windows`."""
        ids = encoding.input_ids
        units = np.array(encoding.words, dtype=np.int64)
        if len(ids) <= self.max_seqlen:
            units[1:][units[1:] == units[:-1]] = -1  # all tokens of a unit but the first
            return [_example(ids, units, labels)]
        ids, words = ids[1:-1], units[1:-1]
        begins = np.flatnonzero(np.diff(words, prepend=-1))
        sizes = np.diff(begins, append=len(ids))
        kept = np.arange(len(ids)) - np.repeat(begins, sizes) < self._room  # of a unit so many tokens at most
        ids, words = ids[kept], words[kept]
        begins = np.flatnonzero(np.diff(words, prepend=-1))
        units = np.full(len(ids), -1, dtype=np.int64)
        units[begins] = words[begins]
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        return [
            _example(
                np.concatenate([[cls], ids[start:stop], [sep]]),
                np.concatenate([[-1], units[start:stop], [-1]]),
                labels,
            )
            for start, stop in self._cut(len(ids), begins)
        ]

    def _cut(self, size: int, begins: np.ndarray) -> list[tuple[int, int]]:
        """Windows of whole units over `size` tokens, as ranges of these."""
        edges = np.append(begins, size)
        ranges: list[tuple[int, int]] = []
        stride = min(self.doc_stride, self._room)
        start = 0
        while True:
            stop = int(edges[np.searchsorted(edges, start + self._room, side="right") - 1])
            ranges.append((start, stop))
            if stop == size:
                return ranges
            start = min(stop, int(edges[np.searchsorted(edges, start + stride)]))
            if size - start <= self._room:  # the last reaches back as far as it can, for more context
                start = int(edges[np.searchsorted(edges, size - self._room)])

    def finish(self, outputs: Mapping[str, Any]) -> list[Answer]:
        """Finds a label for every token.

        Args:
            outputs: `logits`, float `[rows, seq_len, labels]`; of a CRF also `is_unit` (`[rows, seq_len]`)
                and `transitions` (`[rows, labels + 2, labels]`, alike in all rows); see `crf.decode`.

        Returns:
            For each row the ids of its `labels`, one for each token, and their `probabilities`.
        """
        logits = np.asarray(outputs["logits"], dtype=np.float64)
        if "transitions" in outputs and len(logits):
            labels, probabilities = crf.decode(logits, outputs["is_unit"], outputs["transitions"][0])
        else:
            labels = logits.argmax(axis=-1)
            probabilities = 1 / np.exp(logits - logits.max(axis=-1, keepdims=True)).sum(axis=-1)
        return [
            {"labels": row, "probabilities": chances}
            for row, chances in zip(labels.tolist(), probabilities.tolist(), strict=True)
        ]

    def join(self, raw: Raw, examples: Sequence[Mapping[str, Any]], parts: Sequence[Answer]) -> Answer:
        """Makes the answer of the windows of a text.

        Returns:
            `tags`, one for each unit, and `entities`, `{"type", "start", "end", "text", "score"}` each, in
            order. `start` and `end` count characters of the text, and `text` is what stands there; where
            units came joined by `\\x02`, they stand in the text without it. The score is the mean of the
            probabilities of the units' tags.
        """
        text = self._text_of(raw)
        labels = np.full(len(text.units), -1, dtype=np.int64)
        probabilities = np.zeros(len(text.units))
        context = np.full(len(text.units), -1, dtype=np.int64)
        for number, (example, part) in enumerate(zip(examples, parts, strict=True)):
            units = np.asarray(example["units"])
            places = np.flatnonzero(units >= 0)
            before = places if number else np.full_like(places, _FAR)
            after = len(units) - 1 - places if number + 1 < len(examples) else np.full_like(places, _FAR)
            room = np.minimum(before, after)
            better = room > context[units[places]]
            places, chosen = places[better], units[places[better]]
            context[chosen] = room[better]
            labels[chosen] = np.asarray(part["labels"], dtype=np.int64)[places]
            probabilities[chosen] = np.asarray(part["probabilities"], dtype=np.float64)[places]
        return self._answer(text, labels, probabilities)

    def _answer(self, text: _Text, labels: np.ndarray, probabilities: np.ndarray) -> Answer:
        """The answer, given a label (or -1) and its probability for each unit."""
        tags = [self.labels[label] if label >= 0 else OUTSIDE for label in labels.tolist()]
        seen = np.flatnonzero(labels >= 0).tolist()
        chances = probabilities.tolist()
        entities = []
        for entity in entities_of([tags[unit] for unit in seen]):
            members = seen[entity.start : entity.end]
            first, last = members[0], members[-1]
            if last - first >= len(members):
                inside = tags_of([Entity(entity.type, 0, 3)], 3, self.scheme)[1]
                for unit in set(range(first, last)).difference(members):
                    tags[unit] = inside
            start, end = text.starts[first], text.starts[last] + len(text.units[last])
            entities.append(
                {
                    "type": entity.type,
                    "start": start,
                    "end": end,
                    "text": text.whole[start:end],
                    "score": sum(chances[unit] for unit in members) / len(members),
                }
            )
        return {"tags": tags, "entities": entities}

    def _units(self, raw: Raw) -> list[str]:
        """The units of a raw example; see `_text_of`."""
        units = raw.get("units")
        if raw.get("separator", "") not in _SEPARATORS:
            raise DataError(f"The separator is {raw['separator']!r:.40}; expected '\\x02', a blank or ''.")
        if isinstance(units, list | tuple) and all(isinstance(unit, str) for unit in units):
            return list(units)
        whole = raw.get("text_a")
        if units is not None or not isinstance(whole, str) or "text_b" in raw:
            shown = ", ".join(f"{name!r}: {value!r:.40}" for name, value in raw.items())
            raise DataError(f"An example is {{{shown}}}; expected units, a list of strings, or one text_a.")
        return list(whole) if self.by_character else _WORD.findall(whole)

    def _text_of(self, raw: Raw) -> _Text:
        """Cuts a raw example into its units.

        Raises:
            DataError: it has neither `units` nor `text_a`, or they are no strings; or another separator.
        """
        units = self._units(raw)
        if raw.get("units") is None:
            whole = raw["text_a"]
            words = _WORD.finditer(whole)
            starts = range(len(whole)) if self.by_character else [word.start() for word in words]
            return _Text(units, starts, whole)
        # By default a blank is between units, or nothing where they are characters.
        separator = raw.get("separator", "" if self.by_character else " ")
        between = "" if separator == JOINT else separator
        ends = itertools.accumulate((len(unit) + len(between) for unit in units), initial=0)
        return _Text(units, list(ends)[: len(units)], between.join(units))

    def read(self, path: Path, *, columns: Sequence[str] | None = None) -> Dataset:
        return read_ner(path, columns=columns, scheme=self.scheme, labels=self.labels)

    def raw_of(self, value: Any) -> Raw:
        """Takes free text, a list of units, or a mapping as it is.

        Raises:
            DataError: it is none of these.
        """
        if isinstance(value, list | tuple):
            return {"units": list(value)}
        return super().raw_of(value)

    def parse(self, line: str) -> Raw:
        """Reads units joined by `\\x02`, else by single blanks; a line without either is one unit.

        Each separator parts two units, of which either may be empty: what was joined is there again.
        """
        units, separator = split_units(line)
        return {"units": units, "separator": separator}

    def format(self, raw: Raw, answer: Answer) -> str:
        """Writes the tags, joined as the units are: by `\\x02`, else by blanks."""
        return (JOINT if raw.get("separator") == JOINT else " ").join(answer["tags"])

    def metrics(self) -> dict[str, Metric]:
        return {"entities": AnswerMetric(self, self._scores)}

    @property
    def best_metric(self) -> str:
        return "f1"

    def _scores(self, raws: Sequence[Raw], answers: Sequence[Answer]) -> Mapping[str, float]:
        scores = entity_scores(
            [raw["labels"] for raw in raws],
            [answer["tags"] for answer in answers],
            scheme=self.scheme,
            mode=self.score,
        )
        return {"f1": scores["f1"], "precision": scores["precision"], "recall": scores["recall"]}


def _example(input_ids: np.ndarray, units: np.ndarray, labels: np.ndarray | None) -> dict[str, Any]:
    example = {"input_ids": input_ids, "token_type_ids": np.zeros_like(input_ids), "units": units}
    if labels is not None:
        example["label"] = labels[units]
    return example

"""Metrics of tasks whose raw examples are judged as wholes, by the answers that users would get."""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from propeller import atomic
from propeller.errors import DataError
from propeller.metrics import Metric
from propeller.metrics.base import Array, state_array
from propeller.processor import Answer, Processor, Raw

_CHUNK = 512

Score = Callable[[Sequence[Raw], Sequence[Answer]], Mapping[str, float]]


def answer_columns(raw: Raw, window: int) -> dict[str, Any]:
    """The columns by which an example's window is known to `AnswerMetric`; they never reach the model."""
    return {"raw": atomic.to_json(raw), "window": window}


class AnswerMetric(Metric):
    """Joins the windows of every raw example to its answer, and scores all answers at the end.

    Reads the columns of `answer_columns`. What is kept is what `finish` makes of each window.

    Args:
        processor: the task.
        score: what the answers to labelled raw examples are worth: values by name.
    """

    def __init__(self, processor: Processor, score: Score):
        self._processor = processor
        self._score = score
        self.reset()

    def reset(self) -> None:
        # Of each raw example, for each window, its parts: several where the example stands in the data more
        # than once.
        self._parts: dict[str, dict[int, list[Answer]]] = {}

    def update(self, predictions: Mapping[str, Array], labels: Any, features: Mapping[str, Any]) -> None:
        raws, windows = features["raw"], np.asarray(features["window"]).tolist()
        parts = self._processor.finish(predictions)
        if not len(raws) == len(windows) == len(parts):
            raise DataError(f"{len(parts)} parts of answers for {len(raws)} rows; expected one for each.")
        for raw, window, part in zip(raws, windows, parts, strict=True):
            self._add(raw, window, [part])

    def _add(self, raw: str, window: int, parts: list[Answer]) -> None:
        self._parts.setdefault(raw, collections.defaultdict(list))[window] += parts

    def compute(self) -> Mapping[str, float]:
        """The scores over all raw examples of which all windows were seen.

        The others, of an evaluation that ends early (`eval_max_steps`), do not count.
        """
        return self._score(*self.answers())

    def answers(self) -> tuple[list[Raw], list[Answer]]:
        """The raw examples of which all windows were seen, and the answers to them."""
        raws: list[Raw] = []
        answers: list[Answer] = []
        texts = iter(self._parts.items())
        while chunk := list(itertools.islice(texts, _CHUNK)):
            loaded = [json.loads(text) for text, _ in chunk]
            windows = self._processor.windows(loaded)
            for raw, examples, (_, parts) in zip(loaded, windows, chunk, strict=True):
                seen = [parts.get(window, []) for window in range(len(examples))]
                for chosen in zip(*seen, strict=False):
                    raws.append(raw)
                    answers.append(self._processor.join(raw, examples, chosen))
        return raws, answers

    def state(self) -> dict[str, Array]:
        text = atomic.to_json(self._parts).encode("utf-8", "surrogatepass")
        return {"parts": np.frombuffer(text, dtype=np.uint8)}

    def merge(self, state: Mapping[str, Array]) -> None:
        text = state_array(state, "parts").tobytes().decode("utf-8", "surrogatepass")
        for raw, windows in json.loads(text).items():
            for window, parts in windows.items():
                self._add(raw, int(window), parts)

"""Linear-chain conditional random fields: the best path and the probabilities along it; no Paddle.

A path y over the units of a row has the score

    start[y_1] + sum_t emission[t, y_t] + sum_t transition[y_(t-1), y_t] + end[y_n]

and the probability exp(score) / (the same, summed over all paths). The three tables are one, `[L + 2, L]`:
the transitions (from, to), then start, then end. Only some positions of a row are units; the others (special
tokens, the rest of a word, padding) are skipped, as if they were not there.

Source: Lafferty, McCallum & Pereira 2001, "Conditional Random Fields"; Rabiner 1989, "A Tutorial on Hidden
    Markov Models", III A to C (forward-backward, Viterbi), in logarithms.

Shapes: B rows, S positions, L labels; U units of the row that has most of them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from propeller.types import HParamsGroup

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class CrfSettings(HParamsGroup):
    """Whether there is a CRF, and how it is trained, as hyper-parameters name it.

    Attributes:
        use_crf: whether there is one.
        crf_learning_rate: the peak of the schedule for its tables. They hold log-odds, which have to grow to
            several units; at the rate of a pretrained encoder, some 5e-5, they would hardly move.

    Raises:
        ConfigError: a value that cannot be used.
    """

    use_crf: bool = False
    crf_learning_rate: float = 5e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_above_0("crf_learning_rate")


def decode(emissions: npt.ArrayLike, is_unit: npt.ArrayLike, table: npt.ArrayLike) -> tuple[Ints, Floats]:
    """Finds the best path of each row.

    Args:
        emissions: `[B, S, L]`.
        is_unit: `[B, S]`, not 0 where a unit is.
        table: `[L + 2, L]`.

    Returns:
        The labels, int64 `[B, S]`, and the probability of each, given all emissions of the row and summed
        over all paths, float64 `[B, S]`. Both are 0 where there is no unit. Of paths that are equally good it
        is the one whose last labels come first.
    """
    scores, mask = np.asarray(emissions, dtype=np.float64), np.asarray(is_unit) != 0
    packed = np.asarray(table, dtype=np.float64)
    counts = mask.sum(axis=1)
    most = int(counts.max(initial=0))
    labels, probabilities = np.zeros(mask.shape, np.int64), np.zeros(mask.shape)
    if most == 0:
        return labels, probabilities
    places = np.argsort(~mask, axis=1, kind="stable")[:, :most]  # the units of each row, then others
    units = np.take_along_axis(scores, places[:, :, None], axis=1)
    present = np.arange(most) < counts[:, None]
    path = _best_paths(units, present, packed)
    chances = _marginals(units, present, packed)
    chosen = np.take_along_axis(chances, path[:, :, None], axis=2)[:, :, 0]
    np.put_along_axis(labels, places, np.where(present, path, 0), axis=1)
    np.put_along_axis(probabilities, places, np.where(present, chosen, 0.0), axis=1)
    return labels, probabilities


def _best_paths(units: Floats, present: npt.NDArray[np.bool_], table: Floats) -> Ints:
    """Viterbi over rows of unlike length: emissions `[B, U, L]` -> labels `[B, U]`."""
    transitions, start, end = table[:-2], table[-2], table[-1]
    rows, most, num_labels = units.shape
    best = start + units[:, 0]  # [B, L], of the paths that end in each label
    before = np.empty((most, rows, num_labels), np.int64)
    for step in range(1, most):
        scores = best[:, :, None] + transitions  # [B, from, to]
        before[step] = scores.argmax(axis=1)
        best = np.where(present[:, step, None], scores.max(axis=1) + units[:, step], best)
    path = np.empty((rows, most), np.int64)
    label = (best + end).argmax(axis=1)
    everyone = np.arange(rows)
    for step in range(most - 1, -1, -1):
        path[:, step] = label
        if step:
            label = np.where(present[:, step], before[step, everyone, label], label)
    return path


def _marginals(units: Floats, present: npt.NDArray[np.bool_], table: Floats) -> Floats:
    """Forward-backward: emissions `[B, U, L]` -> probability of each label of each unit, `[B, U, L]`."""
    transitions, start, end = table[:-2], table[-2], table[-1]
    forward = np.empty_like(units)
    backward = np.empty_like(units)
    forward[:, 0] = start + units[:, 0]
    for step in range(1, units.shape[1]):
        reached = _log_sum(forward[:, step - 1, :, None] + transitions, axis=1) + units[:, step]
        forward[:, step] = np.where(present[:, step, None], reached, forward[:, step - 1])
    backward[:, -1] = end
    for step in range(units.shape[1] - 1, 0, -1):
        ahead = (units[:, step] + backward[:, step])[:, None, :]
        left = _log_sum(transitions + ahead, axis=2)
        backward[:, step - 1] = np.where(present[:, step, None], left, backward[:, step])
    both = forward + backward
    return np.asarray(np.exp(both - _log_sum(both, axis=2)[:, :, None]))


def _log_sum(values: Floats, axis: int) -> Floats:
    """The logarithm of the sum of exponentials, without overflow."""
    largest = values.max(axis=axis, keepdims=True)
    return np.asarray(np.log(np.exp(values - largest).sum(axis=axis)) + largest.squeeze(axis))

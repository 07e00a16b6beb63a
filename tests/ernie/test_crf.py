"""The chain in numpy, against every path there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.special import logsumexp

from ernie import crf


def path_scores(units, table):
    """Path -> score, for all paths over the emissions `[U, L]` of one row."""
    transitions, start, end = table[:-2], table[-2], table[-1]
    scores = {}
    for path in itertools.product(range(units.shape[1]), repeat=len(units)):
        steps = sum(transitions[a, b] for a, b in itertools.pairwise(path))
        emitted = sum(units[t, label] for t, label in enumerate(path))
        scores[path] = start[path[0]] + steps + emitted + end[path[-1]]
    return scores


def make(seed, *, rows=6, size=7, labels=3, scale=2.0):
    rng = np.random.default_rng(seed)
    emissions = rng.normal(size=(rows, size, labels)) * scale
    is_unit = rng.random((rows, size)) < 0.6
    is_unit[0] = False  # a row without any
    is_unit[1] = True
    return emissions, is_unit, rng.normal(size=(labels + 2, labels)) * scale


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("labels", [1, 2, 4])
def test_best_path_and_probabilities_are_those_of_all_paths(seed, labels):
    emissions, is_unit, table = make(seed, labels=labels)
    found, probabilities = crf.decode(emissions, is_unit, table)
    assert found.dtype == np.int64 and found.shape == is_unit.shape == probabilities.shape
    for row in range(len(emissions)):
        places = np.flatnonzero(is_unit[row])
        assert not found[row][~is_unit[row]].any() and not probabilities[row][~is_unit[row]].any()
        if not len(places):
            continue
        scores = path_scores(emissions[row, places], table)
        best = max(scores, key=scores.__getitem__)
        assert tuple(found[row, places]) == best
        whole = logsumexp(list(scores.values()))
        for step, place in enumerate(places):
            through = [score for path, score in scores.items() if path[step] == best[step]]
            assert probabilities[row, place] == pytest.approx(np.exp(logsumexp(through) - whole))


def test_what_is_no_unit_changes_nothing():
    emissions, is_unit, table = make(0)
    expected = crf.decode(emissions, is_unit, table)
    emissions[~is_unit] = 1e6
    wider = np.concatenate([emissions, np.full_like(emissions, -1e6)], axis=1)
    mask = np.concatenate([is_unit, np.zeros_like(is_unit)], axis=1).astype(np.int64)
    for found, wanted in zip(crf.decode(wider, mask, table), expected, strict=True):
        np.testing.assert_allclose(found[:, : is_unit.shape[1]], wanted, atol=1e-12)
        assert not found[:, is_unit.shape[1] :].any()


def test_a_forbidden_step_is_not_taken():
    """O O I: with I only behind B, of the probable labels some give way."""
    table = np.zeros((5, 3))
    emissions = np.array([[[0.0, 1.0, 3.0], [0.0, 0.0, 2.0], [3.0, 0.0, 0.0]]])  # of O, B, I
    assert crf.decode(emissions, np.ones((1, 3)), table)[0].tolist() == [[2, 2, 0]]
    table[0, 2] = table[-2, 2] = -1e4  # no I after O, none at the start
    found, probabilities = crf.decode(emissions, np.ones((1, 3)), table)
    assert found.tolist() == [[1, 2, 0]]
    assert ((probabilities > 0.5) & (probabilities <= 1)).all()


def test_large_scores_and_nothing_at_all():
    emissions, is_unit, table = make(1, scale=1e4)
    _, probabilities = crf.decode(emissions, is_unit, table)
    assert np.isfinite(probabilities).all() and probabilities.max() <= 1 + 1e-9
    for shape in [(0, 5, 3), (2, 0, 3), (2, 5, 3)]:
        found, probabilities = crf.decode(np.zeros(shape), np.zeros(shape[:2]), table)
        assert found.shape == shape[:2] and not found.any() and not probabilities.any()

"""The losses of ranking and retrieval, against plain loops in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp

from propeller.paddle import losses
from propeller.paddle.runtime import paddle

SCORES = [0.3, -1.2, 2.0, 0.1, 0.4, 0.4, -0.7, 5.0]
LABELS = [0, 2, 1, 0, 0, 1, 1, 3]
GROUPS = [4, 4, 9, 4, 9, 9, 4, 5]


def tensors():
    scores = paddle.to_tensor(SCORES, stop_gradient=False)
    return scores, paddle.to_tensor(LABELS), paddle.to_tensor(GROUPS)


def pairs():
    """Differences of the scores of each two rows of a group with falling labels."""
    rows = range(len(SCORES))
    return np.array(
        [
            SCORES[i] - SCORES[j]
            for i in rows
            for j in rows
            if GROUPS[i] == GROUPS[j] and LABELS[i] > LABELS[j]
        ]
    )


def gradient_of(loss, scores):
    total, _ = loss(scores)
    total.backward()
    found = scores.grad.numpy()
    step = 1e-2
    for place in range(len(found)):
        moved = [np.array(SCORES, np.float32) for _ in range(2)]
        moved[0][place] += step
        moved[1][place] -= step
        above, below = (loss(paddle.to_tensor(one))[0].item() for one in moved)
        assert found[place] == pytest.approx((above - below) / (2 * step), abs=2e-3)
    return found


def test_ranknet():
    scores, labels, groups = tensors()
    total, weight = losses.pairwise(scores, labels, groups)
    assert total.item() == pytest.approx(np.log1p(np.exp(-pairs())).sum(), rel=1e-6)
    assert weight.item() == len(pairs()) == 7
    gradient = gradient_of(lambda scores: losses.pairwise(scores, labels, groups), scores)
    assert gradient[-1] == 0, "alone in its group"


@pytest.mark.parametrize("margin", [0.5, 1.0])
def test_hinge(margin):
    scores, labels, groups = tensors()
    total, weight = losses.pairwise(scores, labels, groups, margin=margin)
    assert total.item() == pytest.approx(np.maximum(0, margin - pairs()).sum(), rel=1e-6)
    assert weight.item() == 7


def test_listwise():
    scores, labels, groups = tensors()
    expected, count = 0.0, 0
    for group in set(GROUPS):
        own = np.array([score for score, other in zip(SCORES, GROUPS, strict=True) if other == group])
        grades = np.array([label for label, other in zip(LABELS, GROUPS, strict=True) if other == group])
        expected -= (grades / grades.sum() * (own - logsumexp(own))).sum()
        count += 1
    total, weight = losses.listwise(scores, labels, groups)
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert weight.item() == pytest.approx(count)
    gradient_of(lambda scores: losses.listwise(scores, labels, groups), scores)


def test_a_query_without_a_relevant_candidate_does_not_count():
    scores = paddle.to_tensor([1.0, 2.0, 3.0], stop_gradient=False)
    for labels in ([0, 0, 0], [1, 1, 1]):
        total, weight = losses.pairwise(scores, paddle.to_tensor(labels), paddle.to_tensor([1, 1, 1]))
        assert total.item() == weight.item() == 0
    total, weight = losses.listwise(scores, paddle.to_tensor([0, 0, 1]), paddle.to_tensor([1, 1, 2]))
    assert (total.item(), weight.item()) == (pytest.approx(0, abs=1e-6), 1)


def test_groups_add_up():
    """What one rank computes over its groups and another over its own is what one computes over all."""
    scores, labels, groups = tensors()
    for loss in (losses.pairwise, losses.listwise):
        total, weight = loss(scores, labels, groups)
        parts = []
        for chosen in ([4], [5, 9]):
            rows = paddle.to_tensor([place for place, group in enumerate(GROUPS) if group in chosen])
            parts.append(loss(*(paddle.gather(values, rows) for values in (scores, labels, groups))))
        assert sum(part[0].item() for part in parts) == pytest.approx(total.item(), rel=1e-6)
        assert sum(part[1].item() for part in parts) == pytest.approx(weight.item(), rel=1e-6)


def test_contrastive():
    rng = np.random.default_rng(0)
    similarity = (10 * rng.normal(size=(4, 7))).astype(np.float32)
    right = np.zeros((4, 7), bool)
    right[[0, 1, 1, 3], [0, 1, 2, 6]] = True
    wrong = ~right
    wrong[0, 3] = False  # neither
    wrong[3] = False  # nothing to tell it from
    expected = 0.0
    for query, passage in zip(*np.nonzero(right), strict=True):
        terms = [similarity[query, passage], *similarity[query][wrong[query]]]
        expected += logsumexp(np.array(terms, np.float64)) - similarity[query, passage]
    given = paddle.to_tensor(similarity, stop_gradient=False)
    total, weight = losses.contrastive(given, paddle.to_tensor(right), paddle.to_tensor(wrong))
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert weight.item() == 4
    total.backward()
    gradient = given.grad.numpy()
    assert gradient[0, 3] == 0 and not gradient[2:].any(), "what does not count is not pulled"
    np.testing.assert_allclose(gradient.sum(axis=1), 0, atol=1e-5)


def test_contrastive_with_one_right_passage_is_cross_entropy():
    similarity = paddle.to_tensor(np.random.default_rng(1).normal(size=(5, 5)).astype(np.float32))
    right = paddle.eye(5).astype("bool")
    total, _ = losses.contrastive(similarity, right, ~right)
    expected = paddle.nn.functional.cross_entropy(similarity, paddle.arange(5), reduction="sum")
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)

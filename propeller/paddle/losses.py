"""Terms of losses that more than one task uses."""

from __future__ import annotations

from propeller.paddle.runtime import paddle

F = paddle.nn.functional

# Stands in for minus infinity: its exponential is 0 in float32, and 0 times it is a number.
_LOWEST = -1e9


def r_drop(first: paddle.Tensor, second: paddle.Tensor, *, regression: bool = False) -> paddle.Tensor:
    """How far apart two passes over the same examples are, in which dropout left out different units.

    Shapes: C classes; `...` any leading axes.

    Source: Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks", the term L_KL of
        section 2: the mean of both Kullback-Leibler divergences, `(KL(P1 || P2) + KL(P2 || P1)) / 2`. It
        has none for a regression; its authors' code for GLUE takes the squared difference there.

    Args:
        first, second: logits `[..., C]` of the two passes.
        regression: they are no logits, but the outputs of a regression, of any shape.

    Returns:
        A scalar, summed over the examples. Gradients flow into both passes.
    """
    if regression:
        return F.mse_loss(first, second, reduction="sum")
    first, second = F.log_softmax(first), F.log_softmax(second)
    # Both divergences at once: the sum over the classes of (p1 - p2) (log p1 - log p2).
    return 0.5 * ((first.exp() - second.exp()) * (first - second)).sum()


def pairwise(
    scores: paddle.Tensor, labels: paddle.Tensor, groups: paddle.Tensor, *, margin: float | None = None
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Each candidate against each one of its query that has a lower label.

    Source: without a margin RankNet, Burges et al. 2005, "Learning to Rank using Gradient Descent",
        section 3, for pairs whose order is certain: `log(1 + exp(-(s_i - s_j)))`. With one the hinge
        `max(0, margin - (s_i - s_j))` of Herbrich et al. 2000, "Large margin rank boundaries for ordinal
        regression".

    Args:
        scores: float `[rows]`.
        labels: `[rows]`, any numbers that rise with relevance.
        groups: int `[rows]`, the query of each row. Its rows need not stand together.
        margin: of the hinge; None takes the logistic loss.

    Returns:
        The sum over the pairs, and their number.
    """
    scores = scores.astype("float32")
    pairs = (groups.unsqueeze(1) == groups) & (labels.unsqueeze(1) > labels)  # [rows, rows]
    apart = scores.unsqueeze(1) - scores
    terms = F.softplus(-apart) if margin is None else F.relu(margin - apart)
    pairs = pairs.astype("float32")
    return (terms * pairs).sum(), pairs.sum()


def listwise(
    scores: paddle.Tensor, labels: paddle.Tensor, groups: paddle.Tensor
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Cross entropy of the softmax over the candidates of a query with their shares of its labels.

    Source: ListNet, Cao et al. 2007, "Learning to Rank: From Pairwise Approach to Listwise Approach", whose
        target is the softmax of the labels. Their share is that of Bruch et al. 2019, "An Analysis of the
        Softmax Cross Entropy Loss for Learning-to-Rank with Binary Relevance": it does not fade where a query
        has many candidates.

    Args:
        scores: float `[rows]`.
        labels: `[rows]`, numbers from 0.
        groups: int `[rows]`, the query of each row. Its rows need not stand together.

    Returns:
        The sum over the queries with a label above 0, and their number.
    """
    scores, labels = scores.astype("float32"), labels.astype("float32")
    together = groups.unsqueeze(1) == groups  # [rows, rows]
    whole = paddle.where(together, scores, paddle.full_like(scores, _LOWEST)).logsumexp(axis=1)
    total = paddle.matmul(together.astype("float32"), labels)
    share = labels / total.clip(min=1)  # labels are whole: where the sum is below 1 they are 0
    return (share * (whole - scores)).sum(), share.sum()


def contrastive(
    similarity: paddle.Tensor, right: paddle.Tensor, wrong: paddle.Tensor
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Each right passage of a query against all the wrong ones: cross entropy of a softmax over these.

    Source: "multiple negatives ranking", Henderson et al. 2017, "Efficient Natural Language Response
        Suggestion for Smart Reply", section 4.4. There a query has one right passage; of several each is a
        term, and none stands in the softmax of another.

    Args:
        similarity: float `[queries, passages]`, scaled.
        right: bool, of the same shape.
        wrong: bool, of the same shape; what is neither right nor wrong does not count.

    Returns:
        The sum over what is right, and how much that is.
    """
    similarity = similarity.astype("float32")
    lowest = paddle.full_like(similarity, _LOWEST)
    others = paddle.where(wrong, similarity, lowest).logsumexp(axis=1, keepdim=True)  # [queries, 1]
    right = right.astype("float32")
    # -log(exp(s) / (exp(s) + sum of exp of the others))
    return (F.softplus(others - similarity) * right).sum(), right.sum()

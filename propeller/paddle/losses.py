"""Terms of losses that more than one task uses."""

from __future__ import annotations

from propeller.paddle.runtime import paddle

F = paddle.nn.functional


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

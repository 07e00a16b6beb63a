"""Layers that train fast on a CPU; elsewhere they are Paddle's own.

Some of Paddle's CPU kernels are slow where the library can do better by another route. One core, float32:

| what | shape | Paddle | here |
|---|---|---|---|
| sum of rows (the gradient of a bias) | `[4096, 1536]` | 43 ms | 0.6 ms: a product with a row of ones |
| adding a row to each row (bias) | `[4096, 1536]` | 4 ms | 2 ms: within the product (`addmm`) |
| backward of the layer norm | `[4096, 384]` | 15 ms | 7 ms |
| forward and backward of GELU | `[4096, 1536]` | 34 ms | 20 ms |
| transposing heads, with the copy that follows | `[32, 128, 12, 32]` | 16 ms | 0.3 ms: by `einsum` |

and dropout draws its random numbers one by one. So in eager training on a CPU these layers bring a forward
or backward of their own. In evaluation (but for the heads), in static graphs (export), on other devices and
with frozen parameters they do what Paddle does.

Shapes: I inputs, O outputs; R rows, that is all leading axes as one; `...` any leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from propeller.paddle.runtime import paddle

F = paddle.nn.functional


def truncated_normal(std: float) -> paddle.ParamAttr:
    """New weights as BERT's: normal around 0, cut at two standard deviations."""
    initializer = paddle.nn.initializer.TruncatedNormal(std=std, a=-2 * std, b=2 * std)
    return paddle.ParamAttr(initializer=initializer)


def _eager_on_cpu(x: paddle.Tensor) -> bool:
    return paddle.in_dynamic_mode() and x.place.is_cpu_place()


def _trains_on_cpu(*tensors: paddle.Tensor) -> bool:
    """Whether this is eager training on a CPU in which every one of `tensors` gets a gradient."""
    return (
        _eager_on_cpu(tensors[0])
        and paddle.is_grad_enabled()
        and not any(tensor.stop_gradient for tensor in tensors)
    )


def _rows(x: paddle.Tensor) -> paddle.Tensor:
    """`[..., H]` -> `[R, H]`."""
    return x.reshape([-1, x.shape[-1]])


def _sum_rows(rows: paddle.Tensor) -> paddle.Tensor:
    """`[R, H]` -> `[H]`."""
    return paddle.matmul(paddle.ones([1, rows.shape[0]], rows.dtype), rows).reshape([-1])


class _LinearFunction(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor) -> paddle.Tensor:
        ctx.save_for_backward(x, weight)
        return paddle.addmm(bias.unsqueeze(0), _rows(x), weight).reshape([*x.shape[:-1], -1])

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> tuple[paddle.Tensor, ...]:
        x, weight = ctx.saved_tensor()
        grad_rows = _rows(grad)
        return (
            paddle.matmul(grad, weight, transpose_y=True),
            paddle.matmul(_rows(x), grad_rows, transpose_x=True),
            _sum_rows(grad_rows),
        )


class Linear(paddle.nn.Linear):
    """`paddle.nn.Linear` whose weights start from a truncated normal, as BERT's, and biases from zero.

    Args:
        in_features: I.
        out_features: O.
        std: standard deviation of the new weights.
    """

    def __init__(self, in_features: int, out_features: int, std: float):
        super().__init__(in_features, out_features, weight_attr=truncated_normal(std))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """`[..., I]` -> `[..., O]`."""
        if _trains_on_cpu(x, self.weight, self.bias):
            return _LinearFunction.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class _LayerNormFunction(paddle.autograd.PyLayer):
    @staticmethod
    def forward(
        ctx: Any, x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor, epsilon: float
    ) -> paddle.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return F.layer_norm(x, weight.shape, weight, bias, epsilon)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> tuple[paddle.Tensor, ...]:
        x, weight = ctx.saved_tensor()
        rows, grad_rows, size = _rows(x), _rows(grad), weight.shape[0]
        mean = paddle.full([size, 1], 1 / size, x.dtype)  # a product with it is the mean of each row
        weighted_mean = (weight / size).unsqueeze(1)
        normed = rows - paddle.matmul(rows, mean)
        inverse_std = paddle.rsqrt(paddle.matmul(normed * normed, mean) + ctx.epsilon)
        normed = normed.multiply_(inverse_std)
        grad_normed = grad_rows * normed
        grad_weight = _sum_rows(grad_normed)
        grad_x = (grad_rows * weight).subtract_(paddle.matmul(grad_rows, weighted_mean))
        grad_x = grad_x.subtract_(normed.multiply_(paddle.matmul(grad_normed, weighted_mean)))
        return grad_x.multiply_(inverse_std).reshape(x.shape), grad_weight, _sum_rows(grad_rows)


class LayerNorm(paddle.nn.LayerNorm):
    """`paddle.nn.LayerNorm` over the last axis.

    Args:
        size: of that axis.
        epsilon: added to the variance.
    """

    def __init__(self, size: int, epsilon: float):
        super().__init__(size, epsilon)
        self._epsilon = epsilon

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """`[..., H]` -> `[..., H]`."""
        if _trains_on_cpu(x, self.weight, self.bias):
            return _LayerNormFunction.apply(x, self.weight, self.bias, self._epsilon)
        return super().forward(x)


class _GeluFunction(paddle.autograd.PyLayer):
    """`x * cdf(x)`; the derivative, `cdf(x) + x * pdf(x)`, is made at once, so that `x` need not be kept."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor) -> paddle.Tensor:
        cdf = paddle.erf(x * math.sqrt(0.5)).scale_(0.5, 0.5)
        pdf = paddle.square(x).scale_(-0.5).exp_().scale_(1 / math.sqrt(2 * math.pi))
        ctx.save_for_backward(pdf.multiply_(x).add_(cdf))
        return x * cdf

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        (derivative,) = ctx.saved_tensor()
        return grad * derivative


def gelu(x: paddle.Tensor) -> paddle.Tensor:
    """Gaussian error linear unit, the exact one: `[...]` -> `[...]`."""
    return _GeluFunction.apply(x) if _trains_on_cpu(x) else F.gelu(x)


# Elements of a dropout mask are drawn from so many values: 16 random bits meet the rate to 1e-5.
_LEVELS = 1 << 16


class _DropoutFunction(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, dropped_levels: int) -> paddle.Tensor:
        seed = paddle.randint(0, 2**31 - 1, [1]).item()
        size = int(np.prod(x.shape))
        words = np.random.SFC64(seed).random_raw(-(-size // 4))  # 64 random bits make 4 elements
        keep = words.view(np.uint16)[:size].reshape(x.shape) >= dropped_levels
        # A byte an element; as an integer it is cast to float three times as fast as a bool.
        keep = paddle.to_tensor(keep.view(np.uint8))
        ctx.save_for_backward(keep)
        ctx.scale = _LEVELS / (_LEVELS - dropped_levels)
        return keep.astype(x.dtype).multiply_(x).scale_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        (keep,) = ctx.saved_tensor()
        return keep.astype(grad.dtype).multiply_(grad).scale_(ctx.scale)


class Dropout(paddle.nn.Dropout):
    """`paddle.nn.Dropout`, scaled up in training; returns its input if `p` is 0, and in evaluation.

    On a CPU the mask comes from numpy, seeded from Paddle's generator at each call: `paddle.seed` decides
    it, and a restored generator state repeats it.

    Args:
        p: probability that an element becomes 0.
    """

    def __init__(self, p: float):
        super().__init__(p)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """`[...]` -> `[...]`."""
        if not self.training or self.p == 0:
            return x
        dropped_levels = round(self.p * _LEVELS)
        if dropped_levels < _LEVELS and _trains_on_cpu(x):
            return _DropoutFunction.apply(x, dropped_levels)
        return super().forward(x)


def _swapped(x: paddle.Tensor) -> paddle.Tensor:
    """`[B, S, N, D]` -> `[B, N, S, D]` and back, laid out in memory as it is read."""
    return paddle.einsum("bsnd->bnsd", x)


class _SplitHeadsFunction(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, parts: int, num_heads: int) -> tuple[paddle.Tensor, ...]:
        batch, length, size = x.shape
        # Not `paddle.split`: it makes views, too.
        split = paddle.einsum("rph->prh", x.reshape([batch * length, parts, size // parts]))
        return tuple(_swapped(part.reshape([batch, length, num_heads, -1])) for part in split.unbind())

    @staticmethod
    def backward(ctx: Any, *grads: paddle.Tensor) -> paddle.Tensor:
        batch, _, length, _ = grads[0].shape
        return paddle.concat([_swapped(grad).reshape([batch, length, -1]) for grad in grads], axis=-1)


def split_heads(x: paddle.Tensor, parts: int, num_heads: int) -> Sequence[paddle.Tensor]:
    """`[B, S, parts * N * D]` -> as many times `[B, N, S, D]`."""
    if _eager_on_cpu(x):
        return _SplitHeadsFunction.apply(x, parts, num_heads)
    size = x.shape[-1] // parts
    return [
        x[:, :, start : start + size].reshape([0, 0, num_heads, size // num_heads]).transpose([0, 2, 1, 3])
        for start in range(0, parts * size, size)
    ]


class _MergeHeadsFunction(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor) -> paddle.Tensor:
        batch, ctx.num_heads, length, _ = x.shape
        return _swapped(x).reshape([batch, length, -1])

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        batch, length, _ = grad.shape
        return _swapped(grad.reshape([batch, length, ctx.num_heads, -1]))


def merge_heads(x: paddle.Tensor) -> paddle.Tensor:
    """`[B, N, S, D]` -> `[B, S, N * D]`."""
    if _eager_on_cpu(x):
        return _MergeHeadsFunction.apply(x)
    return x.transpose([0, 2, 1, 3]).reshape([0, 0, x.shape[1] * x.shape[3]])

"""Linear and dropout layers that train fast on a CPU; elsewhere they are Paddle's own.

Two of Paddle's CPU kernels are slow: the sum over rows behind the gradient of a bias uses one thread, and
dropout draws its random numbers one by one. On 2 cores and `[4096, 1536]` float32 the former takes 43 ms,
nearly as long as the layer's matrix product, and as a product with a row of ones 0.6 ms. So in eager
training on a CPU these layers bring a backward of their own. In evaluation, in static graphs (export), on
other devices and with frozen parameters they do what Paddle does.

Shapes: I inputs, O outputs; `...` any leading axes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from propeller.paddle.runtime import paddle

F = paddle.nn.functional


def truncated_normal(std: float) -> paddle.ParamAttr:
    """New weights as BERT's: normal around 0, cut at two standard deviations."""
    initializer = paddle.nn.initializer.TruncatedNormal(std=std, a=-2 * std, b=2 * std)
    return paddle.ParamAttr(initializer=initializer)


def _trains_on_cpu(*tensors: paddle.Tensor) -> bool:
    """Whether this is eager training on a CPU in which every one of `tensors` gets a gradient."""
    return (
        paddle.in_dynamic_mode()
        and paddle.is_grad_enabled()
        and tensors[0].place.is_cpu_place()
        and not any(tensor.stop_gradient for tensor in tensors)
    )


class _LinearFunction(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor) -> paddle.Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> tuple[paddle.Tensor, ...]:
        x, weight = ctx.saved_tensor()
        x_rows, grad_rows = x.reshape([-1, x.shape[-1]]), grad.reshape([-1, grad.shape[-1]])
        ones = paddle.ones([1, grad_rows.shape[0]], grad.dtype)
        return (
            paddle.matmul(grad, weight, transpose_y=True),
            paddle.matmul(x_rows, grad_rows, transpose_x=True),
            paddle.matmul(ones, grad_rows).reshape([-1]),
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


# Elements of a dropout mask are drawn from so many values: 16 random bits meet the rate to 1e-5.
_LEVELS = 1 << 16


class _DropoutFunction(paddle.autograd.PyLayer):
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, dropped_levels: int) -> paddle.Tensor:
        seed = paddle.randint(0, 2**31 - 1, [1]).item()
        size = int(np.prod(x.shape))
        words = np.random.SFC64(seed).random_raw(-(-size // 4))  # 64 random bits make 4 elements
        keep = paddle.to_tensor(words.view(np.uint16)[:size].reshape(x.shape) >= dropped_levels)
        ctx.save_for_backward(keep)  # a byte an element; the factor made of it is four
        ctx.scale = _LEVELS / (_LEVELS - dropped_levels)
        return x * (keep.astype(x.dtype) * ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        (keep,) = ctx.saved_tensor()
        return grad * (keep.astype(grad.dtype) * ctx.scale)


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

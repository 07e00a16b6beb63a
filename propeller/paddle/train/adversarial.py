"""Adversarial training: a second backward pass on embeddings moved a little in the worst direction.

Source: Miyato, Dai & Goodfellow, "Adversarial Training Methods for Semi-Supervised Text Classification",
equation 5 (the fast gradient method), in the form that practitioners use: the embedding table is moved as
a whole, along its gradient, by `epsilon` in the L2 norm, and both gradients are added up.
"""

from __future__ import annotations

import fnmatch

from propeller.errors import ConfigError
from propeller.paddle.runtime import paddle
from propeller.paddle.train.step import Step


class Fgm:
    """A step strategy: forward and backward, move the table, forward and backward, move back, update.

    A step takes about twice as long. The loss reported is that of the first pass.

    Args:
        pattern: `fnmatch` pattern of the tables' names, such as `*embeddings.word.weight`.
        epsilon: how far they are moved.

    Raises:
        ConfigError: `epsilon` is not positive; at the first step: no trained parameter has such a name.
    """

    def __init__(self, pattern: str, epsilon: float = 1.0):
        if not epsilon > 0:
            raise ConfigError(f"FGM needs an epsilon above 0, got {epsilon}.")
        self.pattern, self.epsilon = pattern, epsilon

    def __call__(self, step: Step) -> float:
        """Makes the update; returns the mean loss of the first pass."""
        tables = [
            parameter
            for name, parameter in step.parameters.items()
            if fnmatch.fnmatchcase(name, self.pattern)
        ]
        if not tables:
            raise ConfigError(f"FGM moves the parameters {self.pattern!r}, but no trained one is called so.")
        loss = step.backward()
        before = [table.clone() for table in tables]
        try:
            with paddle.no_grad():
                for table in tables:
                    gradient = step.gradient(table)
                    norm = gradient.norm().item()
                    if norm > 0:  # NaN as well stays where it is
                        table.add_(gradient * (self.epsilon / norm))
            step.backward()
        finally:
            with paddle.no_grad():
                for table, value in zip(tables, before, strict=True):
                    table.copy_(value, True)
        step.update()
        return loss

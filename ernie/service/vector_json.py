"""Vectors as JSON, quickly."""

from __future__ import annotations

import numpy as np

# As many digits tell every float32 from its neighbours.
_FORMAT = "%.9g"


def number_list(vector: np.ndarray) -> str:
    """Writes a finite float32 vector as a JSON list; `json.dumps` takes three times as long.

    Args:
        vector: float32 `[dim]`, or `[tokens, dim]` for a list of lists.
    """
    if vector.ndim == 2:
        return f"[{','.join(map(number_list, vector))}]"
    return f"[{','.join([_FORMAT] * len(vector))}]" % tuple(vector.tolist())

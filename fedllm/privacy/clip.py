"""L2 clipping, the step that makes sensitivity a fact."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import NonFiniteUpdate

SLACK = 2.0**-10
"""Share of the clip norm that is kept free for rounding a sum to the noise grid (Mironov 2012)."""


def clip_l2(x: NDArray[Any], max_norm: float) -> tuple[NDArray[Any], float]:
    """Scale `x` down to L2 norm `max_norm` if it is longer.

    Parameters
    ----------
    x : NDArray
        Floats of any shape; the norm is over all entries, computed in float64.
    max_norm : float
        Positive and finite.

    Returns
    -------
    clipped : NDArray
        Same shape and dtype; `x` itself where nothing had to be done, the zero vector included.
    norm : float
        L2 norm before clipping.

    Raises
    ------
    NonFiniteUpdate
        If `x` holds NaN or infinity, or is so large that its norm does: no scale would bound it.
    ValueError
        If `max_norm` is not positive and finite.
    """
    if not (np.isfinite(max_norm) and max_norm > 0):
        raise ValueError(f"clip norm {max_norm}: positive and finite needed")
    with np.errstate(over="ignore", invalid="ignore"):  # found and named below
        norm = float(np.linalg.norm(x.astype(np.float64).ravel()))
    if not np.isfinite(norm):
        raise NonFiniteUpdate(
            f"vector of {x.size} entries has norm {norm}; a finite norm is needed to clip to {max_norm:g}",
            hint="lower the learning rate, or look for broken records",
        )
    if norm <= max_norm:
        return x, norm
    return (x * (max_norm / norm)).astype(x.dtype), norm

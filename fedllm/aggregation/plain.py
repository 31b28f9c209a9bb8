"""The unmasked twin of the secure sum: what `secagg` must equal bit for bit; for simulation and tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedllm.aggregation.fixedpoint import RING_BITS
from fedllm.errors import ConfigError


def plain_sum(vectors: Sequence[NDArray[np.uint32]], bits: int) -> NDArray[np.uint32]:
    """Return the sum of the vectors in Z_2^bits.

    Parameters
    ----------
    vectors : Sequence[NDArray[uint32]]
        At least one, all of shape ``(entries,)``.
    bits : int
        8, 16, 24 or 32.

    Raises
    ------
    ConfigError
        If there is no vector, shapes differ or the ring has another width.
    """
    if bits not in RING_BITS:
        raise ConfigError(f"ring of {bits} bits: {', '.join(map(str, RING_BITS))} allowed")
    if not vectors or any(v.shape != vectors[0].shape for v in vectors):
        raise ConfigError(f"{len(vectors)} vectors of shapes {sorted({v.shape for v in vectors})}: one shape needed")
    total = np.zeros_like(vectors[0], dtype=np.uint32)
    for vector in vectors:
        total += vector
    return total & np.uint32((1 << bits) - 1)

"""Choosing the next token from one row of logits. NumPy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedllm.rng import Rng
from fedllm.serving.engine import SamplingParams


def new_generator(params: SamplingParams, rng: Rng) -> np.random.Generator | None:
    """Return the request's own random stream, or None if it is greedy.

    Parameters
    ----------
    params : SamplingParams
        Its seed, if any, makes the stream repeatable.
    rng : Rng
        Where a seed comes from otherwise.
    """
    if params.temperature == 0.0:
        return None
    seed = params.seed if params.seed is not None else int.from_bytes(rng.token(16), "little")
    return np.random.Generator(np.random.PCG64(seed))


def sample(logits_V: NDArray[np.float32], params: SamplingParams, generator: np.random.Generator) -> int:
    """Draw a token: temperature, then top-k, then top-p (Holtzman et al., arXiv 1904.09751).

    Parameters
    ----------
    logits_V : NDArray[np.float32]
        Shape ``(V,)``.
    params : SamplingParams
        With a temperature above 0.
    generator : np.random.Generator
        The request's stream; exactly one number is drawn.
    """
    scaled_V = logits_V.astype(np.float64) / params.temperature
    order = np.arange(scaled_V.size)
    if 0 < params.top_k < scaled_V.size:
        order = np.argpartition(-scaled_V, params.top_k - 1)[: params.top_k]
    weights = np.exp(scaled_V[order] - scaled_V[order].max())
    if params.top_p < 1.0:
        by_weight = np.argsort(-weights, kind="stable")
        mass = np.cumsum(weights[by_weight])
        # The token that crosses the mass is kept, so at least one always is.
        kept = by_weight[: int(np.searchsorted(mass, params.top_p * mass[-1])) + 1]
        order, weights = order[kept], weights[kept]
    cumulative = np.cumsum(weights)
    drawn = int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
    return int(order[min(drawn, order.size - 1)])

"""A clip norm that follows a quantile of the gradients' norms (Andrew et al. 2021, arXiv 1905.03871).

Each step counts, beside the clipped sum, how many of its units were short enough: plus one for each that was, minus
one for each that was not. One unit moves that integer by one, half a unit of the paper's count, so that integer noise
of twice the count's standard deviation is what theorem 1 prices. The norm is computed from nothing else, and costs
nothing more.
"""

from __future__ import annotations

import math

from fedllm.messages.mechanism import Mechanism
from fedllm.privacy.noise import GRID_BITS, GaussianGrid, discrete_gaussian
from fedllm.rng import Rng

SPAN = 64.0
"""The norm stays within this factor of the plan's, both ways."""


def step_grid(mechanism: Mechanism, clip_norm: float, dimension: int) -> GaussianGrid:
    """Return the noise of one DP-SGD step at `clip_norm`.

    Parameters
    ----------
    mechanism : Mechanism
    clip_norm : float
        Of this step.
    dimension : int
        Trained entries.

    Raises
    ------
    ConfigError
        If the grid is too coarse, see `GaussianGrid.check`. A norm that moves is held to the coarsest grid that it
        can meet, so that the first step of a round is refused or none is.
    """
    grid = GaussianGrid(mechanism.gradient_noise * clip_norm)
    # The step is a power of two below sigma: coarsest, for its clip norm, where sigma is a power of two itself.
    coarsest = math.ldexp(grid.step, GRID_BITS) / mechanism.gradient_noise
    grid.check(dimension, clip_norm if mechanism.adaptive is None else coarsest)
    return grid


def next_clip_norm(mechanism: Mechanism, clip_norm: float, balance: int, declared_records: int, rng: Rng) -> float:
    """Return the clip norm of the step after one at `clip_norm`; the same if the mechanism does not adapt it.

    ``C exp(-rate (share - quantile))`` with ``share = ((balance + N(0, (2 count_noise)^2)) / (q N) + 1) / 2``, within
    a factor of `SPAN` of the mechanism's own.

    Parameters
    ----------
    mechanism : Mechanism
    clip_norm : float
        C of the step that was taken.
    balance : int
        Sampled units whose gradient's norm is at most C, less those whose is not.
    declared_records : int
        The public size N; the sample's own is private.
    rng : Rng
        `OsRng`, except in tests.
    """
    adaptive = mechanism.adaptive
    if adaptive is None:
        return clip_norm
    noisy = balance + int(discrete_gaussian(2 * adaptive.count_noise, 1, rng)[0])
    share = (noisy / (mechanism.sample_rate * declared_records) + 1) / 2
    # In logarithms, where no noise overflows.
    height = math.log(clip_norm / mechanism.clip_norm) - adaptive.rate * (share - adaptive.quantile)
    return mechanism.clip_norm * math.exp(min(max(height, -math.log(SPAN)), math.log(SPAN)))

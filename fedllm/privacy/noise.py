"""Integer Gaussian noise from the operating system's CSPRNG, on a public grid.

Floating-point Gaussians leak through the low bits of their outputs (Mironov 2012). Here the sum is rounded to
a grid of public step g, a power of two, and the noise is an integer number of steps drawn from the discrete
Gaussian of Canonne, Kamath and Steinke 2020 (arXiv 2004.00010): every output is a multiple of g whatever the data
were, and only probabilities, not the support, can be inexact.

How inexact. The sampler is CKS rejection, with exact integers and 64-bit comparisons for all but the values of
``exp``, taken in float64. Each probability is off by a factor of at most 1 ± 2^-45 out to nine standard
deviations, and by at most 2^-60 in total variation beyond that. Over d entries and T steps this adds at most
``2^-44 d T`` to epsilon and ``(1 + e^epsilon) 2^-60 d T`` to delta: for d = 30,720, T = 8 and epsilon 8 that is
1.4e-8 and 7e-10, below what is printed. Running time depends on the draws, not on the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import ConfigError, NonFiniteUpdate
from fedllm.privacy.clip import SLACK
from fedllm.rng import Rng

MAX_SIGMA = 2.0**24
GRID_BITS = 23
"""A grid step is the largest power of two not above sigma / 2^23."""
_TWO64 = 2.0**64
_CHUNK = 1 << 18  # keeps the arrays of one pass within a few caches


def discrete_gaussian(sigma: float, count: int, rng: Rng) -> NDArray[np.int64]:
    """Draw integers x with probability proportional to ``exp(-x^2 / (2 sigma^2))``.

    Parameters
    ----------
    sigma : float
        In (0, 2^24]. From about 1 on it is the standard deviation to many digits.
    count : int
        How many.
    rng : Rng
        `OsRng`, except in tests.

    Returns
    -------
    NDArray[int64]
        Shape ``(count,)``.
    """
    if not 0 < sigma <= MAX_SIGMA:
        raise ValueError(f"sigma {sigma}: between 0 and {MAX_SIGMA:g} needed")
    return collect(count, lambda size: _attempt(sigma, size, rng))


def collect(count: int, attempt: Callable[[int], NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the first `count` draws of a rejection sampler; ``attempt(size)`` makes `size` proposals."""
    out = np.empty(count, dtype=np.int64)
    have = 0
    while have < count:
        batch = attempt(min(_CHUNK, int(2.2 * (count - have)) + 16))[: count - have]
        out[have : have + batch.size] = batch
        have += batch.size
    return out


def _attempt(sigma: float, size: int, rng: Rng) -> NDArray[np.int64]:
    """One pass of CKS algorithm 3: discrete Laplace proposals of scale t, accepted towards the Gaussian."""
    scale = math.floor(sigma) + 1
    laplace = discrete_laplace(scale, size, rng)
    accepted: NDArray[np.int64] = laplace[bernoulli_exp(_gamma(laplace, sigma, scale), rng)]
    return accepted


def _gamma(laplace: NDArray[np.int64], sigma: float, scale: int) -> NDArray[np.float64]:
    """Return -log of the probability to accept a proposal."""
    distance = np.abs(laplace).astype(np.float64) - sigma * sigma / scale
    return np.asarray(distance * distance / (2 * sigma * sigma))


def discrete_laplace(scale: int, size: int, rng: Rng) -> NDArray[np.int64]:
    """CKS algorithm 2: up to `size` draws with probability proportional to ``exp(-|x| / scale)``."""
    words = _words(size, rng)
    # Reduction modulo scale is uniform on the words up to the last whole multiple of scale.
    even = words[words <= np.uint64(2**64 - 1 - 2**64 % scale)]
    rest = (even % np.uint64(scale)).astype(np.int64)
    rest = rest[bernoulli_exp(rest / scale, rng)]
    magnitude = rest + scale * _geometric(rest.size, rng)
    negative = np.unpackbits(np.frombuffer(rng.token((rest.size + 7) // 8), dtype=np.uint8))[: rest.size].astype(bool)
    keep = ~(negative & (magnitude == 0))  # zero has one sign only
    signed: NDArray[np.int64] = np.where(negative, -magnitude, magnitude)[keep]
    return signed


def _words(size: int, rng: Rng) -> NDArray[np.uint64]:
    return np.frombuffer(rng.token(8 * size), dtype="<u8").astype(np.uint64, copy=False)


def bernoulli_exp(gamma: NDArray[np.float64], rng: Rng) -> NDArray[np.bool_]:
    """Return True with probability ``exp(-gamma)`` for each entry, by comparing a 64-bit word.

    A word that equals the threshold's whole part is decided by a second word against the fraction. So small
    probabilities keep all digits of a float64; without it, ``exp(-32)`` would have 18 bits.
    """
    threshold = np.exp(-gamma) * _TWO64
    sure = threshold >= _TWO64
    whole = np.where(sure, 0.0, threshold).astype(np.uint64)
    words = _words(gamma.size, rng)
    chosen = np.asarray(sure | (words < whole))
    tied = np.flatnonzero((words == whole) & ~sure)
    if tied.size:
        fraction = (threshold[tied] - np.floor(threshold[tied])) * _TWO64
        chosen[tied] = _words(tied.size, rng) < fraction.astype(np.uint64)
    return chosen


@cache
def _geometric_thresholds() -> NDArray[np.uint64]:
    with localcontext() as context:
        context.prec = 60
        powers = [int(Decimal(2) ** 64 * Decimal(-k).exp()) for k in range(44, 0, -1)]
    return np.array(powers, dtype=np.uint64)


def _geometric(size: int, rng: Rng) -> NDArray[np.int64]:
    """Return V with ``P(V >= k) = exp(-k)``: how many thresholds ``2^64 e^-k`` a word lies under."""
    thresholds = _geometric_thresholds()
    return (thresholds.size - np.searchsorted(thresholds, _words(size, rng), side="right")).astype(np.int64)


@dataclass(frozen=True)
class GaussianGrid:
    """Noise of standard deviation `sigma` on a grid of public step.

    The sum of records clipped to C (1 - 2^-10) is rounded to the grid, which moves it by at most g sqrt(d) / 2. Two
    neighbouring sums thus differ by at most C (1 - 2^-10) + g sqrt(d), which is below C as long as g sqrt(d) <
    2^-10 C; `check` refuses any other combination, so that the sensitivity accounted is the sensitivity there is.

    Attributes
    ----------
    sigma : float
        Standard deviation in the units of the sum: noise multiplier times clip norm.
    """

    sigma: float

    def __post_init__(self) -> None:
        """Refuse a sigma without a grid."""
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(f"sigma {self.sigma}: positive and finite needed")

    @property
    def step(self) -> float:
        """The grid step g: a power of two, so that scaling to the grid and back is exact."""
        return math.ldexp(1.0, math.frexp(self.sigma)[1] - 1 - GRID_BITS)

    def check(self, dimension: int, clip_norm: float) -> None:
        """Raise `ConfigError` if rounding `dimension` entries could use up more than the slack of `clip_norm`."""
        rounding = self.step * math.sqrt(dimension)
        if rounding >= SLACK * clip_norm:
            raise ConfigError(
                f"noise grid: rounding {dimension} entries may move a sum by {rounding:.3g}, less than"
                f" {SLACK * clip_norm:.3g} (2^-10 of clip norm {clip_norm:g}) allowed",
                hint="lower the noise multiplier or the adapter's size",
            )

    def add_noise(self, x: NDArray[Any], rng: Rng) -> NDArray[np.float64]:
        """Return `x` rounded to the grid plus discrete Gaussian noise, as float64 multiples of the step.

        Raises
        ------
        NonFiniteUpdate
            If `x` is not finite, or too large to be a float64 multiple of the step exactly.
        """
        with np.errstate(over="ignore"):  # found and named below
            steps = np.rint(x.astype(np.float64) / self.step)
        if not (np.abs(steps) < 2.0**52).all():
            raise NonFiniteUpdate(f"a sum of {x.size} entries is not finite, or above 2^52 noise grid steps")
        noise = discrete_gaussian(self.sigma / self.step, x.size, rng).reshape(x.shape)
        return np.asarray((steps + noise) * self.step, dtype=np.float64)


def add_noise(x: NDArray[Any], sigma: float, rng: Rng) -> NDArray[np.float64]:
    """Return `x` with integer Gaussian noise of standard deviation `sigma`; see `GaussianGrid`."""
    return GaussianGrid(sigma).add_noise(x, rng)

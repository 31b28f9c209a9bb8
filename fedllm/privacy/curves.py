"""Renyi curves of what a round releases: a fast upper bound of epsilon, and the only one for Skellam noise.

A curve is the Renyi divergence D(a) between neighbouring outputs, in both directions, at the orders of `ORDERS`.
Curves of releases add up under composition (Mironov 2017, arXiv 1702.07476).

Why whole orders. Our noise is an integer Gaussian on a grid, with probabilities proportional to
``exp(-|x|^2 / (2 s^2))`` on the lattice, and neighbouring sums differ by a whole vector v. Let Q be the noise, P the
noise shifted by v, and r = P / Q. The moment of a whole order k is

    E_Q[r^k] = sum_x exp(-(k |x - v|^2 - (k - 1) |x|^2) / (2 s^2)) / N
             = exp(k (k - 1) |v|^2 / (2 s^2)) * sum_x exp(-|x - k v|^2 / (2 s^2)) / N,

and as k v is whole, the last sum runs over the same lattice as the normaliser N and equals it. So at whole orders the
moments are those of the continuous Gaussian, exactly, in any dimension. Under Poisson sampling at rate q the moment of
order a is the binomial sum of these, so that equation 3 of Mironov, Talwar, Zhang 2019 (arXiv 1908.10530) holds as is.

That it also bounds the other direction. The reflection x -> v - x maps the lattice onto itself and swaps P and Q, hence
``E_Q[f(r)] = E_Q[f(r) + r f(1 / r)] / 2``. With m(r) = 1 - q + q r and h(y) = y^a - y^(1 - a), the difference of the
two directions' moments is E_Q[h(m(r))]. For r >= 1 put y = m(r) and z = m(1 / r): then y - 1 = r (1 - z), y z >= 1,
and h(y) + r h(z) = (y - 1) (g(y) - g(z)) with g(y) = h(y) / (y - 1). As g(z) = g(1 / z), and g rises from 1 on, h being
convex there with h(1) = 0, this is not negative: the moment computed here is the larger one.

Orders between whole ones would gain nothing: ``(a - 1) D(a)`` is convex, and with the chords that bound it the best
epsilon lies at their ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

ORDERS: NDArray[np.float64] = np.array(
    [*range(2, 65), 72, 80, 96, 112, 128, 160, 192, 256, 384, 512, 768, 1024], dtype=np.float64
)
"""Whole orders at which curves are known."""


@dataclass(frozen=True, order=True)
class Gaussian:
    """One release with Gaussian noise, integer or continuous, of a Poisson sample.

    Attributes
    ----------
    noise_multiplier : float
        Standard deviation over L2 sensitivity.
    sample_rate : float
        In (0, 1].
    """

    noise_multiplier: float
    sample_rate: float = 1.0

    def curve(self) -> NDArray[np.float64]:
        """Return D at `ORDERS`: exactly ``a / (2 z^2)`` without sampling, else Mironov et al. 2019.

        The binomial weights add up to one and the moments of order 0 and 1 are one, hence
        ``A = 1 + sum_(k >= 2) C(a, k) q^k (1 - q)^(a - k) (exp(k (k - 1) / (2 z^2)) - 1)``: no term is negative, and
        nothing cancels.
        """
        with np.errstate(over="ignore", divide="ignore"):
            rho = float(np.float64(0.5) / np.float64(self.noise_multiplier) ** 2)
            if self.sample_rate == 1:
                return ORDERS * rho
            choose, taken, left, first = _binomials()
            exponent = taken * (taken - 1) * rho
            weight = choose + taken * math.log(self.sample_rate) + left * math.log1p(-self.sample_rate)
            terms = weight + exponent + np.log(-np.expm1(-exponent))
            moments = np.logaddexp(0.0, np.logaddexp.reduceat(terms, first))
        return np.asarray(moments / (ORDERS - 1))


@dataclass(frozen=True, order=True)
class Skellam:
    """One release of a whole vector with Skellam noise on every entry.

    Attributes
    ----------
    variance : float
        Of the noise of one entry, all honest shares together: mu.
    sensitivity : float
        L2 norm of the difference of neighbouring vectors, in grid steps.
    dimension : int
    """

    variance: float
    sensitivity: float
    dimension: int

    @property
    def l1_sensitivity(self) -> float:
        """L1 norm of the difference, at most: ``sqrt(d)`` times the L2 norm, and its square as entries are whole."""
        return self.sensitivity * min(math.sqrt(self.dimension), self.sensitivity)

    def branches(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return (rho, xi) of two bounds ``D(a) <= rho a + xi`` at whole orders a.

        Agarwal, Kairouz, Liu 2021 (arXiv 2110.04995), theorem 3.5 and corollary 3.6, with D1 and D2 the sensitivities:
        ``D(a) <= a D2^2 / (2 mu) + min(((2 a - 1) D2^2 + 6 D1) / (4 mu^2), 3 D1 / (2 mu))``. The authors' own code
        has the same: ``_skellam_rdp`` in distributed_dp/accounting_utils.py of google-research/federated; so has
        ``SkellamMechanism.renyi_div`` in mechanisms.py of facebookresearch/dp_compression.
        """
        mu, d1, d2 = self.variance, self.l1_sensitivity, self.sensitivity
        # Ratios first: the square of a large variance would be no float.
        gaussian = d2 / mu * d2 / 2
        low_noise = (gaussian, 1.5 * d1 / mu)
        high_noise = (gaussian + gaussian / mu, (1.5 * d1 / mu - gaussian / 2) / mu)
        return high_noise, low_noise

    def curve(self) -> NDArray[np.float64]:
        """Return the lesser of both bounds at `ORDERS`."""
        if self.variance == 0:
            return np.full_like(ORDERS, math.inf)
        (rho, xi), (other_rho, other_xi) = self.branches()
        # With next to no noise the first may be infinity less infinity: the second says so plainly.
        return np.fmin(rho * ORDERS + xi, other_rho * ORDERS + other_xi)


Release = Gaussian | Skellam


@lru_cache(maxsize=4096)
def renyi(release: Release) -> NDArray[np.float64]:
    """Return `release.curve()`, worked out once."""
    curve = release.curve()
    curve.setflags(write=False)
    return curve


def to_epsilon(curve: NDArray[np.float64], delta: float) -> float:
    """Return the epsilon that follows from a curve at `delta`.

    Canonne, Kamath, Steinke 2020 (arXiv 2004.00010), proposition 12. Where the divergence is so small that the total
    variation distance is below delta, epsilon is 0.

    Parameters
    ----------
    curve : NDArray[float64]
        At `ORDERS`.
    delta : float
        In (0, 1).
    """
    if -math.expm1(-float(curve.min())) < delta * delta:  # Bretagnolle and Huber 1979
        return 0.0
    bounds = curve + np.log1p(-1 / ORDERS) - np.log(delta * ORDERS) / (ORDERS - 1)
    return max(0.0, float(bounds.min()))


@cache
def _binomials() -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
    """Return log C(a, k), k, a - k for all orders a and k from 2 to a, in one row, and where each order begins."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, ORDERS[-1] + 1)))])
    orders = ORDERS.astype(np.intp)
    of = np.repeat(orders, orders - 1)
    first = np.concatenate([[0], np.cumsum(orders - 1)[:-1]])
    taken = np.arange(of.size) - np.repeat(first, orders - 1) + 2
    choose = log_factorial[of] - log_factorial[taken] - log_factorial[of - taken]
    return choose, taken.astype(np.float64), (of - taken).astype(np.float64), first

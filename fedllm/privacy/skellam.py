"""Integer noise for unit owner: Poisson and Skellam sampling, noise shares, and the grid that updates are summed on.

A sum of Skellam variables is Skellam (Agarwal, Kairouz, Liu 2021, arXiv 2110.04995), so that every owner can add a
share of the sum's noise and any survivors' shares add up to noise whose law is known exactly.

How inexact. A Poisson draw is a discrete Laplace proposal (`fedllm.privacy.noise`), accepted with a probability
taken in float64 from a saddle point form of the mass function (Loader 2000) that has no cancellation at any rate.
Each probability down to 2^-80 of the mode's is off by a factor of at most 1 ± 2^-42, and what lies beyond is below
2^-78 in total variation; a Skellam draw has twice that. In a sum of d entries that counts h shares this adds at most
``2^-40 h d`` to epsilon and ``(1 + e^epsilon) 2^-77 h d`` to delta: for d = 30,720, h = 10 and epsilon 8 that is
2.8e-7 and 6.1e-15. Running time depends on the draws, not on the data.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import ConfigError, IntegrityError, NonFiniteUpdate
from fedllm.messages.mechanism import Mechanism, NoiseShares
from fedllm.privacy.noise import bernoulli_exp, collect, discrete_laplace
from fedllm.rng import KEY_BYTES, Rng, WordStream

MAX_RATE = 2.0**52
"""Up to here every count that is drawn is a float64."""
MAX_CLIP_STEPS = (1 << 31) - 1
"""An entry's square fits a signed 64-bit word, so that norms are checked exactly."""
_LEAST_STEPS = 8
"""The clip norm is at least so many times what rounding can add to a norm."""
_CLIP_SLACK = 2.0**-30
"""Of the clip norm, for what float64 loses while an update is scaled."""
_TABLE = 16
_STIRLING = (1 / 1188, -1 / 1680, 1 / 1260, -1 / 360, 1 / 12)
_NEAR = 0.3
_ATANH = tuple(1 / (2 * j + 1) for j in range(15, 0, -1))
_ROOT_TWO_PI = "2.50662827463100050241576528481104525300698674060994"
_BLOCK = 1 << 15


def poisson(rate: float, count: int, rng: Rng) -> NDArray[np.int64]:
    """Draw integers k with probability ``e^-rate rate^k / k!``.

    Rejection from a discrete Laplace distribution around the mode. Each probability is inexact by a factor of at
    most 1 ± 2^-42 (see the module).

    Parameters
    ----------
    rate : float
        Mean and variance, in (0, 2^52].
    count : int
        How many.
    rng : Rng
        `OsRng`, except in tests.

    Returns
    -------
    NDArray[int64]
        Shape ``(count,)``.
    """
    if not 0 < rate <= MAX_RATE:
        raise ValueError(f"rate {rate}: between 0 and {MAX_RATE:g} needed")
    envelope = _Envelope.around(rate)

    def attempt(size: int) -> NDArray[np.int64]:
        x = discrete_laplace(envelope.scale, size, rng)
        x = x[x >= -envelope.mode]
        accepted: NDArray[np.int64] = x[bernoulli_exp(envelope.gamma(x), rng)]
        return accepted + envelope.mode

    return collect(count, attempt)


def skellam(variance: float, count: int, rng: Rng) -> NDArray[np.int64]:
    """Draw differences of two Poisson variables of rate ``variance / 2``: mean 0, and closed under addition.

    Parameters
    ----------
    variance : float
        In (0, 2^53].
    count : int
        How many.
    rng : Rng
        `OsRng`, except in tests.

    Returns
    -------
    NDArray[int64]
        Shape ``(count,)``.
    """
    drawn = poisson(variance / 2, count, rng)
    drawn -= poisson(variance / 2, count, rng)
    return drawn


@dataclass(frozen=True)
class _Envelope:
    """A discrete Laplace distribution above a Poisson one: both around the mode, touching at one integer."""

    rate: float
    mode: int
    scale: int
    top: float

    @classmethod
    def around(cls, rate: float) -> _Envelope:
        # One more than the standard deviation needs: at small rates too, no draw that matters is many scales away.
        mode, scale = math.floor(rate), math.floor(math.sqrt(rate)) + 2
        # The log ratio is concave on each side of the mode; it stops rising where p(k + 1) / p(k) passes e^(∓1 / t).
        turns = [rate * math.expm1(sign / scale) + (rate - mode) for sign in (1, -1)]
        around = {0} | {math.floor(turn) + step for turn in turns for step in (-1, 0, 1)}
        x = np.array(sorted(x for x in around if x >= -mode), dtype=np.int64)
        log_ratio = log_mass(x + mode, rate) + np.abs(x) / scale
        return cls(rate, mode, scale, float(log_ratio.max()))

    def gamma(self, x: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return -log of the probability to accept ``mode + x``, a count no less than 0."""
        return np.asarray(self.top - log_mass(x + self.mode, self.rate) - np.abs(x) / self.scale)


def log_mass(k: NDArray[np.int64], rate: float) -> NDArray[np.float64]:
    """Return the log of the Poisson mass at counts k >= 0, plus ``log(2 pi rate) / 2``.

    With v = (k - rate) / (k + rate), log(k / rate) is 2 atanh(v), and Stirling's formula becomes
    ``-error(k) - (k - rate) v - (2 k + 1) (atanh(v) - v) - v``: no large terms that cancel (after Loader 2000).
    """
    positive = np.maximum(k, 1)
    count = positive.astype(np.float64)
    away = count - rate
    v = away / (count + rate)
    with np.errstate(over="ignore"):  # an infinite ratio is a count that is never accepted
        ratio = count / rate
    mass = -stirling_error(positive) - away * v - (2 * count + 1) * _atanh_less(v, ratio) - v
    zero = k == 0
    if zero.any():
        mass[zero] = 0.5 * math.log(2 * math.pi * rate) - rate
    return mass


def _atanh_less(v: NDArray[np.float64], ratio: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``atanh(v) - v`` for v = (ratio - 1) / (ratio + 1): the series near zero, else half the logarithm."""
    square = v * v
    total = np.full_like(v, _ATANH[0])
    for coefficient in _ATANH[1:]:
        total *= square
        total += coefficient
    total *= square
    total *= v
    far = np.flatnonzero(square > _NEAR * _NEAR)
    if far.size:
        total[far] = np.log(ratio[far]) / 2 - v[far]
    return total


def stirling_error(k: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return ``log(k!)`` less Stirling's formula, for k >= 1: a table below 16, five terms of the series above."""
    inverse = 1.0 / k
    square = inverse * inverse
    total = np.full_like(inverse, _STIRLING[0])
    for coefficient in _STIRLING[1:]:
        total *= square
        total += coefficient
    total *= inverse
    small = np.flatnonzero(k < _TABLE)
    if small.size:
        total[small] = _stirling_table()[k[small]]
    return total


@cache
def _stirling_table() -> NDArray[np.float64]:
    with localcontext() as context:
        context.prec = 50
        errors = [Decimal(0)]
        for k in range(1, _TABLE):
            n = Decimal(k)
            formula = (n + Decimal("0.5")) * n.ln() - n + Decimal(_ROOT_TWO_PI).ln()
            errors.append(Decimal(math.factorial(k)).ln() - formula)
        return np.array([float(error) for error in errors])


def share_variance(mechanism: Mechanism) -> float:
    """Return the variance of one owner's noise share, in grid steps squared: ``(z C)^2 / h``.

    Raises
    ------
    ConfigError
        If the mechanism has no noise shares.
    """
    shares = _shares(mechanism)
    std = mechanism.noise_multiplier * shares.clip_steps
    return std * std / shares.honest


def _shares(mechanism: Mechanism) -> NoiseShares:
    if mechanism.shares is None:
        raise ConfigError(f"mechanism {mechanism.kind!r} has no noise shares: skellam needed")
    return mechanism.shares


@dataclass(frozen=True)
class SumGrid:
    """The integers in which owners' updates are summed, and the ball that no owner's update leaves.

    Attributes
    ----------
    clip_norm : float
        L2 bound of one owner's update.
    clip_steps : int
        The same in grid steps, up to 2^31 - 1.
    dimension : int
        Entries of an update.
    """

    clip_norm: float
    clip_steps: int
    dimension: int

    def __post_init__(self) -> None:
        """Refuse a grid without a step."""
        if not 1 <= self.clip_steps <= MAX_CLIP_STEPS or self.dimension < 1:
            raise ConfigError(
                f"sum grid of {self.clip_steps} clip steps and {self.dimension} entries: 1 to {MAX_CLIP_STEPS} steps"
                " and at least 1 entry allowed"
            )
        if not (math.isfinite(self.clip_norm) and self.step >= sys.float_info.min):
            raise ConfigError(f"clip norm {self.clip_norm:g}: a positive number with room for its steps is needed")

    @classmethod
    def of(cls, mechanism: Mechanism) -> SumGrid:
        """Return the grid of a mechanism with noise shares; raise `ConfigError` if no share can be drawn on it."""
        shares = _shares(mechanism)
        if not 0 < share_variance(mechanism) <= 2 * MAX_RATE:
            raise ConfigError(
                f"noise share of variance {share_variance(mechanism):.3g} grid steps squared: above 0 and up to"
                f" {2 * MAX_RATE:.3g} allowed",
                hint="take fewer value_bits or a lower noise multiplier",
            )
        return cls(mechanism.clip_norm, shares.clip_steps, shares.dimension)

    @property
    def step(self) -> float:
        """Distance of two neighbouring values, in the units of the update."""
        return self.clip_norm / self.clip_steps

    def check(self) -> None:
        """Raise `ConfigError` if rounding could use up more than an eighth of the clip norm."""
        if math.sqrt(self.dimension) > self.clip_steps / _LEAST_STEPS:
            raise ConfigError(
                f"rounding {self.dimension} entries may add {math.sqrt(self.dimension):.4g} grid steps to an update's"
                f" norm, up to {self.clip_steps / _LEAST_STEPS:.4g} (an eighth of the clip norm) allowed",
                hint="take more value_bits",
            )

    def encode(self, update: NDArray[np.floating], rng: Rng) -> NDArray[np.int64]:
        """Return the update as integers whose L2 norm is at most `clip_steps`, checked in integers.

        Clipping leaves room for rounding, which moves each entry by less than a step. Rounding is stochastic: up
        with a probability equal to the fraction, to within 2^-32. Zero stays zero.

        Parameters
        ----------
        update : NDArray[floating]
            Shape ``(dimension,)``, finite.
        rng : Rng
            Gives the 32-byte key of the AES-256-CTR stream that rounds this update.

        Returns
        -------
        NDArray[int64]
            Shape ``(dimension,)``, in grid steps.

        Raises
        ------
        ConfigError
            If the shape is another, or `check` refuses the grid.
        NonFiniteUpdate
            If an entry is NaN or infinite; the message counts them and never shows a value.
        IntegrityError
            If the norm is above `clip_steps` all the same: a fault of this program, and nothing may be sent.
        """
        self.check()
        if update.shape != (self.dimension,):
            raise ConfigError(f"an update of shape {update.shape}: ({self.dimension},) needed")
        encoded = _round(self._scale(update), rng)
        if not _within(encoded, self.clip_steps):
            raise IntegrityError(
                f"an encoded update's norm is above {self.clip_steps} grid steps, the clip norm",
                hint="nothing was sent; report this, the privacy of the update is at stake",
            )
        return encoded

    def _scale(self, update: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the clipped update in grid steps, float64; never through a norm that overflows or vanishes."""
        wide = update.astype(np.float64)
        bad = wide.size - int(np.count_nonzero(np.isfinite(wide)))
        if bad:
            raise NonFiniteUpdate(
                f"{bad} of {wide.size} entries are NaN or infinite; finite values are needed",
                hint="lower the learning rate, or look for an empty or malformed batch",
            )
        peak = float(np.abs(wide).max())
        if peak == 0:
            return wide
        room = (self.clip_steps - math.sqrt(self.dimension)) * (1 - _CLIP_SLACK)
        wide /= peak
        wide *= min(peak / self.step, room / float(np.linalg.norm(wide)))
        return wide

    def share(self, mechanism: Mechanism, rng: Rng) -> NDArray[np.int64]:
        """Return a fresh noise share of `mechanism`; raise `ConfigError` if its numbers are not this grid's."""
        if SumGrid.of(mechanism) != self:
            shares = _shares(mechanism)
            raise ConfigError(
                f"mechanism of {shares.dimension} entries and clip norm {mechanism.clip_norm:g} in"
                f" {shares.clip_steps} steps, grid of {self.dimension}, {self.clip_norm:g} and {self.clip_steps}:"
                " the same needed"
            )
        return skellam(share_variance(mechanism), self.dimension, rng)

    def noised(self, update: NDArray[np.floating], mechanism: Mechanism, rng: Rng) -> NDArray[np.int64]:
        """Return the encoded update plus a noise share: what is masked, and all that leaves the owner."""
        noise = self.share(mechanism, rng)
        noise += self.encode(update, rng)
        return noise


def _round(value: NDArray[np.float64], rng: Rng) -> NDArray[np.int64]:
    """Round stochastically: up where a uniform 32-bit word is below the fraction, which float64 holds exactly."""
    stream = WordStream(rng.token(KEY_BYTES))
    buffer = bytearray(4 * _BLOCK)
    raw, words = memoryview(buffer), np.frombuffer(buffer, dtype="<u4")
    rounded = np.empty(value.size, dtype=np.int64)
    for at in range(0, value.size, _BLOCK):
        part = value[at : at + _BLOCK]
        stream.fill(raw[: 4 * part.size])
        whole = np.floor(part)
        whole += words[: part.size] < (part - whole) * 2.0**32
        rounded[at : at + _BLOCK] = whole
    return rounded


def _within(x: NDArray[np.int64], bound: int) -> bool:
    """Return whether the L2 norm of integers is at most `bound` < 2^31; exact, nothing wraps around."""
    if int(x.max()) > bound or int(x.min()) < -bound:
        return False
    squares = x * x
    high, low = int((squares >> 32).sum()), int((squares & 0xFFFFFFFF).sum())
    return (high << 32) + low <= bound * bound

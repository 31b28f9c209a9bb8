"""The samplers of discrete Gaussian, Poisson and Skellam noise against exact mass functions and another library.

Every statistical test draws from a seeded stream, so that it says the same on every run, and is set to a false-alarm
rate of 1e-6; only the comparison with OpenDP draws afresh, because OpenDP does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedllm.privacy.noise import _gamma, _geometric_thresholds, bernoulli_exp, discrete_gaussian
from fedllm.privacy.skellam import _Envelope, log_mass, poisson, skellam, stirling_error
from fedllm.rng import OsRng, SeededRng

ALPHA = 1e-6
Z = 6.0
COUNT = 100_000
Mass = Callable[[NDArray[np.int64]], NDArray[np.float64]]


def chi_square(drawn: NDArray[np.int64], low: int, expected: NDArray[np.float64]) -> tuple[float, float]:
    """Return the statistic over bins low, low + 1, … (rare ones joined with all beyond) and its 1e-6 limit."""
    inside = (drawn >= low) & (drawn < low + expected.size)
    observed = np.bincount(drawn[inside] - low, minlength=expected.size).astype(float)
    common = expected >= 20
    rest, rest_observed = drawn.size - expected[common].sum(), drawn.size - observed[common].sum()
    statistic = ((observed[common] - expected[common]) ** 2 / expected[common]).sum()
    statistic += (rest_observed - rest) ** 2 / max(rest, 1)
    return float(statistic), float(stats.chi2.ppf(1 - ALPHA, df=int(common.sum())))


def gaussian_mass(sigma: float) -> Mass:
    """Return the definition: exp(-x^2 / 2 sigma^2) over its sum."""
    x = np.arange(-math.ceil(12 * sigma) - 2, math.ceil(12 * sigma) + 3).astype(float)
    total = np.exp(-(x**2) / (2 * sigma**2)).sum()
    return lambda k: np.exp(-(k.astype(float) ** 2) / (2 * sigma**2)) / total


GAUSSIAN = [0.4, 1.0, 3.3, 40.0, 300.0]
POISSON = [0.3, 0.99, 3.0, 40.0, 1e4]
SKELLAM = [0.5, 6.0, 200.0, 2e4]
LAWS = [
    *[pytest.param(discrete_gaussian, s, gaussian_mass(s), 0.0, s, id=f"gaussian-{s}") for s in GAUSSIAN],
    *[pytest.param(poisson, r, stats.poisson(r).pmf, r, math.sqrt(r), id=f"poisson-{r}") for r in POISSON],
    *[pytest.param(skellam, v, stats.skellam(v / 2, v / 2).pmf, 0.0, math.sqrt(v), id=f"skellam-{v}") for v in SKELLAM],
]


@pytest.mark.parametrize(("sampler", "parameter", "mass", "mean", "std"), LAWS)
def test_draws_follow_the_exact_mass_function(
    sampler: Callable[..., NDArray[np.int64]], parameter: float, mass: Mass, mean: float, std: float
) -> None:
    """Chi-square over every integer that is expected often enough."""
    drawn = sampler(parameter, COUNT, SeededRng(f"pmf/{parameter}"))
    reach = math.ceil(10 * std) + 3
    low = max(math.floor(mean) - reach, 0) if sampler is poisson else math.floor(mean) - reach
    support = np.arange(low, math.floor(mean) + reach + 1)
    expected = COUNT * mass(support)
    assert expected.sum() == pytest.approx(COUNT, rel=1e-9)  # the truth itself is a law
    statistic, limit = chi_square(drawn, low, expected)
    assert statistic < limit


BIG = [("poisson", 1e9), ("poisson", 2.0**52), ("skellam", 1e8), ("skellam", 2.0**50), ("gaussian", 2.0**24)]


@pytest.mark.parametrize(("law", "variance"), [(law, v**2 if law == "gaussian" else v) for law, v in BIG])
def test_wide_draws_follow_the_law_in_bins(law: str, variance: float) -> None:
    """At rates too large for a table, 400 bins of equal width over ten standard deviations, by the normal law.

    Its distance from the true law is below 1e-5 (skewness 1/sqrt(rate)), far below what these draws can tell apart.
    """
    std = math.sqrt(variance)
    sampler = {
        "poisson": lambda rng: poisson(variance, COUNT, rng) - round(variance),
        "skellam": lambda rng: skellam(variance, COUNT, rng),
        "gaussian": lambda rng: discrete_gaussian(std, COUNT, rng),
    }[law]
    width = max(round(std / 40), 1)
    drawn = np.floor_divide(sampler(SeededRng(f"wide/{law}/{variance}")), width)
    edges = (np.arange(-200, 201) * width - 0.5) / std
    statistic, limit = chi_square(drawn, -200, COUNT * np.diff(stats.norm.cdf(edges)))
    assert statistic < limit


@pytest.mark.parametrize("parameter", [0.7, 3.0, 55.5, 1e4, 1e7])
def test_mean_and_variance(parameter: float) -> None:
    """Within six standard errors, by the fourth moments of each law (3 v^2 + v for Poisson and Skellam)."""
    laws = [
        (poisson(parameter, COUNT, SeededRng(f"p/{parameter}")) - parameter, parameter, 2 * parameter**2 + parameter),
        (skellam(parameter, COUNT, SeededRng(f"s/{parameter}")), parameter, 2 * parameter**2 + parameter),
        (discrete_gaussian(parameter, COUNT, SeededRng(f"g/{parameter}")), *_gaussian_moments(parameter)),
    ]
    for drawn, variance, spread in laws:
        assert abs(drawn.mean()) < Z * math.sqrt(variance / COUNT)
        assert abs((drawn.astype(float) ** 2).mean() - variance) < Z * math.sqrt(spread / COUNT)


def _gaussian_moments(sigma: float) -> tuple[float, float]:
    if sigma > 30:
        return sigma**2, 2 * sigma**4
    x = np.arange(-500, 501)
    mass = gaussian_mass(sigma)(x)
    variance = float((x.astype(float) ** 2 * mass).sum())
    return variance, float((x.astype(float) ** 4 * mass).sum()) - variance**2


@pytest.mark.parametrize(("factor", "parameter"), [(0.9, 40.0), (1.1, 40.0), (0.5, 6.0), (2.0, 6.0)])
def test_a_wrong_law_is_noticed(factor: float, parameter: float) -> None:
    """The control: the chi-square test fails for variances that are 10 % off, and for half and double."""
    support = np.arange(-90, 91)
    for sampler, law in ((poisson, stats.poisson(parameter)), (skellam, stats.skellam(parameter / 2, parameter / 2))):
        drawn = sampler(factor * parameter, COUNT, SeededRng("wrong"))
        statistic, limit = chi_square(drawn, -90, COUNT * law.pmf(support))
        assert statistic > 1.5 * limit


def test_the_gaussian_agrees_with_opendp() -> None:
    """Two samples, two libraries: OpenDP's exact sampler and ours cannot be told apart at a rate of 1e-6."""
    import opendp.prelude as dp

    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T=int)), dp.l2_distance(T=float)
    for sigma in (0.8, 4.0, 11.0):
        theirs = np.array(dp.m.make_gaussian(*space, scale=sigma)([0] * 8000))
        ours = discrete_gaussian(sigma, 8000, OsRng())
        assert two_samples(ours, theirs) > ALPHA
        assert two_samples(discrete_gaussian(1.3 * sigma, 8000, OsRng()), theirs) < ALPHA  # the test can fail


def two_samples(ours: NDArray[np.int64], theirs: NDArray[np.int64]) -> float:
    """Return the p-value of one law for both, by a chi-square test of homogeneity on bins with 20 draws or more."""
    low, high = int(min(ours.min(), theirs.min())), int(max(ours.max(), theirs.max()))
    table = np.stack([np.bincount(x - low, minlength=high - low + 1) for x in (ours, theirs)])
    common = table.sum(axis=0) >= 20
    rest = table[:, ~common].sum(axis=1, keepdims=True)
    table = np.hstack([table[:, common], rest]) if rest.sum() >= 20 else table[:, common]
    return float(stats.chi2_contingency(table, correction=False).pvalue)


# How inexact: the probability that the code gives each count, as a number, against the definition in 60 digits.

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")
BERNOULLI = [(1, 12), (-1, 360), (1, 1260), (-1, 1680), (1, 1188), (-691, 360360), (1, 156)]


@cache
def log_factorial(k: int) -> Decimal:
    """Return log k!: by the product, or from 2000 on by Stirling's series to more than 45 digits."""
    if k < 2000:
        return Decimal(math.factorial(k)).ln()
    n = Decimal(k)
    series = sum(Decimal(a) / b / n ** (2 * i + 1) for i, (a, b) in enumerate(BERNOULLI))
    return (n + Decimal("0.5")) * n.ln() - n + (2 * PI).ln() / 2 + series


def log_probability(x: int, scale: int, gamma: float) -> Decimal:
    """Return the log of what one proposal gives x, from the very thresholds that words are compared with."""
    scales, rest = divmod(abs(x), scale)
    thresholds = [2**64, *(int(t) for t in _geometric_thresholds()[::-1]), 0]
    whole = Decimal(thresholds[scales] - thresholds[scales + 1]) / 2**64
    return (whole * Decimal(float(np.exp(-rest / scale))) * Decimal(min(1.0, float(np.exp(-gamma))))).ln()


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.3, 40.0, 1e4, 1.37 * 2**20, 2.0**24])
def test_gaussian_probabilities_are_off_by_at_most_two_to_the_minus_45(sigma: float) -> None:
    """Relative to zero 2^-46, out to nine standard deviations; one more bit for the normalisation."""
    scale = math.floor(sigma) + 1
    with localcontext() as context:
        context.prec = 60
        at_zero = log_probability(0, scale, float(_gamma(np.array([0]), sigma, scale)[0]))
        for x in sorted({int(x) for x in np.linspace(0, 9 * sigma, 100)}):
            truth = -(Decimal(x) ** 2) / (2 * Decimal(sigma) ** 2)
            found = log_probability(x, scale, float(_gamma(np.array([x]), sigma, scale)[0]))
            assert abs(found - at_zero - truth) < Decimal(2) ** -46


@pytest.mark.parametrize("rate", [1e-9, 0.3, 0.99, 3.0, 40.0, 115.0, 365.0, 1000.5, 1e4, 1e9, 2.0**52 - 1])
def test_poisson_probabilities_are_off_by_at_most_two_to_the_minus_42(rate: float) -> None:
    """Relative to the mode 2^-43, down to 2^-80 of it; one more bit for what the others add to the normalisation."""
    envelope = _Envelope.around(rate)
    reach = math.ceil(13 * math.sqrt(rate)) + 40
    points = {int(x) for x in np.linspace(-min(envelope.mode, reach), reach, 101)} | set(
        range(-min(envelope.mode, 9), 30)
    )
    with localcontext() as context:
        context.prec = 60
        deepest = -80 * Decimal(2).ln()
        at_mode = log_probability(0, envelope.scale, float(envelope.gamma(np.array([0]))[0]))
        compared = 0
        for x in points:
            truth = x * Decimal(rate).ln() - log_factorial(envelope.mode + x) + log_factorial(envelope.mode)
            if truth >= deepest:
                compared += 1
                found = log_probability(x, envelope.scale, float(envelope.gamma(np.array([x]))[0]))
                assert abs(found - at_mode - truth) < Decimal(2) ** -43
    assert compared >= 3


@pytest.mark.parametrize("rate", [1e-9, 0.3, 1.0, 3.99, 16.0, 40.0, 999.5, 1e4])
def test_the_envelope_touches_and_is_never_below(rate: float) -> None:
    """No count is worth more than certain acceptance, and the best one is accepted surely: the maximum is exact."""
    envelope = _Envelope.around(rate)
    reach = math.ceil(20 * math.sqrt(rate)) + 50
    gamma = envelope.gamma(np.arange(-min(envelope.mode, reach), reach))
    assert abs(gamma.min()) < 1e-13


def test_stirling_error_against_the_definition() -> None:
    """Table and series meet at 16 and agree with log k! to the last bits."""
    k = np.array([1, 2, 7, 15, 16, 17, 40, 1000, 10**9])
    with localcontext() as context:
        context.prec = 60
        for count, error in zip(k.tolist(), stirling_error(k).tolist(), strict=True):
            n = Decimal(count)
            truth = log_factorial(count) - (n + Decimal("0.5")) * n.ln() + n - (2 * PI).ln() / 2
            assert float(truth) == pytest.approx(error, rel=1e-12, abs=2e-16)


@pytest.mark.parametrize("rate", [0.3, 3.0, 40.0, 1e4])
def test_log_mass_against_scipy(rate: float) -> None:
    """The saddle point form and another library's: the same to 1e-9, zero included."""
    k = np.arange(0, int(rate + 9 * math.sqrt(rate)) + 3)
    expected = stats.poisson(rate).logpmf(k) + 0.5 * math.log(2 * math.pi * rate)
    np.testing.assert_allclose(log_mass(k, rate), expected, rtol=1e-9, atol=1e-9)


class Words:
    """An `Rng` that gives the 64-bit words it was told, and records that they were asked for."""

    def __init__(self, *words: int) -> None:
        self.words = list(words)

    def token(self, size: int) -> bytes:
        """Return the next words."""
        taken, self.words = self.words[: size // 8], self.words[size // 8 :]
        return b"".join(word.to_bytes(8, "little") for word in taken)


@pytest.mark.parametrize(("second", "chosen"), [(0, True), (2**64 - 1, False)])
def test_a_tie_is_decided_by_a_second_word(second: int, chosen: bool) -> None:
    """exp(-32) is 233,615 and a fraction in 2^-64: the fraction counts, or rare draws would be off by 2^-18."""
    threshold = math.exp(-32.0) * 2.0**64
    whole = math.floor(threshold)
    assert threshold != whole
    gamma = np.array([32.0])
    assert bernoulli_exp(gamma, Words(whole - 1))[0]
    assert not bernoulli_exp(gamma, Words(whole + 1))[0]
    source = Words(whole, second)
    assert bernoulli_exp(gamma, source)[0] == chosen
    assert not source.words


@pytest.mark.parametrize("sampler", [discrete_gaussian, poisson, skellam])
def test_seeded_draws_repeat_and_os_draws_do_not(sampler: Callable[..., NDArray[np.int64]]) -> None:
    """Tests need repeatability; production must not have it."""
    first, second = (sampler(500.0, 1000, SeededRng(7)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.dtype == np.int64
    assert (sampler(500.0, 1000, OsRng()) != sampler(500.0, 1000, OsRng())).any()


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 2.0**54])
def test_unusable_rates_are_refused(bad: float) -> None:
    """Zero noise is not noise, and beyond 2^52 counts are no longer float64."""
    with pytest.raises(ValueError, match="rate"):
        poisson(bad, 1, SeededRng(0))
    with pytest.raises(ValueError, match="rate"):
        skellam(bad, 1, SeededRng(0))

"""The sampler against the exact distribution, and the grid it is added on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedllm.errors import ConfigError, NonFiniteUpdate
from fedllm.privacy.noise import GaussianGrid, add_noise, discrete_gaussian
from fedllm.rng import OsRng, SeededRng

ALPHA = 1e-6  # false-alarm rate of every statistical test here


@pytest.mark.parametrize("sigma", [0.4, 1.0, 1.7, 12.5])
def test_draws_follow_the_exact_mass_function(sigma: float) -> None:
    """Chi-square against exp(-x^2 / 2 sigma^2) summed over the integers, the definition itself."""
    count = 200_000
    drawn = discrete_gaussian(sigma, count, SeededRng(f"pmf/{sigma}"))
    edge = math.ceil(12 * sigma) + 2
    support = np.arange(-edge, edge + 1)
    mass = np.exp(-(support.astype(float) ** 2) / (2 * sigma**2))
    expected = count * mass / mass.sum()
    observed = np.bincount(drawn + edge, minlength=support.size).astype(float)
    common = expected >= 10
    observed = np.append(observed[common], observed[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    statistic = ((observed - expected) ** 2 / np.maximum(expected, 1e-9))[expected > 1].sum()
    assert statistic < stats.chi2.ppf(1 - ALPHA, df=int((expected > 1).sum()) - 1)


def test_a_wrong_sigma_is_noticed() -> None:
    """The control: the same kind of test fails by a wide margin for noise that is 2 % too small."""
    drawn = discrete_gaussian(2**20 * 0.98, 200_000, SeededRng("control")) / 2**20
    low = stats.chi2.ppf(ALPHA / 2, df=drawn.size)
    assert (drawn**2).sum() < low


@pytest.mark.parametrize("sigma", [2.0**20, 1.37 * 2**20, 2.0**24])
def test_large_sigma_has_gaussian_moments(sigma: float) -> None:
    """Mean, variance and shape where the discrete and the continuous Gaussian agree to many digits."""
    drawn = discrete_gaussian(sigma, 300_000, SeededRng(f"large/{sigma}")) / sigma
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], df=drawn.size)
    assert low < (drawn**2).sum() < high
    assert abs(drawn.mean()) < 5 / math.sqrt(drawn.size)
    assert stats.kstest(drawn, "norm").pvalue > ALPHA


def test_low_bits_are_uniform() -> None:
    """At a sigma of 2^20 steps the low byte is noise like any other: nothing in it tells the data."""
    low_byte = discrete_gaussian(2.0**20, 200_000, SeededRng("bits")) & 255
    assert stats.chisquare(np.bincount(low_byte, minlength=256)).pvalue > ALPHA


def test_seeded_draws_repeat_and_os_draws_do_not() -> None:
    """Known answers need repeatability; production must not have it."""
    first, second = (discrete_gaussian(50.0, 1000, SeededRng(7)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.dtype == np.int64
    assert (discrete_gaussian(50.0, 1000, OsRng()) != discrete_gaussian(50.0, 1000, OsRng())).any()


@pytest.mark.parametrize("sigma", [0.0, -1.0, 2.0**25, math.nan, math.inf])
def test_unusable_sigmas_are_refused(sigma: float) -> None:
    """Zero noise is not noise."""
    with pytest.raises(ValueError, match="sigma"):
        discrete_gaussian(sigma, 1, SeededRng(0))


def test_outputs_lie_on_a_public_grid() -> None:
    """Whatever the data, outputs are multiples of one power of two: low bits carry nothing (Mironov 2012)."""
    grid = GaussianGrid(0.04)
    assert math.frexp(grid.step)[0] == 0.5
    assert grid.sigma / 2**24 < grid.step <= grid.sigma / 2**23
    noisy = grid.add_noise(np.linspace(-3, 3, 999), SeededRng("grid"))
    assert (noisy / grid.step == np.rint(noisy / grid.step)).all()


def test_add_noise_has_the_variance_asked_for() -> None:
    """The whole path, snapping included, in the units of the sum."""
    noise = add_noise(np.full(200_000, 0.123), 0.04, SeededRng("path")) - 0.123
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], df=noise.size)
    assert low < (noise**2).sum() / 0.04**2 < high


def test_the_grid_must_fit_the_clipping_slack() -> None:
    """Rounding d entries must stay inside the 2^-10 of the clip norm that clipping left free."""
    GaussianGrid(0.04).check(30_720, 0.05)
    with pytest.raises(ConfigError, match="noise grid"):
        GaussianGrid(400.0).check(30_720, 0.05)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e300])
def test_sums_without_a_place_on_the_grid_raise(bad: float) -> None:
    """NaN plus noise would look like an update."""
    with pytest.raises(NonFiniteUpdate):
        add_noise(np.array([0.0, bad]), 0.04, SeededRng(0))

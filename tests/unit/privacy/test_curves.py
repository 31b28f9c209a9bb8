"""Renyi curves against the sums that they stand for, taken entry by entry."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedllm.privacy.curves import ORDERS, Gaussian, Skellam, renyi, to_epsilon

WHOLE = ORDERS.astype(int).tolist()


def at(curve: NDArray[np.float64], order: int) -> float:
    """Return the curve's value at one order."""
    return float(curve[WHOLE.index(order)])


def divergence(log_p: NDArray[np.float64], log_q: NDArray[np.float64], order: float) -> float:
    """Return the Renyi divergence of two distributions, by its definition."""
    return float(np.logaddexp.reduce(order * log_p + (1 - order) * log_q)) / (order - 1)


def discrete_gaussian(s: float, shift: tuple[int, ...], reach: int) -> NDArray[np.float64]:
    """Return log probabilities of the discrete Gaussian around `shift`, on the points of a box around 0."""
    points = np.array(list(product(range(-reach, reach + 1), repeat=len(shift))), dtype=np.float64)
    wide = np.arange(-40 * math.ceil(s), 40 * math.ceil(s) + 1)
    normaliser = len(shift) * np.logaddexp.reduce(-(wide**2) / (2 * s * s))
    return np.asarray(-((points - np.array(shift)) ** 2).sum(axis=1) / (2 * s * s) - normaliser)


@pytest.mark.parametrize(
    ("s", "shift", "reach"), [(0.4, (1,), 30), (0.7, (2,), 40), (2.5, (3,), 120), (0.8, (1, 2), 30), (1.3, (-2, 1), 40)]
)
@pytest.mark.parametrize("rate", [1.0, 0.3, 0.02])
def test_whole_moments_of_the_discrete_gaussian_are_the_continuous_ones(
    s: float, shift: tuple[int, ...], reach: int, rate: float
) -> None:
    """Coarser than any grid we use, in one and two dimensions: equal at whole orders, and never less backwards."""
    curve = Gaussian(s / math.hypot(*shift), rate).curve()
    still, moved = discrete_gaussian(s, tuple(0 for _ in shift), reach), discrete_gaussian(s, shift, reach)
    mixed = np.logaddexp(math.log(rate) + moved, math.log1p(-rate) + still) if rate < 1 else moved
    for order in (2, 3, 5, 8):
        assert divergence(mixed, still, order) == pytest.approx(at(curve, order), rel=1e-9)
        assert divergence(still, mixed, order) <= at(curve, order) * (1 + 1e-9)


def test_between_whole_orders_they_differ() -> None:
    """Why only whole orders are used: on a coarse lattice the continuous formula is off between them."""
    s = 0.3
    found = divergence(discrete_gaussian(s, (1,), 30), discrete_gaussian(s, (0,), 30), 2.5)
    assert abs(found / (2.5 / (2 * s * s)) - 1) > 1e-2


@pytest.mark.parametrize(("noise", "rate"), [(0.6, 0.0064), (0.8, 0.25), (1.4, 1.0), (5.0, 1e-5), (0.3, 0.9)])
def test_sampled_gaussians_are_those_of_an_independent_library(noise: float, rate: float) -> None:
    """dp-accounting's Renyi accountant at the same orders."""
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(WHOLE).compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)), 1)
    # For tiny rates theirs loses digits to cancellation.
    np.testing.assert_allclose(Gaussian(noise, rate).curve(), accountant.rdp, rtol=1e-9, atol=1e-13)


def log_skellam(variance: float, reach: int) -> NDArray[np.float64]:
    """Return log probabilities of 0 to `reach`: ``e^-mu I_k(mu)``, by the stable backward recurrence of the ratios."""
    ratio, logs = 0.0, np.zeros(reach + 1)
    for k in range(2 * reach + 2 * math.ceil(variance) + 50, -1, -1):
        ratio = variance / (2 * (k + 1) + variance * ratio)
        if k < reach:
            logs[k + 1] = math.log(ratio)
    logs = np.cumsum(logs)
    return np.asarray(logs - np.logaddexp.reduce(np.concatenate([logs[1:], logs])))


def skellam_divergence(variance: float, shift: int, order: int) -> float:
    """Return the Renyi divergence of Skellam noise and the same noise shifted, summed term by term."""
    reach = order * shift * 2 + 40 * math.ceil(math.sqrt(variance)) + 200
    log_p, x = log_skellam(variance, reach + shift), np.arange(-reach, reach + 1)
    return divergence(log_p[np.abs(x - shift)], log_p[np.abs(x)], order)


@pytest.mark.parametrize("variance", [0.05, 0.5, 2.0, 20.0, 400.0])
def test_skellam_costs_no_more_than_its_curve(variance: float) -> None:
    """One entry: Agarwal et al. 2021 bound the true divergence, for less noise than anybody would use too."""
    for shift in (1, 2, 7):
        curve = Skellam(variance, shift, 1).curve()
        for order in (2, 3, 8, 32):
            assert skellam_divergence(variance, shift, order) <= at(curve, order)


@pytest.mark.parametrize("shifts", [(1, 1), (3, 4), (0, 5)])
def test_skellam_of_two_entries(shifts: tuple[int, int]) -> None:
    """Two entries: divergences add up, and norms are all that the curve knows of the shift."""
    for variance in (1.0, 30.0):
        curve = Skellam(variance, math.hypot(*shifts), 2).curve()
        for order in (2, 5, 16):
            exact = sum(skellam_divergence(variance, shift, order) for shift in shifts if shift)
            assert exact <= at(curve, order)


def test_with_much_noise_the_skellam_curve_is_tight() -> None:
    """At variance 3000 it is within two percent of the true divergence, at all orders that matter."""
    for shift, order in ((1, 2), (1, 40), (5, 4), (10, 12)):
        assert at(Skellam(3000.0, shift, 1).curve(), order) == pytest.approx(
            skellam_divergence(3000.0, shift, order), rel=0.02
        )


def test_on_a_fine_grid_skellam_costs_what_a_gaussian_costs() -> None:
    """A clip norm of 2^20 steps: as much as the Gaussian of the same multiplier, to a millionth."""
    steps, noise = 2.0**20, 1.7
    np.testing.assert_allclose(Skellam((noise * steps) ** 2, steps, 30_720).curve(), Gaussian(noise).curve(), rtol=1e-6)


def test_skellam_is_a_zero_concentrated_event() -> None:
    """Each branch, as dp-accounting's zCDP event, gives a curve no lower than ours; one of them ours at each order."""
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    release = Skellam(50.0, 6.0, 100)
    theirs = [RdpAccountant(WHOLE).compose(dp.ZCDpEvent(rho, max(0.0, xi)), 1).rdp for rho, xi in release.branches()]
    np.testing.assert_allclose(np.minimum(*theirs), release.curve(), rtol=1e-12)
    below = Skellam(50.0, 600.0, 2)
    assert below.branches()[0][1] < 0, "an offset that the library would refuse"
    assert (below.curve() > 0).all()


def test_the_l1_norm_of_whole_vectors() -> None:
    """At most sqrt(d) times the L2 norm, and at most its square: the worst vectors there are reach it."""
    assert Skellam(1.0, 2.0, 4).l1_sensitivity == np.abs([1, 1, 1, 1]).sum()
    assert Skellam(1.0, 2.0, 1000).l1_sensitivity == 4
    assert Skellam(1.0, 10.0, 4).l1_sensitivity == np.abs([5, 5, 5, 5]).sum()


def test_epsilon_of_a_curve_known_answers() -> None:
    """The library's conversion at the same orders; nothing released and next to nothing released cost 0."""
    from dp_accounting.rdp import rdp_privacy_accountant

    for curve, delta in ((ORDERS / 32, 1e-5), (8 * renyi(Gaussian(0.8, 0.25)), 1e-6), (ORDERS / 3e9, 1e-5)):
        expected, _ = rdp_privacy_accountant.compute_epsilon(WHOLE, curve, delta)
        assert to_epsilon(curve, delta) == pytest.approx(float(expected), rel=1e-12)
    assert to_epsilon(np.zeros_like(ORDERS), 1e-5) == 0
    assert to_epsilon(ORDERS * 1e-12, 1e-5) == 0
    assert to_epsilon(np.full_like(ORDERS, math.inf), 1e-5) == math.inf


@pytest.mark.parametrize(
    "release",
    [Gaussian(0.0), Gaussian(0.0, 0.5), Gaussian(1e-200, 0.5), Skellam(0.0, 8.0, 3), Skellam(1e-320, 8.0, 3)],
)
def test_no_noise_costs_everything(release: Gaussian | Skellam) -> None:
    """Noise that vanishes in float64 is no noise; no NaN passes for a price."""
    assert to_epsilon(renyi(release), 1e-5) > 1e100


@pytest.mark.parametrize("release", [Gaussian(1e200), Gaussian(1e200, 0.5), Skellam(math.inf, 8.0, 3)])
def test_boundless_noise_costs_nothing(release: Gaussian | Skellam) -> None:
    """The other end of float64."""
    assert to_epsilon(renyi(release), 1e-5) == 0


@given(noise=st.floats(0.05, 50), rate=st.floats(1e-6, 1), more=st.floats(1, 2))
@settings(max_examples=40, deadline=None)
def test_curves_rise_with_order_and_rate_and_fall_with_noise(noise: float, rate: float, more: float) -> None:
    """What Renyi divergence does, and what calibration relies on."""
    curve = Gaussian(noise, rate).curve()
    assert (np.diff(curve) >= -1e-12 * curve[1:]).all()
    assert (Gaussian(noise * more, rate).curve() <= curve * (1 + 1e-12)).all()
    assert (Gaussian(noise, min(1.0, rate * more)).curve() >= curve * (1 - 1e-12)).all()


def test_curves_are_remembered_and_cannot_be_changed() -> None:
    """One array for all who ask: it is read-only."""
    curve = renyi(Gaussian(1.25, 0.5))
    assert renyi(Gaussian(1.25, 0.5)) is curve
    with pytest.raises(ValueError, match="read-only"):
        curve[0] = 0.0

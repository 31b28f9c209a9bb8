"""Epsilon: known answers, independent accountants, units, and how it is said."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.errors import NonFiniteUpdate
from fedllm.messages.mechanism import (
    RELATION_ADD_REMOVE,
    RELATION_ZERO_OUT,
    UNIT_OWNER,
    UNIT_PERSON,
    UNIT_RECORD,
    AdaptiveClip,
    Mechanism,
    NoiseShares,
    Stream,
)
from fedllm.privacy import accountant
from fedllm.privacy.accountant import burn_down, epsilon, rdp_epsilon
from fedllm.privacy.clip import clip_l2
from fedllm.privacy.mechanism import describe, describe_noise
from fedllm.privacy.noise import GRID_BITS

COARSE = 2e-3
"""Of privacy losses: fast, and good to a thousandth where few steps are composed."""


def sgd(noise: float, *, rate: float = 0.25, steps: int = 2, clip: float = 0.05) -> Mechanism:
    """Return a DP-SGD round."""
    return Mechanism("dp-sgd", UNIT_RECORD, RELATION_ADD_REMOVE, noise, clip, rate, steps, 1e-5)


def ftrl(noise: float, *, name: str = "s", clip: float = 0.05, band: int = 4, steps: int = 2) -> Mechanism:
    """Return a round of a stream."""
    stream = Stream(name, steps=24, band=band, separation=8)
    return Mechanism("dp-ftrl", UNIT_RECORD, RELATION_ADD_REMOVE, noise, clip, 1.0, steps, 1e-5, stream=stream)


def shares(noise: float, *, clip_steps: int = 1 << 20, dimension: int = 30_720) -> Mechanism:
    """Return a round with noise shares."""
    part = NoiseShares(honest=3, dimension=dimension, clip_steps=clip_steps)
    return Mechanism("skellam", UNIT_OWNER, RELATION_ZERO_OUT, noise, 0.05, 1.0, 1, 1e-5, shares=part)


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "tight", "renyi"),
    [
        (0.8, 0.0064, 1000, 2.023, 2.575),
        (1.0, 0.0064, 1000, 1.128, 1.429),
        (4.0, 1.0, 10, 3.34, 3.62),
        (8.0, 1.0, 50, 3.80, 4.11),
    ],
)
def test_known_prices(noise: float, rate: float, steps: int, tight: float, renyi: float) -> None:
    """Measured once with dp-accounting directly: PLD, and its Renyi accountant, which has orders between whole ones."""
    history = [sgd(noise, rate=rate, steps=steps)]
    assert epsilon(history, 1e-5) == pytest.approx(tight, abs=0.006)
    assert renyi - 0.006 < rdp_epsilon(history, 1e-5) < 1.04 * renyi


@pytest.mark.parametrize(
    "rounds",
    [
        [(0.8028, 0.25, 8)],
        [(1.4407, 0.25, 8)],
        [(2.0, 0.25, 30)],
        [(0.6, 0.0064, 1000)],
        [(1.5, 0.01, 2000)],
        [(1.0, 0.05, 20), (1.5, 0.1, 10), (0.9, 0.01, 50), (4.0, 0.5, 2)],
    ],
)
def test_an_independent_accountant_agrees(rounds: list[tuple[float, float, int]]) -> None:
    """Opacus' PRV accountant, other code by other people, within 2 % or 0.02; the Renyi bound is above both."""
    from opacus.accountants import PRVAccountant

    prv = PRVAccountant()
    prv.history = rounds
    history = [sgd(noise, rate=rate, steps=steps) for noise, rate, steps in rounds]
    ours = epsilon(history, 1e-5, interval=1e-3)
    assert ours == pytest.approx(prv.get_epsilon(1e-5), rel=0.02, abs=0.02)
    assert ours < rdp_epsilon(history, 1e-5) < 1.35 * ours


def test_adaptive_clipping_is_inside_the_multiplier() -> None:
    """Gradients and count released side by side, each with its own noise, cost what the multiplier alone says."""
    from opacus.accountants import PRVAccountant

    adaptive = dataclasses.replace(sgd(4.0, steps=4), adaptive=AdaptiveClip(0.5, 0.2, count_noise=4.8))
    prv = PRVAccountant()
    prv.history = [(4.0, 0.25, 4)]
    assert epsilon([adaptive], 1e-5, interval=COARSE) == pytest.approx(prv.get_epsilon(1e-5), rel=0.02, abs=0.02)
    assert adaptive.gradient_noise > 4.36
    # The count moves by one half around its middle: sensitivity 1/2.
    apart = [sgd(adaptive.gradient_noise, rate=1.0, steps=4), sgd(2 * 4.8, rate=1.0, steps=4)]
    together = [dataclasses.replace(adaptive, sample_rate=1.0)]
    assert epsilon(together, 1e-5, interval=COARSE) == pytest.approx(epsilon(apart, 1e-5, interval=COARSE), rel=1e-6)


def test_unsampled_gaussian_is_the_analytic_one() -> None:
    """One full-batch step: delta(epsilon) by Balle and Wang 2018, closed form."""
    from scipy.stats import norm

    noise, delta = 1.5, 1e-5
    spent = epsilon([sgd(noise, rate=1.0, steps=1)], delta)
    mean = 1 / noise
    exact = norm.cdf(mean / 2 - spent / mean) - math.exp(spent) * norm.cdf(-mean / 2 - spent / mean)
    assert exact == pytest.approx(delta, rel=0.02)
    assert exact <= delta, "an upper bound, never below"


def test_rounds_add_up_in_any_order() -> None:
    """Four rounds of two steps are one of eight; order and clip norm do not matter; nothing spent is zero."""

    def price(rounds: list[Mechanism]) -> float:
        return epsilon(rounds, 1e-5, interval=COARSE)

    rounds = [sgd(1.0), sgd(2.0), sgd(1.0, clip=1.0)]
    assert price([]) == 0.0
    assert price([sgd(1.0)] * 4) == price([sgd(1.0, steps=8)])
    assert price(rounds) == price(rounds[::-1])
    assert price(rounds) > price(rounds[:2]) > price(rounds[:1])


def test_absurd_plans_are_priced_quickly() -> None:
    """A hostile plan with next to no noise must cost its price, not the daemon's memory."""
    for noise, steps in ((1e-3, 2), (0.05, 1000), (0.3, 100_000), (1e-150, 1)):
        assert epsilon([sgd(noise, steps=steps)], 1e-5) > 100


def test_a_delta_below_what_the_library_cuts_off_has_a_price() -> None:
    """Where composition has thrown more mass away than delta, the Renyi bound is left."""
    rounds = [sgd(6.0, rate=0.1 + i / 100, steps=1) for i in range(4)]
    assert epsilon(rounds, 1e-16, interval=COARSE) == rdp_epsilon(rounds, 1e-16) < math.inf


def test_one_unprotected_round_spoils_all() -> None:
    """Without a mechanism epsilon is infinite, whatever else was careful."""
    assert epsilon([sgd(5.0), Mechanism.none()], 1e-5) == math.inf


def test_units_say_what_is_priced() -> None:
    """The table of the accountant: nothing but Skellam noise bounds what an owner spends; a person is as a record."""
    for mechanism in (sgd(2.0), ftrl(2.0)):
        assert epsilon([mechanism], 1e-5, unit=UNIT_OWNER) == math.inf
        assert rdp_epsilon([mechanism], 1e-5, unit=UNIT_OWNER) == math.inf
        assert epsilon([mechanism, shares(2.0)], 1e-5, unit=UNIT_OWNER) == math.inf
    for mechanism in (sgd(2.0), ftrl(2.0), shares(4.0)):
        record, person = (epsilon([mechanism], 1e-5, unit=unit, interval=COARSE) for unit in (UNIT_RECORD, UNIT_PERSON))
        assert 0 < record == person < math.inf
    for unit in (UNIT_RECORD, UNIT_PERSON, UNIT_OWNER):
        assert epsilon([Mechanism.none()], 1e-5, unit=unit) == math.inf
        assert epsilon([], 1e-5, unit=unit) == 0


def test_a_record_in_a_noisy_sum_moves_it_by_twice_the_clip_norm() -> None:
    """An owner's budget at half the noise, on a grid so fine that the L1 norm does not count."""
    record = epsilon([shares(4.0)] * 3, 1e-5)
    owner = epsilon([shares(2.0)] * 3, 1e-5, unit=UNIT_OWNER)
    assert record == pytest.approx(owner, rel=1e-6)
    assert record > 2 * epsilon([shares(4.0)] * 3, 1e-5, unit=UNIT_OWNER)


def test_skellam_noise_is_nearly_gaussian() -> None:
    """An owner's sum costs what the Renyi bound of the Gaussian says, as long as steps are fine; more where not."""
    fine = epsilon([shares(2.0)], 1e-5, unit=UNIT_OWNER)
    assert fine == pytest.approx(rdp_epsilon([sgd(2.0, rate=1.0, steps=1)], 1e-5), rel=1e-6)
    assert epsilon([shares(2.0, clip_steps=4)], 1e-5, unit=UNIT_OWNER) > 1.01 * fine


def test_histories_with_skellam_noise_are_priced_by_renyi_as_a_whole() -> None:
    """A record's rounds of both kinds: more than either, less than both apart, and as the fast bound says."""
    both = [sgd(2.0), shares(6.0)]
    assert epsilon(both, 1e-5) == rdp_epsilon(both, 1e-5) == epsilon(both[::-1], 1e-5)
    assert max(rdp_epsilon(both[:1], 1e-5), rdp_epsilon(both[1:], 1e-5)) < epsilon(both, 1e-5)
    assert epsilon(both, 1e-5) < sum(rdp_epsilon([each], 5e-6) for each in both)


def test_a_stream_is_charged_once() -> None:
    """However many rounds it takes; one Gaussian; any other number makes it another stream, even under its name."""
    once = epsilon([ftrl(2.0)], 1e-5, interval=COARSE)
    assert once == epsilon([ftrl(2.0), ftrl(2.0, steps=3)] * 6, 1e-5, interval=COARSE)
    assert once == epsilon([sgd(2.0, rate=1.0, steps=1)], 1e-5, interval=COARSE)
    twice = epsilon([sgd(2.0, rate=1.0, steps=2)], 1e-5, interval=COARSE)
    for other in (ftrl(2.0, name="t"), ftrl(2.0, band=5), ftrl(2.0, clip=0.06)):
        assert epsilon([ftrl(2.0), other, ftrl(2.0)], 1e-5, interval=COARSE) == twice > once
    assert epsilon([ftrl(2.0), ftrl(3.0)], 1e-5, interval=COARSE) > once


def test_gaussians_without_sampling_are_composed_exactly() -> None:
    """Three different ones are one of the harmonic noise: no discretisation adds up."""
    parts = [sgd(noise, rate=1.0, steps=1) for noise in (2.0, 3.0, 6.0)]
    whole = 1 / math.sqrt(1 / 4 + 1 / 9 + 1 / 36)
    assert epsilon(parts, 1e-5, interval=COARSE) == pytest.approx(
        epsilon([sgd(whole, rate=1.0, steps=1)], 1e-5, interval=COARSE), rel=1e-9
    )


def test_many_different_rounds_cost_what_they_cost_apart() -> None:
    """Coarser losses for many mechanisms: no less than the fine price of dp-accounting, and within half a percent."""
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant

    rounds = [sgd(1.0 + i / 24, rate=0.05 + i / 400, steps=1 + i % 10) for i in range(24)]
    fine = PLDAccountant(value_discretization_interval=2e-3)
    for one in rounds:
        fine.compose(dp.PoissonSampledDpEvent(one.sample_rate, dp.GaussianDpEvent(one.noise_multiplier)), one.steps)
    expected = fine.get_epsilon(1e-5)
    assert expected * (1 - 1e-4) < epsilon(rounds, 1e-5, interval=COARSE) < 1.005 * expected


@given(
    noise=st.floats(0.7, 3), rate=st.sampled_from([0.02, 0.3, 1.0]), steps=st.integers(1, 40), more=st.floats(1.01, 2)
)
@settings(max_examples=8, deadline=None)
def test_caution_never_costs_more(noise: float, rate: float, steps: int, more: float) -> None:
    """More noise, fewer rounds, a larger delta and the tighter accountant: each spends no more."""
    one = sgd(noise, rate=rate, steps=steps)
    spent = epsilon([one], 1e-5, interval=COARSE)
    least = 1 + 1e-6  # losses of different rounds fall differently on one grid
    assert epsilon([sgd(noise * more, rate=rate, steps=steps)], 1e-5, interval=COARSE) <= spent * least
    assert spent <= epsilon([one, sgd(noise * more, rate=rate, steps=1)], 1e-5, interval=COARSE) * least
    assert epsilon([one], 1e-4, interval=COARSE) <= spent * least
    assert spent <= rdp_epsilon([one], 1e-5) * least


@pytest.mark.parametrize(
    "history",
    [
        [sgd(3.0, rate=0.05, steps=4)] * 40,
        [sgd(3.0), ftrl(4.0), sgd(3.0), ftrl(4.0), ftrl(4.0), sgd(3.0, rate=1.0)],
        [sgd(3.0), shares(6.0), sgd(3.0), ftrl(4.0)],
        [sgd(2.0), sgd(0.05, rate=0.9, steps=100), sgd(2.0)],
        [sgd(2.0), Mechanism.none(), sgd(2.0)],
        [Mechanism.none()],
    ],
)
def test_burning_down_never_shows_less_than_was_spent(history: list[Mechanism]) -> None:
    """Each value is above the ledger's price of its prefix, close to it while that is useful, rising, exact at last."""
    spent = burn_down(history, 1e-5)
    assert len(spent) == len(history)
    assert spent[-1] == epsilon(history, 1e-5)
    assert spent == sorted(spent)
    for at in {0, 1, len(history) // 2} & set(range(len(history) - 1)):
        exact = epsilon(history[: at + 1], 1e-5, interval=3e-4)
        assert exact * (1 - 1e-4) <= spent[at]
        assert spent[at] <= exact * 1.01 + 0.001 or exact == spent[at]


def test_long_histories_burn_down_in_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eleven rounds every third is priced; the others show the next price, which covers them."""
    history = [sgd(4.0, rate=0.1)] * 11
    every = burn_down(history, 1e-5)
    monkeypatch.setattr(accountant, "_PREFIXES", 4)
    strides = burn_down(history, 1e-5)
    assert strides == pytest.approx([every[min(at // 3 * 3 + 2, 10)] for at in range(11)], rel=1e-6)
    assert all(wide >= fine * (1 - 1e-9) for wide, fine in zip(strides, every, strict=True))
    assert burn_down([], 1e-5) == []


def test_budgets_out_of_range_are_refused() -> None:
    """Delta and unit name what is allowed."""
    for price in (epsilon, rdp_epsilon, burn_down):
        with pytest.raises(ValueError, match="between 0 and 1"):
            price([sgd(1.0)], 0.0)
        with pytest.raises(ValueError, match="record, person, owner"):
            price([sgd(1.0)], 1e-5, unit="house")


def test_integer_noise_is_next_to_the_gaussian_that_is_priced() -> None:
    """Rounded Gaussian over discrete Gaussian, entry by entry: 1 + (t^2 - 1) / (24 s^2), below 2^-37 on our grids.

    The ratio is an integral over one step; its first-order term is odd and cancels, so that what is left is found to
    full precision. The normalisers of the two agree to ``2 exp(-2 pi^2 s^2)``.
    """
    nodes, weights = np.polynomial.legendre.leggauss(16)
    u = nodes / 2

    def off(s: float, t: float) -> float:
        # exp(-(2 x u + u^2) / (2 s^2)) - 1 with x = t s, its even part in u
        inner = np.expm1(-(u**2) / (2 * s * s))
        return float((weights / 2 * (inner + (1 + inner) * 2 * np.sinh(t * u / (2 * s)) ** 2)).sum())

    for s in (8.0, 64.0, 2.0**GRID_BITS):
        for t in (0.0, 1.0, 3.0, 9.0):
            assert off(s, t) == pytest.approx((t * t - 1) / (24 * s * s), rel=3 * (1 + t * t) / s**2, abs=3 / s**4)
    assert max(abs(off(2.0**GRID_BITS, t)) for t in np.linspace(0, 9, 50)) < 2.0**-37
    for s in (0.5, 1.0, 1.5):
        total = np.exp(-(np.arange(-60, 61) ** 2) / (2 * s * s)).sum() / (s * math.sqrt(2 * math.pi))
        assert total - 1 == pytest.approx(2 * math.exp(-2 * (math.pi * s) ** 2), rel=1e-3, abs=1e-15)


def test_epsilon_is_never_said_alone() -> None:
    """Unit, relation and delta stand beside it, and rounding never makes it smaller."""
    assert describe(3.2051, 1e-5, "record", "add-or-remove-one") == "ε = 3.21 per record (add-or-remove-one), δ = 1e-05"
    assert describe(3.2, 1e-5, "record", "add-or-remove-one").startswith("ε = 3.20 ")
    assert "∞" in describe(math.inf, 1e-5, "record", "add-or-remove-one")


def test_noise_in_one_phrase() -> None:
    """Every kind says its own numbers."""
    assert describe_noise(sgd(1.3, rate=0.1, steps=7)) == (
        "7 steps, sample rate 0.1, noise multiplier 1.3, clip norm 0.05"
    )
    adaptive = dataclasses.replace(sgd(1.0, steps=1), adaptive=AdaptiveClip(0.5, 0.2, 10.0))
    assert describe_noise(adaptive) == (
        "1 step, sample rate 0.25, noise multiplier 1, clip norm 0.05 at first, then quantile 0.5 (gradients' noise"
        " 1.001, count's 10)"
    )
    assert describe_noise(ftrl(2.0)) == (
        "2 steps of 24 of stream 's', band 4, noise multiplier 2, clip norm 0.05 for the whole stream"
    )
    assert describe_noise(shares(2.0)) == (
        "noise multiplier 2, clip norm 0.05 (1048576 grid steps), 3 honest shares, 30720 entries"
    )
    assert describe_noise(Mechanism.none()) == "no noise"


def test_clipping_known_answers() -> None:
    """3-4-5; short vectors and zero stay; NaN and overflow raise instead of dividing by anything."""
    clipped, norm = clip_l2(np.array([3.0, 4.0]), 1.0)
    np.testing.assert_allclose(clipped, [0.6, 0.8])
    assert norm == 5.0
    for same in (np.zeros(3), np.array([0.3, 0.4])):
        assert clip_l2(same, 1.0)[0] is same
    for bad in (np.array([np.nan]), np.array([np.inf, 1.0]), np.array([1e200, 1e200])):
        with pytest.raises(NonFiniteUpdate):
            clip_l2(bad, 1.0)
    with pytest.raises(ValueError, match="clip norm"):
        clip_l2(np.ones(2), 0.0)

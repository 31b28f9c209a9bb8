"""Epsilon: known answers, an independent accountant, and how it is said."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedllm.errors import ConfigError, NonFiniteUpdate
from fedllm.messages.mechanism import RELATION_ADD_REMOVE, UNIT_RECORD, Mechanism
from fedllm.privacy.accountant import epsilon
from fedllm.privacy.calibrate import noise_multiplier
from fedllm.privacy.clip import clip_l2
from fedllm.privacy.mechanism import describe, to_event


def sgd(noise: float, *, rate: float = 0.25, steps: int = 2, clip: float = 0.05) -> Mechanism:
    """Return a DP-SGD round."""
    return Mechanism("dp-sgd", UNIT_RECORD, RELATION_ADD_REMOVE, noise, clip, rate, steps, 1e-5)


@pytest.mark.parametrize(("target", "noise"), [(8.0, 0.80), (3.0, 1.44)])
def test_known_noise_for_a_budget(target: float, noise: float) -> None:
    """Measured once with dp-accounting directly: q = 0.25, T = 8, delta 1e-5."""
    found = noise_multiplier(epsilon=target, delta=1e-5, sample_rate=0.25, steps=8)
    assert found == pytest.approx(noise, abs=0.005)
    spent = epsilon([sgd(found, steps=8)], 1e-5)
    assert target - 0.05 < spent <= target


def test_an_independent_accountant_agrees() -> None:
    """Opacus' PRV accountant, other code by other people, within 2 % or 0.02."""
    from opacus.accountants import PRVAccountant

    for noise, steps in ((0.8028, 8), (1.4407, 8), (2.0, 30)):
        prv = PRVAccountant()
        prv.history = [(noise, 0.25, steps)]
        ours = epsilon([sgd(noise, steps=steps)], 1e-5)
        assert ours == pytest.approx(prv.get_epsilon(1e-5), rel=0.02, abs=0.02)


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
    rounds = [sgd(1.0), sgd(2.0), sgd(1.0, clip=1.0)]
    assert epsilon([], 1e-5) == 0.0
    assert epsilon([sgd(1.0)] * 4, 1e-5) == epsilon([sgd(1.0, steps=8)], 1e-5)
    assert epsilon(rounds, 1e-5) == epsilon(rounds[::-1], 1e-5)
    assert epsilon(rounds, 1e-5) > epsilon(rounds[:2], 1e-5) > epsilon(rounds[:1], 1e-5)


def test_absurd_plans_are_priced_quickly() -> None:
    """A hostile plan with next to no noise must cost its price, not the daemon's memory."""
    for noise, steps in ((1e-3, 2), (0.05, 1000), (0.3, 100_000), (1e-150, 1)):
        assert epsilon([sgd(noise, steps=steps)], 1e-5) > 100


def test_one_unprotected_round_spoils_all() -> None:
    """Without a mechanism epsilon is infinite, whatever else was careful."""
    assert epsilon([sgd(5.0), Mechanism.none()], 1e-5) == math.inf


def test_impossible_budgets_are_refused() -> None:
    """Numbers out of range name the range."""
    with pytest.raises(ConfigError, match="sample rate"):
        noise_multiplier(epsilon=1.0, delta=1e-5, sample_rate=0.0, steps=1)


def test_epsilon_is_never_said_alone() -> None:
    """Unit, relation and delta stand beside it, and rounding never makes it smaller."""
    assert describe(3.2051, 1e-5, "record", "add-or-remove-one") == "ε = 3.21 per record (add-or-remove-one), δ = 1e-05"
    assert describe(3.2, 1e-5, "record", "add-or-remove-one").startswith("ε = 3.20 ")
    assert "∞" in describe(math.inf, 1e-5, "record", "add-or-remove-one")


def test_events_are_what_the_plan_says() -> None:
    """Poisson-sampled Gaussian, composed with itself."""
    event = to_event(sgd(1.3, rate=0.1, steps=7))
    assert (event.count, event.event.sampling_probability, event.event.event.noise_multiplier) == (7, 0.1, 1.3)
    assert type(to_event(Mechanism.none())).__name__ == "NonPrivateDpEvent"


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

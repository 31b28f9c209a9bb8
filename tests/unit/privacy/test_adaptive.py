"""The clip norm that follows a quantile: known answers, the quantile itself, its bounds, its grid."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedllm.errors import ConfigError
from fedllm.messages.mechanism import RELATION_ADD_REMOVE, UNIT_RECORD, AdaptiveClip, Mechanism
from fedllm.privacy import adaptive
from fedllm.privacy.adaptive import SPAN, next_clip_norm, step_grid
from fedllm.privacy.clip import SLACK
from fedllm.privacy.noise import GRID_BITS, discrete_gaussian
from fedllm.rng import SeededRng, uniform_floats

ALPHA = 1e-6  # false-alarm rate of every statistical test here
DP = Mechanism(
    "dp-sgd", UNIT_RECORD, RELATION_ADD_REMOVE, 1.0, 0.5, 0.25, 8, 1e-5, adaptive=AdaptiveClip(0.5, 0.2, 10.0)
)


class NoRandomness:
    """An `Rng` that must not be asked."""

    def token(self, size: int) -> bytes:
        """Fail."""
        raise AssertionError(f"{size} bytes asked for")


def test_a_known_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 of 64 sampled units short, noise +4: share (20 / 64 + 1) / 2, and exp of 0.2 of the excess off the norm."""
    asked: list[tuple[float, int]] = []

    def noise(sigma: float, count: int, _rng: object) -> np.ndarray:
        asked.append((sigma, count))
        return np.array([4])

    monkeypatch.setattr(adaptive, "discrete_gaussian", noise)
    found = next_clip_norm(DP, 0.25, 40 - 24, 256, SeededRng(0))
    assert found == pytest.approx(0.25 * math.exp(-0.2 * ((20 / 64 + 1) / 2 - 0.5)), rel=1e-12)
    assert asked == [(20.0, 1)], "one unit moves the balance by one: noise of twice the count's"


def test_a_norm_that_is_not_adapted_stays_and_costs_no_randomness() -> None:
    """Without the part nothing is released beside the gradients."""
    assert next_clip_norm(dataclasses.replace(DP, adaptive=None), 0.3, 7, 100, NoRandomness()) == 0.3


def test_what_leaves_is_noise_of_the_priced_size() -> None:
    """Read back from the norm, the count has mean and variance of the Gaussian that the accountant was told of."""
    rng, sampled = SeededRng("count"), 0.25 * 400
    logs = np.array([math.log(next_clip_norm(DP, 0.5, 30, 400, rng) / 0.5) for _ in range(4000)])
    noise = ((0.5 - logs / 0.2) * 2 - 1) * sampled - 30
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], df=noise.size)
    assert low < (noise**2).sum() / 20.0**2 < high
    assert abs(noise.mean()) < 5 * 20 / math.sqrt(noise.size)
    np.testing.assert_allclose(noise, np.rint(noise), atol=1e-6, err_msg="an integer, whatever the norm is")


@pytest.mark.parametrize(("quantile", "first"), [(0.5, 0.05), (0.5, 20.0), (0.8, 1.0), (0.2, 1.0)])
def test_the_quantile_is_tracked(quantile: float, first: float) -> None:
    """On lognormal norms, Poisson-sampled, from far off: the norm settles at the population's quantile."""
    plan = dataclasses.replace(DP, clip_norm=first, adaptive=AdaptiveClip(quantile, 0.2, 10.0))
    rng = SeededRng(f"{quantile}/{first}")
    population = np.exp(0.8 * stats.norm.ppf(uniform_floats(rng, 1000) * 0.999 + 5e-4))
    norm, path = first, []
    for _ in range(150):
        sample = population[uniform_floats(rng, population.size) < plan.sample_rate]
        norm = next_clip_norm(plan, norm, int(np.where(sample <= norm, 1, -1).sum()), population.size, rng)
        path.append(float((population <= norm).mean()))
    assert abs(np.mean(path[100:]) - quantile) < 0.03
    assert max(abs(x - quantile) for x in path[100:]) < 0.1


def test_a_step_without_units_still_moves_by_noise() -> None:
    """Nothing sampled: half a share and noise, as for any balance; nothing tells that the sample was empty."""
    noise = int(discrete_gaussian(20.0, 1, SeededRng("empty"))[0])
    share = (noise / (0.25 * 1000) + 1) / 2
    expected = 0.5 * math.exp(-0.2 * (share - 0.5))
    assert next_clip_norm(DP, 0.5, 0, 1000, SeededRng("empty")) == pytest.approx(expected, rel=1e-12)


@given(
    st.integers(-(10**6), 10**6), st.floats(1e-3, 1e6), st.floats(0.01, 1.0), st.integers(1, 10**6), st.integers(0, 99)
)
def test_the_norm_stays_within_its_span(balance: int, noise: float, rate: float, size: int, seed: int) -> None:
    """However wild the count and its noise are, the norm is finite and near the plan's."""
    clip = AdaptiveClip(0.5, rate, noise + 4)
    plan = dataclasses.replace(DP, sample_rate=0.01, adaptive=clip)
    found = next_clip_norm(plan, 0.5, balance, size, SeededRng(seed))
    assert 0.5 / SPAN * (1 - 1e-9) <= found <= 0.5 * SPAN * (1 + 1e-9)


def test_gradients_get_the_noise_that_the_count_leaves_them() -> None:
    """The grid's sigma is the gradients' multiplier, above the plan's, times this step's norm."""
    assert step_grid(DP, 0.3, 100).sigma == pytest.approx(0.3 / math.sqrt(1 - 1 / 400))
    assert step_grid(dataclasses.replace(DP, adaptive=None), 0.3, 100).sigma == 0.3


@given(st.floats(1 / SPAN, SPAN), st.integers(10, 10**7), st.floats(0.3, 500.0))
def test_a_grid_is_refused_at_the_first_step_or_never(moved: float, dimension: int, noise: float) -> None:
    """A refusal in mid-round would waste what was charged: all norms that one round can meet fare alike."""
    plan = dataclasses.replace(DP, noise_multiplier=noise, adaptive=AdaptiveClip(0.5, 0.2, 2 * noise + 4))

    def refused(norm: float) -> bool:
        try:
            step_grid(plan, norm, dimension).check(dimension, norm)
        except ConfigError:
            return True
        return False

    assert refused(plan.clip_norm) == refused(plan.clip_norm * moved)


def test_a_grid_too_coarse_is_refused() -> None:
    """Without a bound on rounding there is no sensitivity."""
    noise = 2 * SLACK * 2**GRID_BITS / 10**3
    with pytest.raises(ConfigError, match="noise grid"):
        step_grid(dataclasses.replace(DP, noise_multiplier=noise, adaptive=AdaptiveClip(0.5, 0.2, noise)), 0.5, 10**6)

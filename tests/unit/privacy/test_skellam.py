"""Noise shares and the grid of unit owner: the variance that was promised, the ball that nothing leaves."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedllm.errors import ConfigError, IntegrityError, NonFiniteUpdate
from fedllm.messages.mechanism import (
    RELATION_ADD_REMOVE,
    RELATION_ZERO_OUT,
    SKELLAM,
    UNIT_OWNER,
    UNIT_RECORD,
    Mechanism,
    NoiseShares,
)
from fedllm.privacy import skellam
from fedllm.privacy.skellam import SumGrid, share_variance
from fedllm.rng import KEY_BYTES, OsRng, SeededRng, uniform_u32

Z = 6.0
DIMENSION = 40_000


def mechanism(
    *, noise: float = 0.8, honest: int = 5, dimension: int = DIMENSION, clip_steps: int = 4000, clip_norm: float = 0.5
) -> Mechanism:
    """Return a Skellam mechanism; by default noise shares of 1431 steps."""
    shares = NoiseShares(honest, dimension, clip_steps)
    return Mechanism(SKELLAM, UNIT_OWNER, RELATION_ZERO_OUT, noise, clip_norm, 1.0, 1, 1e-5, shares=shares)


def has_variance(noise: NDArray[np.int64], variance: float) -> bool:
    """Return whether entries of mean 0 have `variance`, within six standard errors (a false alarm in 5e8)."""
    found = float((noise.astype(float) ** 2).mean())
    return abs(found - variance) < Z * math.sqrt((2 * variance**2 + variance) / noise.size)


def test_a_share_has_the_variance_that_h_of_them_need() -> None:
    """Noise of 3200 steps over 5 honest owners: 2,048,000 each; a sum of four times as many has twice the noise."""
    assert share_variance(mechanism()) == pytest.approx(3200**2 / 5)
    assert mechanism().sum_std(5) == pytest.approx(3200)
    assert mechanism().sum_std(20) == pytest.approx(6400)
    assert mechanism().noise_over_signal(5) == pytest.approx(0.8 * math.sqrt(DIMENSION) / 5)


def test_noise_over_signal_is_sigma_root_d_over_n() -> None:
    """The figures of a million entries at noise multiplier 4: 40 times the signal with 100 owners, 200 with 20."""
    big: dict[str, Any] = {"noise": 4.0, "dimension": 10**6, "clip_steps": 2**20}
    assert mechanism(honest=100, **big).noise_over_signal(100) == pytest.approx(40)
    assert mechanism(honest=20, **big).noise_over_signal(20) == pytest.approx(200)


@pytest.mark.parametrize("honest", [1, 3, 5])
def test_the_shares_of_h_owners_add_up_to_the_noise_that_is_accounted(honest: int) -> None:
    """The sum of h updates, noised, less the sum of the same updates, encoded, has variance (z C)^2."""
    plan = mechanism(honest=honest)
    grid = SumGrid.of(plan)
    update = np.linspace(-1e-3, 1e-3, DIMENSION)
    rngs = [SeededRng(f"share/{honest}/{owner}") for owner in range(honest)]
    noised = sum(grid.noised(update, plan, rng) for rng in rngs)
    assert isinstance(noised, np.ndarray)
    # Stochastic rounding of each of h updates leaves less than h/4 of variance beside 10 million.
    signal = np.rint(honest * update / grid.step).astype(np.int64)
    assert has_variance(noised - signal, 3200**2)
    assert abs((noised - signal).mean()) < Z * 3200 / math.sqrt(DIMENSION)


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0, 0.9, 1.1])
def test_noise_dropped_halved_or_doubled_would_be_noticed(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with noise of another variance in its place, the test above sees it."""
    plan = mechanism(honest=1)
    grid = SumGrid.of(plan)
    zero = np.zeros(DIMENSION)
    assert has_variance(grid.noised(zero, plan, SeededRng("true")), 3200**2)
    real = skellam.skellam

    def tampered(variance: float, count: int, rng: Any) -> NDArray[np.int64]:
        return real(factor * variance, count, rng) if factor else np.zeros(count, dtype=np.int64)

    monkeypatch.setattr(skellam, "skellam", tampered)
    assert not has_variance(grid.noised(zero, plan, SeededRng("true")), 3200**2)


def test_owners_draw_afresh_from_the_operating_system() -> None:
    """Two attempts with one update share neither noise nor rounding; the production source is used as it is."""
    plan = mechanism()
    grid = SumGrid.of(plan)
    update = np.full(DIMENSION, 0.4 * grid.step)
    first, second = (grid.noised(update, plan, OsRng()) for _ in range(2))
    assert np.count_nonzero(first == second) < DIMENSION / 50
    shares = [grid.share(plan, OsRng()) for _ in range(2)]
    correlation = float((shares[0].astype(float) * shares[1]).mean()) / share_variance(plan)
    assert abs(correlation) < Z / math.sqrt(DIMENSION)
    assert (grid.encode(update, OsRng()) != grid.encode(update, OsRng())).any()


def test_noise_and_rounding_are_independent_of_each_other() -> None:
    """What is left after the noise is taken out is exactly the update, encoded: nothing else is added."""
    plan = mechanism()
    grid = SumGrid.of(plan)
    update = np.random.default_rng(1).normal(0, 1e-3, DIMENSION)
    noised = grid.noised(update, plan, SeededRng(3))
    rng = SeededRng(3)
    noise = grid.share(plan, rng)
    np.testing.assert_array_equal(noised - noise, grid.encode(update, rng))


def test_short_updates_are_rounded_without_bias() -> None:
    """0.3 steps in every entry: the mean is 0.3 within six standard errors, and every entry is 0 or 1."""
    grid = SumGrid(0.5, 4000, DIMENSION)
    encoded = grid.encode(np.full(DIMENSION, 0.3 * grid.step), SeededRng("bias"))
    assert set(np.unique(encoded)) == {0, 1}
    assert abs(encoded.mean() - 0.3) < Z * math.sqrt(0.21 / DIMENSION)
    negative = grid.encode(np.full(DIMENSION, -0.3 * grid.step), SeededRng("bias"))
    assert set(np.unique(negative)) == {-1, 0}
    assert abs(negative.mean() + 0.3) < Z * math.sqrt(0.21 / DIMENSION)


def test_long_updates_keep_their_direction_and_fill_the_ball() -> None:
    """Clipped to the clip norm less what rounding needs: 3800 of 4000 steps here, along the same line."""
    grid = SumGrid(0.5, 4000, DIMENSION)
    update = np.random.default_rng(2).normal(0, 1.0, DIMENSION)
    encoded = grid.encode(update, SeededRng("long")).astype(float)
    norm = float(np.linalg.norm(encoded))
    assert 3795 < norm <= 4000
    assert float(encoded @ update) / (norm * float(np.linalg.norm(update))) > 0.999


def test_the_fast_rounding_is_the_naive_one() -> None:
    """Block by block, or value by value with floor and the same words: the same integers, over a block's edge."""
    value = np.random.default_rng(4).normal(0, 50, (1 << 15) + 3)
    value[:4] = [0.0, -3.0, 7.0, -0.5]
    words = uniform_u32(SeededRng(9).token(KEY_BYTES), value.size).tolist()
    naive = [math.floor(v) + (w / 2**32 < v - math.floor(v)) for v, w in zip(value.tolist(), words, strict=True)]
    assert skellam._round(value, SeededRng(9)).tolist() == naive


@pytest.mark.parametrize("bound", [5, 2**31 - 1])
def test_the_norm_is_compared_in_exact_integers(bound: int) -> None:
    """At the bound yes, one step beyond no; sums of squares that would wrap 64 bits around are no way in."""
    assert skellam._within(np.array([bound, 0, 0]), bound)
    assert not skellam._within(np.array([bound, 1, 0]), bound)
    assert not skellam._within(np.array([0, -bound - 1]), bound)
    assert not skellam._within(np.full(4, bound), bound)
    assert not skellam._within(np.full(8, -bound), bound)
    assert skellam._within(np.array([3, 4]), 5)


def test_an_update_that_rounding_took_out_of_the_ball_is_never_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line of defence works on integers and does not trust the arithmetic before it."""
    grid = SumGrid(0.5, 4000, DIMENSION)
    monkeypatch.setattr(skellam, "_round", lambda value, rng: np.full(value.size, 21, dtype=np.int64))
    with pytest.raises(IntegrityError, match="norm is above 4000 grid steps"):
        grid.encode(np.zeros(DIMENSION), SeededRng(0))
    monkeypatch.setattr(skellam, "_round", lambda value, rng: np.full(value.size, 20, dtype=np.int64))
    assert grid.encode(np.zeros(DIMENSION), SeededRng(0)).sum() == 20 * DIMENSION


def test_a_grid_too_coarse_for_its_dimension_is_refused() -> None:
    """40,000 entries round by up to 200 steps: 1600 clip steps are the least, and the hint says what to do."""
    SumGrid(0.5, 1600, DIMENSION).check()
    with pytest.raises(ConfigError, match="may add 200 grid steps") as refusal:
        SumGrid(0.5, 1599, DIMENSION).check()
    assert refusal.value.hint == "take more value_bits"
    with pytest.raises(ConfigError, match="grid steps"):
        SumGrid(0.5, 1599, DIMENSION).encode(np.zeros(DIMENSION), SeededRng(0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_updates_are_refused_and_counted(bad: float) -> None:
    """NaN plus noise would look like an update; the message shows how many and no value."""
    update = np.zeros(DIMENSION, dtype=np.float32)
    update[[3, -1]] = bad
    with pytest.raises(NonFiniteUpdate, match="2 of 40000 entries"):
        SumGrid(0.5, 4000, DIMENSION).encode(update, OsRng())


@pytest.mark.parametrize("shape", [(DIMENSION - 1,), (DIMENSION + 1,), (200, 200), ()])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    """Noise for d entries on an update of another size would leave entries bare."""
    plan = mechanism()
    with pytest.raises(ConfigError, match="shape"):
        SumGrid.of(plan).noised(np.zeros(shape), plan, OsRng())


@pytest.mark.parametrize("change", [{"dimension": 100}, {"clip_steps": 4001}, {"clip_norm": 0.25}])
def test_a_mechanism_of_another_grid_is_refused(change: dict[str, Any]) -> None:
    """The share's variance and size are the mechanism's, the ball is the grid's: they must be one."""
    grid = SumGrid.of(mechanism())
    with pytest.raises(ConfigError, match="the same needed"):
        grid.share(mechanism(**change), OsRng())
    with pytest.raises(ConfigError, match="the same needed"):
        grid.noised(np.zeros(DIMENSION), mechanism(**change), OsRng())


def test_other_mechanisms_have_no_shares() -> None:
    """DP-SGD and no mechanism at all make their noise elsewhere, or none: no grid is made up for them."""
    local = Mechanism("dp-sgd", UNIT_RECORD, RELATION_ADD_REMOVE, 1.0, 0.5, 0.1, 8, 1e-5)
    for other in (local, Mechanism.none()):
        for ask in (share_variance, SumGrid.of):
            with pytest.raises(ConfigError, match="no noise shares"):
                ask(other)
        with pytest.raises(ValueError, match="noise shares"):
            other.noise_over_signal(3)
        with pytest.raises(ConfigError, match="no noise shares"):
            SumGrid.of(mechanism()).share(other, OsRng())


@pytest.mark.parametrize("noise", [1e-300, 1e6, 1e300])
def test_noise_that_cannot_be_drawn_is_refused_when_the_grid_is_made(noise: float) -> None:
    """Before a round starts, with a hint, and not in an owner's last step."""
    with pytest.raises(ConfigError, match="noise share of variance") as refusal:
        SumGrid.of(mechanism(noise=noise, clip_steps=2**20))
    assert refusal.value.hint is not None


@pytest.mark.parametrize(
    "numbers",
    [
        *[(norm, 4000, 9) for norm in (0.0, -1.0, math.nan, math.inf, 1e-310)],
        *[(0.5, 0, 9), (0.5, 2**31, 9), (0.5, 4000, 0)],
    ],
)
def test_grids_without_a_step_are_refused(numbers: tuple[float, int, int]) -> None:
    """No division by zero, no square that wraps around, whatever the plan says."""
    with pytest.raises(ConfigError):
        SumGrid(*numbers)


def test_a_sum_of_nobody_has_no_noise_to_speak_of() -> None:
    """Zero survivors is a caller's mistake, not a division by zero."""
    with pytest.raises(ValueError, match="at least 1 owner"):
        mechanism().noise_over_signal(0)


def test_the_grid_is_frozen() -> None:
    """A grid is as immutable as the plan it comes from."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        SumGrid.of(mechanism()).clip_steps = 1  # type: ignore[misc]

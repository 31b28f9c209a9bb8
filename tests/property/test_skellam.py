"""Whatever an owner trained: integers within the ball, and one owner's worth of difference at most."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedllm.errors import NonFiniteUpdate
from fedllm.messages.mechanism import RELATION_ZERO_OUT, SKELLAM, UNIT_OWNER, Mechanism, NoiseShares
from fedllm.privacy.skellam import SumGrid, poisson, skellam
from fedllm.rng import SeededRng

SEEDS = st.integers(0, 2**32)
CLIPS = st.floats(1e-12, 1e12)
DTYPES = st.sampled_from([np.float32, np.float64])


def norm_squared(x: np.ndarray) -> int:
    """Return the squared L2 norm in Python's integers, which never wrap around."""
    return sum(int(v) * int(v) for v in x)


@st.composite
def grids(draw: st.DrawFn) -> SumGrid:
    """Any grid that `check` accepts, the coarsest ones among them."""
    dimension = draw(st.integers(1, 60))
    least = math.ceil(8 * math.sqrt(dimension))
    return SumGrid(draw(CLIPS), draw(st.integers(least, least + 5) | st.integers(least, 2**31 - 1)), dimension)


@st.composite
def updates(draw: st.DrawFn, dimension: int) -> np.ndarray:
    """Any finite update: zeros, constants, subnormals, and lengths that overflow their own norm."""
    dtype = np.dtype(draw(DTYPES))
    elements = arrays.from_dtype(dtype, allow_nan=False, allow_infinity=False)
    return draw(arrays.arrays(dtype, dimension, elements=elements, fill=elements))


@given(data=st.data(), grid=grids(), seed=SEEDS)
@settings(deadline=None, max_examples=200)
def test_any_finite_update_is_encoded_within_the_ball(data: st.DataObject, grid: SumGrid, seed: int) -> None:
    """In exact integers, against the update that zero-out-one puts in its place; entries that are zero stay so."""
    update = data.draw(updates(grid.dimension))
    kept = update.copy()
    encoded = grid.encode(update, SeededRng(seed))
    assert encoded.dtype == np.int64
    assert encoded.shape == (grid.dimension,)
    zero = grid.encode(np.zeros_like(update), SeededRng(seed))
    assert norm_squared(encoded - zero) <= grid.clip_steps**2
    assert not encoded[update == 0].any()
    np.testing.assert_array_equal(update, kept)


@given(data=st.data(), grid=grids(), seed=SEEDS, scale=st.floats(0.5, 2.0))
@settings(deadline=None, max_examples=200)
def test_updates_at_the_edge_of_the_ball_stay_in_it(
    data: st.DataObject, grid: SumGrid, seed: int, scale: float
) -> None:
    """All entries alike and near the clip norm, where rounding adds most."""
    signs = np.array(data.draw(st.lists(st.sampled_from([-1, 1]), min_size=grid.dimension, max_size=grid.dimension)))
    update = signs * scale * grid.clip_norm / math.sqrt(grid.dimension)
    assert norm_squared(grid.encode(update, SeededRng(seed))) <= grid.clip_steps**2


@given(data=st.data(), grid=grids(), seed=SEEDS)
@settings(deadline=None, max_examples=100)
def test_a_short_update_is_moved_by_less_than_a_step_an_entry(data: st.DataObject, grid: SumGrid, seed: int) -> None:
    """Nothing is clipped that did not have to be: the ball costs what rounding may add, and no more."""
    direction = np.array(data.draw(st.lists(st.floats(-1, 1), min_size=grid.dimension, max_size=grid.dimension)))
    length = float(np.linalg.norm(direction))
    room = (grid.clip_steps - math.sqrt(grid.dimension)) * (1 - 2.0**-29)
    steps = direction * (room / length) if length > 0.1 else direction
    moved = np.abs(grid.encode(steps * grid.step, SeededRng(seed)) - steps)
    assert (moved <= 1 + 1e-6).all()


@given(grid=grids(), dtype=DTYPES, seed=SEEDS)
@settings(deadline=None, max_examples=60)
def test_zero_is_zero_and_its_norm_divides_nothing(grid: SumGrid, dtype: type, seed: int) -> None:
    """A silo that learned nothing sends noise alone."""
    assert not grid.encode(np.zeros(grid.dimension, dtype=dtype), SeededRng(seed)).any()
    assert not grid.encode(-np.zeros(grid.dimension, dtype=dtype), SeededRng(seed)).any()


@given(grid=grids(), at=st.integers(0, 59), bad=st.sampled_from([math.nan, math.inf, -math.inf]), dtype=DTYPES)
@settings(deadline=None, max_examples=60)
def test_one_bad_entry_anywhere_is_refused(grid: SumGrid, at: int, bad: float, dtype: type) -> None:
    """NaN and infinity never become integers."""
    update = np.ones(grid.dimension, dtype=dtype)
    update[at % grid.dimension] = bad
    with pytest.raises(NonFiniteUpdate):
        grid.encode(update, SeededRng(0))


@given(data=st.data(), noise=st.floats(0.1, 20), honest=st.integers(1, 50), dimension=st.integers(1, 60), seed=SEEDS)
@settings(deadline=None, max_examples=60)
def test_a_noised_update_is_integers_near_the_update(
    data: st.DataObject, noise: float, honest: int, dimension: int, seed: int
) -> None:
    """At most twelve standard deviations and the ball from zero, whatever the update."""
    shares = NoiseShares(honest, dimension, data.draw(st.integers(100, 2**20)))
    plan = Mechanism(SKELLAM, UNIT_OWNER, RELATION_ZERO_OUT, noise, 0.5, 1.0, 1, 1e-5, shares=shares)
    noised = SumGrid.of(plan).noised(data.draw(updates(dimension)), plan, SeededRng(seed))
    assert noised.dtype == np.int64
    assert noised.shape == (dimension,)
    reach = 12 * noise * shares.clip_steps / math.sqrt(honest) + 40
    assert (np.abs(noised) <= shares.clip_steps + reach).all()


@given(rate=st.floats(1e-12, 2.0**52), count=st.integers(0, 200), seed=SEEDS)
@settings(deadline=None, max_examples=100)
def test_any_rate_gives_the_number_of_counts_asked_for(rate: float, count: int, seed: int) -> None:
    """Never too few, never negative, never beyond what twelve standard deviations and a few counts reach."""
    drawn = poisson(rate, count, SeededRng(seed))
    assert drawn.shape == (count,)
    assert drawn.dtype == np.int64
    assert (drawn >= 0).all()
    assert (np.abs(drawn - rate) <= 12 * math.sqrt(rate) + 40).all()
    assert (np.abs(skellam(rate, count, SeededRng(seed))) <= 12 * math.sqrt(rate) + 40).all()

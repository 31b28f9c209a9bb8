"""Fixed point: bounded error, no bias, no overflow whatever the owners send."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.aggregation.fixedpoint import FixedPoint, Limbs, check_capacity, required_bits
from fedllm.aggregation.plain import plain_sum
from fedllm.aggregation.vector import UpdateTail, UpdateVector
from fedllm.errors import ConfigError, IntegrityError, NonFiniteUpdate
from fedllm.messages.plan import Ring
from fedllm.rng import OsRng, SeededRng, uniform_u32

FLOATS = st.floats(-100, 100, width=32)


@settings(max_examples=150, deadline=None)
@given(st.lists(FLOATS, max_size=30), st.integers(2, 32), st.floats(1e-3, 50), st.integers(1, 4))
def test_the_error_of_a_sum_is_below_a_step_an_owner(xs: list[float], bits: int, clip: float, owners: int) -> None:
    """Encoding then decoding k equal owners differs from k clipped values by less than k steps."""
    grid = FixedPoint(bits, clip)
    x = np.array(xs, dtype=np.float32)
    total = np.zeros(x.size, dtype=np.uint64)
    for _ in range(owners):
        encoded = grid.encode(x, OsRng())
        assert encoded.dtype == np.uint32
        assert not x.size or int(encoded.max()) <= 2 * grid.levels < 2**bits
        total += encoded
    if x.size and int(total.max()) >= 2**32:
        return
    error = grid.decode_sum(total.astype(np.uint32), owners) - owners * np.clip(x.astype(np.float64), -clip, clip)
    assert np.all(np.abs(error) <= owners * grid.step * (1 + 1e-6))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(2, 31), st.sampled_from([8, 16, 24, 32]))
def test_overflow_is_impossible_or_refused(owners: int, value_bits: int, ring_bits: int) -> None:
    """A capacity that is accepted holds the largest sum; one that is refused could have wrapped around."""
    largest = owners * (2**value_bits - 1)
    if largest >= 2**ring_bits:
        with pytest.raises(ConfigError, match="need a ring"):
            check_capacity(owners, value_bits, ring_bits)
        return
    check_capacity(owners, value_bits, ring_bits)
    assert required_bits(owners, value_bits) <= ring_bits
    grid = FixedPoint(value_bits, 1.0)
    top = grid.encode(np.ones(1, dtype=np.float32), OsRng())
    total = plain_sum([top] * owners, ring_bits)
    assert int(total[0]) == owners * 2 * grid.levels
    assert grid.decode_sum(total, owners)[0] == pytest.approx(owners)


def test_rounding_has_no_bias() -> None:
    """The mean of 200,000 roundings of 0.3 steps is 0.3 steps within five standard errors (6e-7 false alarms)."""
    grid = FixedPoint(16, 4.0)
    x = np.full(200_000, 0.3 * grid.step)
    mean = float((grid.encode(x, OsRng()).astype(np.int64) - grid.levels).mean())
    assert abs(mean - 0.3) < 5 * np.sqrt(0.3 * 0.7 / x.size)


def test_grid_values_and_zero_are_kept_exactly() -> None:
    """Zero, the ends and every multiple of the step come back as they were."""
    grid = FixedPoint(8, 1.0)
    x = np.arange(-grid.levels, grid.levels + 1) * grid.step
    np.testing.assert_array_equal(grid.encode(x, OsRng()), np.arange(2 * grid.levels + 1))
    assert not grid.decode_sum(3 * grid.encode(np.zeros(5, np.float32), OsRng()), 3).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_entry_is_refused_wherever_it_is(bad: float) -> None:
    """NaN and infinity never become integers; the error counts them without showing values."""
    x = np.zeros((1 << 15) + 2, dtype=np.float32)
    x[-1] = bad
    with pytest.raises(NonFiniteUpdate, match="1 of 2 entries from 32768 on"):
        FixedPoint(16, 1.0).encode(x, OsRng())


def test_the_entries_beyond_the_clip_range_are_counted() -> None:
    """Two of four are beyond; the range itself is within, and the weight counts."""
    out = np.empty(4, dtype=np.uint32)
    x = np.array([0.5, 1.0, 1.1, -7.0], dtype=np.float32)
    assert FixedPoint(16, 1.0).encode_into(out, x, OsRng()) == 2
    assert FixedPoint(16, 1.0).encode_into(out, x, OsRng(), weight=0.5) == 1
    assert FixedPoint(16, 1.0).encode_into(out, x, OsRng(), weight=0.1) == 0


def naive_encode(grid: FixedPoint, x: np.ndarray, weight: float, key: bytes) -> list[int]:
    """Round one value after another: up with a probability equal to the fraction, by the same draws."""
    encoded = []
    for value, word in zip(x.tolist(), uniform_u32(key, x.size).tolist(), strict=True):
        signed = word - (word >> 31 << 32)
        scaled = min(max(value * weight, -grid.clip_range), grid.clip_range) / grid.step
        below = math.floor(scaled)
        up = (signed + 2**31) / 2**32 >= 1 - (scaled - below)
        encoded.append(min(max(below + up + grid.levels, 0), 2 * grid.levels))
    return encoded


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 24), st.floats(1e-3, 50), st.floats(1e-6, 1), st.sampled_from([1, 7, 1 << 15, (1 << 15) + 3]))
def test_the_fast_quantiser_is_the_naive_one(bits: int, clip: float, weight: float, size: int) -> None:
    """Block by block, weight folded in and truncated, or value by value with floor: the same integers.

    The two compute a value's place on the grid in another order, so one whose draw decides within the last bits of
    a float64 may differ by a step: less than one in 2^20.
    """
    grid = FixedPoint(bits, clip)
    x = np.random.default_rng(bits).normal(0, 30, size).astype(np.float32)
    out = np.empty(size, dtype=np.uint32)
    clipped = grid.encode_into(out, x, SeededRng(7), weight=weight)
    expected = np.array(naive_encode(grid, x, weight, SeededRng(7).token(32)), dtype=np.int64)
    off = np.abs(out.astype(np.int64) - expected)
    assert int(off.max()) <= 1
    assert np.count_nonzero(off) <= size / 2**20 + 1
    assert clipped == int(np.count_nonzero(np.abs(x.astype(np.float64) * weight) > clip))


def test_a_sum_beyond_its_owners_is_noticed() -> None:
    """An entry that two owners cannot add up to is refused, not decoded."""
    grid = FixedPoint(16, 1.0)
    with pytest.raises(IntegrityError, match="beyond what 2 owners"):
        grid.decode_sum(np.array([4 * grid.levels + 1], dtype=np.uint32), 2)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([8, 16, 24, 32]), st.integers(1, 100), st.data())
def test_limbs_sum_exactly(ring_bits: int, owners: int, data: st.DataObject) -> None:
    """Whole numbers of any width are summed exactly, on the narrowest ring too."""
    width = data.draw(st.integers(1, 60))
    limbs = Limbs(ring_bits, owners, (("a", width), ("one", 1)))
    numbers = data.draw(st.lists(st.integers(0, 2**width - 1), min_size=1, max_size=min(owners, 8)))
    total = plain_sum([limbs.encode({"a": number, "one": 1}) for number in numbers], ring_bits)
    assert limbs.decode(total, len(numbers)) == {"a": sum(numbers), "one": len(numbers)}
    with pytest.raises(ConfigError, match="does not fit"):
        limbs.encode({"a": 2**width, "one": 1})


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.lists(FLOATS, min_size=6, max_size=6), st.floats(1e-6, 1)), min_size=1, max_size=6),
    st.booleans(),
)
def test_update_vectors_sum_like_the_float_sum(owners: list[tuple[list[float], float]], covered: bool) -> None:
    """The decoded sum is the sum of weight times update within a step an owner, and every number is exact."""
    codec = UpdateVector(Ring(24, 16, 8.0), 10, 6, covered)
    rng = SeededRng(1)
    vectors = [codec.encode(np.array(x, np.float32), w, UpdateTail(5 + i, 0.5), rng) for i, (x, w) in enumerate(owners)]
    out = codec.decode(plain_sum(vectors, 24), len(owners))
    exact = sum(np.clip(np.array(x, np.float32).astype(np.float64) * w, -8, 8) for x, w in owners)
    assert np.all(np.abs(out.update - exact) <= len(owners) * codec.fixed_point.step * (1 + 1e-6))
    assert out.weight == pytest.approx(sum(w for _, w in owners), abs=len(owners) * 2**-30)
    if covered:
        assert (out.records, out.train_loss) == (None, None)
    else:
        assert out.records == sum(5 + i for i in range(len(owners)))
        assert out.train_loss == pytest.approx(0.5)

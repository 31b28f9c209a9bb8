"""What is in each masked sum, and what must never be."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from fedllm.aggregation.plain import plain_sum
from fedllm.aggregation.vector import LOSS_UNIT, OwnerScores, ScoreVector, UpdateTail, UpdateVector
from fedllm.errors import ConfigError, IntegrityError, NonFiniteUpdate
from fedllm.messages.plan import Ring
from fedllm.rng import OsRng, SeededRng

RING = Ring(24, 16, 4.0)


def test_a_zero_update_comes_back_as_exact_zero() -> None:
    """An owner that learned nothing adds nothing, not rounding noise."""
    codec = UpdateVector(RING, 4, 6, covered=False)
    zeros = [codec.encode(np.zeros(6, np.float32), 0.5, UpdateTail(3, 1.0), OsRng()) for _ in range(4)]
    out = codec.decode(plain_sum(zeros, 24), 4)
    assert not out.update.any()
    assert not out.mean.any()
    assert (out.weight, out.owners, out.records, out.train_loss, out.saturated) == (2.0, 4, 12, 1.0, 0.0)


def test_the_weighted_mean_is_that_of_the_owners() -> None:
    """Two owners of weight 1 and 1/2: the mean is (1*1 + 0.5*4) / 1.5 = 2."""
    codec = UpdateVector(RING, 4, 3, covered=True)
    parts = [
        codec.encode(np.full(3, 1.0, np.float32), 1.0, UpdateTail(1, 0.0), OsRng()),
        codec.encode(np.full(3, 4.0, np.float32), 0.5, UpdateTail(1, 0.0), OsRng()),
    ]
    np.testing.assert_allclose(codec.decode(plain_sum(parts, 24), 2).mean, 2.0, atol=2 * codec.fixed_point.step)


def test_under_differential_privacy_private_numbers_are_not_in_the_vector() -> None:
    """With one random stream the vector is the same whatever the record count and loss: they are not in it."""
    codec = UpdateVector(RING, 4, 6, covered=True)
    update = np.linspace(-1, 1, 6, dtype=np.float32)
    a = codec.encode(update, 0.7, UpdateTail(10, 0.1), SeededRng(1))
    b = codec.encode(update, 0.7, UpdateTail(999_999, 31.0), SeededRng(1))
    np.testing.assert_array_equal(a, b)
    out = codec.decode(plain_sum([a, b], 24), 2)
    assert (out.records, out.train_loss) == (None, None)
    open_codec = UpdateVector(RING, 4, 6, covered=False)
    assert open_codec.entries > codec.entries
    assert (
        open_codec.encode(update, 0.7, UpdateTail(10, 0.1), SeededRng(1)).tolist()
        != open_codec.encode(update, 0.7, UpdateTail(11, 0.1), SeededRng(1)).tolist()
    )


def test_saturation_is_the_mean_share_of_clipped_entries() -> None:
    """One owner with half of its scaled entries beyond the range, one with none: a quarter."""
    codec = UpdateVector(RING, 2, 4, covered=True)
    wide = codec.encode(np.array([9, -9, 0, 0], np.float32), 1.0, UpdateTail(1, 0.0), OsRng())
    # Scaled by its weight before it is clipped, the same update fits.
    fits = codec.encode(np.array([9, -9, 0, 0], np.float32), 0.25, UpdateTail(1, 0.0), OsRng())
    out = codec.decode(plain_sum([wide, fits], 24), 2)
    assert out.saturated == 0.25
    assert out.update[0] == pytest.approx(4.0 + 2.25, abs=2 * codec.fixed_point.step)


@pytest.mark.parametrize("ring", [Ring(8, 5, 1.0), Ring(16, 12, 1.0), Ring(32, 20, 1.0)])
def test_every_ring_carries_the_numbers_exactly(ring: Ring) -> None:
    """Scalars are spread over as many entries as the ring needs, on 8 bits too."""
    codec = UpdateVector(ring, 7, 2, covered=False)
    parts = [codec.encode(np.zeros(2, np.float32), 1.0, UpdateTail(2**32 - 1 - i, 31.999), OsRng()) for i in range(7)]
    out = codec.decode(plain_sum(parts, ring.bits), 7)
    assert out.records == 7 * (2**32 - 1) - 21
    assert out.train_loss == pytest.approx(31.999, abs=LOSS_UNIT)
    assert out.weight == 7.0


def test_a_ring_that_could_overflow_is_refused_when_the_codec_is_made() -> None:
    """257 owners of 16-bit values do not fit 24 bits; 256 do."""
    UpdateVector(RING, 256, 1, covered=True)
    with pytest.raises(ConfigError, match="257 owners with 16-bit values need a ring of 25 bits"):
        UpdateVector(RING, 257, 1, covered=True)


@pytest.mark.parametrize("weight", [0.0, -1.0, 1.5, float("nan")])
def test_a_weight_outside_its_range_is_refused(weight: float) -> None:
    """A weight above one would leave the ring's room; the value itself is private and not shown."""
    codec = UpdateVector(RING, 4, 1, covered=True)
    with pytest.raises(ConfigError, match="must lie in"):
        codec.encode(np.zeros(1, np.float32), weight, UpdateTail(1, 0.0), OsRng())


def test_wrong_shapes_and_non_finite_numbers_are_refused() -> None:
    """Another layout's update, NaN in it, and a NaN loss never become ring entries."""
    codec = UpdateVector(RING, 4, 3, covered=False)
    with pytest.raises(ConfigError, match=r"shape \(2,\), \(3,\) expected"):
        codec.encode(np.zeros(2, np.float32), 1.0, UpdateTail(1, 0.0), OsRng())
    with pytest.raises(NonFiniteUpdate):
        codec.encode(np.full(3, np.nan, np.float32), 1.0, UpdateTail(1, 0.0), OsRng())
    with pytest.raises(NonFiniteUpdate, match="loss"):
        codec.encode(np.zeros(3, np.float32), 1.0, UpdateTail(1, float("nan")), OsRng())
    with pytest.raises(IntegrityError, match="shape"):
        codec.decode(np.zeros(3, np.uint32), 1)


def test_scores_are_means_over_owners_with_their_spread() -> None:
    """Means, sample standard deviation and the count of regressions equal those of the statistics module."""
    rows = [(10, 2.0, 2.5), (300, 3.25, 3.0), (7, 1.0, 1.005), (40, 2.0, 1.995)]
    codec = ScoreVector(7)
    parts = [codec.encode(OwnerScores(*row), OsRng()) for row in rows]
    out = codec.decode(plain_sum(parts, codec.ring.bits), len(rows))
    deltas = [candidate - head for _, candidate, head in rows]
    assert (out.owners, out.records, out.regressed) == (4, 357, 1)
    assert out.candidate_loss == pytest.approx(statistics.mean(r[1] for r in rows), abs=LOSS_UNIT)
    assert out.head_loss == pytest.approx(statistics.mean(r[2] for r in rows), abs=LOSS_UNIT)
    assert out.delta == pytest.approx(statistics.mean(deltas), abs=2 * LOSS_UNIT)
    assert out.delta_std == pytest.approx(statistics.stdev(deltas), abs=4 * LOSS_UNIT)


def test_equal_deltas_have_no_spread() -> None:
    """The variance is exact: equal owners give exactly zero, where float sums give noise."""
    codec = ScoreVector(5)
    parts = [codec.encode(OwnerScores(9, 2.25, 2.5), OsRng()) for _ in range(5)]
    out = codec.decode(plain_sum(parts, 32), 5)
    assert (out.delta, out.delta_std, out.regressed) == (-0.25, 0.0, 0)
    assert codec.decode(parts[0], 1).delta_std == 0.0


def test_scores_out_of_range_are_clipped_and_non_finite_ones_refused() -> None:
    """A loss beyond 32 counts as just below 32, a negative one as 0; NaN is refused."""
    codec = ScoreVector(3)
    out = codec.decode(codec.encode(OwnerScores(1, 1e9, -1.0), OsRng()), 1)
    assert (out.candidate_loss, out.head_loss) == (32 - LOSS_UNIT, 0.0)
    assert out.delta == 32 - LOSS_UNIT
    with pytest.raises(NonFiniteUpdate):
        codec.encode(OwnerScores(1, float("inf"), 1.0), OsRng())
    with pytest.raises(ConfigError, match="records"):
        codec.encode(OwnerScores(2**32, 1.0, 1.0), OsRng())


def test_a_sum_of_scores_that_nobody_could_send_is_refused() -> None:
    """Counts that differ from the survivors, and squares smaller than they can be, are noticed."""
    codec = ScoreVector(3)
    total = plain_sum([codec.encode(OwnerScores(1, 3.0, 2.0), OsRng()) for _ in range(3)], 32)
    with pytest.raises(IntegrityError, match="owners"):
        codec.decode(total, 2)
    squares = codec._limbs.encode({"owners": 0, "records": 0, "candidate_loss": 0, "head_loss": 0, "delta": 0,
                                   "delta_sq": 1 << 40, "regressed": 0})  # fmt: skip
    with pytest.raises(IntegrityError, match="squares"):
        codec.decode(total - squares, 3)


def test_plain_sums_wrap_around_the_ring() -> None:
    """The twin adds modulo 2^bits, and refuses what has no sum."""
    big = np.array([2**24 - 1, 5], dtype=np.uint32)
    assert plain_sum([big, big], 24).tolist() == [2**24 - 2, 10]
    for vectors, bits in (([], 24), ([big, big[:1]], 24), ([big], 20)):
        with pytest.raises(ConfigError):
            plain_sum(vectors, bits)

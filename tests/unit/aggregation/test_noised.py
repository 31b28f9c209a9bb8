"""Noised integers in the ring: sums are exact modulo the ring, nothing else travels, what cannot be is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.aggregation.noised import NoisedVector, needed_bits
from fedllm.aggregation.plain import plain_sum
from fedllm.errors import ConfigError, IntegrityError
from fedllm.messages.mechanism import RELATION_ZERO_OUT, SKELLAM, UNIT_OWNER, Mechanism, NoiseShares

CODEC = NoisedVector(ring_bits=24, owners=4, layout_size=6, clip_steps=1000, clip_norm=0.5, noise_std=2000.0)


def shares(dimension: int = 6, honest: int = 2) -> Mechanism:
    """Return a mechanism of noise shares."""
    parts = NoiseShares(honest, dimension, 1000)
    return Mechanism(SKELLAM, UNIT_OWNER, RELATION_ZERO_OUT, 1.0, 0.5, 1.0, 1, 1e-5, shares=parts)


@given(rows=st.lists(st.lists(st.integers(-6000, 6000), min_size=6, max_size=6), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_the_sum_is_the_sum_of_the_signed_steps(rows: list[list[int]]) -> None:
    """Whatever signs, the opened sum is the exact integer sum, scaled; every owner weighs 1."""
    vectors = [CODEC.encode(np.array(row, dtype=np.int64)) for row in rows]
    opened = CODEC.decode(plain_sum(vectors, 24), len(rows))
    np.testing.assert_array_equal(opened.update, np.sum(rows, axis=0) * (0.5 / 1000))
    assert (opened.weight, opened.owners) == (float(len(rows)), len(rows))


def test_nothing_but_owner_and_weight_travels_beside_the_update() -> None:
    """Two updates that clip and count differently have the same tail: no saturation, records or loss."""
    quiet, loud = CODEC.encode(np.zeros(6, np.int64)), CODEC.encode(np.full(6, 7000, np.int64))
    np.testing.assert_array_equal(quiet[6:], loud[6:])
    opened = CODEC.decode(loud, 1)
    assert (opened.records, opened.train_loss, opened.saturated) == (None, None, None)


def test_a_ring_without_room_for_the_noise_is_refused() -> None:
    """Sum and twelve standard deviations, signed: one bit less is too few."""
    assert needed_bits(4, 1000, 2000.0) == 16
    NoisedVector(16, 4, 6, 1000, 0.5, 2000.0)
    with pytest.raises(ConfigError, match="need a ring of 17 bits, the plan has 16"):
        NoisedVector(16, 4, 6, 1000, 0.5, 4000.0)


def test_a_mechanism_for_updates_of_another_length_is_refused() -> None:
    """The noise is made for a number of entries."""
    assert NoisedVector.of(shares(), ring_bits=24, owners=4, layout_size=6).noise_std == pytest.approx(1000 * 2**0.5)
    with pytest.raises(ConfigError, match="no noise shares for updates of 7 entries"):
        NoisedVector.of(shares(), ring_bits=24, owners=4, layout_size=7)


@pytest.mark.parametrize("damage", ["owners", "entry", "length"])
def test_a_sum_that_cannot_be_is_refused(damage: str) -> None:
    """Masks that did not cancel show in the owners' count, or as an entry that no noise makes."""
    total = plain_sum([CODEC.encode(np.zeros(6, np.int64))] * 2, 24)
    survivors = 2
    if damage == "owners":
        survivors = 3
    elif damage == "entry":
        total[0] = 1 << 22
    else:
        total = total[:-1]
    with pytest.raises(IntegrityError):
        CODEC.decode(total, survivors)


def test_more_honest_owners_than_counted_on_cost_less_and_fewer_never_more() -> None:
    """Each share keeps its variance: with twice the shares the noise multiplier grows by the root of two."""
    planned = shares()
    assert planned.realised(4).noise_multiplier == pytest.approx(2**0.5)
    assert planned.realised(4).sum_std(4) == pytest.approx(planned.sum_std(4))
    assert planned.realised(1) == planned

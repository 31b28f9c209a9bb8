"""The toy trainer's shortcuts against what they stand for: records one by one."""

from __future__ import annotations

import numpy as np
import pytest

from fedllm.adapter import AdapterSpec, AdapterState
from fedllm.client import toy
from fedllm.client.toy import ToyPool, ToyTrainer
from fedllm.errors import NonFiniteUpdate
from fedllm.ids import Digest, OwnerId
from fedllm.privacy.clip import clip_l2
from fedllm.rng import SeededRng, uniform_floats

BASE = Digest("ab" * 32)
SPEC = AdapterSpec(BASE, 2, 4, {"q_proj": (6, 4), "v_proj": (3, 4)}, (0, 1))


def _state() -> AdapterState:
    """Return an adapter none of whose factors is zero: every gradient is there."""
    size = SPEC.layout().size
    flat = (uniform_floats(SeededRng(5), size) - 0.5).astype("<f4")
    return AdapterState.from_bytes(SPEC, flat.tobytes())


def _record_by_record(trainer: ToyTrainer, rows: range) -> list[np.ndarray]:
    """Return each record's own gradient, by central differences of its own loss: no formula of the trainer's."""
    state, data = _state(), trainer._of(SPEC)
    layout, step = SPEC.layout(), 1e-3
    flat = layout.flatten(state.factors).astype(np.float64)
    found = []
    for row in rows:
        at = np.array([row])
        gradient = np.empty(flat.size)
        for place in range(flat.size):
            losses = []
            for sign in (1, -1):
                moved = flat.copy()
                moved[place] += sign * step
                there = AdapterState(SPEC, layout.unflatten(moved.astype(np.float32)))
                losses.append(toy._gradients(there, data.inputs[at], data.targets(at), ())[1][0])
            gradient[place] = (losses[0] - losses[1]) / (2 * step)
        found.append(gradient)
    return found


def test_rank_one_gradients_are_each_records_own() -> None:
    """The weighted sum over records is the sum of what central differences give for each, in the layout's order."""
    trainer = ToyTrainer(BASE, OwnerId("east"), 5)
    data = trainer._of(SPEC)
    gradients, _ = toy._gradients(_state(), data.inputs, data.targets(np.arange(5)), ("A", "B"))
    weights = np.array([1.0, 0.5, 0.0, 2.0, 1.0])
    expected = sum(w * g for w, g in zip(weights, _record_by_record(trainer, range(5)), strict=True))
    np.testing.assert_allclose(gradients.total(weights), expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("max_norm", [0.01, 0.3, 100.0])
def test_clipping_is_what_clipping_each_record_gives(max_norm: float) -> None:
    """Norms as products of two equal the norms of the whole gradients, clipped one by one."""
    trainer = ToyTrainer(BASE, OwnerId("east"), 7)
    data = trainer._of(SPEC)
    gradients, _ = toy._gradients(_state(), data.inputs, data.targets(np.arange(7)), ("B",))
    one_by_one = [clip_l2(gradients.total(np.eye(7)[row]), max_norm)[0] for row in range(7)]
    np.testing.assert_allclose(gradients.total(gradients.clipping(max_norm)), np.sum(one_by_one, axis=0), rtol=1e-9)


def test_a_record_without_a_finite_gradient_is_not_clipped_away() -> None:
    """No scale bounds infinity."""
    broken = toy._Gradients([(np.array([[np.inf]]), np.array([[1.0]]))])
    with pytest.raises(NonFiniteUpdate):
        broken.clipping(1.0)


def test_owners_of_a_pool_share_arrays_and_differ_in_records() -> None:
    """Nothing is made twice, and no two of these owners begin at the same record."""
    pool = ToyPool(records=16)
    east, west = (ToyTrainer(BASE, OwnerId(name), 8, pool=pool) for name in ("east", "west"))
    assert east._of(SPEC) is west._of(SPEC)
    assert east._first % 16 != west._first % 16
    assert east.dataset != west.dataset
    assert east.dataset != ToyTrainer(BASE, OwnerId("east"), 8).dataset

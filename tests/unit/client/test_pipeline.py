"""From a trained adapter to a masked vector, and what of it can be seen."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from unit.client.owner_fakes import HEAD, IDENTITIES, OWNERS, ROSTER, plan

from fedllm import wire
from fedllm.aggregation.vector import OwnerScores
from fedllm.client.kept import Answers, LocalUpdate
from fedllm.client.pipeline import (
    OwnerSums,
    RingVector,
    encode_update,
    local_update,
    score_codec,
    update_codec,
    weight_of,
)
from fedllm.client.trainer import Trained
from fedllm.errors import NonFiniteUpdate, ProtocolError, StepMismatch, TwoViews
from fedllm.ids import OwnerId
from fedllm.messages.mechanism import Mechanism
from fedllm.messages.secagg import ShareDelivery
from fedllm.rng import SeededRng

PLAIN = {"mechanism": Mechanism.none(), "weights": None}
NORTH = OwnerId("north")


def _local(step: float, records: int = 1) -> LocalUpdate:
    moved = HEAD.replace({n: a + np.float32(step) for n, a in HEAD.factors.items() if n.endswith("lora_B")})
    return local_update(plan(), head=HEAD, trained=Trained(moved, records, 1.0, 2, 0.1), train_s=0.1)


def test_the_sum_of_encoded_updates_is_the_weighted_mean() -> None:
    """Four owners of different sizes; without masks the ring sum decodes to what FedAvg says, within the grid."""
    sizes = dict(zip(OWNERS, (40, 20, 10, 10), strict=True))
    made = plan(declared_records=sizes, **PLAIN)
    codec = update_codec(made)
    steps = dict(zip(OWNERS, (0.5, -0.25, 1.0, 0.0), strict=True))
    total = np.zeros(codec.entries, dtype=np.uint32)
    for owner in OWNERS:
        total += encode_update(made, owner, _local(steps[owner], sizes[owner]), SeededRng(owner))
    opened = codec.decode(total & np.uint32((1 << made.ring.bits) - 1), 4)
    expected = sum(sizes[o] * steps[o] for o in OWNERS) / sum(sizes.values())
    assert opened.records == 80
    assert np.allclose(opened.mean, expected, atol=2 * 4.0 / 2**15)


def test_a_weight_is_public_under_dp_and_stays_within_one_without() -> None:
    """Under DP the private count must not leak through the weight; without, more records than declared count as one."""
    public = plan(weights=dict.fromkeys(OWNERS, 0.5))
    assert weight_of(public, NORTH, 999) == weight_of(public, NORTH, 1) == 0.5
    private = plan(**PLAIN)
    assert weight_of(private, NORTH, 20) == 0.5
    assert weight_of(private, NORTH, 999) == 1.0


def test_a_diverged_update_is_not_sent() -> None:
    """NaN never reaches the ring, where it would be a number like any other."""
    huge = HEAD.replace({n: np.full_like(a, 3e38) for n, a in HEAD.factors.items() if n.endswith("lora_B")})
    low = HEAD.replace({n: np.full_like(a, -3e38) for n, a in HEAD.factors.items() if n.endswith("lora_B")})
    made = plan(head=low.digest)
    with np.errstate(over="ignore"), pytest.raises(NonFiniteUpdate):
        local_update(made, head=low, trained=Trained(huge, 1, None, 2, 0.1), train_s=0.1)


def test_an_update_has_no_wire_form() -> None:
    """The ring vector before masking is an array: the codec refuses it, so no message can carry one by mistake."""
    values = encode_update(plan(), NORTH, _local(0.1), SeededRng(1))

    @dataclasses.dataclass(frozen=True)
    class Leak:
        values: object

    with pytest.raises(TypeError):
        wire.encode(Leak(values))


def _ready(
    folder: Path, observed: dict[OwnerId, RingVector] | None = None
) -> tuple[OwnerSums, ShareDelivery, ShareDelivery]:
    """Return north's sums after the shares were exchanged, and what is delivered to it."""
    made = plan()
    observed = {} if observed is None else observed
    sums = {
        o: OwnerSums(
            made, o, identity=IDENTITIES[o], roster=ROSTER, rng=SeededRng(f"sums {o}"), answers=Answers(folder / o),
            observer=lambda owner, values: observed.update({owner: values.copy()}),
        )
        for o in OWNERS
    }  # fmt: skip
    keys = [sums[o].advertise() for o in OWNERS]
    shared = {o: sums[o].share_keys([k[0] for k in keys], [k[1] for k in keys]) for o in OWNERS}
    deliveries = [
        ShareDelivery(
            purpose, OWNERS,
            {o: shared[o][at].ciphertexts["north"] for o in OWNERS if o != "north"},
        )
        for at, purpose in enumerate(("update", "evaluation"))
    ]  # fmt: skip
    return sums[NORTH], deliveries[0], deliveries[1]


def test_what_leaves_does_not_correlate_with_what_it_hides(tmp_path: Path) -> None:
    """The masked vector is uniform on the ring: its correlation with the update is that of chance."""
    observed: dict[OwnerId, RingVector] = {}
    sums, update, evaluation = _ready(tmp_path, observed)
    masked = sums.mask_update(_local(0.3), update, evaluation)
    values = observed[NORTH]
    sent = np.frombuffer(b"".join(masked.chunks), dtype=np.uint8).reshape(-1, 3).astype(np.int64)
    words = sent[:, 0] + (sent[:, 1] << 8) + (sent[:, 2] << 16)
    assert not np.array_equal(words, values)
    assert len(set(words.tolist())) > 0.9 * words.size
    assert masked.head.entries == values.size


def test_scores_wait_for_their_shares_and_are_encoded_once(tmp_path: Path) -> None:
    """Rounding is random: masking a second encoding under the same masks would show the difference."""
    sums, update, evaluation = _ready(tmp_path)
    scores = OwnerScores(records=10, candidate_loss=1.25, head_loss=1.5)
    with pytest.raises(StepMismatch):
        sums.mask_scores(scores)
    sums.mask_update(_local(0.1), update, evaluation)
    assert sums.mask_scores(scores) == sums.mask_scores(scores)
    assert sums.mask_scores(scores).head.entries == score_codec(plan()).entries
    other = dataclasses.replace(evaluation, ciphertexts={**evaluation.ciphertexts, "east": bytes(94)})
    with pytest.raises(TwoViews):
        sums.mask_update(_local(0.1), update, other)


def test_there_are_two_sums_in_a_round_and_no_third(tmp_path: Path) -> None:
    """A purpose nobody planned is a protocol error, not a key error."""
    sums, _, _ = _ready(tmp_path)
    with pytest.raises(ProtocolError):
        sums.confirm("everything", OWNERS)

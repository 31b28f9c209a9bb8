"""From a trained adapter to a masked vector, and what of it can be seen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from unit.client.owner_fakes import HEAD, IDENTITIES, OWNERS, ROSTER, plan

from fedllm import wire
from fedllm.adapter import AdapterState
from fedllm.aggregation.vector import OwnerScores
from fedllm.client.pipeline import OwnerSums, encode_update, score_codec, update_codec, weight_of
from fedllm.errors import NonFiniteUpdate, ProtocolError, StepMismatch
from fedllm.ids import OwnerId
from fedllm.messages.plan import Mechanism
from fedllm.messages.secagg import ShareDelivery
from fedllm.rng import SeededRng

PLAIN = {"mechanism": Mechanism.none(), "weights": None}
NORTH = OwnerId("north")


def _trained(step: float) -> AdapterState:
    return HEAD.replace({n: a + np.float32(step) for n, a in HEAD.factors.items() if n.endswith("lora_B")})


def test_the_sum_of_encoded_updates_is_the_weighted_mean() -> None:
    """Four owners of different sizes; without masks the ring sum decodes to what FedAvg says, within the grid."""
    sizes = dict(zip(OWNERS, (40, 20, 10, 10), strict=True))
    made = plan(declared_records=sizes, **PLAIN)
    codec = update_codec(made)
    steps = dict(zip(OWNERS, (0.5, -0.25, 1.0, 0.0), strict=True))
    total = np.zeros(codec.entries, dtype=np.uint32)
    for owner in OWNERS:
        total += encode_update(
            made, owner, head=HEAD, trained=_trained(steps[owner]), records=sizes[owner], mean_loss=1.0,
            rng=SeededRng(owner),
        )  # fmt: skip
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
        encode_update(made, NORTH, head=low, trained=huge, records=1, mean_loss=None, rng=SeededRng(1))


def test_an_update_has_no_wire_form() -> None:
    """The ring vector before masking is an array: the codec refuses it, so no message can carry one by mistake."""
    values = encode_update(plan(), NORTH, head=HEAD, trained=_trained(0.1), records=1, mean_loss=None, rng=SeededRng(1))

    @dataclasses.dataclass(frozen=True)
    class Leak:
        values: object

    with pytest.raises(TypeError):
        wire.encode(Leak(values))


def _ready() -> tuple[OwnerSums, ShareDelivery, ShareDelivery]:
    """Return north's sums after the shares were exchanged, and what is delivered to it."""
    made = plan()
    sums = {o: OwnerSums(made, o, identity=IDENTITIES[o], roster=ROSTER, rng=SeededRng(f"sums {o}")) for o in OWNERS}
    keys = [sums[o].advertise() for o in OWNERS]
    shared = {o: sums[o].share_keys([k[0] for k in keys], [k[1] for k in keys]) for o in OWNERS}
    deliveries = [
        ShareDelivery(
            purpose, OWNERS, {o: shared[o][at].seed_commitment for o in OWNERS},
            {o: shared[o][at].ciphertexts["north"] for o in OWNERS if o != "north"},
        )
        for at, purpose in enumerate(("update", "evaluation"))
    ]  # fmt: skip
    return sums[NORTH], deliveries[0], deliveries[1]


def test_what_leaves_does_not_correlate_with_what_it_hides() -> None:
    """The masked vector is uniform on the ring: its correlation with the update is that of chance."""
    sums, update, evaluation = _ready()
    made = plan()
    values = encode_update(
        made, NORTH, head=HEAD, trained=_trained(0.3), records=1, mean_loss=None, rng=SeededRng("update")
    )
    masked = sums.mask_update(values, update, evaluation)
    sent = np.frombuffer(b"".join(masked.chunks), dtype=np.uint8).reshape(-1, 3).astype(np.int64)
    words = sent[:, 0] + (sent[:, 1] << 8) + (sent[:, 2] << 16)
    assert not np.array_equal(words, values)
    assert len(set(words.tolist())) > 0.9 * words.size
    assert masked.entries == values.size


def test_scores_wait_for_their_shares_and_are_encoded_once() -> None:
    """Rounding is random: masking a second encoding under the same masks would show the difference."""
    sums, update, evaluation = _ready()
    scores = OwnerScores(records=10, candidate_loss=1.25, head_loss=1.5)
    with pytest.raises(StepMismatch):
        sums.mask_scores(scores)
    values = np.zeros(update_codec(plan()).entries, dtype=np.uint32)
    sums.mask_update(values, update, evaluation)
    assert sums.mask_scores(scores) == sums.mask_scores(scores)
    assert sums.mask_scores(scores).entries == score_codec(plan()).entries
    other = dataclasses.replace(evaluation, commitments={**evaluation.commitments, "east": bytes(32)})
    with pytest.raises(StepMismatch):
        sums.mask_update(values, update, other)


def test_there_are_two_sums_in_a_round_and_no_third() -> None:
    """A purpose nobody planned is a protocol error, not a key error."""
    sums, _, _ = _ready()
    with pytest.raises(ProtocolError):
        sums.confirm("everything", OWNERS)

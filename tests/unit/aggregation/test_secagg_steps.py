"""The coordinator's state machine: faults are attributed, steps are ordered, a crashed round resumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from secagg_world import IDENTITIES, NAMES, World, make_plan, roster_of

from fedllm import wire
from fedllm.aggregation.plain import plain_sum
from fedllm.aggregation.secagg import SecAggCoordinator
from fedllm.aggregation.secagg.masking import digests_of
from fedllm.aggregation.vector import UpdateTail, UpdateVector
from fedllm.errors import (
    CohortRefused,
    ConfigError,
    DecodeError,
    DigestMismatch,
    FedllmError,
    IntegrityError,
    ProtocolError,
    RosterMismatch,
    RoundAborted,
    StepMismatch,
)
from fedllm.ids import OwnerId
from fedllm.messages.plan import Ring
from fedllm.messages.secagg import MaskedVector, UnmaskShares
from fedllm.rng import OsRng

EAST, FAR, MID, NORTH = NAMES[:4]


def unmask_all(world: World, missing: tuple[OwnerId, ...] = ()) -> dict[OwnerId, UnmaskShares]:
    """Run a world up to unmask and return what the survivors answer."""
    requests = world.confirm(world.survivors(missing))
    return {n: world.owners[n].unmask(request) for n, request in requests.items()}


def flipped(data: bytes) -> bytes:
    """Return the bytes with the last bit changed."""
    return data[:-1] + bytes([data[-1] ^ 1])


def test_an_ill_signed_bundle_is_attributed_and_dropped() -> None:
    """One bad bundle costs its owner the round, not the others."""
    world = World(4)
    sent = {n: o.advertise() for n, o in world.owners.items()}
    sent[FAR] = dataclasses.replace(sent[FAR], mask_key=flipped(sent[FAR].mask_key))
    sent[OwnerId("sybil")] = dataclasses.replace(sent[EAST], owner=OwnerId("sybil"))
    assert [b.owner for b in world.coordinator.advertised(sent)] == [EAST, MID, NORTH]
    assert set(world.coordinator.faults) == {FAR, "sybil"}
    assert world.coordinator.faults[FAR].startswith("signature-invalid: ")


def test_a_message_in_anothers_name_is_attributed_to_its_sender() -> None:
    """The sender that the envelope proved counts, not the name in the body."""
    world = World(4)
    sent = {n: o.advertise() for n, o in world.owners.items()}
    sent[FAR] = sent[EAST]
    world.coordinator.advertised(sent)
    assert world.coordinator.faults == {FAR: "protocol: 'far' sent a message of 'east'"}


@pytest.mark.parametrize("what", ["missing", "short", "commitment"])
def test_a_malformed_share_message_is_attributed(what: str) -> None:
    """Shares for the wrong peers, of the wrong length, or without a commitment drop their owner."""
    world = World(4)
    bundles = world.advertise()
    sent = {n: world.owners[n].share_keys(bundles) for n in world.names}
    ciphertexts = dict(sent[FAR].ciphertexts)
    if what == "missing":
        del ciphertexts[EAST]
    if what == "short":
        ciphertexts[EAST] = ciphertexts[EAST][:-1]
    commitment = b"" if what == "commitment" else sent[FAR].seed_commitment
    sent[FAR] = dataclasses.replace(sent[FAR], ciphertexts=ciphertexts, seed_commitment=commitment)
    deliveries = world.coordinator.shared(sent)
    assert set(deliveries) == {EAST, MID, NORTH}
    assert set(world.coordinator.faults) == {FAR}
    assert set(deliveries[EAST].ciphertexts) == {MID, NORTH}


def test_masked_vectors_are_added_as_they_come_and_once() -> None:
    """Any order gives the same survivors; a repeat changes nothing, a second vector is refused and proven."""
    world = World(4, entries=700)
    deliveries = world.share(world.advertise())
    vectors = {n: world.owners[n].mask(deliveries[n], world.values(n)) for n in world.names}
    for name in (NORTH, EAST, MID, FAR, EAST):
        world.coordinator.add_masked(name, *vectors[name])
    other = flipped(vectors[EAST].chunks[0])
    head = dataclasses.replace(vectors[EAST].head, chunks=digests_of([other]))
    with pytest.raises(StepMismatch, match="two different masked vectors"):
        world.coordinator.add_masked(EAST, head, [other])
    assert world.coordinator.proven == {EAST}
    survivors = world.coordinator.masked()
    assert survivors == world.names, "the first vector counts"
    total = world.unmask(world.confirm(survivors))
    np.testing.assert_array_equal(total, plain_sum([world.values(n) for n in world.names], 24))


@pytest.mark.parametrize("what", ["short", "cut", "none", "bytes", "entries", "width", "purpose", "owner", "digests"])
def test_a_vector_that_is_wrong_anywhere_is_not_added_at_all(what: str) -> None:
    """Sizes and digests of all chunks are checked before the first one touches the sum."""
    world = World(4, bits=32, entries=600_000)
    deliveries = world.share(world.advertise())
    head, chunks = world.owners[EAST].mask(deliveries[EAST], world.values(EAST))
    assert len(chunks) == 3
    bad: dict[str, tuple[MaskedVector, Sequence[bytes], type[FedllmError]]] = {
        "short": (head, (*chunks[:-1], chunks[-1][:-4]), DigestMismatch),
        "cut": (head, (chunks[0][:8], chunks[0][8:], *chunks[1:]), DigestMismatch),
        "none": (head, (), DigestMismatch),
        "bytes": (head, (*chunks[:-1], flipped(chunks[-1])), DigestMismatch),
        "entries": (dataclasses.replace(head, entries=6), chunks, ProtocolError),
        "width": (dataclasses.replace(head, entry_bytes=4 - 1), chunks, ProtocolError),
        "purpose": (dataclasses.replace(head, purpose="evaluation"), chunks, ProtocolError),
        "owner": (dataclasses.replace(head, owner=FAR), chunks, ProtocolError),
        "digests": (dataclasses.replace(head, chunks=head.chunks[:-1]), chunks, DecodeError),
    }
    changed, sent, error = bad[what]
    with pytest.raises(error):
        world.coordinator.add_masked(EAST, changed, sent)
    assert not world.coordinator._sum.any()
    carried = error is DigestMismatch  # whoever carried the chunks may have changed them
    assert world.coordinator.proven == (set() if carried else {EAST})
    assert set(world.coordinator.faults) == {EAST}


def test_a_vector_from_outside_the_sharers_is_refused() -> None:
    """An owner whose shares were not deposited could not be unmasked later."""
    world = World(4)
    deliveries = world.share(world.advertise(), missing=[FAR])
    head, chunks = world.owners[EAST].mask(deliveries[EAST], world.values(EAST))
    with pytest.raises(ProtocolError, match="did not share keys"):
        world.coordinator.add_masked(FAR, dataclasses.replace(head, owner=FAR), chunks)


def test_a_bad_share_is_attributed_and_the_sum_is_still_right() -> None:
    """One wrong share of four at threshold three: named, worked around, the sum exact."""
    world = World(4)
    answers = unmask_all(world)
    lie = {**answers[FAR].seed_shares, MID: flipped(answers[FAR].seed_shares[MID])}
    answers[FAR] = dataclasses.replace(answers[FAR], seed_shares=lie)
    total = world.coordinator.unmasked(answers)
    np.testing.assert_array_equal(total, plain_sum([world.values(n) for n in world.names], 24))
    assert world.coordinator.faults == {FAR: "its share of the seed of 'mid' is wrong"}
    assert not world.coordinator.proven, "mid may have dealt it wrong"


def test_a_bad_share_without_spares_aborts_instead_of_giving_a_wrong_sum() -> None:
    """With exactly t answers one wrong share cannot be worked around; the recovered key is checked, not trusted."""
    world = World(4)
    answers = unmask_all(world, missing=(NORTH,))
    lie = {NORTH: flipped(answers[FAR].key_shares[NORTH])}
    answers[FAR] = dataclasses.replace(answers[FAR], key_shares=lie)
    with pytest.raises(RoundAborted, match="mask key of 'north' cannot be opened: no 3 of 3 shares"):
        world.coordinator.unmasked(answers)


@pytest.mark.parametrize("fault", ["unreduced", "short", "both kinds", "stranger"])
def test_malformed_unmask_shares_are_attributed(fault: str) -> None:
    """A share that is no field element, or of somebody it should not be, drops the whole answer."""
    world = World(4)
    answers = unmask_all(world)
    seeds, key_shares = dict(answers[FAR].seed_shares), dict(answers[FAR].key_shares)
    if fault == "unreduced":
        seeds[MID] = b"\xff" * 33
    if fault == "short":
        seeds[MID] = seeds[MID][1:]
    if fault == "both kinds":
        key_shares[MID] = seeds[MID]
    if fault == "stranger":
        seeds["sybil"] = seeds[MID]
    answers[FAR] = dataclasses.replace(answers[FAR], seed_shares=seeds, key_shares=key_shares)
    total = world.coordinator.unmasked(answers)
    np.testing.assert_array_equal(total, plain_sum([world.values(n) for n in world.names], 24))
    assert set(world.coordinator.faults) == {FAR}


def test_a_forged_confirmation_is_attributed_and_too_few_abort() -> None:
    """Signatures over another set do not count towards the threshold."""
    world = World(4)
    survivors = world.survivors()
    signed = {n: world.owners[n].confirm(survivors) for n in survivors}
    signed[FAR] = dataclasses.replace(signed[FAR], signature=flipped(signed[FAR].signature))
    del signed[NORTH]
    with pytest.raises(RoundAborted, match=r"2 of 4 owners confirmed the survivors, at least 3.*far"):
        world.coordinator.confirmed(signed)


def test_steps_are_taken_in_order_and_once() -> None:
    """The coordinator's steps cannot be skipped or repeated."""
    world = World(4)
    with pytest.raises(StepMismatch, match="advertised is next"):
        world.coordinator.shared({})
    bundles = world.advertise()
    with pytest.raises(StepMismatch, match="shared is next"):
        world.coordinator.advertised({b.owner: b for b in bundles})
    done = World(4)
    done.run()
    with pytest.raises(StepMismatch, match="nothing is next"):
        done.coordinator.unmasked({})
    assert "next step none" in repr(done.coordinator)


@pytest.mark.parametrize("graph", [None, (4, 3)])
def test_a_crashed_coordinator_resumes_from_its_journal(graph: tuple[int, int] | None) -> None:
    """Replaying the recorded inputs on a fresh instance, through the wire codec, gives the same answers and sum."""
    world = World(7, graph=graph)
    first = world.coordinator
    advertised = {n: o.advertise() for n, o in world.owners.items()}
    u1 = first.advertised(advertised)
    shared = {n: world.owners[n].share_keys(u1) for n in world.names}
    deliveries = first.shared(shared)
    masked = {n: world.owners[n].mask(deliveries[n], world.values(n)) for n in world.names[:6]}
    for n, made in masked.items():
        first.add_masked(n, *made)
    u3 = first.masked()
    confirmed = {n: world.owners[n].confirm(u3) for n in u3}
    requests = first.confirmed(confirmed)
    again = world.new_coordinator()
    assert again.advertised({n: wire.decode(type(m), wire.encode(m)) for n, m in advertised.items()}) == u1
    assert again.shared({n: wire.decode(type(m), wire.encode(m)) for n, m in shared.items()}) == deliveries
    for n, made in reversed(masked.items()):
        again.add_masked(n, wire.decode(MaskedVector, wire.encode(made.head)), made.chunks)
    assert again.masked() == u3
    assert again.confirmed(confirmed) == requests
    answers = {n: world.owners[n].unmask(request) for n, request in requests.items()}
    np.testing.assert_array_equal(again.unmasked(answers), first.unmasked(answers))


def test_both_sums_of_one_round_are_independent() -> None:
    """The evaluation sum has its own keys and may lose owners that the update sum kept."""
    update, evaluation = World(4), World(4, purpose="evaluation", bits=32)
    assert update.owners[EAST].advertise() != evaluation.owners[EAST].advertise()
    assert update.run()[0] == update.names
    survivors, total = evaluation.run({"mask": [MID]})
    np.testing.assert_array_equal(total, plain_sum([evaluation.values(n) for n in survivors], 32))


def test_impossible_sums_are_refused_by_both_sides() -> None:
    """A ring that nothing packs, no entries, an unknown purpose, or values that do not fit."""
    world = World(4)
    for changes in ({"ring_bits": 20}, {"entries": 0}):
        with pytest.raises(ConfigError, match="a masked sum of"):
            world.owner(EAST, **changes)
    with pytest.raises(ProtocolError, match="purpose 'gossip'"):
        world.owner(EAST, purpose="gossip")
    with pytest.raises(RosterMismatch, match="identity held here"):
        world.owner(EAST, identity=IDENTITIES[FAR])
    with pytest.raises(CohortRefused, match="does not name 'yard'"):
        world.owner(OwnerId("yard"))
    with pytest.raises(RosterMismatch, match="roster"):
        SecAggCoordinator(plan=make_plan(NAMES[:4]), purpose="update", roster=roster_of(NAMES), ring_bits=24, entries=1)
    delivery = world.share(world.advertise())[EAST]
    for bad in (np.full(5, 1 << 24, np.uint32), np.zeros(4, np.uint32), np.zeros(5, np.int64)):
        with pytest.raises(ProtocolError, match="to mask"):
            world.owners[EAST].mask(delivery, bad)  # type: ignore[arg-type]
    assert Ring(24, 16, 4.0).entry_bytes == 3


def test_a_sum_whose_masks_did_not_cancel_is_noticed() -> None:
    """Decoding anything but the true sum fails: the owners' count and the range of every entry give it away."""
    for _ in range(20):
        codec = UpdateVector(make_plan(NAMES[:4]).ring, 4, 50, covered=True)
        world = World(4, entries=codec.entries)
        update = np.linspace(-1, 1, 50, dtype=np.float32)
        values = {n: codec.encode(update, 1.0, UpdateTail(1, 0.0), OsRng()) for n in world.names}
        deliveries = world.share(world.advertise())
        for n, delivery in deliveries.items():
            world.coordinator.add_masked(n, *world.owners[n].mask(delivery, values[n]))
        survivors = world.coordinator.masked()
        with pytest.raises(IntegrityError):
            codec.decode(world.coordinator._sum & np.uint32(0xFFFFFF), len(survivors))
        total = world.unmask(world.confirm(survivors))
        np.testing.assert_array_equal(total, plain_sum(list(values.values()), 24))
        assert codec.decode(total, 4).owners == 4
        with pytest.raises(IntegrityError, match="counts 4 owners, 5 survived"):
            codec.decode(total, 5)
        with pytest.raises(IntegrityError, match="owners"):
            codec.decode(total, 3)

"""Attribution: proven faults, faults that are one of two owners', and nobody honest among the proven."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from secagg_world import IDENTITIES, NAMES, World

from fedllm.aggregation.plain import plain_sum
from fedllm.aggregation.secagg import keys
from fedllm.errors import ProtocolError, SharesUnopenable, StepMismatch
from fedllm.ids import OwnerId
from fedllm.messages.secagg import Complaint, ShareDelivery

EAST, FAR, MID, NORTH, SOUTH, WEST, YARD = NAMES


def deliveries_with_bad_shares_of(
    world: World, dealer: OwnerId, receivers: tuple[OwnerId, ...]
) -> dict[OwnerId, ShareDelivery]:
    """Run the first two arrows; the dealer sealed nonsense for some receivers."""
    bundles = world.advertise()
    messages = {n: world.owners[n].share_keys(bundles) for n in world.names}
    sealed = {**messages[dealer].ciphertexts, **dict.fromkeys(receivers, bytes(94))}
    messages[dealer] = dataclasses.replace(messages[dealer], ciphertexts=sealed)
    return world.coordinator.shared(messages)


def complain_or_mask(world: World, deliveries: dict[OwnerId, ShareDelivery]) -> None:
    """Let everybody mask, or complain of what does not open."""
    for name, delivery in deliveries.items():
        try:
            world.send_masked(name, delivery)
        except SharesUnopenable as error:
            world.coordinator.complained(name, world.owners[name].complaint(error.dealers))


def test_one_complaint_names_both_and_proves_nothing() -> None:
    """East says far's shares do not open: either may lie, both are named, and the others' sum is exact."""
    world = World(7)
    complain_or_mask(world, deliveries_with_bad_shares_of(world, FAR, (EAST,)))
    doubt = "the sealed shares of 'far' for 'east' do not open: one of the two is wrong"
    assert world.coordinator.faults == {FAR: doubt, EAST: doubt}
    assert not world.coordinator.proven
    survivors = world.coordinator.masked()
    assert survivors == world.names[1:], "the one who complains is lost, the dealer is not"
    total = world.unmask(world.confirm(survivors))
    np.testing.assert_array_equal(total, plain_sum([world.values(n) for n in survivors], 24))


def test_more_complaints_than_colluders_prove_the_dealer_and_clear_who_complained() -> None:
    """Of seven at most two collude: three complaints cannot all be lies."""
    world = World(7)
    deliveries = deliveries_with_bad_shares_of(world, FAR, (EAST, MID, NORTH))
    complain_or_mask(world, deliveries)
    assert world.coordinator.proven == {FAR}
    assert world.coordinator.faults == {FAR: "3 owners complain that its sealed shares do not open"}


def test_colluders_who_complain_prove_nobody() -> None:
    """Two liars of seven, each complaining of everybody, put all under suspicion and nobody out."""
    world = World(7)
    deliveries = world.share(world.advertise())
    for liar in (EAST, MID):
        everybody = tuple(n for n in world.names if n != liar)
        world.coordinator.complained(liar, Complaint(liar, "update", everybody))
    assert not world.coordinator.proven
    assert set(world.coordinator.faults) == set(world.names)
    assert set(deliveries) == set(world.names)


def test_on_a_sparse_graph_colluders_are_counted_among_the_holders() -> None:
    """Of six holders at threshold four fewer than two collude: two complaints prove the dealer."""
    world = World(12, graph=(6, 4))
    bundles = world.advertise()
    messages = {n: world.owners[n].share_keys(bundles) for n in world.names}
    victims = tuple(sorted(messages[FAR].ciphertexts))[:2]
    sealed = {**messages[FAR].ciphertexts, **dict.fromkeys(victims, bytes(94))}
    messages[FAR] = dataclasses.replace(messages[FAR], ciphertexts=sealed)
    complain_or_mask(world, world.coordinator.shared(messages))
    assert world.coordinator.proven == {FAR}


@pytest.mark.parametrize("what", ["nobody", "itself", "stranger", "unsorted", "twice", "owner", "purpose"])
def test_a_complaint_that_makes_no_sense_is_its_senders_fault(what: str) -> None:
    """Of nobody, of oneself, of somebody outside, in disorder, or in another's name."""
    world = World(5)
    world.share(world.advertise())
    good = Complaint(EAST, "update", (FAR, MID))
    bad = {
        "nobody": dataclasses.replace(good, dealers=()),
        "itself": dataclasses.replace(good, dealers=(EAST,)),
        "stranger": dataclasses.replace(good, dealers=(OwnerId("sybil"),)),
        "unsorted": dataclasses.replace(good, dealers=(MID, FAR)),
        "twice": dataclasses.replace(good, dealers=(FAR, FAR)),
        "owner": dataclasses.replace(good, owner=FAR),
        "purpose": dataclasses.replace(good, purpose="evaluation"),
    }[what]
    with pytest.raises(ProtocolError):
        world.coordinator.complained(EAST, bad)
    assert world.coordinator.proven == {EAST}


def test_a_complaint_and_a_vector_exclude_each_other() -> None:
    """Who complains takes no part; the same complaint again is a repeat; another is a second story."""
    world = World(5)
    deliveries = world.share(world.advertise())
    complaint = Complaint(EAST, "update", (FAR,))
    world.coordinator.complained(EAST, complaint)
    world.coordinator.complained(EAST, complaint)
    assert not world.coordinator.proven
    with pytest.raises(StepMismatch, match="of others than before"):
        world.coordinator.complained(EAST, Complaint(EAST, "update", (MID,)))
    with pytest.raises(StepMismatch, match="takes no part"):
        world.send_masked(EAST, deliveries[EAST])
    world.send_masked(FAR, deliveries[FAR])
    with pytest.raises(StepMismatch, match="after it sent a masked vector"):
        world.coordinator.complained(FAR, Complaint(FAR, "update", (EAST,)))
    with pytest.raises(ProtocolError, match="did not share keys"):
        world.coordinator.complained(OwnerId("sybil"), Complaint(OwnerId("sybil"), "update", (EAST,)))


def test_wrong_shares_of_more_dealers_than_collude_prove_their_holder() -> None:
    """One wrong share may have been dealt so; wrong shares of three of seven dealers were answered so."""
    for lies, proven in (((MID, NORTH), set()), ((MID, NORTH, SOUTH), {FAR})):
        world = World(7)
        requests = world.confirm(world.survivors())
        answers = {n: world.owners[n].unmask(request) for n, request in requests.items()}
        lie = {dealer: bytes(33) for dealer in lies}
        answers[FAR] = dataclasses.replace(answers[FAR], seed_shares={**answers[FAR].seed_shares, **lie})
        total = world.coordinator.unmasked(answers)
        np.testing.assert_array_equal(total, plain_sum([world.values(n) for n in world.names], 24))
        assert world.coordinator.faults == {FAR: "its share of the seed of 'mid' is wrong"}
        assert world.coordinator.proven == proven


def test_a_bad_signature_and_a_wrong_message_are_proven() -> None:
    """What is wrong in itself needs no second witness."""
    world = World(7)
    bundles = {n: o.advertise() for n, o in world.owners.items()}
    bundles[FAR] = dataclasses.replace(bundles[FAR], signature=bytes(64))
    listed = world.coordinator.advertised(bundles)
    shared = {b.owner: world.owners[b.owner].share_keys(listed) for b in listed}
    shared[MID] = dataclasses.replace(shared[MID], seed_commitment=b"")
    world.coordinator.shared(shared)
    assert world.coordinator.proven == {FAR, MID}
    assert set(world.coordinator.faults) == {FAR, MID}


@pytest.mark.parametrize("thief", [EAST, YARD], ids=["named before", "named after"])
def test_who_copies_a_peers_keys_frames_nobody(thief: OwnerId) -> None:
    """Who sees the line can sign far's public keys as its own: both are left out, neither is proven."""
    world = World(7)
    bundles = {name: world.owners[name].advertise() for name in world.names}
    far, ctx = bundles[FAR], keys.context(world.plan, world.purpose)
    bundles[thief] = keys.sign_bundle(ctx, world.purpose, thief, far.cipher_key, far.mask_key, IDENTITIES[thief])
    listed = world.coordinator.advertised(bundles)
    assert {bundle.owner for bundle in listed} == set(NAMES) - {FAR, thief}
    assert set(world.coordinator.faults) == {FAR, thief}
    assert not world.coordinator.proven
    survivors = world.mask(world.share(listed))
    total = world.unmask(world.confirm(survivors))
    np.testing.assert_array_equal(total, plain_sum([world.values(n) for n in survivors], 24))

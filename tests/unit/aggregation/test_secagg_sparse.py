"""The sparse graph: picks that only their owner makes, verified where they matter, enough of them at every step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from secagg_world import MANY, NAMES, World

from fedllm.aggregation.plain import plain_sum
from fedllm.errors import ProtocolError, RoundAborted, SignatureInvalid
from fedllm.messages.secagg import UnmaskRequest
from fedllm.rng import SeededRng

EAST = NAMES[0]
N, K, T = 12, 6, 4


def sparse_world() -> World:
    """Return a world in which everybody picks six of eleven, any four of which open a secret."""
    return World(N, graph=(K, T))


def test_an_owner_deals_to_k_picks_and_keeps_nothing() -> None:
    """Exactly k sealed shares, none for itself; owners pick differently, and nobody before U1 came."""
    world = sparse_world()
    assert not any(owner._picked for owner in world.owners.values())
    deliveries = world.share(world.advertise())
    for name, owner in world.owners.items():
        assert len(owner._picks) == K
        assert name not in owner._picks
        assert not owner._shares
        assert set(deliveries[name].ciphertexts) == {n for n, o in world.owners.items() if name in o._picks}
    assert len({owner._picks for owner in world.owners.values()}) > 1
    world.owners[EAST].mask(deliveries[EAST], world.values(EAST))
    assert set(world.owners[EAST]._shares) == set(deliveries[EAST].ciphertexts)


def test_picks_are_drawn_once_and_from_the_cohort_whoever_advertised() -> None:
    """A list that is refused buys no second draw, and one that leaves owners out makes nobody likelier."""
    world = sparse_world()
    bundles = world.advertise()
    forged = [b if b.owner == EAST else dataclasses.replace(b, signature=bytes(64)) for b in bundles]
    with pytest.raises(SignatureInvalid):
        world.owners[EAST].share_keys(forged)
    picked = world.owners[EAST]._picked
    assert len(picked) == K
    message = world.owners[EAST].share_keys([b for b in bundles if b.owner not in picked[:2]])
    assert set(message.ciphertexts) == set(picked[2:])


def test_an_owner_refuses_a_list_with_too_few_of_its_picks() -> None:
    """With three of its six picks left out, four shares can never come together; any three strangers may be."""
    world = sparse_world()
    bundles = world.advertise()
    picked = world.owners[EAST]._pick()
    with pytest.raises(ProtocolError, match=r"keys \(U1\) hold 3 of this owner's neighbours, at least 4"):
        world.owners[EAST].share_keys([b for b in bundles if b.owner not in picked[:3]])
    strangers = [n for n in world.names if n not in picked and n != EAST]
    world.owners[EAST].share_keys([b for b in bundles if b.owner not in strangers[:3]])


def test_an_owner_refuses_to_mask_confirm_or_unmask_with_too_few_of_its_picks() -> None:
    """T of them must share, survive, and sign; signatures of strangers do not count."""
    world = sparse_world()
    east = world.owners[EAST]
    deliveries = world.share(world.advertise())
    mine = deliveries[EAST]
    few = tuple(n for n in world.names if n not in east._picks[:3])
    sealed = {dealer: data for dealer, data in mine.ciphertexts.items() if dealer in few}
    with pytest.raises(ProtocolError, match=r"sharers \(U2\) hold 3"):
        east.mask(dataclasses.replace(mine, sharers=few, ciphertexts=sealed), world.values(EAST))
    survivors = world.mask(deliveries)
    with pytest.raises(ProtocolError, match=r"survivors \(U3\) hold 3"):
        east.confirm(few)
    signed = {n: world.owners[n].confirm(survivors) for n in survivors}
    strangers = [signed[n] for n in survivors if n not in east._picks]
    request = UnmaskRequest("update", survivors, (*strangers, *(signed[n] for n in east._picks[:3])))
    with pytest.raises(ProtocolError, match="3 consistency signatures of this owner's neighbours, at least 4"):
        east.unmask(request)
    answer = east.unmask(UnmaskRequest("update", survivors, tuple(signed[n] for n in east._picks[:4])))
    assert set(answer.seed_shares) == set(mine.ciphertexts)


def test_keys_are_verified_of_whom_it_deals_to_and_of_who_dealt_to_it() -> None:
    """A forged bundle of a stranger passes at first, and is found when the stranger turns out to be a dealer."""
    world = World(N, graph=(K, T), rng=SeededRng("dealers"))
    bundles = world.advertise()
    messages = {n: world.owners[n].share_keys(bundles) for n in world.names if n != EAST}
    picked = world.owners[EAST]._pick()
    dealer = next(n for n in messages if EAST in messages[n].ciphertexts and n not in picked)
    forged = [dataclasses.replace(b, signature=bytes(64)) if b.owner == dealer else b for b in bundles]
    messages[EAST] = world.owners[EAST].share_keys(forged)
    delivery = world.coordinator.shared(messages)[EAST]
    with pytest.raises(SignatureInvalid, match=f"keys of '{dealer}'"):
        world.owners[EAST].mask(delivery, world.values(EAST))


def test_only_neighbours_share_masks_and_only_those_are_taken_out() -> None:
    """With four lost at the mask arrow the sum is exact, though the lost and most survivors share nothing."""
    world = World(30, graph=(10, 6))
    deliveries = world.share(world.advertise())
    edges = {n: set(world.owners[n]._picks) | set(deliveries[n].ciphertexts) for n in world.names}
    assert all(10 <= len(peers) < 29 for peers in edges.values())
    assert all(n in edges[peer] for n, peers in edges.items() for peer in peers)
    survivors = world.mask(deliveries, missing=MANY[:4])
    total = world.unmask(world.confirm(survivors))
    np.testing.assert_array_equal(total, plain_sum([world.values(n) for n in survivors], 24))


def test_who_has_too_few_holders_left_is_left_out_of_the_sharers() -> None:
    """Its secrets could not be opened if it were lost; it gets no delivery and no blame."""
    world = World(30, graph=(8, 5), rng=SeededRng("alone"))  # other draws may leave others alone, too, and abort
    bundles = world.advertise()
    messages = {n: world.owners[n].share_keys(bundles) for n in world.names}
    for lost in world.owners[EAST]._picks[:4]:
        del messages[lost]
    deliveries = world.coordinator.shared(messages)
    assert EAST not in deliveries
    assert not world.coordinator.faults


def test_each_signer_is_shown_the_signatures_of_its_own_picks() -> None:
    """T of them and no more; who cannot get t is not asked."""
    world = sparse_world()
    survivors = world.survivors()
    requests = world.confirm(survivors, missing=())
    for name, request in requests.items():
        signers = [signature.owner for signature in request.signatures]
        assert len(signers) == T
        assert set(signers) <= set(world.owners[name]._picks)


def test_too_few_confirmations_abort_before_anything_is_asked() -> None:
    """With four of twelve signing, nobody holds t signatures of its picks, so no share is asked of anyone."""
    world = sparse_world()
    survivors = world.survivors()
    signed = {n: world.owners[n].confirm(survivors) for n in survivors[:T]}
    with pytest.raises(RoundAborted, match=r"0 holders of the shares of 'east' confirmed the survivors, at least 4"):
        world.coordinator.confirmed(signed)


@pytest.mark.parametrize("change", ["too few", "too many", "itself"])
def test_a_share_message_for_the_wrong_peers_is_attributed(change: str) -> None:
    """Fewer than t receivers, more than k, or the dealer itself."""
    world = sparse_world()
    bundles = world.advertise()
    messages = {n: world.owners[n].share_keys(bundles) for n in world.names}
    sealed = dict(messages[EAST].ciphertexts)
    one = next(iter(sealed.values()))
    if change == "too few":
        sealed = dict(list(sealed.items())[: T - 1])
    if change == "too many":
        sealed = {n: one for n in world.names if n != EAST}
    if change == "itself":
        sealed = {**dict(list(sealed.items())[:-1]), EAST: one}
    messages[EAST] = dataclasses.replace(messages[EAST], ciphertexts=sealed)
    assert EAST not in world.coordinator.shared(messages)
    assert world.coordinator.proven == {EAST}

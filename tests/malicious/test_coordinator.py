"""A hostile coordinator: whatever it asks, an honest owner refuses, or what comes out is noticed as garbage."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from secagg_world import IDENTITIES, NAMES, World, make_plan, roster_of

from fedllm.aggregation.secagg import SecAggOwner
from fedllm.aggregation.secagg.keys import check_bundle, context, sign_bundle
from fedllm.errors import (
    FedllmError,
    PolicyRefused,
    ProtocolError,
    RoundAborted,
    SignatureInvalid,
    StepMismatch,
)
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import OwnerId, sha256
from fedllm.messages.plan import RoundPlan
from fedllm.messages.secagg import (
    PURPOSE_EVALUATION,
    KeyBundle,
    ShareDelivery,
    SurvivorSignature,
    UnmaskRequest,
)
from fedllm.rng import OsRng

EAST, FAR, MID, NORTH = NAMES[:4]
ATTACKER = SigningIdentity.from_seed(b"\xee" * 32)


def forge_bundle(world: World, owner: OwnerId, signer: SigningIdentity, plan: RoundPlan | None = None) -> KeyBundle:
    """Return keys that the coordinator made up in an owner's name, signed by `signer`."""
    ctx = context(plan or world.plan, world.purpose)
    return sign_bundle(ctx, world.purpose, owner, b"\x11" * 32, b"\x22" * 32, signer)


def honest_bundles(world: World) -> dict[OwnerId, KeyBundle]:
    """Return what every owner advertises."""
    return {name: owner.advertise() for name, owner in world.owners.items()}


def signatures(world: World, survivors: tuple[OwnerId, ...]) -> dict[OwnerId, SurvivorSignature]:
    """Return every survivor's signature over one set."""
    return {name: world.owners[name].confirm(survivors) for name in survivors}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 2}, "threshold is 2 of 4 owners, 3 to 4 allowed"),
        ({"threshold": 5}, "threshold is 5 of 4 owners"),
        ({"min_survivors": 2}, "publishes from 2 survivors"),
        ({"min_survivors": 5}, "publishes from 5 survivors"),
        ({"roster": sha256(b"another roster")}, "roster .* is not the one pinned here"),
    ],
)
def test_a_plan_that_weakens_the_promise_is_refused(changes: dict[str, object], message: str) -> None:
    """The owner recomputes threshold and floor and compares the roster; the coordinator does not decide them."""
    world = World(4)
    with pytest.raises(PolicyRefused, match=message):
        world.owner(EAST, plan=make_plan(world.names, **changes))


def test_a_cohort_of_two_is_refused() -> None:
    """In a sum of two each could subtract its own."""
    with pytest.raises(PolicyRefused):
        SecAggOwner(
            plan=make_plan(NAMES[:2], min_survivors=2), purpose="update", owner=EAST, identity=IDENTITIES[EAST],
            roster=roster_of(NAMES[:2]), ring_bits=24, entries=1, rng=OsRng(),
        )  # fmt: skip


def test_sybils_in_the_cohort_are_refused() -> None:
    """A roster with an owner added by the coordinator is not the pinned one, whatever the plan claims."""
    world = World(4)
    grown = Roster.of({**{n: IDENTITIES[n].public for n in world.names}, OwnerId("sybil"): ATTACKER.public})
    names = tuple(sorted([*world.names, OwnerId("sybil")]))
    with pytest.raises(PolicyRefused, match="not the one pinned"):
        world.owner(EAST, plan=make_plan(names, roster=grown.digest, threshold=4))
    with pytest.raises(PolicyRefused, match="'sybil', who is not in the pinned roster"):
        world.owner(EAST, plan=make_plan(names, roster=world.roster.digest, threshold=4))


def test_a_sybil_among_the_advertised_keys_is_refused() -> None:
    """Keys of somebody outside the plan's cohort are refused even when well signed."""
    world = World(4)
    bundles = [*honest_bundles(world).values(), forge_bundle(world, OwnerId("sybil"), ATTACKER)]
    with pytest.raises(ProtocolError, match="name 'sybil'"):
        world.owners[EAST].share_keys(bundles)
    with pytest.raises(ProtocolError, match="not in the plan's cohort"):
        check_bundle(context(world.plan, "update"), "update", bundles[-1], world.plan.cohort, world.roster)


@pytest.mark.parametrize("field", ["cipher_key", "mask_key", "signature"])
def test_a_swapped_key_is_refused(field: str) -> None:
    """Changing one byte of what a peer signed breaks its signature."""
    world = World(4)
    bundles = honest_bundles(world)
    changed = bytes([getattr(bundles[FAR], field)[0] ^ 1]) + getattr(bundles[FAR], field)[1:]
    bundles[FAR] = dataclasses.replace(bundles[FAR], **{field: changed})
    with pytest.raises(SignatureInvalid, match="keys of 'far'"):
        world.owners[EAST].share_keys(list(bundles.values()))


def test_keys_made_by_the_coordinator_are_refused() -> None:
    """A man in the middle has no pinned identity to sign its keys with."""
    world = World(4)
    bundles = {**honest_bundles(world), FAR: forge_bundle(world, FAR, ATTACKER)}
    with pytest.raises(SignatureInvalid, match="keys of 'far'"):
        world.owners[EAST].share_keys(list(bundles.values()))


def test_an_owner_notices_that_its_own_keys_were_replaced_or_left_out() -> None:
    """Its own bundle must be in U1, unchanged, even if its identity once signed the other one."""
    world = World(4)
    bundles = {**honest_bundles(world), EAST: forge_bundle(world, EAST, IDENTITIES[EAST])}
    with pytest.raises(ProtocolError, match="not the ones it advertised"):
        world.owners[EAST].share_keys(list(bundles.values()))
    del bundles[EAST]
    with pytest.raises(ProtocolError, match="not the ones it advertised"):
        world.owners[EAST].share_keys(list(bundles.values()))


@pytest.mark.parametrize("twice", ["owner", "key"])
def test_a_doubled_owner_or_key_is_refused(twice: str) -> None:
    """One peer shown as two would count twice towards the threshold."""
    world = World(4)
    bundles = honest_bundles(world)
    double = bundles[FAR] if twice == "owner" else dataclasses.replace(bundles[FAR], owner=MID)
    with pytest.raises(ProtocolError, match="listed twice"):
        world.owners[EAST].share_keys([*[b for n, b in bundles.items() if n != MID], double])


def test_keys_of_another_round_plan_or_sum_are_refused() -> None:
    """A signature made for one nonce, global adapter or purpose verifies for no other."""
    world = World(4)
    bundles = honest_bundles(world)
    for changes in ({"nonce": b"\1" * 32}, {"head": sha256(b"another head")}, {"min_survivors": 4}):
        other = World(4, plans={FAR: make_plan(world.names, **changes)})
        replayed = [*[b for n, b in bundles.items() if n != FAR], other.owners[FAR].advertise()]
        with pytest.raises(SignatureInvalid, match="keys of 'far'"):
            world.owners[EAST].share_keys(replayed)
    evaluation = World(4, purpose=PURPOSE_EVALUATION).owners[FAR].advertise()
    with pytest.raises(ProtocolError, match="are for the sum 'evaluation'"):
        world.owners[EAST].share_keys([*[b for n, b in bundles.items() if n != FAR], evaluation])
    with pytest.raises(SignatureInvalid):
        relabelled = dataclasses.replace(evaluation, purpose="update")
        world.owners[EAST].share_keys([*[b for n, b in bundles.items() if n != FAR], relabelled])


def test_different_global_adapters_for_different_owners_are_noticed() -> None:
    """Model inconsistency (Pasquini et al. 2022): the plan names the head, so nobody's keys verify across views."""
    names = NAMES[:4]
    world = World(4, plans={name: make_plan(names, head=sha256(name.encode())) for name in names})
    bundles = list(honest_bundles(world).values())
    for owner in world.owners.values():
        with pytest.raises(SignatureInvalid):
            owner.share_keys(bundles)


def test_too_few_advertised_keys_are_refused() -> None:
    """U1 below the threshold never gets a share."""
    world = World(4)
    bundles = honest_bundles(world)
    with pytest.raises(ProtocolError, match="are 2 owners, at least 3"):
        world.owners[EAST].share_keys([bundles[EAST], bundles[FAR]])


def test_two_views_of_the_advertised_keys_do_not_open_each_others_shares() -> None:
    """Owners shown different key lists derive different keys: their sealed shares are refused by name."""
    world = World(7)
    bundles = world.advertise()
    fewer = tuple(b for b in bundles if b.owner != NAMES[6])
    messages = {n: world.owners[n].share_keys(fewer if n == FAR else bundles) for n in world.names}
    sharers = world.names[:6]
    delivery = ShareDelivery(
        "update", sharers, {n: messages[n].seed_commitment for n in sharers},
        {n: messages[n].ciphertexts[EAST] for n in sharers if n != EAST},
    )  # fmt: skip
    with pytest.raises(ProtocolError, match="shares of 'far' for 'east' do not open"):
        world.owners[EAST].mask(delivery, world.values(EAST))


def test_changed_or_misdirected_shares_are_refused() -> None:
    """Sealed shares open for their receiver, from their sender, unchanged, and for nobody else."""
    world = World(4)
    deliveries = world.share(world.advertise())
    mine = deliveries[EAST]
    flipped = bytes([mine.ciphertexts[FAR][0] ^ 1]) + mine.ciphertexts[FAR][1:]
    for stolen in (flipped, deliveries[MID].ciphertexts[FAR], mine.ciphertexts[MID], b""):
        changed = dataclasses.replace(mine, ciphertexts={**mine.ciphertexts, FAR: stolen})
        with pytest.raises(ProtocolError, match="shares of 'far'"):
            world.owners[EAST].mask(changed, world.values(EAST))
    assert world.owners[EAST].mask(mine, world.values(EAST)).owner == EAST, "a refusal leaves the step open"


def test_a_delivery_that_leaves_out_or_adds_somebody_is_refused() -> None:
    """U2 must be large enough, within U1, name this owner, and match ciphertexts and commitments."""
    world = World(4)
    mine = world.share(world.advertise(), missing=())[EAST]
    two = {FAR: mine.ciphertexts[FAR]}
    for changes, message in (
        ({"sharers": (EAST, FAR), "ciphertexts": two}, "are 2 owners"),
        ({"sharers": (FAR, MID, NORTH)}, "do not name 'east'"),
        ({"sharers": (EAST, FAR, MID, OwnerId("sybil"))}, "name 'sybil'"),
        ({"sharers": mine.sharers[::-1]}, "not sorted"),
        ({"ciphertexts": two}, "not from exactly the other sharers"),
        ({"commitments": {**mine.commitments, EAST: bytes(32)}}, "this owner's was changed"),
        ({"purpose": PURPOSE_EVALUATION}, "sum 'evaluation'"),
    ):
        with pytest.raises(ProtocolError, match=message):
            world.owners[EAST].mask(dataclasses.replace(mine, **changes), world.values(EAST))  # type: ignore[arg-type]


def test_two_vectors_under_one_mask_are_refused() -> None:
    """The difference of two vectors under one mask is the difference of the values: asked twice, answered once."""
    world = World(4)
    mine = world.share(world.advertise())[EAST]
    first = world.owners[EAST].mask(mine, world.values(EAST))
    with pytest.raises(StepMismatch, match="answered once"):
        world.owners[EAST].mask(mine, np.zeros(world.entries, dtype=np.uint32))
    assert world.owners[EAST].mask(mine, world.values(EAST)) == first


def test_a_second_survivor_view_is_refused() -> None:
    """An owner signs one U3; the second set is refused, the same one repeats the same signature."""
    world = World(4)
    survivors = world.survivors()
    first = world.owners[EAST].confirm(survivors)
    with pytest.raises(StepMismatch, match="answered once"):
        world.owners[EAST].confirm(survivors[:3])
    assert world.owners[EAST].confirm(survivors) == first


def test_two_views_never_reach_the_threshold_together() -> None:
    """Half of the owners shown one set and half another: neither set has t signatures, nothing is unmasked."""
    world = World(4)
    everyone = world.survivors()
    fewer = everyone[:3]
    signed = {n: world.owners[n].confirm(everyone if n in {EAST, FAR} else fewer) for n in fewer}
    signed[NORTH] = world.owners[NORTH].confirm(everyone)
    for name, owner in world.owners.items():
        for view in (everyone, fewer):
            request = UnmaskRequest("update", view, tuple(signed[n] for n in view))
            with pytest.raises(FedllmError) as caught:
                owner.unmask(request)
            assert isinstance(caught.value, StepMismatch | SignatureInvalid | ProtocolError), name


def test_both_kinds_of_share_of_one_peer_are_never_given() -> None:
    """A second request with the peer moved to the dropouts is refused; one answer holds each peer once."""
    world = World(7)
    survivors = world.survivors(missing=[NAMES[6]])
    request = world.coordinator.confirmed(signatures(world, survivors))
    answer = world.owners[EAST].unmask(request)
    assert set(answer.seed_shares) == set(survivors)
    assert set(answer.key_shares) == {NAMES[6]}
    moved = dataclasses.replace(request, survivors=survivors[:-1])
    with pytest.raises(StepMismatch):
        world.owners[EAST].unmask(moved)
    assert world.owners[EAST].unmask(request) == answer


def test_a_request_for_an_unsigned_set_is_refused_even_as_the_first() -> None:
    """The owner that signed one set never unmasks another, and one that signed none unmasks nothing."""
    world = World(7)
    survivors = world.survivors()
    request = world.coordinator.confirmed({n: world.owners[n].confirm(survivors) for n in survivors if n != EAST})
    with pytest.raises(StepMismatch, match="confirm is next"):
        world.owners[EAST].unmask(request)
    with pytest.raises(StepMismatch, match="another survivor set"):
        world.owners[FAR].unmask(dataclasses.replace(request, survivors=survivors[:-1]))


def test_signatures_must_be_enough_distinct_and_over_this_set() -> None:
    """Too few, doubled, foreign, relabelled or forged consistency signatures open nothing."""
    world = World(4)
    survivors = world.survivors()
    signed = signatures(world, survivors)
    good = tuple(signed.values())
    sybil = dataclasses.replace(good[3], owner=OwnerId("sybil"))
    forged = dataclasses.replace(good[0], signature=bytes(64))
    for listed, error in (
        (good[:2], ProtocolError),
        ((good[0], good[0], good[1]), ProtocolError),
        ((*good[:2], sybil), ProtocolError),
        ((*good[:2], dataclasses.replace(good[3], owner=MID)), SignatureInvalid),
        ((forged, *good[1:]), SignatureInvalid),
        ((dataclasses.replace(good[0], purpose=PURPOSE_EVALUATION), *good[1:]), ProtocolError),
    ):
        with pytest.raises(error):
            world.owners[EAST].unmask(UnmaskRequest("update", survivors, listed))


@pytest.mark.parametrize(
    ("survivors", "message"),
    [
        ((EAST, FAR), "are 2 owners, at least 3"),
        ((FAR, MID, NORTH), "do not name 'east'"),
        ((EAST, FAR, MID, OwnerId("sybil")), "name 'sybil'"),
        ((MID, FAR, EAST), "not sorted"),
        ((EAST, EAST, FAR, MID), "not sorted and unique"),
    ],
)
def test_a_bad_survivor_set_is_not_signed(survivors: tuple[OwnerId, ...], message: str) -> None:
    """U3 must be large enough, within U2, in canonical order, and must not deny a vector that was sent."""
    world = World(4)
    world.survivors()
    with pytest.raises(ProtocolError, match=message):
        world.owners[EAST].confirm(survivors)


def test_two_views_of_the_sharers_are_noticed_before_anything_is_opened() -> None:
    """The consistency signature covers U2 too: an owner shown fewer sharers verifies nobody else's."""
    world = World(7)
    bundles = world.advertise()
    deliveries = world.share(bundles)
    fewer = tuple(n for n in world.names if n != NAMES[6])
    kept = {k: v for k, v in deliveries[EAST].ciphertexts.items() if k in fewer}
    commitments = {k: v for k, v in deliveries[EAST].commitments.items() if k in fewer}
    world.owners[EAST].mask(ShareDelivery("update", fewer, commitments, kept), world.values(EAST))
    for name in world.names[1:]:
        world.owners[name].mask(deliveries[name], world.values(name))
    signed = {n: world.owners[n].confirm(fewer) for n in fewer}
    for asked, at_fault in ((EAST, "far"), (FAR, "east")):
        with pytest.raises(SignatureInvalid, match=f"consistency of '{at_fault}'"):
            world.owners[asked].unmask(UnmaskRequest("update", fewer, tuple(signed.values())))


def test_the_plans_own_floor_counts_when_it_is_above_the_threshold() -> None:
    """A plan that promises four survivors is held to it by both sides, though three could open the sum."""
    plan = make_plan(NAMES[:4], min_survivors=4)
    world = World(4, plans=dict.fromkeys(NAMES[:4], plan))
    bundles = [owner.advertise() for owner in world.owners.values()]
    with pytest.raises(ProtocolError, match="are 3 owners, at least 4"):
        world.owners[EAST].share_keys(bundles[:3])
    world.plan = plan
    with pytest.raises(RoundAborted, match="3 of 4 owners advertised keys, at least 4"):
        world.new_coordinator().advertised({b.owner: b for b in bundles[:3]})


def test_steps_out_of_order_are_refused() -> None:
    """No step can be skipped or asked for early."""
    world = World(4)
    bundles = world.advertise()
    fresh = world.owner(EAST)
    delivery = ShareDelivery("update", world.names, {}, {})
    for ask in (
        lambda: fresh.share_keys(bundles),
        lambda: fresh.mask(delivery, world.values(EAST)),
        lambda: fresh.confirm(world.names),
        lambda: fresh.unmask(UnmaskRequest("update", world.names, ())),
    ):
        with pytest.raises(StepMismatch, match="advertise is next"):
            ask()


def test_a_closed_owner_answers_nothing_and_holds_no_secret() -> None:
    """After close every step is refused, those answered before too, and the secrets are overwritten."""
    world = World(4)
    survivors = world.survivors()
    owner = world.owners[EAST]
    held = [owner._seed, owner._mask.private, owner._cipher.private]
    assert all(any(secret) for secret in held)
    owner.close()
    owner.close()
    assert not any(any(secret) for secret in held)
    assert not owner._shares
    for ask in (owner.advertise, lambda: owner.confirm(survivors)):
        with pytest.raises(StepMismatch, match="closed"):
            ask()


def test_a_secret_is_never_printed() -> None:
    """Neither repr nor str of an owner or of its parts shows a private key, seed or share."""
    world = World(4)
    world.survivors()
    owner = world.owners[EAST]
    shown = repr(owner) + repr(owner._cipher) + repr(owner._shares) + str(owner)
    share = owner._shares[FAR].seed
    for secret in (owner._seed.hex(), repr(bytes(owner._seed)), repr(bytes(owner._mask.private)), str(share)):
        assert secret not in shown
    assert "redacted" in repr(owner)

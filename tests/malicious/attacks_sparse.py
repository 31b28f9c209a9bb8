"""Large cohorts, where each owner picks its neighbours itself: what a coordinator that knows the picks may not use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from malicious.attacks_keys import UNSIGNED
from malicious.removals import cut
from malicious.scene import Attack, Play, Verdicts
from secagg_world import MANY, World

from fedllm.aggregation.secagg import keys, shamir
from fedllm.aggregation.secagg.owner import SecAggOwner
from fedllm.aggregation.secagg.terms import SumTerms
from fedllm.errors import FedllmError
from fedllm.identity import SigningIdentity
from fedllm.ids import OwnerId
from fedllm.messages.secagg import KeyBundle, ShareDelivery, ShareMessage, UnmaskRequest
from fedllm.rng import SeededRng

K, T, FLOOR = 10, 7, 21
FORGED = MANY[-1]
"""The owner in whose name the attacker deals."""
PICKED = cut(SumTerms.check_picks, "found < self.threshold")


def verdict(answer: Callable[[], object]) -> str:
    """Return the code of a refusal, or the kind of an answer."""
    try:
        return type(answer()).__name__
    except FedllmError as error:
        return error.code


def in_a_sum(attack: Callable[[World], Verdicts]) -> Play:
    """Return an attack on thirty owners of whom each deals to ten."""

    async def play(_home: Path) -> Verdicts:
        return attack(World(30, graph=(K, T)))

    return play


def _dealt(world: World) -> dict[OwnerId, ShareMessage]:
    bundles = world.advertise()
    return {owner: world.owners[owner].share_keys(bundles) for owner in world.names}


def _picks(messages: dict[OwnerId, ShareMessage], owner: OwnerId) -> list[OwnerId]:
    return [OwnerId(peer) for peer in messages[owner].ciphertexts]


def _deliver(world: World, messages: dict[OwnerId, ShareMessage]) -> None:
    deliveries = world.coordinator.shared(messages)
    world.mask(deliveries)


def _without_picks(world: World, picks: list[OwnerId]) -> tuple[OwnerId, ...]:
    """Return the smallest set that is allowed, with as few of somebody's picks as it can have."""
    gone = set(sorted(picks)[: len(world.names) - FLOOR])
    return tuple(owner for owner in world.names if owner not in gone)


def keys_without_picks(world: World) -> Verdicts:
    """Show each owner a key list that is large enough and holds one of its picks, guessed by luck."""
    bundles = world.advertise()
    said: Verdicts = {}
    for owner in world.names:
        machine = world.owners[owner]
        picks = machine._pick()
        listed = [bundle for bundle in bundles if bundle.owner in _without_picks(world, list(picks))]
        said[owner] = verdict(lambda machine=machine, listed=listed: machine.share_keys(listed))
    return said


def survivors_without_picks(world: World) -> Verdicts:
    """Show each owner a survivor set that is large enough and holds one of its neighbours."""
    messages = _dealt(world)
    _deliver(world, messages)
    return {
        owner: verdict(lambda owner=owner: world.owners[owner].confirm(_without_picks(world, _picks(messages, owner))))
        for owner in world.names
    }


def signatures_of_others(world: World) -> Verdicts:
    """Open with t signatures of owners that the one who is asked did not pick."""
    messages = _dealt(world)
    _deliver(world, messages)
    signed = {owner: world.owners[owner].confirm(world.names) for owner in world.names}
    said: Verdicts = {}
    for owner in world.names:
        chosen = [signed[o] for o in world.names if o not in _picks(messages, owner)][:T]
        request = UnmaskRequest("update", world.names, tuple(chosen))
        said[owner] = verdict(lambda owner=owner, request=request: world.owners[owner].unmask(request))
    return said


def a_dealer_that_nobody_vouches_for(world: World) -> Verdicts:
    """List keys that the attacker made, and deal with them to owners that did not pick their alleged owner."""
    honest = world.advertise()
    pairs = [keys.KeyPair.generate(SeededRng(i)) for i in range(2)]
    ctx = keys.context(world.plan, "update")
    made = keys.sign_bundle(
        ctx, "update", FORGED, pairs[0].public, pairs[1].public, SigningIdentity.from_seed(b"\xee" * 32)
    )
    listed = {bundle.owner: bundle for bundle in honest} | {FORGED: made}
    v1 = keys.transcript(ctx, tuple(listed.values()))
    owners = [o for o in world.names if o != FORGED and FORGED not in world.owners[o]._pick()]
    messages = {owner: world.owners[owner].share_keys(list(listed.values())) for owner in owners}
    said: Verdicts = {}
    for owner in owners:
        sealed = _sealed(pairs[0], listed[owner], v1, ctx, owner)
        delivery = ShareDelivery(
            "update", world.names,
            {**{o: m.ciphertexts[owner] for o, m in messages.items() if owner in m.ciphertexts}, FORGED: sealed},
        )  # fmt: skip
        said[owner] = verdict(lambda o=owner, d=delivery: world.owners[o].mask(d, world.values(o)))
    return said


def _sealed(pair: keys.KeyPair, receiver: KeyBundle, v1: bytes, ctx: bytes, owner: OwnerId) -> bytes:
    key = keys.sealing_key(pair.exchange(receiver.cipher_key), ctx, v1, FORGED, owner)
    shares = keys.SharePair(bytearray(33), bytearray(33))
    return keys.seal_shares(shares, key, ctx, v1, FORGED, owner, SeededRng(owner))


SPARSE = [
    Attack(
        "a key list without an owner's picks", in_a_sum(keys_without_picks), "set-refused",
        (PICKED, cut(shamir.split, "threshold <= len(points)")), "ShareMessage",
    ),
    Attack(
        "survivors without an owner's picks", in_a_sum(survivors_without_picks), "set-refused", (PICKED,),
        "SurvivorSignature",
    ),
    Attack(
        "signatures of owners that were not picked", in_a_sum(signatures_of_others), "signatures-missing",
        (cut(SecAggOwner._check_request, "len(counted) < t.threshold"),), "UnmaskShares",
    ),
    Attack(
        "a dealer that nobody vouches for", in_a_sum(a_dealer_that_nobody_vouches_for), "signature-invalid",
        (UNSIGNED,), "MaskedInput",
    ),
]  # fmt: skip

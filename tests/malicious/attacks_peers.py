"""Owners that are hostile themselves: what an honest coordinator does not take into a sum, and whose it says it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from malicious.attacks_sparse import verdict
from malicious.removals import cut
from malicious.scene import Attack, Play, Verdicts
from secagg_world import IDENTITIES, NAMES, World

from fedllm.aggregation.secagg import coordinator, dealing, keys, masking, shamir
from fedllm.aggregation.secagg.coordinator import SecAggCoordinator
from fedllm.aggregation.secagg.masking import MaskedInput, digests_of
from fedllm.messages.secagg import Complaint, KeyBundle, ShareMessage, UnmaskShares

HOSTILE = NAMES[0]
HONEST = NAMES[1]
TWO_CHUNKS = 400_000
"""Entries of three bytes: more than the least size of a chunk."""


def fault(world: World) -> str:
    """Return the code under which the hostile owner is at fault; ``counted`` if its message counts.

    It is proven by what the owner signed, and by nothing that a carrier may have changed on the way.
    """
    found = world.coordinator.faults.get(HOSTILE)
    code = "counted" if found is None else found.partition(":")[0]
    assert (HOSTILE in world.coordinator.proven) == (code not in {"counted", "digest-mismatch"})
    assert not set(world.coordinator.faults) - {HOSTILE}, "nobody else is named"
    return code


def at_coordinator(attack: Callable[[World], None], **world: Any) -> Play:
    """Return an attack whose verdict is what the coordinator notes."""

    async def play(_home: Path) -> Verdicts:
        made = World(7, **world)
        attack(made)
        return {HOSTILE: fault(made)}

    return play


def advertised(change: Callable[[World, KeyBundle], KeyBundle]) -> Play:
    """Return the attack that changes the hostile owner's keys."""

    def attack(world: World) -> None:
        bundles = {owner: each.advertise() for owner, each in world.owners.items()}
        world.coordinator.advertised({**bundles, HOSTILE: change(world, bundles[HOSTILE])})

    return at_coordinator(attack)


def shared(change: Callable[[ShareMessage], ShareMessage]) -> Play:
    """Return the attack that changes the hostile owner's sealed shares."""

    def attack(world: World) -> None:
        bundles = world.advertise()
        messages = {owner: each.share_keys(bundles) for owner, each in world.owners.items()}
        world.coordinator.shared({**messages, HOSTILE: change(messages[HOSTILE])})

    return at_coordinator(attack)


def masked(
    change: Callable[[World, MaskedInput], MaskedInput], *, first: bool = False, entries: int = TWO_CHUNKS
) -> Play:
    """Return the attack that changes the hostile owner's vector, `first` having sent it as it is."""

    async def play(_home: Path) -> Verdicts:
        world = World(4, entries=entries)
        deliveries = world.share(world.advertise())
        honest = world.owners[HOSTILE].mask(deliveries[HOSTILE], world.values(HOSTILE))
        assert len(honest.chunks) == 2
        if first:
            world.coordinator.add_masked(HOSTILE, *honest)
        try:
            said = verdict(lambda: world.coordinator.add_masked(HOSTILE, *change(world, honest)))
        except ValueError:  # the vector does not fit into the sum: without a check nobody is named
            return {HOSTILE: "ends the round"}
        assert said == fault(world) or (said, fault(world)) == ("NoneType", "counted")
        return {HOSTILE: fault(world)}

    return play


def complained(change: Callable[[Complaint], Complaint]) -> Play:
    """Return the attack that changes a complaint."""

    async def play(_home: Path) -> Verdicts:
        world = World(7)
        world.share(world.advertise())
        honest = world.owners[HOSTILE].complaint([HONEST])
        return {HOSTILE: verdict(lambda: world.coordinator.complained(HOSTILE, change(honest)))}

    return play


def unmasked(change: Callable[[UnmaskShares], UnmaskShares]) -> Play:
    """Return the attack that changes what the hostile owner hands out, one owner being lost."""

    def attack(world: World) -> None:
        requests = world.confirm(world.survivors(missing=[NAMES[6]]))
        answers = {owner: world.owners[owner].unmask(request) for owner, request in requests.items()}
        world.coordinator.unmasked({**answers, HOSTILE: change(answers[HOSTILE])})

    return at_coordinator(attack)


def _other_head(**changes: Any) -> Callable[[World, MaskedInput], MaskedInput]:
    return lambda _world, honest: MaskedInput(dataclasses.replace(honest.head, **changes), honest.chunks)


def _cut_anew(_world: World, honest: MaskedInput) -> MaskedInput:
    """Cut the vector at another place, and name the chunks rightly."""
    whole = b"".join(honest.chunks)
    chunks = (whole[:600_000], whole[600_000:])
    return MaskedInput(dataclasses.replace(honest.head, chunks=digests_of(chunks)), chunks)


def _one_byte_short(_world: World, honest: MaskedInput) -> MaskedInput:
    chunks = (honest.chunks[0], honest.chunks[1][:-1])
    return MaskedInput(dataclasses.replace(honest.head, chunks=digests_of(chunks)), chunks)


def _another_vector(_world: World, honest: MaskedInput) -> MaskedInput:
    chunks = (bytes(len(honest.chunks[0])), honest.chunks[1])
    return MaskedInput(dataclasses.replace(honest.head, chunks=digests_of(chunks)), chunks)


def _signed_by_another(world: World, honest: KeyBundle) -> KeyBundle:
    ctx = keys.context(world.plan, "update")
    return keys.sign_bundle(ctx, "update", HOSTILE, honest.cipher_key, honest.mask_key, IDENTITIES[HONEST])


def _of_low_order(world: World, _honest: KeyBundle) -> KeyBundle:
    ctx = keys.context(world.plan, "update")
    return keys.sign_bundle(ctx, "update", HOSTILE, bytes(32), b"\x09" + bytes(31), IDENTITIES[HOSTILE])


def _both_kinds(honest: UnmaskShares) -> UnmaskShares:
    return dataclasses.replace(honest, key_shares={**honest.key_shares, **honest.seed_shares})


_VECTOR = SecAggCoordinator.add_masked
_SENDER = cut(coordinator._check_sender, "owner != sender")

PEERS = [
    Attack(
        "keys that another owner signed", advertised(_signed_by_another), "signature-invalid",
        (cut(keys.check_signature, "verify("),), "counted",
    ),
    Attack(
        "a point of low order sent to the coordinator", advertised(_of_low_order), "low-order-key",
        (cut(keys.check_form, "_low_order"),), "counted",
    ),
    Attack(
        "keys in another owner's name", advertised(lambda _w, b: dataclasses.replace(b, owner=HONEST)), "protocol",
        (_SENDER,), "signature-invalid",
    ),
    Attack(
        "shares for too few peers",
        shared(lambda m: dataclasses.replace(m, ciphertexts=dict(list(m.ciphertexts.items())[:3]))), "protocol",
        (cut(dealing.check_message, "receivers != others"),), "counted",
    ),
    Attack(
        "sealed shares of another size",
        shared(lambda m: dataclasses.replace(m, ciphertexts=dict.fromkeys(m.ciphertexts, b"short"))), "protocol",
        (cut(dealing.check_message, "keys.SEALED_BYTES"),), "counted",
    ),
    Attack(
        "a chunk that its head does not name",
        masked(lambda _w, m: MaskedInput(m.head, (m.chunks[0], bytes(len(m.chunks[1]))))), "digest-mismatch",
        (cut(masking.check_chunks, "!= digest"),), "counted",
    ),
    Attack(
        "chunks of one size in another order",
        masked(lambda _w, m: MaskedInput(m.head, m.chunks[::-1]), entries=2 * (-(-masking.CHUNK_BYTES // 3))),
        "digest-mismatch", (cut(masking.check_chunks, "!= digest"),), "counted",
    ),
    Attack(
        "chunks in another order", masked(lambda _w, m: MaskedInput(m.head, m.chunks[::-1])), "digest-mismatch",
        (cut(masking.check_chunks, "found != sizes", "!= digest"),), "counted",
    ),
    Attack(
        "a chunk less", masked(lambda _w, m: MaskedInput(m.head, m.chunks[:1])), "digest-mismatch",
        (cut(masking.check_chunks, "found != sizes"),), "ends the round",
    ),
    Attack(
        "chunks cut elsewhere", masked(_cut_anew), "digest-mismatch",
        (cut(masking.check_chunks, "found != sizes"),), "counted",
    ),
    Attack(
        "a vector one byte short", masked(_one_byte_short), "digest-mismatch",
        (cut(masking.check_chunks, "found != sizes"),), "ends the round",
    ),
    Attack(
        "a head that names a chunk less", masked(lambda w, m: _other_head(chunks=m.head.chunks[:1])(w, m)), "decode",
        (cut(masking.check_chunks, "len(head.chunks) != len(sizes)"),), "ends the round",
    ),
    Attack(
        "a vector of another length", masked(_other_head(entries=5)), "protocol",
        (cut(_VECTOR, "head.entries, head.entry_bytes"),), "decode",
    ),
    Attack("a vector in another's name", masked(_other_head(owner=HONEST)), "protocol", (_SENDER,), "counted"),
    Attack("two vectors of one owner", masked(_another_vector, first=True), "step-mismatch",
           (cut(_VECTOR, "self._added.get(owner, name) != name"),), "counted"),
    Attack(
        "a complaint of what was not dealt", complained(lambda c: dataclasses.replace(c, dealers=(HOSTILE,))),
        "protocol", (cut(SecAggCoordinator.complained, "self._dealing.inbox"),), "NoneType",
    ),
    Attack(
        "a complaint without a dealer", complained(lambda c: dataclasses.replace(c, dealers=())), "protocol",
        (cut(SecAggCoordinator.complained, "not complaint.dealers"),), "NoneType",
    ),
    Attack(
        "both kinds of share, unasked", unmasked(_both_kinds), "protocol",
        (cut(SecAggCoordinator.unmasked, "held & survivors"),), "counted",
    ),
    Attack(
        "a share that is no field element",
        unmasked(lambda m: dataclasses.replace(m, seed_shares=dict.fromkeys(m.seed_shares, b"\xff" * 33))), "decode",
        (cut(shamir.share_from_bytes, "share >= PRIME"),),
        "counted",
    ),
]  # fmt: skip

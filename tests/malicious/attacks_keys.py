"""Key lists and sealed shares that no owner accepts: what stands between an owner and a man in the middle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from malicious.attacks_plan import SYBIL
from malicious.removals import cut, replaced
from malicious.scene import (
    EAST,
    IDENTITIES,
    NORTH,
    OWNERS,
    SOUTH,
    WEST,
    Attack,
    Play,
    Scene,
    Verdicts,
    begin,
    plan,
    verdict,
)
from unit.client.owner_fakes import SPEC

from fedllm.adapter import AdapterState
from fedllm.aggregation.secagg import keys, shamir
from fedllm.aggregation.secagg.owner import SecAggOwner
from fedllm.aggregation.secagg.steps import Steps
from fedllm.aggregation.secagg.terms import SumTerms
from fedllm.client.pipeline import OwnerSums
from fedllm.errors import ProtocolError
from fedllm.identity import SigningIdentity
from fedllm.ids import OwnerId
from fedllm.messages.envelope import COORDINATOR
from fedllm.messages.plan import RoundPlan
from fedllm.messages.secagg import KeyBundle
from fedllm.rng import SeededRng

Bundles = dict[OwnerId, KeyBundle]
FIELD = 2**255 - 19
ORDER_8 = (
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
)
LOW_ORDER = [u + top for u in (0, 1, *ORDER_8, FIELD - 1, FIELD, FIELD + 1) for top in (0, 1 << 255)]
"""Every 32-byte string that X25519 takes for a point of order 1, 2, 4 or 8, of the curve or of its twist (the last
two are 0 and 1, not reduced; the top bit is ignored, RFC 7748 section 5)."""
STEPS = cut(Steps.answer, "step in self.asked", "STEPS[done] != step")
"""The memory of what a step was asked, and the order of the steps."""
UNSIGNED = cut(keys.check_signature, "verify(")
LARGE_ENOUGH = cut(SumTerms.check_set, "len(owners) < self.floor")


def made_up(at: Scene, owner: OwnerId, signer: SigningIdentity, made: RoundPlan | None = None) -> KeyBundle:
    """Return keys that the attacker holds the private parts of, in an owner's name."""
    pairs = [keys.KeyPair.generate(SeededRng(f"{owner}{i}")) for i in range(2)]
    return keys.sign_bundle(
        keys.context(made or at.plan, "update"), "update", owner, pairs[0].public, pairs[1].public, signer
    )


def listed(
    change: Callable[[Scene, OwnerId, Bundles], Iterable[KeyBundle]], owners: tuple[OwnerId, ...] = OWNERS
) -> Play:
    """Return the attack that shows each owner a key list of its own, made by `change` from the honest one."""

    async def play(home: Path) -> Verdicts:
        at = Scene(home)
        await at.begin()
        asked = {owner: at.key_list(update=change(at, owner, dict(at.keys["update"]))) for owner in owners}
        return await at.verdicts(asked)

    return play


def _swapped(_at: Scene, owner: OwnerId, bundles: Bundles) -> Iterable[KeyBundle]:
    one, other = [each for each in OWNERS if each != owner][:2]
    swapped = {
        one: dataclasses.replace(bundles[other], owner=one), other: dataclasses.replace(bundles[one], owner=other)
    }  # fmt: skip
    return {**bundles, **swapped}.values()


def _in_the_middle(at: Scene, owner: OwnerId, bundles: Bundles) -> Iterable[KeyBundle]:
    mine = {peer: made_up(at, peer, IDENTITIES[COORDINATOR]) for peer in OWNERS if peer != owner}
    return {**bundles, **mine}.values()


def _of_another_round(at: Scene, owner: OwnerId, bundles: Bundles) -> Iterable[KeyBundle]:
    other = plan(nonce=b"x" * 32)
    return {**bundles, **{o: made_up(at, o, IDENTITIES[o], other) for o in OWNERS if o != owner}}.values()


def _own_replaced(at: Scene, owner: OwnerId, bundles: Bundles) -> Iterable[KeyBundle]:
    return {**bundles, owner: made_up(at, owner, IDENTITIES[owner])}.values()


def _own_left_out(_at: Scene, owner: OwnerId, bundles: Bundles) -> Iterable[KeyBundle]:
    return [bundle for name, bundle in bundles.items() if name != owner]


def _an_owner_twice(at: Scene, owner: OwnerId, bundles: Bundles) -> Iterable[KeyBundle]:
    peer = WEST if owner != WEST else EAST
    return [*bundles.values(), made_up(at, peer, IDENTITIES[peer])]


def _a_sybil(at: Scene, _owner: OwnerId, bundles: Bundles) -> Iterable[KeyBundle]:
    return [*bundles.values(), made_up(at, SYBIL, IDENTITIES["stranger"])]


def _of_the_other_sum(at: Scene, owner: OwnerId, bundles: Bundles) -> Iterable[KeyBundle]:
    peer = WEST if owner != WEST else EAST
    return {**bundles, peer: at.keys["evaluation"][peer]}.values()


def _two_owners(_at: Scene, owner: OwnerId, bundles: Bundles) -> Iterable[KeyBundle]:
    return [bundles[owner], bundles[WEST if owner != WEST else EAST]]


def peer_dealt(**changed: bytes | Callable[[Bundles], bytes]) -> Play:
    """Return the attack of a hostile peer, west, that signs these keys with its own pinned identity."""

    def change(at: Scene, _owner: OwnerId, bundles: Bundles) -> Iterable[KeyBundle]:
        west = {name: key if isinstance(key, bytes) else key(bundles) for name, key in changed.items()}
        honest = bundles[WEST]
        pair = {"cipher_key": honest.cipher_key, "mask_key": honest.mask_key, **west}
        ctx = keys.context(at.plan, "update")
        signed = keys.sign_bundle(ctx, "update", WEST, pair["cipher_key"], pair["mask_key"], IDENTITIES[WEST])
        return {**bundles, WEST: signed}.values()

    return listed(change, OWNERS[:3])


async def a_plan_for_each(home: Path) -> Verdicts:
    """Show every owner a plan, and a global adapter, of its own, then everybody's keys, then everybody's shares."""
    at = Scene(home)
    for owner in OWNERS:
        head = AdapterState.initial(SPEC, SeededRng(owner))
        answer: Any = await at.ask(owner, begin(plan(head=head.digest), head=head))
        for purpose in ("update", "evaluation"):
            at.keys.setdefault(purpose, {})[owner] = getattr(answer, purpose)
    at.dealt = await at.each(at.key_list())
    if {verdict(answer) for answer in at.dealt.values()} != {"SharedKeys"}:
        return {owner: verdict(answer) for owner, answer in at.dealt.items()}
    return await at.verdicts({owner: at.send_masked(owner) for owner in OWNERS})


async def two_key_lists(home: Path) -> Verdicts:
    """With the help of west, which signs two sets of keys, show some owners the one and some the other."""
    at = Scene(home)
    await at.begin()
    other = {**at.keys["update"], WEST: made_up(at, WEST, IDENTITIES[WEST])}
    lists = {EAST: at.key_list(), NORTH: at.key_list(update=other.values()), SOUTH: at.key_list()}
    at.dealt = {**await at.each(lists), WEST: await at.ask(WEST, at.key_list())}
    honest = {"sharers": (EAST, NORTH, SOUTH)}
    return await at.verdicts(
        {owner: at.send_masked(owner, ciphertexts=without(at, owner, WEST), **honest) for owner in lists}
    )


def delivered(change: Callable[[Scene, OwnerId], dict[str, Any]], owners: tuple[OwnerId, ...] = OWNERS) -> Play:
    """Return the attack that changes fields of each owner's delivery."""

    async def play(home: Path) -> Verdicts:
        at = Scene(home)
        await at.share()
        return await at.verdicts({owner: at.send_masked(owner, **change(at, owner)) for owner in owners})

    return play


def without(at: Scene, owner: OwnerId, *others: OwnerId) -> dict[str, bytes]:
    """Return the sealed shares for an owner, less those that some dealt."""
    return {o: each for o, each in at.delivery(owner).ciphertexts.items() if o not in others}


def _one_missing(at: Scene, owner: OwnerId) -> dict[str, Any]:
    return {"ciphertexts": without(at, owner, WEST if owner != WEST else EAST)}


def _too_few(at: Scene, owner: OwnerId) -> dict[str, Any]:
    peer = WEST if owner != WEST else EAST
    others = [o for o in OWNERS if o not in (owner, peer)]
    return {"sharers": tuple(sorted((owner, peer))), "ciphertexts": without(at, owner, *others)}


def _without_me(at: Scene, owner: OwnerId) -> dict[str, Any]:
    return {"sharers": tuple(o for o in OWNERS if o != owner)}


def _with_a_sybil(_at: Scene, _owner: OwnerId) -> dict[str, Any]:
    return {"sharers": tuple(sorted((*OWNERS, SYBIL)))}


def _changed_shares(at: Scene, owner: OwnerId) -> dict[str, Any]:
    sealed_shares = dict(at.delivery(owner).ciphertexts)
    dealer = min(sealed_shares)
    return {"ciphertexts": {**sealed_shares, dealer: bytes([sealed_shares[dealer][0] ^ 1]) + sealed_shares[dealer][1:]}}


def _exchanged_shares(at: Scene, owner: OwnerId) -> dict[str, Any]:
    sealed_shares = at.delivery(owner).ciphertexts
    return {"ciphertexts": dict(zip(sealed_shares, [*list(sealed_shares.values())[1:], b""], strict=True))}


def _other_receivers_shares(at: Scene, owner: OwnerId) -> dict[str, Any]:
    peer = WEST if owner != WEST else EAST
    return {"ciphertexts": {**without(at, owner), **{o: s for o, s in without(at, peer).items() if o != owner}}}


def a_second_delivery(purpose: str) -> Play:
    """Return the attack that masks the update twice, with shares of fewer owners the second time."""

    async def play(home: Path) -> Verdicts:
        at = Scene(home)
        await at.mask()
        asked = {}
        for owner in OWNERS:
            gone = WEST if owner != WEST else EAST
            three = tuple(o for o in OWNERS if o != gone)
            fewer = {"sharers": three, "ciphertexts": without(at, owner, gone)}
            first = at.send_masked(owner)
            asked[owner] = dataclasses.replace(
                first,
                **{purpose: dataclasses.replace(getattr(first, purpose), **fewer)},  # type: ignore[arg-type]
            )
        return await at.verdicts(asked)

    return play


def _agree_anyway(self: keys.KeyPair, peer: bytes) -> bytes:
    """Return what X25519 computes; for a point of low order that is zero, for everybody."""
    try:
        return _agree(self, peer)
    except ProtocolError:
        return bytes(32)


_agree = keys.KeyPair.exchange
_ANYTHING = replaced(keys, "open_shares", lambda *_: keys.SharePair(bytearray(33), bytearray(33)))

KEYS = [
    Attack("two peers' keys swapped", listed(_swapped), "signature-invalid", (UNSIGNED,), "SharedKeys"),
    Attack("the attacker's keys for all peers", listed(_in_the_middle), "signature-invalid", (UNSIGNED,), "SharedKeys"),
    Attack("peers' keys of another round", listed(_of_another_round), "signature-invalid", (UNSIGNED,), "SharedKeys"),
    Attack("a plan of its own for each owner", a_plan_for_each, "signature-invalid", (UNSIGNED,), "Complained"),
    Attack(
        "an owner's own keys replaced", listed(_own_replaced), "keys-invalid",
        (cut(SecAggOwner._share_keys, "peers.get(self._owner) != self._bundle"),), "SharedKeys",
    ),
    Attack(
        "an owner's own keys left out", listed(_own_left_out), "keys-invalid",
        (cut(SecAggOwner._share_keys, "peers.get(self._owner) != self._bundle"),), "SharedKeys",
    ),
    Attack(
        "one owner listed twice", listed(_an_owner_twice), "keys-invalid",
        (cut(keys.check_distinct, "set(owners)"),), "set-refused",
    ),
    Attack(
        "a peer that advertises another's key", peer_dealt(cipher_key=lambda bundles: bundles[EAST].cipher_key),
        "keys-invalid", (cut(keys.check_distinct, "set(keys)"),), "SharedKeys",
    ),
    Attack(
        "a peer that advertises one key twice", peer_dealt(mask_key=lambda bundles: bundles[WEST].cipher_key),
        "keys-invalid", (cut(keys.check_distinct, "set(keys)"),), "SharedKeys",
    ),
    Attack(
        "a peer's key of 31 bytes", peer_dealt(cipher_key=b"\x09" * 31), "keys-invalid",
        (cut(keys.check_form, "KEY_BYTES"),), "low-order-key",
    ),
    Attack(
        "a peer's key of 33 bytes", peer_dealt(cipher_key=b"\x09" * 33), "keys-invalid",
        (cut(keys.check_form, "KEY_BYTES"),), "low-order-key",
    ),
    *(
        Attack(
            f"a peer's {kind.replace('_', ' ')} of low order: {u.to_bytes(32, 'little').hex()}",
            peer_dealt(**{kind: u.to_bytes(32, "little")}), "low-order-key",
            (cut(keys.check_form, "_low_order"), replaced(keys.KeyPair, "exchange", _agree_anyway)), "SharedKeys",
        )
        for kind in ("cipher_key", "mask_key") for u in LOW_ORDER
    ),
    Attack(
        "a Sybil in the key list", listed(_a_sybil), "keys-invalid",
        (cut(SumTerms.check_set, "extra"), cut(keys.check_form, "not in cohort")), "SharedKeys",
    ),
    Attack(
        "a peer's keys of the other sum", listed(_of_the_other_sum), "keys-invalid",
        (cut(keys.check_form, "bundle.purpose != purpose"),), "signature-invalid",
    ),
    Attack(
        "a key list of two owners", listed(_two_owners), "set-refused",
        (LARGE_ENOUGH, cut(shamir.split, "threshold <= len(points)")), "SharedKeys",
    ),
    # sealed shares
    Attack(
        "two key lists", two_key_lists, "Complained",
        (replaced(keys, "transcript", lambda _ctx, _bundles: bytes(32)),), "Masked",
    ),
    Attack("sealed shares changed on the way", delivered(_changed_shares), "Complained", (_ANYTHING,), "Masked"),
    Attack("sealed shares exchanged", delivered(_exchanged_shares), "Complained", (_ANYTHING,), "Masked"),
    Attack("another's sealed shares", delivered(_other_receivers_shares), "Complained", (_ANYTHING,), "Masked"),
    Attack(
        "a dealer's shares kept back", delivered(_one_missing), "set-refused",
        (cut(SecAggOwner._check_delivery, "dealers <= others"),), "Masked",
    ),
    Attack("two sharers", delivered(_too_few), "set-refused", (LARGE_ENOUGH,), "Masked"),
    Attack(
        "sharers without the one who is asked", delivered(_without_me), "set-refused",
        (cut(SecAggOwner._check_delivery, "self._owner not in delivery.sharers"),), "Masked",
    ),
    Attack(
        "a Sybil among the sharers", delivered(_with_a_sybil), "set-refused",
        (cut(SumTerms.check_set, "extra"), cut(SecAggOwner._check_delivery, "dealers <= others")), "Masked",
    ),
    Attack("an update masked twice", a_second_delivery("update"), "two-views", (STEPS,), "Masked"),
    Attack(
        "shares of the scores delivered twice", a_second_delivery("evaluation"), "two-views",
        (cut(OwnerSums.mask_update, "self._delivery not in"),), "Masked",
    ),
]  # fmt: skip

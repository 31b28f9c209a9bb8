"""The owner's state machine: one answer to each step, secrets gone at the end, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
from secagg_world import IDENTITIES, NAMES, Remembered, World, make_plan

from fedllm.aggregation.secagg import keys
from fedllm.errors import (
    CohortRefused,
    KeysInvalid,
    LowOrderKey,
    ProtocolError,
    RosterMismatch,
    SharesUnopenable,
    StepMismatch,
    ThresholdRefused,
    TwoViews,
)
from fedllm.ids import Digest, OwnerId, sha256
from fedllm.messages.secagg import Complaint, KeyBundle, UnmaskRequest

EAST, FAR, MID, NORTH = NAMES[:4]
LOW_ORDER = (
    bytes(32),
    b"\x01" + bytes(31),
    (2**255 - 20).to_bytes(32, "little"),
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 18).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    b"\x01" + bytes(30) + b"\x80",
)
"""All points of order 1, 2, 4 and 8 on curve and twist, two of them not reduced, one with the top bit set."""


def flipped(data: bytes) -> bytes:
    """Return the bytes with the last bit changed."""
    return data[:-1] + bytes([data[-1] ^ 1])


def test_a_request_again_gets_the_same_answer_and_another_one_none() -> None:
    """Every step repeats itself bit for bit; asked with anything else it is refused as a second view."""
    world = World(4)
    east = world.owners[EAST]
    assert east.advertise() == east.advertise()
    bundles = world.advertise()
    shared = {n: world.owners[n].share_keys(bundles) for n in world.names}
    assert east.share_keys(bundles[::-1]) == shared[EAST]
    with pytest.raises(TwoViews, match="share_keys"):
        east.share_keys([b for b in bundles if b.owner != NORTH])
    deliveries = world.coordinator.shared(shared)
    masked = east.mask(deliveries[EAST], world.values(EAST))
    assert east.mask(deliveries[EAST], world.values(EAST).copy()) == masked
    with pytest.raises(TwoViews, match="other values"):
        east.mask(deliveries[EAST], world.values(FAR))
    with pytest.raises(TwoViews, match="mask was asked before"):
        east.mask(dataclasses.replace(deliveries[EAST], sharers=(EAST, FAR, MID)), world.values(EAST))
    assert east.mask(deliveries[EAST], world.values(EAST)) == masked, "a refusal changes nothing"
    survivors = world.mask(deliveries)
    assert east.confirm(survivors) == east.confirm(survivors)
    with pytest.raises(TwoViews, match="confirm"):
        east.confirm(survivors[:3])
    requests = world.confirm(survivors)
    assert east.unmask(requests[EAST]) == east.unmask(requests[EAST])
    with pytest.raises(TwoViews, match="unmask"):
        east.unmask(dataclasses.replace(requests[EAST], survivors=survivors[:3]))
    with pytest.raises(TwoViews, match="about something else"):
        east.bind(b"another subject")


def test_steps_out_of_order_are_no_second_view() -> None:
    """What comes too early is out of order, a code of its own."""
    east = World(4).owners[EAST]
    for ask in (
        lambda: east.share_keys([]),
        lambda: east.confirm(NAMES[:4]),
        lambda: east.unmask(UnmaskRequest("update", NAMES[:4], ())),
    ):
        with pytest.raises(StepMismatch, match="advertise is next") as caught:
            ask()
        assert caught.value.code == "step-mismatch"


def test_three_steps_are_written_down_before_they_are_answered() -> None:
    """Advertise with its bundle, confirm and unmask with what was asked: each once, in that order, for this sum."""
    seen: list[tuple[bytes, str, Digest]] = []
    world = World(4)
    world.owners[EAST] = world.owner(EAST, once=lambda *asked: seen.append(asked))
    world.run()
    ctx = keys.context(world.plan, "update")
    assert [(c, step) for c, step, _ in seen] == [(ctx, "advertise"), (ctx, "confirm"), (ctx, "unmask")]
    assert len({digest for *_, digest in seen}) == 3


@pytest.mark.parametrize("step", ["advertise", "confirm", "unmask"])
def test_what_cannot_be_written_down_is_not_answered(step: str) -> None:
    """A full disk stops the answer and leaves the step open for when it can be written."""
    full = True

    def once(ctx: bytes, at: str, digest: Digest) -> None:
        if full and at == step:
            raise OSError("no space left")

    world = World(4)
    east = world.owners[EAST] = world.owner(EAST, once=once)
    with pytest.raises(OSError, match="no space"):
        world.run()
    assert step not in east._steps.asked
    full = False
    if step == "advertise":
        assert east.advertise().owner == EAST
    if step == "confirm":
        assert east.confirm(world.names).owner == EAST


def test_a_restarted_owner_takes_no_part_in_a_sum_that_it_advertised_for() -> None:
    """Its keys are gone with the process; fresh ones for the same sum would be a second view of it."""
    world = World(4)
    remembered = Remembered()
    world.owner(EAST, once=remembered).advertise()
    with pytest.raises(TwoViews, match="advertise"):
        world.owner(EAST, once=remembered).advertise()
    again = make_plan(world.names, attempt=2, nonce=b"\1" * 32)
    assert world.owner(EAST, once=remembered, plan=again).advertise().owner == EAST


def test_secrets_are_overwritten_and_answers_let_go_when_a_sum_is_closed() -> None:
    """Keys, seed, shares and derived keys are zero bytes; no answer is held any more."""
    world = World(5)
    world.run({"mask": [MID]})
    owner = world.owners[EAST]
    held = [owner._seed, owner._cipher.private, owner._mask.private, *owner._opening.values()]
    held += [share for pair in owner._shares.values() for share in (pair.seed, pair.key)]
    assert len(held) == 3 + 4 + 2 * 5
    assert all(any(secret) for secret in held)
    owner.close()
    owner.close()
    assert not any(any(secret) for secret in held)
    assert not owner._shares
    assert not owner._opening
    assert not owner._steps._answers
    with pytest.raises(ProtocolError, match="wiped"):
        owner._mask.exchange(world.owners[FAR]._mask.public)
    for ask in (owner.advertise, lambda: owner.confirm(world.names)):
        with pytest.raises(StepMismatch, match="closed"):
            ask()


def test_a_secret_is_never_printed() -> None:
    """Neither repr nor str of an owner, its pairs or shares shows a private key, a seed or a share, in any notation."""
    world = World(4)
    world.run()
    owner = world.owners[EAST]
    share = owner._shares[FAR]
    parts = (owner, owner._cipher, owner._mask, owner._shares)
    shown = repr(parts) + "".join(map(str, (*parts, share)))
    for secret in (owner._seed, owner._cipher.private, owner._mask.private, share.seed, share.key):
        assert any(secret), "still there to be shown"
        assert bytes(secret).hex()[:16] not in shown
        assert repr(bytes(secret)) not in shown
        assert str(int.from_bytes(secret, "big")) not in shown
    for part in (owner, owner._cipher, owner._mask):
        assert "redacted" in repr(part)


def test_policy_refusals_have_codes_of_their_own() -> None:
    """Roster, cohort and threshold each say which."""
    world = World(4)
    plans = (
        (RosterMismatch, {"roster": sha256(b"other")}),
        (ThresholdRefused, {"threshold": 2}),
        (ThresholdRefused, {"threshold": 5}),
        (ThresholdRefused, {"min_survivors": 2}),
        (ThresholdRefused, {"neighbours": 2, "threshold": 1}),
        (ThresholdRefused, {"corruption": 0.6}),
    )
    for error, changes in plans:
        with pytest.raises(error):
            world.owner(EAST, plan=make_plan(world.names, **changes))
    strangers = make_plan((*world.names, OwnerId("sybil")), roster=world.roster.digest)
    with pytest.raises(RosterMismatch, match="'sybil', who is not in the pinned roster"):
        world.owner(EAST, plan=strangers)
    with pytest.raises(CohortRefused, match="does not name 'yard'"):
        world.owner(OwnerId("yard"))
    with pytest.raises(RosterMismatch, match="identity held here"):
        world.owner(EAST, identity=IDENTITIES[FAR])


@pytest.mark.parametrize("key", LOW_ORDER)
@pytest.mark.parametrize("which", ["cipher_key", "mask_key"])
def test_a_key_of_low_order_is_refused_when_keys_are_listed(which: str, key: bytes) -> None:
    """Well signed by its owner, and refused all the same, before any secret is agreed with it."""
    world = World(4)
    bundles = {n: o.advertise() for n, o in world.owners.items()}
    pair = {"cipher_key": b"\x11" * 32, "mask_key": b"\x22" * 32} | {which: key}
    ctx = keys.context(world.plan, "update")
    bundles[FAR] = keys.sign_bundle(ctx, "update", FAR, **pair, identity=IDENTITIES[FAR])
    with pytest.raises(LowOrderKey, match="'far'"):
        world.owners[EAST].share_keys(list(bundles.values()))
    world.coordinator.advertised(bundles)
    assert world.coordinator.faults[FAR].startswith("low-order-key")


def test_the_list_of_low_order_points_is_what_openssl_refuses() -> None:
    """Agreement with each of them fails in the library, too; and with no ordinary point."""
    pair = keys.KeyPair(bytearray(b"\x42" * 32))
    for key in (*LOW_ORDER, bytes(31)):
        with pytest.raises(LowOrderKey, match="malformed or of low order"):
            pair.exchange(key)
    assert len(pair.exchange(b"\x09" + bytes(31))) == 32


@pytest.mark.parametrize("what", ["own", "absent", "length", "double owner", "double key"])
def test_a_list_that_nobody_advertised_is_refused(what: str) -> None:
    """Own keys exchanged or left out, keys of another size, owners or keys listed twice."""
    world = World(4)
    bundles = {n: o.advertise() for n, o in world.owners.items()}
    listed: list[KeyBundle] = list(bundles.values())
    if what == "own":
        listed[0] = world.owner(EAST).advertise()
    if what == "absent":
        listed = listed[1:]
    if what == "length":
        listed[1] = dataclasses.replace(listed[1], mask_key=listed[1].mask_key[1:])
    if what == "double owner":
        listed.append(listed[1])
    if what == "double key":
        listed[1] = dataclasses.replace(listed[1], mask_key=listed[2].cipher_key)
    with pytest.raises(KeysInvalid):
        world.owners[EAST].share_keys(listed)
    assert world.owners[EAST].share_keys(list(bundles.values())).owner == EAST


def test_all_dealers_whose_shares_do_not_open_are_named_at_once() -> None:
    """One answer names them all, keeps nothing of the others, and leaves the step open."""
    world = World(5)
    mine = world.share(world.advertise())[EAST]
    east = world.owners[EAST]
    wrong = {FAR: flipped(mine.ciphertexts[FAR]), NORTH: mine.ciphertexts[NORTH][:-1], MID: mine.ciphertexts[FAR]}
    changed = dataclasses.replace(mine, ciphertexts={**mine.ciphertexts, **wrong})
    with pytest.raises(SharesUnopenable, match="shares of 'far', 'mid', 'north' for 'east' do not open") as caught:
        east.mask(changed, world.values(EAST))
    assert caught.value.dealers == (FAR, MID, NORTH)
    assert set(east._shares) == {EAST}
    assert east.complaint(caught.value.dealers) == Complaint(EAST, "update", (FAR, MID, NORTH))
    assert east.mask(mine, world.values(EAST)).head.owner == EAST

"""Owners that were shown different things never open a sum together, whichever thing it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
from malicious.attacks_keys import LARGE_ENOUGH
from malicious.attacks_sparse import verdict
from malicious.removals import cut
from secagg_world import NAMES, World, make_plan

from fedllm.aggregation.secagg import keys
from fedllm.aggregation.secagg.owner import SecAggOwner
from fedllm.ids import OwnerId
from fedllm.messages.secagg import ShareDelivery, SurvivorSignature, UnmaskRequest

EAST, FAR, MID, NORTH = NAMES[:4]


def asked_of_each(world: World, signed: Mapping[OwnerId, SurvivorSignature], *views: tuple[OwnerId, ...]) -> set[str]:
    """Return what all owners say to requests that name each view, with the signatures of its members."""
    requests = [UnmaskRequest("update", view, tuple(signed[name] for name in view)) for view in views]
    return {verdict(lambda o=o, r=r: world.owners[o].unmask(r)) for o in world.names for r in requests}


def test_two_views_of_the_survivors_never_have_enough_signatures_both() -> None:
    """Half of the owners sign one set and half another: neither is opened, by anybody."""
    world = World(4)
    everyone = world.survivors()
    fewer = everyone[:3]
    signed = {n: world.owners[n].confirm(everyone if n in {EAST, FAR} else fewer) for n in fewer}
    signed[NORTH] = world.owners[NORTH].confirm(everyone)
    assert asked_of_each(world, signed, everyone, fewer) <= {"two-views", "signature-invalid"}


def two_sharer_sets() -> set[str]:
    """Tell east of one sharer less, let all sign the same survivors, and ask all to open them."""
    world = World(7)
    deliveries = world.share(world.advertise())
    fewer = world.names[:6]
    kept = {o: each for o, each in deliveries[EAST].ciphertexts.items() if o in fewer}
    world.owners[EAST].mask(ShareDelivery("update", fewer, kept), world.values(EAST))
    for name in world.names[1:]:
        world.owners[name].mask(deliveries[name], world.values(name))
    signed = {n: world.owners[n].confirm(fewer) for n in fewer}
    request = UnmaskRequest("update", fewer, tuple(signed.values()))
    return {verdict(lambda o=owner: world.owners[o].unmask(request)) for owner in fewer}


def test_two_views_of_the_sharers_are_noticed_before_anything_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signature is over U2 too: otherwise some would give a key share of an owner that others never masked with."""
    assert two_sharer_sets() == {"signature-invalid"}
    honest = keys.survivors_message
    monkeypatch.setattr(keys, "survivors_message", lambda ctx, v1, _sharers, *rest: honest(ctx, v1, (), *rest))
    assert two_sharer_sets() == {"UnmaskShares"}


def a_list_of_three_where_four_were_promised() -> str:
    """Plan to publish from four survivors on, and list three."""
    plan = make_plan(NAMES[:4], min_survivors=4)
    world = World(4, plans=dict.fromkeys(NAMES[:4], plan))
    bundles = [owner.advertise() for owner in world.owners.values()]
    return verdict(lambda: world.owners[EAST].share_keys(bundles[:3]))


def test_a_plan_is_held_to_its_own_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of four could open the sum; a plan that promised four is refused three."""
    assert a_list_of_three_where_four_were_promised() == "set-refused"
    LARGE_ENOUGH(monkeypatch)
    assert a_list_of_three_where_four_were_promised() == "ShareMessage"


def test_a_repeated_step_gives_what_it_gave_and_a_changed_one_nothing() -> None:
    """Shares, vector, signature and answer are each given for one question, and again for the same one."""
    world = World(4)
    bundles = world.advertise()
    deliveries = world.share(bundles)
    survivors = world.mask(deliveries)
    requests = world.confirm(survivors)
    world.unmask(requests)
    east, delivery, request = world.owners[EAST], deliveries[EAST], requests[EAST]
    fewer = {o: each for o, each in delivery.ciphertexts.items() if o != NORTH}
    for again, changed in (
        (lambda: east.share_keys(bundles), lambda: east.share_keys(bundles[:3])),
        (
            lambda: east.mask(delivery, world.values(EAST)),
            lambda: east.mask(dataclasses.replace(delivery, sharers=NAMES[:3], ciphertexts=fewer), world.values(EAST)),
        ),
        (
            lambda: east.mask(delivery, world.values(EAST)),
            lambda: east.mask(delivery, world.values(FAR)),
        ),
        (lambda: east.confirm(survivors), lambda: east.confirm(survivors[:3])),
        (lambda: east.unmask(request), lambda: east.unmask(dataclasses.replace(request, survivors=survivors[:3]))),
    ):
        assert again() == again()
        assert verdict(changed) == "two-views"


def test_values_that_differ_are_never_masked_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two vectors under one mask subtract to what they differ in: that is what the check keeps in."""
    world = World(4)
    delivery = world.share(world.advertise())[EAST]
    first = world.owners[EAST].mask(delivery, world.values(EAST))
    assert verdict(lambda: world.owners[EAST].mask(delivery, world.values(FAR))) == "two-views"
    cut(SecAggOwner.mask, "again.head != head")(monkeypatch)
    second = world.owners[EAST].mask(delivery, world.values(FAR))
    gap = int.from_bytes(first.chunks[0][:3], "little") - int.from_bytes(second.chunks[0][:3], "little")
    assert (gap - int(world.values(EAST)[0]) + int(world.values(FAR)[0])) % (1 << world.bits) == 0

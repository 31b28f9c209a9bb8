"""Hostile owners: the sum is right or is not opened, the honest are not blamed, and one owner counts once."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

import numpy as np
import pytest
from malicious.removals import Removal, cut, replaced
from round_world import Agent
from secagg_world import NAMES, World

from fedllm.aggregation.secagg import keys, owner
from fedllm.aggregation.secagg.coordinator import SecAggCoordinator
from fedllm.aggregation.secagg.shamir import PRIME, share_from_bytes, share_to_bytes
from fedllm.errors import RoundAborted, SharesUnopenable
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import OwnerId
from fedllm.messages import envelope
from fedllm.messages.secagg import UnmaskRequest, UnmaskShares
from fedllm.relay.carrier import Reply
from fedllm.rng import SeededRng
from fedllm.server.roster import Roll

HOSTILE, *OTHERS = NAMES
REQUEST = cut(envelope.check_reply, "reply.request != request.request")
CHALLENGE = cut(Roll._bind, "body.challenge != hello.challenge")


def true_sum(world: World) -> np.ndarray:
    """Return what an honest sum over everybody is."""
    total = np.sum([world.values(name).astype(np.uint64) for name in world.names], axis=0)
    return (total % (1 << world.bits)).astype(np.uint32)


def moved(shares: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return shares that are off by one, each still a field element."""
    return {peer: share_to_bytes((share_from_bytes(share) + 1) % PRIME) for peer, share in shares.items()}


def liar(answers: Mapping[OwnerId, UnmaskShares], *liars: OwnerId) -> dict[OwnerId, UnmaskShares]:
    """Return the answers, with wrong shares from some."""
    return {
        o: dataclasses.replace(a, seed_shares=moved(a.seed_shares)) if o in liars else a for o, a in answers.items()
    }


def answered(world: World) -> dict[OwnerId, UnmaskShares]:
    """Run a sum up to its last message."""
    requests: dict[OwnerId, UnmaskRequest] = world.confirm(world.survivors())
    return {o: world.owners[o].unmask(request) for o, request in requests.items()}


@pytest.mark.parametrize("liars", [1, 2])
def test_wrong_shares_are_noticed_named_and_done_without(liars: int) -> None:
    """Seven owners, five shares open: as many liars as are assumed to collude change nothing in the sum."""
    world = World(7)
    total = world.coordinator.unmasked(liar(answered(world), *NAMES[:liars]))
    assert np.array_equal(total, true_sum(world))
    assert not set(world.coordinator.faults) - set(NAMES[:liars])
    if liars == 1:
        assert "its share of the seed" in world.coordinator.faults[HOSTILE]
        assert HOSTILE in world.coordinator.proven, "it is off the polynomials of more dealers than can collude"


def test_without_the_commitment_wrong_shares_are_a_wrong_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed that comes out of a wrong share is a seed like any other: only its commitment tells."""
    replaced(SecAggCoordinator, "_seed_check", lambda _self, _owner: lambda _seed: True)(monkeypatch)
    world = World(7)
    total = world.coordinator.unmasked(liar(answered(world), HOSTILE))
    assert not np.array_equal(total, true_sum(world))


def garble(world: World, dealer: OwnerId, receivers: list[OwnerId]) -> dict[OwnerId, Any]:
    """Deal, one owner garbage to some of the others; return the deliveries."""
    bundles = world.advertise()
    messages = {o: each.share_keys(bundles) for o, each in world.owners.items()}
    bad = {o: bytes(keys.SEALED_BYTES) for o in receivers}
    messages[dealer] = dataclasses.replace(messages[dealer], ciphertexts={**messages[dealer].ciphertexts, **bad})
    return world.coordinator.shared(messages)


def mask_or_complain(world: World, deliveries: Mapping[OwnerId, Any]) -> None:
    """Let every owner do what it does with its delivery."""
    for name, delivery in deliveries.items():
        machine = world.owners[name]
        try:
            world.coordinator.add_masked(name, *machine.mask(delivery, world.values(name)))
        except SharesUnopenable as error:
            world.coordinator.complained(name, machine.complaint(error.dealers))


@pytest.mark.parametrize("hit", [1, 2])
def test_garbage_for_few_names_dealer_and_complainers_and_proves_nothing(hit: int) -> None:
    """Two of seven could be lying together: both sides are named, nobody is out."""
    world = World(7)
    mask_or_complain(world, garble(world, HOSTILE, OTHERS[:hit]))
    assert set(world.coordinator.faults) == {HOSTILE, *OTHERS[:hit]}
    assert not world.coordinator.proven
    survivors = world.coordinator.masked()
    assert set(survivors) == set(NAMES) - set(OTHERS[:hit]), "who complained has sent no vector; the dealer has"


def test_garbage_for_more_than_a_third_proves_the_dealer() -> None:
    """Three of seven complain: more than are assumed to collude, so it is the dealer, and the next attempt knows."""
    world = World(7)
    mask_or_complain(world, garble(world, HOSTILE, OTHERS[:3]))
    assert set(world.coordinator.faults) == {HOSTILE}
    assert world.coordinator.proven == {HOSTILE}
    with pytest.raises(RoundAborted, match="4 of 7 owners sent masked vectors"):
        world.coordinator.masked()


def test_false_complaints_do_not_prove_an_honest_dealer_wrong() -> None:
    """Two who lie about a third's shares are named with it; none of them is proven wrong."""
    world = World(7)
    deliveries = world.share(world.advertise())
    for name in NAMES[:2]:
        world.coordinator.complained(name, world.owners[name].complaint([NAMES[6]]))
    for name in NAMES[2:]:
        world.send_masked(name, deliveries[name])
    assert set(world.coordinator.faults) == {*NAMES[:2], NAMES[6]}
    assert not world.coordinator.proven


def deal_wrong(monkeypatch: pytest.MonkeyPatch, wrong: int) -> None:
    """Let the hostile owner deal to its first receivers shares of other points than theirs."""
    honest = owner.split

    def split(secret: bytes, threshold: int, points: Any, rng: Any) -> dict[int, int]:
        shares = honest(secret, threshold, points, rng)
        first = list(shares)[1 : wrong + 2]
        exchanged = dict(zip(first, [shares[x] for x in (*first[1:], first[0])], strict=True))
        return {**shares, **exchanged}

    monkeypatch.setattr(owner, "split", split)


def run_with_wrong_dealer(monkeypatch: pytest.MonkeyPatch, wrong: int) -> World:
    """Run a sum in which the hostile owner's shares are exchanged among `wrong` + 1 receivers."""
    world = World(7)
    bundles = world.advertise()
    messages = {name: world.owners[name].share_keys(bundles) for name in OTHERS}
    with monkeypatch.context() as patch:
        deal_wrong(patch, wrong)
        messages[HOSTILE] = world.owners[HOSTILE].share_keys(bundles)
    world.mask(world.coordinator.shared(messages))
    return world


def test_a_dealer_of_wrong_points_gets_nobody_proven_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shares exchanged: the sum is right; their holders hand out what they were dealt, and are not out for it."""
    world = run_with_wrong_dealer(monkeypatch, 1)
    assert np.array_equal(world.unmask(world.confirm(world.names)), true_sum(world))
    assert not world.coordinator.proven


def test_a_dealer_whose_shares_open_nothing_ends_the_round_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """All shares exchanged: no five of seven open its seed. The round ends, and the reason names it."""
    world = run_with_wrong_dealer(monkeypatch, 5)
    with pytest.raises(RoundAborted, match=f"the seed of '{HOSTILE}' cannot be opened"):
        world.unmask(world.confirm(world.names))
    assert not set(world.coordinator.proven) & set(OTHERS)


class TwoNodes:
    """A carrier with more nodes than owners, each answering as `answer` says."""

    patience_s = 0.0

    def __init__(self, nodes: Mapping[str, Callable[[bytes], Awaitable[Reply]]]) -> None:
        self._nodes = nodes

    async def nodes(self) -> tuple[str, ...]:
        """Return all nodes."""
        return tuple(sorted(self._nodes))

    async def exchange(
        self, outbound: Mapping[str, bytes], *, deadline_s: float
    ) -> AsyncGenerator[tuple[str, Reply], None]:
        """Deliver at once."""
        for node, data in outbound.items():
            yield node, await self._nodes[node](data)

    async def close(self) -> None:
        """Nothing to close."""


COORDINATOR = SigningIdentity.from_seed(b"\x01" * 32)
IDENTITIES = {OwnerId(o): SigningIdentity.from_seed(bytes([i + 2] * 32)) for i, o in enumerate(("east", "north"))}
ROSTER = Roster.of({o: identity.public for o, identity in IDENTITIES.items()})


def agent(name: str, signer: str | None = None) -> Agent:
    """Return an owner that says it is `name`, and signs as somebody."""
    return Agent(OwnerId(name), IDENTITIES[OwnerId(signer or name)], ROSTER, COORDINATOR.public)


def called(nodes: Mapping[str, Callable[[bytes], Awaitable[Reply]]], times: int = 1) -> Roll:
    """Call the roll of a federation of two."""
    roll = Roll("tools", ROSTER, COORDINATOR, TwoNodes(nodes), SeededRng("roll"))

    async def scenario() -> None:
        for _ in range(times):
            await roll.call(deadline_s=1.0)

    asyncio.run(scenario())
    return roll


def test_one_owner_behind_two_nodes_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second node is noted; without that check it would take the first one's place in silence."""
    nodes = {"a": agent("east").deliver, "b": agent("east").deliver, "c": agent("north").deliver}
    roll = called(nodes)
    assert roll.present == ("east", "north")
    assert [(fault.owner, fault.code) for fault in roll.faults] == [("east", "owner-twice")]
    cut(Roll._bind, "other != node")(monkeypatch)
    silent = called(nodes)
    assert not silent.faults
    assert silent._nodes[OwnerId("east")] == "b"


def test_a_node_that_cannot_sign_as_an_owner_is_not_that_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """North's key under east's name: refused by the pinned key, and by nothing else."""
    nodes = {"a": agent("east", signer="north").deliver}
    roll = called(nodes)
    assert roll.present == ()
    assert [fault.code for fault in roll.faults] == ["signature-invalid"]
    cut(envelope.unseal, "key.verify")(monkeypatch)
    assert called(nodes).present == ("east",)


@pytest.mark.parametrize(
    ("removed", "codes"),
    [
        ((), ["protocol"]),
        ((REQUEST,), ["authentication"]),
        ((REQUEST, CHALLENGE), []),
    ],
    ids=["as it is", "request not compared", "challenge neither"],
)
def test_an_answer_to_an_older_hello_is_no_answer(
    monkeypatch: pytest.MonkeyPatch, removed: tuple[Removal, ...], codes: list[str]
) -> None:
    """A relay that recorded one greeting cannot give it a second time: request id and challenge are new."""
    for remove in removed:
        remove(monkeypatch)
    east, recorded = agent("east"), []

    async def replay(data: bytes) -> Reply:
        recorded.append(await east.deliver(data))
        return recorded[0]

    first = called({"a": replay})
    assert first.present == ("east",)
    again = Roll("tools", ROSTER, COORDINATOR, TwoNodes({"a": replay}), SeededRng("another roll"))
    asyncio.run(again.call(deadline_s=1.0))
    assert [fault.code for fault in again.faults] == codes
    assert again.present == (() if codes else ("east",))

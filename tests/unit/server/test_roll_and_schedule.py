"""Who is there, by signature only; and a queue that survives restarts, waits for owners and stops when it should."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from patience import PATIENCE_S
from round_world import OWNERS, World

from fedllm.errors import IntegrityError, NotFound, NotReady, PolicyRefused
from fedllm.identity import SigningIdentity
from fedllm.ids import sha256
from fedllm.messages.round import Refused
from fedllm.rng import SeededRng
from fedllm.server.journal import Journal, RoundRecord
from fedllm.server.ports import RoundState, Verdict
from fedllm.server.roster import Roll
from fedllm.server.schedule import Schedule


def roll_of(world: World, seed: str = "roll") -> Roll:
    """Return a roll that knows nobody yet."""
    return Roll("tools", world.roster, world.identity, world.carrier, SeededRng(seed))


def test_roll_binds_nodes_by_signature(tmp_path: Path) -> None:
    """Four signed hellos, four owners; with all bound nobody is asked again."""
    world = World(tmp_path)
    roll = roll_of(world)
    assert asyncio.run(roll.call(deadline_s=1.0)) == OWNERS
    asked = len(world.carrier.carried)
    assert asyncio.run(roll.call(deadline_s=1.0)) == OWNERS
    assert len(world.carrier.carried) == asked


def test_a_recorded_hello_is_worth_nothing(tmp_path: Path) -> None:
    """A relay that replays an owner's earlier hello answers another challenge: the node stays unbound."""
    world = World(tmp_path)
    asyncio.run(roll_of(world, "first").call(deadline_s=1.0))
    world.carrier.fault = lambda owner, _k, _c: "swap" if owner == "west" else "deliver"
    roll = roll_of(world, "second")
    assert asyncio.run(roll.call(deadline_s=1.0)) == ("east", "north", "south")
    assert [f.code for f in roll.faults] == ["protocol"]


def test_a_stranger_and_an_impostor_are_nobody(tmp_path: Path) -> None:
    """A key outside the roster, and a node that claims another owner's name, bind to no one."""
    world = World(tmp_path)
    world.agents["west"].identity = SigningIdentity.from_seed(b"\x05" * 32)
    world.agents["south"].owner = world.agents["east"].owner
    roll = roll_of(world)
    assert asyncio.run(roll.call(deadline_s=1.0)) == ("east", "north")
    assert {f.code for f in roll.faults} == {"signature-invalid"}


def test_another_federations_node_is_asked_less_and_less(tmp_path: Path) -> None:
    """A node that answers as nobody of this federation costs an exchange ever more rarely, not every time."""
    world = World(tmp_path)
    world.agents["west"].identity = SigningIdentity.from_seed(b"\x05" * 32)
    roll = roll_of(world)
    for _ in range(40):
        asyncio.run(roll.call(deadline_s=1.0))
    assert world.carrier.counts["west", "Hello"] == 6
    world.agents["west"].identity = SigningIdentity.from_seed(bytes.fromhex(sha256(b"west")))
    for _ in range(17):
        asyncio.run(roll.call(deadline_s=1.0))
    assert roll.present == OWNERS


def test_a_node_that_went_is_unbound(tmp_path: Path) -> None:
    """A node that the carrier no longer lists is no owner's; when it is back it says hello again."""
    world = World(tmp_path)
    roll = roll_of(world)
    asyncio.run(roll.call(deadline_s=1.0))
    west = world.agents.pop("west")
    assert asyncio.run(roll.call(deadline_s=1.0)) == ("east", "north", "south")
    world.agents["west"] = west
    assert asyncio.run(roll.call(deadline_s=1.0)) == OWNERS


def ended_rounds(world: World) -> list[RoundRecord]:
    """Return the rounds for which nothing is left to do."""
    return [r for r in world.journal.rounds("tools") if r.ended is not None]


async def until(done: Callable[[], bool]) -> None:
    """Wait for something that only the journal tells."""
    while not done():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def serve_until(world: World, schedule: Schedule, ended: int) -> None:
    """Run a schedule until so many rounds have ended and nothing is wanted."""

    async def scenario() -> None:
        working = asyncio.create_task(schedule.run())
        async with asyncio.timeout(PATIENCE_S):
            await until(lambda: not world.journal.wanted("tools") and len(ended_rounds(world)) >= ended)
        working.cancel()

    asyncio.run(scenario())


def test_wanted_rounds_survive_a_restart(tmp_path: Path) -> None:
    """Asked of one coordinator, run by the next: the queue is in the journal."""
    world = World(tmp_path)
    schedule = Schedule({"tools": world.runner()}, world.journal, world.clock)
    assert schedule.request("tools", 1) == 1
    assert schedule.request("tools", 1) == 2
    serve_until(world, Schedule({"tools": world.runner()}, world.journal, world.clock), 2)
    assert [r.state for r in world.journal.rounds("tools")] == [RoundState.JUDGED] * 2


def test_the_queue_waits_for_owners(tmp_path: Path) -> None:
    """Two of four are there: no round is planned, status says who is missing; with the third it runs."""
    world = World(tmp_path)
    away = {name: world.agents.pop(name) for name in ("south", "west")}
    schedule = Schedule({"tools": world.runner()}, world.journal, world.clock)
    schedule.request("tools", 1)

    async def scenario() -> None:
        working = asyncio.create_task(schedule.run())
        async with asyncio.timeout(PATIENCE_S):
            await until(lambda: schedule.waiting("tools") is not None)
            assert "2 of 4 owners are there" in str(schedule.waiting("tools"))
            assert world.journal.rounds("tools") == []
            world.agents["west"] = away["west"]
            await until(lambda: bool(ended_rounds(world)))
        working.cancel()

    asyncio.run(scenario())
    (record,) = world.journal.rounds("tools")
    assert record.plan.cohort == ("east", "north", "west")
    assert schedule.waiting("tools") is None


def test_a_spent_budget_empties_the_queue(tmp_path: Path) -> None:
    """The next round would be refused too: it is not tried. A plain abort leaves the queue alone."""
    world = World(tmp_path)
    for agent in world.agents.values():
        agent.refuse = Refused("budget-exhausted", "spent", None)
    schedule = Schedule({"tools": world.runner()}, world.journal, world.clock)
    schedule.request("tools", 5)
    serve_until(world, schedule, 1)
    assert [r.code for r in world.journal.rounds("tools")] == ["budget-exhausted"]


def test_what_can_never_run_is_refused_when_asked(tmp_path: Path) -> None:
    """A method that needs individual updates, an unknown federation, a round that does not run."""
    world = World(tmp_path, method="flora")
    schedule = Schedule({"tools": world.runner()}, world.journal, world.clock)
    with pytest.raises(PolicyRefused, match="flora"):
        schedule.request("tools", 1)
    with pytest.raises(NotFound, match="known: tools"):
        schedule.request("legal", 1)
    with pytest.raises(NotReady, match="not in progress"):
        schedule.abort("tools", 1, "why not")


def test_two_federations_run_side_by_side(tmp_path: Path) -> None:
    """Two federations on one journal and one registry: each counts its own rounds and versions, has its own alias."""
    worlds = [World(tmp_path), World(tmp_path, name="legal", alias="firm/legal")]
    runners = {world.settings.name: world.runner() for world in worlds}
    schedule = Schedule(runners, worlds[0].journal, worlds[0].clock)
    schedule.request("tools", 2)
    schedule.request("legal", 1)

    async def scenario() -> None:
        working = asyncio.create_task(schedule.run())
        async with asyncio.timeout(PATIENCE_S):
            await until(lambda: all(schedule.present(n) and not schedule.runner(n).running for n in runners))
            await until(lambda: len(ended_rounds(worlds[0])) == 2 and bool(worlds[0].journal.rounds("legal")))
            await until(lambda: worlds[0].journal.rounds("legal")[0].ended is not None)
        working.cancel()

    asyncio.run(scenario())
    registry = worlds[0].registry
    assert sorted(v.name for v in registry.versions()) == ["legal@v1", "tools@v1", "tools@v2"]
    assert set(registry.aliases().aliases) == {"acme/tools", "firm/legal"}


def test_an_aborted_round_never_goes_on(tmp_path: Path) -> None:
    """States only move forward; a verdict is final; an aborted round cannot be advanced or judged."""
    world = World(tmp_path)
    asyncio.run(world.runner().run(1))
    journal = Journal(tmp_path / "journal.sqlite")
    assert not journal.advance("tools", 1, RoundState.SHARES, {})
    journal.abort("tools", 1, code="x", reason="too late")
    assert journal.round("tools", 1).state is RoundState.JUDGED
    record = journal.round("tools", 1)
    plan = record.plan.__class__(**{**vars(record.plan), "round": 2})
    journal.open_round(plan, record.signed, started=1.0)
    journal.abort("tools", 2, code="operator-abort", reason="asked")
    journal.judge("tools", 2, Verdict(True, "late", {}))
    assert (journal.round("tools", 2).state, journal.round("tools", 2).verdict) == (RoundState.ABORTED, None)
    with pytest.raises(IntegrityError, match="was aborted"):
        journal.advance("tools", 2, RoundState.SHARES, {})
    with pytest.raises(NotFound):
        journal.round("tools", 3)

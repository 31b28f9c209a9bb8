"""The coordinator dies between any two messages and is started again on the same journal."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from round_world import OWNERS, World

from fedllm.ids import AliasName
from fedllm.registry.store import Registry
from fedllm.server.ports import RoundState

STEPS = (
    "Begin", "FetchAdvertise", "ShareKeys", "SendMasked", "Confirm", "Unmask", "Evaluate", "FetchScores", "Close",
)  # fmt: skip


class Crash(BaseException):
    """Kill -9, as far as Python can play it."""


def crash_at(world: World, kind: str, *, after: bool, owner: str = "north") -> None:
    """Crash when `owner` is asked `kind` for the first time, before or after it got the message."""
    counted = {"n": 0}

    def fault(asked_owner: str, asked: str, _count: int) -> str:
        if (asked_owner, asked) == (owner, kind):
            counted["n"] += 1
            if counted["n"] == 1:
                if after:
                    world.carrier.fault = crashing
                    return "deliver"
                raise Crash
        return "deliver"

    def crashing(_owner: str, _kind: str, _count: int) -> str:
        raise Crash

    world.carrier.fault = fault


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", STEPS)
def test_a_crash_around_any_message_is_resumed(tmp_path: Path, kind: str, after: bool) -> None:
    """A new coordinator goes on from the journal: same plan, one training, one version, all four in the sum."""
    world = World(tmp_path)
    crash_at(world, kind, after=after)
    with pytest.raises(Crash):
        asyncio.run(world.runner().run(1))
    world.carrier.fault = lambda _o, _k, _c: "deliver"
    runner = world.runner()
    (record,) = asyncio.run(runner.run(0))
    assert record.state is RoundState.JUDGED, record.reason
    assert record.measures["survivors"] == 4
    assert record.ended is not None
    assert all(len(agent.begun) == 1 for agent in world.agents.values())
    assert [v.digest for v in world.registry.versions()] == [record.version]
    assert len(world.registry.history(world.federation.alias)) == 1
    assert asyncio.run(world.runner().resume()) is None


def test_a_crash_between_verdict_and_move_publishes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict is in the journal, the alias has not moved: the restart moves it, once."""
    world = World(tmp_path)
    runner = world.runner()

    def crash(*_args: object, **_kwargs: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "promote", crash)
        with pytest.raises(Crash):
            asyncio.run(runner.run(1))
    assert world.journal.round("tools", 1).state is RoundState.JUDGED
    (record,) = asyncio.run(world.runner().run(0))
    assert record.measures["published"]
    assert world.registry.aliases().aliases == {AliasName("acme/tools"): record.version}


def test_a_deadline_that_passed_while_down_aborts(tmp_path: Path) -> None:
    """Down for a day in mid-round: the phase's deadline has passed, so the round aborts with that reason."""
    world = World(tmp_path)
    crash_at(world, "SendMasked", after=False)
    with pytest.raises(Crash):
        asyncio.run(world.runner().run(1))
    world.clock.advance(86_400)
    world.carrier.fault = lambda _o, _k, _c: "deliver"
    (record,) = asyncio.run(world.runner().run(0))
    assert record.state is RoundState.ABORTED
    assert record.reason is not None
    assert "mask" in record.reason
    assert world.registry.versions() == []
    assert set(world.agents["east"].closed) == {"aborted"}


def test_owners_lost_while_down_are_dropouts(tmp_path: Path) -> None:
    """One owner goes away together with the coordinator: the resumed round ends with three."""
    world = World(tmp_path)
    crash_at(world, "SendMasked", after=False)
    with pytest.raises(Crash):
        asyncio.run(world.runner().run(1))
    world.carrier.fault = lambda o, _k, _c: "lose" if o == "west" else "deliver"
    (record,) = asyncio.run(world.runner().run(0))
    assert record.state is RoundState.JUDGED
    assert record.measures["survivors"] == len(OWNERS) - 1


def test_masked_inputs_are_gone_when_the_round_is(tmp_path: Path) -> None:
    """What owners sent is kept for a crash only: an ended round holds no inputs."""
    import sqlite3

    world = World(tmp_path)
    asyncio.run(world.runner().run(2))
    with sqlite3.connect(tmp_path / "journal.sqlite") as connection:
        assert connection.execute("select count(*) from inputs").fetchone() == (0,)
        assert connection.execute("select count(*) from rounds where ended is not null").fetchone() == (2,)


def test_a_roster_changed_under_a_round_aborts_it(tmp_path: Path) -> None:
    """An owner was removed while the coordinator was down: the unfinished round names another roster and ends."""
    from fedllm.identity import Roster, VerifyKey
    from fedllm.server.federation import Federation

    world = World(tmp_path)
    crash_at(world, "ShareKeys", after=False)
    with pytest.raises(Crash):
        asyncio.run(world.runner().run(1))
    keys = {m.owner: VerifyKey(m.key) for m in world.roster.members if m.owner != "west"}
    world.roster = Roster.of(keys)
    settings = world.settings.__class__(**{**world.settings.__dict__, "declared_records": dict.fromkeys(keys, 10)})
    world.federation = Federation(settings, world.federation.spec, world.roster)
    (record,) = asyncio.run(world.runner().run(0))
    assert record.state is RoundState.ABORTED
    assert record.ended is not None

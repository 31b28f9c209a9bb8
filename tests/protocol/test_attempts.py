"""A sum that fails is tried again with whoever is left, on the updates that are trained already."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from round_world import Agent, World

from fedllm.messages.round import Body, SharedKeys, ShareKeys
from fedllm.server.ports import RoundState

SIX = ("east", "far", "mid", "north", "south", "west")


def deal_garbage(agent: Agent) -> None:
    """Make an owner deal sealed shares that nobody can open."""
    honest = agent._on_ShareKeys

    def dealt(body: ShareKeys) -> Body:
        shared = honest(body)
        assert isinstance(shared, SharedKeys)
        for message in (shared.update, shared.evaluation):
            for peer in message.ciphertexts:
                message.ciphertexts[peer] = bytes(len(message.ciphertexts[peer]))
        return shared

    agent._on_ShareKeys = dealt  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["ShareKeys", "SendMasked", "Confirm"])
def test_two_of_six_lost_cost_an_attempt_and_not_the_round(tmp_path: Path, kind: str) -> None:
    """Five of six are needed, four are left: the second attempt is among these four, and nobody trains again."""
    world = World(tmp_path, owners=SIX)
    for i, agent in enumerate(world.agents.values()):
        agent.step = 0.01 * (i + 1)
    world.carrier.fault = lambda o, asked, c: "lose" if o in {"south", "west"} and asked == kind else "deliver"
    (record,) = asyncio.run(world.runner().run(1))
    assert record.state is RoundState.JUDGED, record.reason
    assert record.plan.attempt == 2
    assert record.plan.cohort == SIX[:4]
    assert record.plan.threshold == 3
    (failed,) = record.measures["attempts"]
    assert failed["attempt"] == 1
    assert "4 of 6 owners answered in time, 5 needed" in failed["reason"]
    assert record.measures["saturated"] == 0.0
    assert all(len(agent.begun) == 1 for agent in world.agents.values())
    assert record.version is not None
    for name, array in world.registry.state(record.version).factors.items():
        if name.endswith("lora_B"):
            np.testing.assert_allclose(array, 0.025, atol=1e-4)


def test_too_few_that_trained_are_tried_at_once_among_themselves(tmp_path: Path) -> None:
    """Four of six trained in time: less than the five that the first plan needs, enough for a plan of four."""
    world = World(tmp_path, owners=SIX)
    world.carrier.fault = lambda o, asked, _c: (
        "lose" if o in {"far", "mid"} and asked == "FetchAdvertise" else "deliver"
    )
    (record,) = asyncio.run(world.runner().run(1))
    assert record.state is RoundState.JUDGED, record.reason
    assert record.plan.cohort == ("east", "north", "south", "west")
    assert record.measures["survivors"] == 4


def test_a_dealer_of_garbage_is_named_and_left_out(tmp_path: Path) -> None:
    """Everybody complains of the same dealer: more than could collude, so it is proven, and the rest go on."""
    world = World(tmp_path)
    deal_garbage(world.agents["west"])
    (record,) = asyncio.run(world.runner().run(1))
    assert record.state is RoundState.JUDGED, record.reason
    assert (record.plan.attempt, record.plan.cohort) == (2, ("east", "north", "south"))
    named = [f["message"] for f in record.measures["faults"] if f["owner"] == "west"]
    assert any("do not open" in message for message in named), record.measures["faults"]


@pytest.mark.parametrize("how", ["garble-parts", "cut-parts"])
def test_a_vector_that_is_not_what_its_head_names_is_not_added(tmp_path: Path, how: str) -> None:
    """Chunks changed or cut on the way: that owner is out of the sum, which stays exact."""
    world = World(tmp_path)
    world.agents["west"].step = 5.0
    world.carrier.fault = lambda o, asked, _c: how if (o, asked) == ("west", "SendMasked") else "deliver"
    (record,) = asyncio.run(world.runner().run(1))
    assert record.state is RoundState.JUDGED, record.reason
    assert record.measures["survivors"] == 3
    assert any(f["owner"] == "west" for f in record.measures["faults"])
    assert record.version is not None
    for name, array in world.registry.state(record.version).factors.items():
        if name.endswith("lora_B"):
            np.testing.assert_allclose(array, 0.01, atol=1e-4)


def test_attempts_are_bounded(tmp_path: Path) -> None:
    """Three of six are lost for good, one more in each attempt: the round ends with its reason, not never."""
    world = World(tmp_path, owners=SIX, attempts=2)
    lost: set[str] = set()

    def fault(owner: str, asked: str, _count: int) -> str:
        if asked == "SendMasked":
            lost.update({"south", "west"} if world.journal.unfinished("tools").plan.attempt == 1 else {"mid", "north"})  # type: ignore[union-attr]
        return "lose" if owner in lost else "deliver"

    world.carrier.fault = fault
    (record,) = asyncio.run(world.runner().run(1))
    assert record.state is RoundState.ABORTED
    assert len(record.measures["attempts"]) == 1
    assert world.registry.versions() == []


def test_a_coordinator_killed_between_attempts_goes_on_with_the_second(tmp_path: Path) -> None:
    """The plan of the next attempt is in the journal before anybody sees it."""
    world = World(tmp_path, owners=SIX)

    class KilledError(BaseException):
        """The process is gone."""

    killed: list[bool] = []

    def fault(owner: str, asked: str, _count: int) -> str:
        if asked == "Retry" and owner == "far" and not killed:
            killed.append(True)
            raise KilledError
        return "lose" if owner in {"south", "west"} and asked == "SendMasked" else "deliver"

    world.carrier.fault = fault
    with pytest.raises(KilledError):
        asyncio.run(world.runner().run(1))
    record = asyncio.run(world.runner().resume())
    assert record is not None
    assert record.state is RoundState.JUDGED, record.reason
    assert (record.plan.attempt, record.measures["survivors"]) == (2, 4)
    assert len(record.measures["attempts"]) == 1


def test_the_end_of_a_round_rides_on_the_next_plan(tmp_path: Path) -> None:
    """While more rounds are wanted no exchange is spent on saying goodbye; the last round is closed by itself."""
    world = World(tmp_path)
    runner = world.runner()

    async def run() -> None:
        world.journal.set_wanted("tools", 2)
        await runner.run_one()
        assert world.agents["east"].closed == []
        await runner.run_one()

    asyncio.run(run())
    assert world.agents["east"].told == ["judged"]
    assert world.agents["east"].closed == ["judged"]

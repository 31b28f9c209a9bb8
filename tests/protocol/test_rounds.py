"""Ten rounds in memory, with everything going wrong that four owners and a carrier can do."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from round_world import OWNERS, World

from fedllm.messages.round import Refused
from fedllm.server.ports import RoundState

STEPS = (
    "Begin", "FetchAdvertise", "ShareKeys", "SendMasked", "Confirm", "Unmask", "Evaluate", "FetchScores", "Close",
)  # fmt: skip


def test_one_round_publishes_the_mean(tmp_path: Path) -> None:
    """Four owners step by 0.01, 0.02, 0.03, 0.04: the version's B moved by their mean, and A not at all."""
    world = World(tmp_path)
    for i, agent in enumerate(world.agents.values()):
        agent.step = 0.01 * (i + 1)
    runner = world.runner()
    (record,) = asyncio.run(runner.run(1))
    assert record.state is RoundState.JUDGED, record.reason
    assert record.verdict is not None
    assert record.verdict.promote
    state = world.registry.state(world.registry.aliases().aliases[world.federation.alias])
    for name, array in state.factors.items():
        if name.endswith("lora_B"):
            np.testing.assert_allclose(array, 0.025, atol=1e-4)
    assert record.measures["published"]
    assert record.measures["train_s"] == 7.0
    assert set(record.measures["bytes_up"]) == set(OWNERS)
    assert list(record.measures["timings"])[:3] == ["PLANNED", "TRAINING", "SHARES"]
    assert all(agent.closed == ["judged"] for agent in world.agents.values())
    assert record.measures["attempts"] == []


@pytest.mark.parametrize("kind", STEPS)
def test_an_owner_lost_at_any_step_costs_nobody_the_round(tmp_path: Path, kind: str) -> None:
    """One of four goes silent from one step on: the round still ends with a version of three."""
    world = World(tmp_path)
    gone: list[str] = []

    def fault(owner: str, asked: str, _count: int) -> str:
        if owner == "west" and asked == kind:
            gone.append(owner)
        return "lose" if owner in gone else "deliver"

    world.carrier.fault = fault
    (record,) = asyncio.run(world.runner().run(1))
    assert record.state is RoundState.JUDGED, record.reason
    assert record.version is not None
    survivors = world.registry.get(record.version).manifest.survivors
    assert survivors == (4 if STEPS.index(kind) > STEPS.index("SendMasked") else 3)


def test_ten_rounds_with_a_dropout_somewhere_each_time(tmp_path: Path) -> None:
    """Every round loses another owner at another step, and the chain of versions has no gap."""
    world = World(tmp_path)
    runner = world.runner()

    async def run() -> list[RoundState]:
        states = []
        for number in range(10):
            lost, kind = OWNERS[number % 4], STEPS[number % len(STEPS)]
            gone: list[str] = []

            def fault(owner: str, asked: str, _count: int, lost: str = lost, kind: str = kind) -> str:
                if owner == lost and asked == kind:
                    gone.append(owner)  # noqa: B023 - each round's own list, called within it
                return "lose" if owner in gone else "deliver"  # noqa: B023

            world.carrier.fault = fault
            states.append((await runner.run_one()).state)
        return states

    assert asyncio.run(run()) == [RoundState.JUDGED] * 10
    versions = world.registry.versions()
    assert [v.number for v in versions] == list(range(1, 11))
    assert [v.manifest.parent for v in versions] == [None, *(v.digest for v in versions[:-1])]


@pytest.mark.parametrize("kind", STEPS)
def test_a_lost_reply_is_asked_for_again(tmp_path: Path, kind: str) -> None:
    """A reply that gets lost once is the same request again: no owner drops out, no work is done twice."""
    world = World(tmp_path)
    world.carrier.fault = lambda o, asked, count: "lose-reply" if (o, asked, count) == ("east", kind, 1) else "deliver"
    (record,) = asyncio.run(world.runner().run(1))
    assert record.state is RoundState.JUDGED
    assert record.version is not None
    assert world.registry.get(record.version).manifest.survivors == 4
    assert len(world.agents["east"].begun) == 1


@pytest.mark.parametrize("how", ["garble", "swap"])
def test_changed_and_replayed_replies_are_refused(tmp_path: Path, how: str) -> None:
    """A carrier that changes west's masked vector, or repeats an older reply in its place, loses west only."""
    world = World(tmp_path)
    world.carrier.fault = lambda o, asked, _c: how if (o, asked) == ("west", "SendMasked") else "deliver"
    (record,) = asyncio.run(world.runner().run(1))
    assert record.state is RoundState.JUDGED
    assert record.measures["survivors"] == 3
    codes = {f["code"] for f in record.measures["faults"] if f["owner"] == "west"}
    assert codes <= {"signature-invalid", "protocol", "decode"}
    assert codes


def test_a_node_that_speaks_for_another_owner_is_nobody(tmp_path: Path) -> None:
    """West's node signs with a key that the roster does not hold: it is bound to no owner."""
    from fedllm.identity import SigningIdentity

    world = World(tmp_path)
    world.agents["west"].identity = SigningIdentity.from_seed(b"\x09" * 32)
    runner = world.runner()
    (record,) = asyncio.run(runner.run(1))
    assert record.plan.cohort == ("east", "north", "south")
    assert record.state is RoundState.JUDGED


def test_too_few_owners_abort_with_the_reason(tmp_path: Path) -> None:
    """Two lost of four: no sum, no version, the journal says which phase and why, owners are told."""
    world = World(tmp_path)
    world.carrier.fault = lambda o, asked, _c: "lose" if o in {"west", "south"} and asked == "SendMasked" else "deliver"
    (record,) = asyncio.run(world.runner().run(1))
    assert record.state is RoundState.ABORTED
    assert record.reason is not None
    assert "mask: 2 of 4 owners answered in time, 3 needed" in record.reason
    assert world.registry.versions() == []
    assert world.registry.aliases().aliases == {}
    assert world.agents["east"].closed == ["aborted"]


def test_spent_budgets_name_their_code(tmp_path: Path) -> None:
    """When owners refuse for one reason, the round carries that reason's code: it becomes the exit code."""
    world = World(tmp_path)
    for name in ("west", "south"):
        world.agents[name].refuse = Refused("budget-exhausted", "epsilon 8.1 projected, 8 allowed", None)
    (record,) = asyncio.run(world.runner().run(1))
    assert (record.state, record.code) == (RoundState.ABORTED, "budget-exhausted")


def test_gate_holds_a_worse_candidate(tmp_path: Path) -> None:
    """Owners' losses rise: the version exists, the alias does not move, the next round starts from the old head."""
    world = World(tmp_path)
    runner = world.runner()
    (first,) = asyncio.run(runner.run(1))
    for agent in world.agents.values():
        agent.losses = (2.5, 2.0)
    second, third = asyncio.run(runner.run(2))
    assert second.verdict is not None
    assert not second.verdict.promote
    assert second.verdict.numbers["delta"] == pytest.approx(0.5, abs=1e-5)
    assert world.registry.aliases().aliases[world.federation.alias] == first.version
    assert third.plan.head_version == first.version


def test_without_scores_a_candidate_is_held(tmp_path: Path) -> None:
    """Two owners never score: the sum is good and stays as a version, but nothing is published."""
    world = World(tmp_path)
    world.carrier.fault = lambda o, asked, _c: "lose" if o in {"west", "south"} and asked == "Evaluate" else "deliver"
    (record,) = asyncio.run(world.runner().run(1))
    assert record.state is RoundState.JUDGED
    assert record.version is not None
    assert record.verdict is not None
    assert not record.verdict.promote
    assert "evaluate: 2 of 4" in record.verdict.reason


def test_an_alias_moved_meanwhile_stays_where_it_was_put(tmp_path: Path) -> None:
    """The operator rolls back while a round runs: the round's own move loses and the journal says why."""
    world = World(tmp_path)
    runner = world.runner()
    first, second = asyncio.run(runner.run(2))
    assert first.version is not None

    def fault(_owner: str, asked: str, _count: int) -> str:
        if asked == "Evaluate" and world.registry.aliases().aliases[world.federation.alias] == second.version:
            world.registry.rollback(world.federation.alias, actor="operator", reason="looks odd")
        return "deliver"

    world.carrier.fault = fault
    (third,) = asyncio.run(runner.run(1))
    assert third.code == "alias-conflict"
    assert not third.measures["published"]
    assert world.registry.aliases().aliases[world.federation.alias] == first.version


def test_an_operator_aborts_a_round(tmp_path: Path) -> None:
    """Abort ends the round at its next await; owners forget its secrets and the next round runs."""
    world = World(tmp_path)
    runner = world.runner()

    def fault(_owner: str, asked: str, _count: int) -> str:
        if asked == "ShareKeys" and runner.running == 1:
            runner.abort(1, "operator asked")
        return "deliver"

    world.carrier.fault = fault
    first, second = asyncio.run(runner.run(2))
    assert (first.state, first.code, first.reason) == (RoundState.ABORTED, "operator-abort", "operator asked")
    assert world.agents["north"].closed == ["aborted", "judged"]
    assert second.state is RoundState.JUDGED


def test_nothing_but_allowed_kinds_is_carried(tmp_path: Path) -> None:
    """Every byte string that crosses decodes to a kind on the allow-list, and no float32 update is inside."""
    from round_world import kind_of

    from fedllm.messages.round import BODIES

    world = World(tmp_path)
    world.agents["east"].step = 0.123
    asyncio.run(world.runner().run(1))
    plain = np.full(8, 0.123, dtype=np.float32).tobytes()
    assert {kind_of(data) for data in world.carrier.carried} <= set(BODIES)
    assert not any(plain in data for data in (*world.carrier.carried, *world.carrier.chunks))

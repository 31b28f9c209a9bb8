"""The round loop against the real owners' daemons: the two sides of the line are the ones that ship."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from round_world import OWNERS, SPEC, World, kind_of

from fedllm.client.daemon import Daemon
from fedllm.client.policy import OwnerPolicy
from fedllm.client.round import InlineWorker
from fedllm.client.toy import ToyTrainer
from fedllm.ids import FederationName, OwnerId
from fedllm.privacy.ledger import Ledger
from fedllm.relay.carrier import Reply
from fedllm.relay.memory import Faults, Handler, MemoryCarrier, Passage
from fedllm.rng import SeededRng
from fedllm.server.ports import RoundState
from fedllm.server.rounds.epsilon import advisory_epsilon
from fedllm.server.rounds.runner import RoundRunner

SETTINGS = {
    "privacy": True, "noise_multiplier": 1.0, "clip_norm": 1.0, "sample_rate": 0.5, "learning_rate": 0.02,
    "clip_range": 4.0, "declared_records": dict.fromkeys(OWNERS, 40), "gate_margin": 1.0,
}  # fmt: skip


class RealOwners:
    """A world whose owners are daemons with ledgers and a toy trainer."""

    def __init__(self, folder: Path, *, max_epsilon: float = 50.0) -> None:
        self.world = World(folder, **SETTINGS)
        self.world.clock.advance(1.0)
        self.daemons: dict[str, Daemon] = {}
        self.ledgers: dict[str, Ledger] = {}
        self._made: dict[str, dict[str, Any]] = {}
        for owner in OWNERS:
            home = folder / owner
            home.mkdir(parents=True)
            identity = self.world.agents[owner].identity
            policy = OwnerPolicy(max_epsilon=max_epsilon, delta=1e-5, allowed_bases=(SPEC.base,))
            trainer = ToyTrainer(SPEC.base, OwnerId(owner))
            self.ledgers[owner] = Ledger.open(
                home / "ledger.jsonl", identity, self.world.clock, dataset=trainer.dataset,
                limit_epsilon=policy.limit_epsilon, delta=policy.delta,
            )  # fmt: skip
            self._made[owner] = {
                "owner": OwnerId(owner), "federation": FederationName("tools"), "home": home, "identity": identity,
                "roster": self.world.roster, "coordinator": self.world.identity.public, "policy": policy,
                "ledger": self.ledgers[owner], "trainer": trainer, "clock": self.world.clock, "release": "test",
            }  # fmt: skip
            self.daemons[owner] = self.new_daemon(owner, owner)
        self.faults = Faults()

    def new_daemon(self, owner: str, seed: str) -> Daemon:
        """Return a daemon that was started just now on an owner's folder."""
        return Daemon(**self._made[owner], rng=SeededRng(seed), worker=InlineWorker())

    def runner(self) -> RoundRunner:
        """Return a coordinator that was started just now."""
        handlers = {f"node-{o}": d.handle for o, d in self.daemons.items()}
        self.world.carrier = MemoryCarrier(handlers, faults=self.faults)  # type: ignore[assignment]
        self.world.epsilon_of = advisory_epsilon
        return self.world.runner()


def test_three_rounds_of_real_dp_sgd(tmp_path: Path) -> None:
    """Versions are made, losses fall, and the manifest's advisory epsilon is what every ledger of record says."""
    owners = RealOwners(tmp_path)
    records = asyncio.run(owners.runner().run(3))
    assert [r.state for r in records] == [RoundState.JUDGED] * 3, [r.reason for r in records]
    versions = owners.world.registry.versions()
    assert [v.number for v in versions] == [1, 2, 3]
    spent = {ledger.spent() for ledger in owners.ledgers.values()}
    assert len(spent) == 1
    assert max(spent) == pytest.approx(versions[-1].manifest.privacy.epsilon)
    assert not any(math.isinf(e) for e in spent)
    metrics = [v.manifest.metrics for v in versions]
    assert metrics[-1]["candidate_loss"] < metrics[0]["head_loss"]
    assert metrics[1]["head_loss"] == pytest.approx(metrics[0]["candidate_loss"], abs=1e-5)
    assert "train_loss" not in metrics[0], "under DP no private loss is summed"


def test_spent_budgets_end_the_rounds(tmp_path: Path) -> None:
    """The owners' own limit, not the coordinator's wish, decides: the round aborts with budget-exhausted."""
    owners = RealOwners(tmp_path, max_epsilon=7.0)
    runner = owners.runner()
    records = asyncio.run(runner.run(3))
    last = records[-1]
    assert (last.state, last.code) == (RoundState.ABORTED, "budget-exhausted")
    assert records[0].state is RoundState.JUDGED
    assert all(ledger.spent() <= 7.0 for ledger in owners.ledgers.values())


def test_a_carrier_that_doubles_and_reorders_changes_nothing(tmp_path: Path) -> None:
    """Every request delivered twice, nodes asked backwards: one training each, the same version."""
    plain = RealOwners(tmp_path / "plain")
    (expected,) = asyncio.run(plain.runner().run(1))
    owners = RealOwners(tmp_path / "noisy")
    owners.faults = Faults(duplicate=lambda _p: True, reorder=lambda nodes: tuple(reversed(nodes)))
    (record,) = asyncio.run(owners.runner().run(1))
    assert record.state is RoundState.JUDGED
    assert record.measures["survivors"] == 4
    assert record.version == expected.version
    assert all(len(ledger.reservations()) == 1 for ledger in owners.ledgers.values())


def test_lost_messages_both_ways_are_made_good(tmp_path: Path) -> None:
    """Every ninth message is lost: the round still ends, by itself, with a version or a reason."""
    owners = RealOwners(tmp_path)

    def every_ninth(passage: Passage) -> bool:
        return passage.index % 9 == 8

    owners.faults = Faults(drop=every_ninth)
    (record,) = asyncio.run(owners.runner().run(1))
    assert record.state is RoundState.JUDGED, record.reason
    assert record.version is not None


def test_a_daemon_killed_in_mid_round_is_a_dropout(tmp_path: Path) -> None:
    """West's daemon vanishes once it has shared its keys: the other three finish, and its masks come off."""
    owners = RealOwners(tmp_path)
    runner = owners.runner()
    carrier = owners.world.carrier

    def gone(passage: Passage) -> bool:
        return passage.node == "node-west" and passage.index >= 24

    carrier._faults = Faults(drop=gone)  # type: ignore[attr-defined]
    (record,) = asyncio.run(runner.run(1))
    assert record.state is RoundState.JUDGED
    assert record.measures["survivors"] == 3


@pytest.mark.parametrize("kind", ["ShareKeys", "SendMasked", "Confirm"])
def test_owners_that_were_restarted_are_in_the_next_attempt(tmp_path: Path, kind: str) -> None:
    """Two of four are killed and start again: too few for this sum, all there for the next, and none trains twice."""
    owners = RealOwners(tmp_path)
    runner = owners.runner()
    handlers = owners.world.carrier._handlers  # type: ignore[attr-defined]
    restarted: set[str] = set()

    def restarting(owner: str) -> Handler:
        async def handle(data: bytes) -> Reply:
            if kind_of(data) == kind and owner not in restarted:
                restarted.add(owner)
                owners.daemons[owner] = owners.new_daemon(owner, f"{owner} again")
            return await owners.daemons[owner].handle(data)

        return handle

    handlers.update({f"node-{owner}": restarting(owner) for owner in ("south", "west")})
    (record,) = asyncio.run(runner.run(1))
    assert restarted == {"south", "west"}
    assert record.state is RoundState.JUDGED, record.reason
    assert (record.plan.attempt, record.measures["survivors"]) == (2, 4)
    assert all(len(ledger.reservations()) == 1 for ledger in owners.ledgers.values())

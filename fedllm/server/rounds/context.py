"""What the phases of one round share: its frozen inputs, its ports, its machines, and what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fedllm.aggregation.secagg.coordinator import SecAggCoordinator
from fedllm.clock import Clock
from fedllm.identity import SigningIdentity
from fedllm.ids import OwnerId
from fedllm.messages.plan import RoundPlan, SignedPlan, honest_threshold
from fedllm.messages.round import Refused
from fedllm.registry.store import Registry
from fedllm.server.federation import Federation, Head
from fedllm.server.journal import Journal
from fedllm.server.ports import Progress, RoundEvent, RoundState
from fedllm.server.roster import Fault, Roll


@dataclass
class RoundContext:
    """One round in progress: its frozen inputs, its ports, and both sums' machines.

    Attributes
    ----------
    update, evaluation : SecAggCoordinator
        The coordinator's side of the two sums; rebuilt from the journal after a restart.
    refusals : dict[OwnerId, Refused]
        What owners said no with, for the reason of an abort.
    alive : set[OwnerId]
        Owners that answered the last phase well: who is left for another attempt.
    trained : set[OwnerId]
        Owners that hold an update of this round: one that was restarted since is out of an attempt, not of the round.
    attempts : list[dict]
        Code, reason and cohort of every attempt at the sum that failed.
    known_faults : list[Fault]
        Of the attempts before; each attempt has machines of its own.
    saturated : float or None
        Mean share of entries that the clip range cut, from the masked sum; None until it was opened.
    phase_s : dict[str, float]
        Wall seconds by state.
    started : float
        When the round was planned, seconds since the epoch.
    train_s : float
        Wall seconds of the slowest owner's training, as the owners report it.
    """

    federation: Federation
    identity: SigningIdentity
    plan: RoundPlan
    signed: SignedPlan
    head: Head
    roll: Roll
    journal: Journal
    registry: Registry
    clock: Clock
    progress: Progress
    update: SecAggCoordinator
    evaluation: SecAggCoordinator
    refusals: dict[OwnerId, Refused] = field(default_factory=dict)
    alive: set[OwnerId] = field(default_factory=set)
    trained: set[OwnerId] = field(default_factory=set)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    known_faults: list[Fault] = field(default_factory=list)
    phase_s: dict[str, float] = field(default_factory=dict)
    state: RoundState = RoundState.PLANNED
    entered: float | None = None
    started: float = 0.0
    train_s: float = 0.0
    survivors: int = 0
    saturated: float | None = None
    published: bool = False

    @property
    def name(self) -> str:
        """The federation's name."""
        return self.plan.federation

    @property
    def number(self) -> int:
        """The round's number."""
        return int(self.plan.round)

    @property
    def quorum(self) -> int:
        """Owners that every phase of an attempt needs, up to unmasking."""
        return max(honest_threshold(len(self.plan.cohort)), self.plan.min_survivors)

    def enter(self, state: RoundState) -> None:
        """Journal a transition, then act on it."""
        self.stop_watch()
        self.state = state
        self.journal.advance(self.name, self.number, state, self.measures())
        self.progress(RoundEvent(self.name, self.number, state))

    def stop_watch(self) -> None:
        """Add the time since the last transition to the state that ends."""
        now = self.clock.monotonic()
        if self.entered is not None:
            self.phase_s[self.state] = self.phase_s.get(self.state, 0.0) + now - self.entered
        self.entered = now

    def save_measures(self) -> None:
        """Journal what was measured so far."""
        self.journal.measure(self.name, self.number, self.measures())

    def measures(self) -> dict[str, Any]:
        """Return what was measured so far: seconds by phase, bytes by owner, faults by code; no content."""
        wall_s = self.clock.now() - self.started
        faults = dict.fromkeys([*self.roll.faults, *self.known_faults, *self.protocol_faults()])
        return {
            "timings": self.phase_s,
            "bytes_up": self.roll.traffic.up,
            "bytes_down": self.roll.traffic.down,
            "wall_s": wall_s,
            "train_s": self.train_s,
            "overhead_s": wall_s - self.train_s,
            "published": self.published,
            "survivors": self.survivors,
            "attempts": self.attempts,
            "saturated": self.saturated,
            "faults": [{"owner": f.owner, "code": f.code, "message": f.message} for f in faults],
            "refusals": {o: {"code": r.code, "message": r.message} for o, r in self.refusals.items()},
        }

    def protocol_faults(self) -> list[Fault]:
        """Return what this attempt's machines found wrong, and with whom."""
        found = {**self.update.faults, **self.evaluation.faults}
        return [Fault(owner, "protocol", why) for owner, why in sorted(found.items())]

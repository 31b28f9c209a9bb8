"""What the round loop speaks of and what it is handed: states, events, verdicts, and the ports around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from fedllm.aggregation.vector import ScoreSum
from fedllm.ids import OwnerId
from fedllm.messages.mechanism import Mechanism


class RoundState(StrEnum):
    """How far a round is. Journalled before it is acted on; only ever later ones follow."""

    PLANNED = "PLANNED"
    TRAINING = "TRAINING"
    SHARES = "SHARES"
    MASKED = "MASKED"
    CONFIRM = "CONFIRM"
    UNMASK = "UNMASK"
    AGGREGATED = "AGGREGATED"
    EVALUATING = "EVALUATING"
    JUDGED = "JUDGED"
    ABORTED = "ABORTED"

    @property
    def final(self) -> bool:
        """Whether nothing of the round's outcome can change any more."""
        return self in {RoundState.JUDGED, RoundState.ABORTED}


STATE_ORDER = tuple(RoundState)


@dataclass(frozen=True)
class RoundEvent:
    """Progress of a round: `owner` has done `done` of `total` in `state` (all owners when None)."""

    federation: str
    round: int
    state: RoundState
    owner: OwnerId | None = None
    done: int = 0
    total: int = 0


Progress = Callable[[RoundEvent], None]


@dataclass(frozen=True)
class Verdict:
    """What the gate decided about a candidate, with the numbers it decided by."""

    promote: bool
    reason: str
    numbers: dict[str, float] = field(default_factory=dict)


class Gate(Protocol):
    """Decides whether a candidate is published."""

    def judge(self, scores: ScoreSum) -> Verdict:
        """Return the verdict on a candidate from masked sums only."""


EpsilonOf = Callable[[Sequence[Mechanism], float, str], float | None]
"""(mechanisms of every round planned, delta, unit) to epsilon; None when nothing bounds it."""

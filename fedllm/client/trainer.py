"""The trainer as a port: what a round needs of local training, whatever does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fedllm.adapter import AdapterState, Factor
from fedllm.errors import PolicyRefused
from fedllm.ids import Digest, OwnerId
from fedllm.messages.plan import RoundPlan
from fedllm.rng import Rng

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass(frozen=True)
class Trained:
    """What local training made; stays on the owner's machine.

    Attributes
    ----------
    state : AdapterState
        The head with this round's factors trained.
    records : int
        Training records held (not the number sampled).
    mean_loss : float or None
        Mean training loss per record; None under DP, where it would be a release outside epsilon.
    steps : int
    seconds : float
        Wall time.
    """

    state: AdapterState
    records: int
    mean_loss: float | None
    steps: int
    seconds: float


@dataclass(frozen=True)
class Scores:
    """Held-out loss of one adapter: mean over all answer tokens, in nats."""

    mean_loss: float
    records: int
    tokens: int


class Trainer(Protocol):
    """Local training and scoring on one owner's data."""

    @property
    def base(self) -> Digest:
        """Digest of the base model it trains on."""

    @property
    def dataset(self) -> Digest:
        """Digest of the owner's data files; goes into the ledger and nowhere else."""

    @property
    def records(self) -> int:
        """Number of usable training records."""

    def fit(
        self, head: AdapterState, plan: RoundPlan, factors: tuple[Factor, ...], rng: Rng, progress: Progress
    ) -> Trained:
        """Train `factors` from `head` by the plan's recipe and mechanism; all other factors stay bit for bit."""

    def score(self, state: AdapterState) -> Scores:
        """Return the held-out loss of an adapter."""


def declared_size(plan: RoundPlan, owner: OwnerId | None) -> int:
    """Return the public size that an owner's DP steps divide by.

    Raises
    ------
    PolicyRefused
        If the owner is not in the plan, or is not named and the plan has several.
    """
    if owner is None and len(plan.declared_records) == 1:
        return next(iter(plan.declared_records.values()))
    if owner is None or owner not in plan.declared_records:
        raise PolicyRefused(f"the plan declares no size for owner {owner!r}: it has {sorted(plan.declared_records)}")
    return plan.declared_records[owner]


def check_steps(plan: RoundPlan) -> None:
    """Refuse a plan that would train more noisy steps, or fewer, than its mechanism is priced for."""
    if plan.mechanism.kind != "none" and plan.mechanism.steps != plan.recipe.steps:
        raise PolicyRefused(
            f"the plan trains {plan.recipe.steps} steps and prices {plan.mechanism.steps}; they must be equal"
        )

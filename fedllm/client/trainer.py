"""The trainer as a port: what a round needs of local training, whatever does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedllm.adapter import AdapterState, Factor
from fedllm.errors import ConfigError, PolicyRefused
from fedllm.ids import Digest, OwnerId
from fedllm.messages.mechanism import DP_FTRL, DP_SGD
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
        Training units held (not the number sampled): records, or persons where the owner groups its records.
    mean_loss : float or None
        Mean training loss per record; None under any mechanism, where it would be a release outside epsilon.
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
        """Number of privacy units to train on: usable records, or persons where the owner groups its records.

        This is what an owner declares: sampling is of units, and DP steps are divided by their number.
        """

    def fit(
        self,
        head: AdapterState,
        plan: RoundPlan,
        factors: tuple[Factor, ...],
        rng: Rng,
        progress: Progress,
        *,
        charged: int = 0,
    ) -> Trained:
        """Train `factors` from `head` by the plan's recipe and mechanism; all other factors stay bit for bit.

        `charged` is how many steps of the plan's stream, if it has one, the ledger reserved for other plans before.
        """

    def score(self, state: AdapterState) -> Scores:
        """Return the held-out loss of an adapter."""


def declared_size(plan: RoundPlan, owner: OwnerId | None) -> int:
    """Return the public size, in units, that an owner's DP steps divide by.

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
    """Refuse a plan that would train more noisy steps, or fewer, than its mechanism is priced for.

    Only mechanisms in the silo make noise at each step; an owner's share of a sum's noise is added once, to the end.
    """
    if plan.mechanism.kind in {DP_SGD, DP_FTRL} and plan.mechanism.steps != plan.recipe.steps:
        raise PolicyRefused(
            f"the plan trains {plan.recipe.steps} steps and prices {plan.mechanism.steps}; they must be equal"
        )


def stream_folder(folder: Path | None) -> Path:
    """Return where a trainer's DP-FTRL streams are; raise `ConfigError` if it was given no place for them."""
    if folder is None:
        raise ConfigError(
            "the plan has a stream of correlated noise, and this trainer has no folder for its state",
            hint="give the trainer streams=...; the daemon keeps them in its home folder",
        )
    return folder

"""FFA-LoRA: train B, freeze A (Sun et al. 2024, arXiv 2403.12313)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedllm.adapter import F32, AdapterState, Factor
from fedllm.aggregation.methods.base import check_plan, difference, moved
from fedllm.messages.plan import RoundPlan

_FACTORS: tuple[Factor, ...] = ("B",)


@dataclass(frozen=True)
class Ffa:
    """B moves, A stays as it was drawn.

    With A shared and frozen, the mean of the products equals the product with the mean, and privacy noise
    enters linearly. Half of the factors are sent. The price: the row space of the adapter never moves.
    """

    name: ClassVar[str] = "ffa"
    one_rank: ClassVar[str | None] = "the columns of B belong to the rows of one shared A, and a sum needs all of them"

    def trainable(self, round_number: int) -> tuple[Factor, ...]:  # noqa: ARG002 - the same in every round
        """Return ``("B",)``."""
        return _FACTORS

    def update(self, trained: AdapterState, head: AdapterState, round_number: int) -> F32:
        """Return local minus global B, flat."""
        return difference(trained, head, self.trainable(round_number))

    def apply(self, head: AdapterState, step: F32, round_number: int) -> AdapterState:
        """Return the head with B moved by `step`."""
        return moved(head, step, self.trainable(round_number))

    def check(self, plan: RoundPlan) -> None:
        """Refuse a plan for another method or layout; every mechanism is supported."""
        check_plan(self, plan)

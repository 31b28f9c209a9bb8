"""FedIT: average A and B separately (Zhang et al. 2023, arXiv 2305.05644)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedllm.adapter import F32, AdapterState, Factor
from fedllm.aggregation.methods.base import check_plan, difference, moved
from fedllm.messages.plan import RoundPlan

_FACTORS: tuple[Factor, ...] = ("A", "B")


@dataclass(frozen=True)
class FedIt:
    """Both factors move: the baseline that other systems have, biased by its cross terms.

    The mean of ``B_i A_i`` is not the product of the means. Under differential privacy it is allowed, because
    clipping and accounting are the same as for any other vector, but the noise in A and in B multiplies:
    expect a worse model than ``ffa`` at the same epsilon.
    """

    name: ClassVar[str] = "fedit"
    one_rank: ClassVar[str | None] = "factors of other shapes do not add up, and padding would average in zeros"

    def trainable(self, round_number: int) -> tuple[Factor, ...]:  # noqa: ARG002 - the same in every round
        """Return ``("A", "B")``."""
        return _FACTORS

    def update(self, trained: AdapterState, head: AdapterState, round_number: int) -> F32:
        """Return local minus global factors, flat."""
        return difference(trained, head, self.trainable(round_number))

    def apply(self, head: AdapterState, step: F32, round_number: int) -> AdapterState:
        """Return the head with A and B moved by `step`."""
        return moved(head, step, self.trainable(round_number))

    def check(self, plan: RoundPlan) -> None:
        """Refuse a plan for another method or layout; every mechanism is supported."""
        check_plan(self, plan)

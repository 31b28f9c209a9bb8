"""What both sides derive from a plan for one sum, and what an owner accepts of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.aggregation.fixedpoint import RING_BITS
from fedllm.aggregation.secagg.keys import context
from fedllm.errors import ConfigError, PolicyRefused, ProtocolError
from fedllm.identity import Roster
from fedllm.ids import OwnerId
from fedllm.messages.plan import RoundPlan, honest_threshold

MIN_PUBLISHED = 3
"""A sum of fewer owners is never opened: of two, each could subtract its own."""


@dataclass(frozen=True)
class SumTerms:
    """The numbers of one masked sum.

    Attributes
    ----------
    ctx : bytes
        Names plan and purpose in every signature and derivation.
    cohort : tuple[OwnerId, ...]
        Sorted; an owner's share point is its index here plus one.
    threshold, floor : int
        Shamir's t; the least size of U1, U2 and U3.
    """

    ctx: bytes
    purpose: str
    cohort: tuple[OwnerId, ...]
    threshold: int
    floor: int
    ring_bits: int
    entries: int

    @classmethod
    def of(cls, plan: RoundPlan, purpose: str, roster: Roster, *, ring_bits: int, entries: int) -> SumTerms:
        """Return the terms of a plan that keeps secure aggregation's promises.

        Raises
        ------
        PolicyRefused
            If the threshold is below ``floor(2n/3) + 1``, fewer than three survivors would publish, or the
            plan's roster is not the one pinned here.
        ConfigError
            If ring or length is impossible.
        """
        n = len(plan.cohort)
        if plan.roster != roster.digest:
            raise PolicyRefused(
                f"the plan's roster {plan.roster[:12]}… is not the one pinned here, {roster.digest[:12]}…",
                hint="compare the two rosters with the operator; approve a new one by hand",
            )
        strangers = sorted(set(plan.cohort) - {member.owner for member in roster.members})
        if strangers:
            raise PolicyRefused(f"the plan's cohort names {strangers[0]!r}, who is not in the pinned roster")
        if not honest_threshold(n) <= plan.threshold <= n:
            raise PolicyRefused(
                f"the plan's threshold is {plan.threshold} of {n} owners, {honest_threshold(n)} to {n} allowed"
            )
        if not MIN_PUBLISHED <= plan.min_survivors <= n:
            raise PolicyRefused(
                f"the plan publishes from {plan.min_survivors} survivors of {n} on, {MIN_PUBLISHED} to {n} allowed"
            )
        if ring_bits not in RING_BITS or entries < 1:
            raise ConfigError(f"a masked sum of {entries} entries of {ring_bits} bits: 8, 16, 24 or 32, 1 or more")
        return cls(
            context(plan, purpose), purpose, plan.cohort, plan.threshold, max(plan.threshold, plan.min_survivors),
            ring_bits, entries,
        )  # fmt: skip

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry on the wire."""
        return self.ring_bits // 8

    @property
    def colluders(self) -> int:
        """The most colluding owners the threshold stands: fewer than a third of the cohort."""
        return (len(self.cohort) - 1) // 3

    def point(self, owner: OwnerId) -> int:
        """Return the point at which every secret is shared to `owner`."""
        return self.cohort.index(owner) + 1

    def check_set(self, owners: Sequence[OwnerId], within: Sequence[OwnerId], *, what: str) -> None:
        """Raise `ProtocolError` unless `owners` is sorted, unique, within the set before, and large enough."""
        if list(owners) != sorted(set(owners)):
            raise ProtocolError(f"{what} are not sorted and unique")
        extra = sorted(set(owners) - set(within))
        if extra:
            raise ProtocolError(f"{what} name {extra[0]!r}, who was not in the step before")
        if len(owners) < self.floor:
            raise ProtocolError(f"{what} are {len(owners)} owners, at least {self.floor} are needed")

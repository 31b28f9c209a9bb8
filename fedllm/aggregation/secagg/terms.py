"""What both sides derive from a plan for one sum, and what an owner accepts of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from fedllm.aggregation.fixedpoint import RING_BITS
from fedllm.aggregation.secagg import graph
from fedllm.aggregation.secagg.keys import context
from fedllm.errors import ConfigError, ProtocolError, RosterMismatch, SetRefused, ThresholdRefused
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
    neighbours : int
        Peers k that an owner deals its shares to.
    threshold : int
        Shamir's t of the holders of one owner's shares.
    floor : int
        The least size of U1, U2 and U3.
    ring_bits, entries : int
    """

    ctx: bytes
    purpose: str
    cohort: tuple[OwnerId, ...]
    neighbours: int
    threshold: int
    floor: int
    ring_bits: int
    entries: int

    @classmethod
    def of(cls, plan: RoundPlan, purpose: str, roster: Roster, *, ring_bits: int, entries: int) -> SumTerms:
        """Return the terms of a plan that keeps secure aggregation's promises.

        Raises
        ------
        RosterMismatch
            If the plan's roster is not the one pinned here, or the cohort names somebody who is not in it.
        ThresholdRefused
            If k and t protect less than they must (`graph.check`), or fewer than three survivors would publish.
        ConfigError
            If ring or length is impossible.
        """
        n = len(plan.cohort)
        if plan.roster != roster.digest:
            raise RosterMismatch(
                f"the plan's roster {plan.roster[:12]}… is not the one pinned here, {roster.digest[:12]}…",
                hint="compare the two rosters with the operator; approve a new one by hand",
            )
        strangers = sorted(set(plan.cohort) - {member.owner for member in roster.members})
        if strangers:
            raise RosterMismatch(f"the plan's cohort names {strangers[0]!r}, who is not in the pinned roster")
        graph.check(n, plan.neighbours, plan.threshold, plan.corruption, plan.dropout)
        if not MIN_PUBLISHED <= plan.min_survivors <= n:
            raise ThresholdRefused(
                f"the plan publishes from {plan.min_survivors} survivors of {n} on, {MIN_PUBLISHED} to {n} allowed"
            )
        if ring_bits not in RING_BITS or entries < 1:
            raise ConfigError(f"a masked sum of {entries} entries of {ring_bits} bits: 8, 16, 24 or 32, 1 or more")
        # On the complete graph every survivor is a holder, so t of them are needed as well.
        floor = max(honest_threshold(n), plan.min_survivors, plan.threshold if plan.neighbours == n - 1 else 0)
        return cls(
            context(plan, purpose), purpose, plan.cohort, plan.neighbours, plan.threshold, floor, ring_bits, entries
        )

    @property
    def complete(self) -> bool:
        """Whether everybody deals to everybody, and keeps a share of its own secrets."""
        return self.neighbours == len(self.cohort) - 1

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry on the wire."""
        return self.ring_bits // 8

    @property
    def colluders(self) -> int:
        """The most holders of one owner's shares that are assumed to collude.

        Fewer than a third of a complete graph; fewer than 2t - k of k picks.
        """
        if self.complete:
            return (len(self.cohort) - 1) // 3
        return 2 * self.threshold - self.neighbours - 1

    @cached_property
    def points(self) -> dict[OwnerId, int]:
        """The point at which every secret is shared to an owner, for each member of the cohort."""
        return {owner: place for place, owner in enumerate(self.cohort, 1)}

    def check_purpose(self, purpose: str) -> None:
        """Raise `ProtocolError` unless a message is for this sum."""
        if purpose != self.purpose:
            raise ProtocolError(f"a message for the sum {purpose!r}, {self.purpose!r} expected")

    def check_set(self, owners: Sequence[OwnerId], within: Collection[OwnerId], *, what: str) -> None:
        """Raise `SetRefused` unless `owners` is sorted, unique, within the set before, and large enough."""
        if list(owners) != sorted(set(owners)):
            raise SetRefused(f"{what} are not sorted and unique")
        extra = sorted(set(owners) - set(within))
        if extra:
            raise SetRefused(f"{what} name {extra[0]!r}, who was not in the step before")
        if len(owners) < self.floor:
            raise SetRefused(f"{what} are {len(owners)} owners, at least {self.floor} are needed")

    def check_picks(self, picks: Collection[OwnerId], owners: Collection[OwnerId], *, what: str) -> None:
        """Raise `SetRefused` on a sparse graph unless t of an owner's picks are in the set."""
        found = len(set(picks) & set(owners))
        if not self.complete and found < self.threshold:
            raise SetRefused(f"{what} hold {found} of this owner's neighbours, at least {self.threshold} are needed")

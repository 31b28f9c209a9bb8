"""A federation small enough to run secure aggregation thousands of times: names, keys, a plan, a whole sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from fedllm.adapter import AdapterSpec
from fedllm.aggregation.secagg import SecAggCoordinator, SecAggOwner, graph
from fedllm.errors import TwoViews
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import Digest, OwnerId, RoundNumber, sha256
from fedllm.messages.mechanism import Mechanism
from fedllm.messages.plan import PLAN_VERSION, Recipe, Ring, RoundPlan, honest_threshold
from fedllm.messages.secagg import PURPOSE_UPDATE, KeyBundle, ShareDelivery, UnmaskRequest
from fedllm.rng import OsRng, Rng

U32 = NDArray[np.uint32]
NAMES = tuple(OwnerId(name) for name in ("east", "far", "mid", "north", "south", "west", "yard"))
SPEC = AdapterSpec(sha256(b"base"), 2, 4, {"q_proj": (8, 8)}, (0,))
MANY = (*NAMES, *(OwnerId(f"z{i:02d}") for i in range(23)))
"""Thirty owners, sorted, for graphs that are not complete."""
IDENTITIES = {name: SigningIdentity.from_seed(bytes([i + 1] * 32)) for i, name in enumerate(MANY)}


def roster_of(names: Collection[OwnerId]) -> Roster:
    """Return the roster of the given owners."""
    return Roster.of({name: IDENTITIES[name].public for name in names})


def make_plan(names: tuple[OwnerId, ...], **changes: object) -> RoundPlan:
    """Return a plan for a cohort that every owner accepts, with some fields replaced."""
    roster = roster_of([name for name in names if name in IDENTITIES])
    plan = RoundPlan(
        version=PLAN_VERSION, federation="tools", round=RoundNumber(3), attempt=1, nonce=bytes(32), cohort=names,
        threshold=honest_threshold(len(names)), neighbours=len(names) - 1, corruption=0.0, dropout=0.0,
        min_survivors=3, roster=roster.digest, spec=SPEC,
        head=sha256(b"head"), head_version=None, layout=SPEC.layout(("B",)).digest, method="ffa",
        weights=dict.fromkeys(names, 1.0), declared_records=dict.fromkeys(names, 100),
        recipe=Recipe("sgd", 1.0, 2, 8, 8, 160), mechanism=Mechanism.none(), ring=Ring(24, 16, 4.0),
        train_deadline_s=60.0, phase_deadline_s=10.0,
    )  # fmt: skip
    return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]


class Remembered:
    """What steps were asked, kept in memory: the owner's write-once record of a test."""

    def __init__(self) -> None:
        self.seen: dict[tuple[bytes, str], Digest] = {}

    def __call__(self, ctx: bytes, step: str, digest: Digest) -> None:
        """Record, or refuse another digest."""
        if self.seen.setdefault((ctx, step), digest) != digest:
            raise TwoViews(f"{step} was asked before with something else")


@dataclass
class World:
    """Owners and a coordinator of one masked sum.

    Attributes
    ----------
    n, bits, entries : int
    plans : dict[OwnerId, RoundPlan]
        What single owners are shown instead of the common plan.
    graph : tuple[int, int] or None
        Neighbours and threshold; None for the complete graph.
    """

    n: int = 4
    bits: int = 24
    entries: int = 5
    purpose: str = PURPOSE_UPDATE
    rng: Rng = field(default_factory=OsRng)
    plans: Mapping[OwnerId, RoundPlan] = field(default_factory=dict)
    graph: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Make the parties."""
        self.names = MANY[: self.n]
        sparse = {} if self.graph is None else {"neighbours": self.graph[0], "threshold": self.graph[1]}
        self.plan = make_plan(self.names, **sparse)
        self.roster = roster_of(self.names)
        self.owners = {name: self.owner(name, plan=self.plans.get(name, self.plan)) for name in self.names}
        self.coordinator = self.new_coordinator()

    def owner(self, name: OwnerId, **changes: object) -> SecAggOwner:
        """Return an owner's state machine, with some arguments replaced."""
        arguments: dict[str, object] = {
            "plan": self.plan, "purpose": self.purpose, "owner": name, "identity": IDENTITIES[name],
            "roster": self.roster, "ring_bits": self.bits, "entries": self.entries, "rng": self.rng,
            "once": Remembered(),
        }  # fmt: skip
        with self.small_graphs():
            return SecAggOwner(**{**arguments, **changes})  # type: ignore[arg-type]

    def small_graphs(self) -> AbstractContextManager[object]:
        """Let this world's parties accept a sparse graph of few owners, whose rates are zero."""
        return nullcontext() if self.graph is None else patch.object(graph, "COMPLETE_UP_TO", 0)

    def new_coordinator(self) -> SecAggCoordinator:
        """Return a fresh coordinator."""
        with self.small_graphs():
            return SecAggCoordinator(
                plan=self.plan, purpose=self.purpose, roster=self.roster, ring_bits=self.bits, entries=self.entries
            )

    def values(self, name: OwnerId) -> U32:
        """Return an owner's values, drawn from its name; they use the whole ring."""
        seed = np.random.default_rng([self.names.index(name), 7])
        return seed.integers(0, 1 << self.bits, self.entries, dtype=np.uint64).astype(np.uint32)

    def advertise(self, missing: Collection[OwnerId] = ()) -> tuple[KeyBundle, ...]:
        """Run the first arrow without some owners; return U1."""
        return self.coordinator.advertised({o: self.owners[o].advertise() for o in self.names if o not in missing})

    def share(self, bundles: tuple[KeyBundle, ...], missing: Collection[OwnerId] = ()) -> dict[OwnerId, ShareDelivery]:
        """Run the second arrow without some owners; return the deliveries."""
        present = [b.owner for b in bundles if b.owner not in missing]
        return self.coordinator.shared({o: self.owners[o].share_keys(bundles) for o in present})

    def mask(
        self, deliveries: Mapping[OwnerId, ShareDelivery], missing: Collection[OwnerId] = ()
    ) -> tuple[OwnerId, ...]:
        """Run the third arrow without some owners; return U3."""
        for owner, delivery in deliveries.items():
            if owner not in missing:
                self.send_masked(owner, delivery)
        return self.coordinator.masked()

    def send_masked(self, owner: OwnerId, delivery: ShareDelivery) -> None:
        """Let one owner mask its values, and the coordinator add them."""
        self.coordinator.add_masked(owner, *self.owners[owner].mask(delivery, self.values(owner)))

    def confirm(
        self, survivors: tuple[OwnerId, ...], missing: Collection[OwnerId] = ()
    ) -> dict[OwnerId, UnmaskRequest]:
        """Run the fourth arrow without some owners; return what each who signed is asked."""
        signed = {owner: self.owners[owner].confirm(survivors) for owner in survivors if owner not in missing}
        return self.coordinator.confirmed(signed)

    def unmask(self, requests: Mapping[OwnerId, UnmaskRequest], missing: Collection[OwnerId] = ()) -> U32:
        """Run the last arrow without some owners; return the opened sum."""
        answers = {o: self.owners[o].unmask(request) for o, request in requests.items() if o not in missing}
        return self.coordinator.unmasked(answers)

    def survivors(self, missing: Collection[OwnerId] = ()) -> tuple[OwnerId, ...]:
        """Run the first three arrows, some owners lost before they mask; return U3."""
        return self.mask(self.share(self.advertise()), missing)

    def run(self, drops: Mapping[str, Collection[OwnerId]] | None = None) -> tuple[tuple[OwnerId, ...], U32]:
        """Run a whole sum, owners lost for good at an arrow; return U3 and the opened sum.

        Arrows: advertise, share, mask, confirm (after it masked), unmask.
        """
        gone: set[OwnerId] = set()
        lost = drops or {}
        gone |= set(lost.get("advertise", ()))
        bundles = self.advertise(gone)
        gone |= set(lost.get("share", ()))
        deliveries = self.share(bundles, gone)
        gone |= set(lost.get("mask", ()))
        survivors = self.mask(deliveries, gone)
        gone |= set(lost.get("confirm", ()))
        requests = self.confirm(survivors, gone)
        gone |= set(lost.get("unmask", ()))
        return survivors, self.unmask(requests, gone)

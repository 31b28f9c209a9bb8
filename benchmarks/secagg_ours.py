"""fedllm's secure aggregation as a provider: the state machines and the codec that rounds use."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.document import check
from fedllm import wire
from fedllm.adapter import AdapterSpec
from fedllm.aggregation.secagg import SecAggCoordinator, SecAggOwner, graph
from fedllm.aggregation.secagg.masking import MaskedInput
from fedllm.aggregation.vector import UpdateTail, UpdateVector
from fedllm.errors import TwoViews
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import Digest, OwnerId, RoundNumber, sha256
from fedllm.messages.mechanism import Mechanism
from fedllm.messages.plan import PLAN_VERSION, Recipe, Ring, RoundPlan
from fedllm.messages.secagg import (
    PURPOSE_UPDATE,
    KeyBundle,
    MaskedVector,
    ShareDelivery,
    ShareMessage,
    SurvivorSignature,
    UnmaskRequest,
    UnmaskShares,
)
from fedllm.rng import OsRng

RING_BITS = 24
TAIL = UpdateTail(records=100, train_loss=1.5)
F32 = NDArray[np.float32]


class Fedllm:
    """All parties of one masked sum; the methods are those of `benchmarks.secagg.Provider`.

    Parameters
    ----------
    owners, dim, dropouts : int
        Size of the cohort, entries of a vector, owners who never mask (the last ones).
    clip_range : float
        Of the fixed-point grid.
    value_bits : int
        Of one quantised entry; 16 in a ring of 24 bits has room for 256 owners.
    corruption, dropout : float
        Rates that the graph is made for; up to 128 owners it is complete whatever they are.

    Attributes
    ----------
    graph : Graph
    upload_bytes : int
        All that the first owner sent, in the wire's encoding.
    """

    def __init__(
        self, *, owners: int, dim: int, dropouts: int, clip_range: float, value_bits: int = 16, corruption: float = 0.0,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        self._names = [OwnerId(f"owner{i:04d}") for i in range(owners)]
        self._survivors = owners - dropouts
        self._identities = [SigningIdentity.from_seed(hashlib.sha256(name.encode()).digest()) for name in self._names]
        keys = {name: one.public for name, one in zip(self._names, self._identities, strict=True)}
        self._roster = Roster.of(keys)
        ring = Ring(RING_BITS, value_bits, clip_range)
        self.graph = graph.parameters(owners, corruption, dropout)
        self._plan = _plan(self._names, self._roster, ring, self.graph, (corruption, dropout))
        self._codec = UpdateVector(ring, owners, dim, covered=False)
        self._coordinator = SecAggCoordinator(
            plan=self._plan, purpose=PURPOSE_UPDATE, roster=self._roster, ring_bits=RING_BITS,
            entries=self._codec.entries,
        )  # fmt: skip
        self._owners: dict[int, SecAggOwner] = {}
        self._bundles: dict[OwnerId, KeyBundle] = {}
        self._listed: tuple[KeyBundle, ...] = ()
        self._shares: dict[OwnerId, ShareMessage] = {}
        self._deliveries: dict[OwnerId, ShareDelivery] = {}
        self._signatures: dict[OwnerId, SurvivorSignature] = {}
        self._requests: dict[OwnerId, UnmaskRequest] = {}
        self._answers: dict[OwnerId, UnmaskShares] = {}
        self._values = np.zeros(0, dtype=np.uint32)
        self._plain = np.zeros(self._codec.entries, dtype=np.uint64)
        self._total = np.zeros(0, dtype=np.uint32)
        self._recorded: dict[tuple[OwnerId, bytes, str], Digest] = {}
        self.upload_bytes = 0

    def setup(self, owner: int) -> None:
        """Make an owner's keys and sign them."""
        name = self._names[owner]

        def once(ctx: bytes, step: str, digest: Digest) -> None:
            if self._recorded.setdefault((name, ctx, step), digest) != digest:
                raise TwoViews(f"{step} was asked before with something else")

        self._owners[owner] = SecAggOwner(
            plan=self._plan, purpose=PURPOSE_UPDATE, owner=name, identity=self._identities[owner],
            roster=self._roster, ring_bits=RING_BITS, entries=self._codec.entries, rng=OsRng(), once=once,
        )  # fmt: skip
        self._bundles[name] = self._owners[owner].advertise()
        self._sent(owner, self._bundles[name])

    def list_keys(self) -> None:
        """Check and forward everybody's keys."""
        self._listed = self._coordinator.advertised(self._bundles)

    def share(self, owner: int) -> None:
        """Check keys, deal and seal shares."""
        self._shares[self._names[owner]] = self._owners[owner].share_keys(self._listed)
        self._sent(owner, self._shares[self._names[owner]])

    def forward(self) -> None:
        """Sort the sealed shares by receiver."""
        self._deliveries = self._coordinator.shared(self._shares)

    def masks(self, owner: int) -> int:
        """Return how many masks an owner adds: its own, and one for each neighbour."""
        name = self._names[owner]
        return 1 + len(set(self._shares[name].ciphertexts) | set(self._deliveries[name].ciphertexts))

    def mask(self, owner: int, update: F32) -> MaskedInput:
        """Quantise, open the peers' shares, agree on masks, add them, pack."""
        self._values = self._codec.encode(update, 1.0, TAIL, OsRng())
        return self._owners[owner].mask(self._deliveries[self._names[owner]], self._values)

    def add(self, owner: int, head: MaskedVector, chunks: Sequence[bytes]) -> None:
        """Check and add one vector."""
        self._coordinator.add_masked(self._names[owner], head, chunks)

    def collect(self, owner: int, vector: MaskedInput) -> None:
        """Add the vector; and, for the gate, what it hides."""
        self.add(owner, *vector)
        self.count(owner, vector)

    def count(self, owner: int, vector: MaskedInput) -> None:
        """Count what was sent, and add what it hides to the plain sum of the gate."""
        self._sent(owner, vector.head, vector.chunks)
        self._plain += self._values

    def confirm(self, owner: int) -> None:
        """Sign the survivors."""
        survivors = tuple(self._names[: self._survivors])
        self._signatures[self._names[owner]] = self._owners[owner].confirm(survivors)
        self._sent(owner, self._signatures[self._names[owner]])

    def settle(self) -> None:
        """Close the masking and gather signatures."""
        self._coordinator.masked()
        self._requests = self._coordinator.confirmed(self._signatures)

    def reveal(self, owner: int) -> None:
        """Check signatures and return shares."""
        name = self._names[owner]
        self._answers[name] = self._owners[owner].unmask(self._requests[name])
        self._sent(owner, self._answers[name])

    def open(self) -> None:
        """Open seeds and dropouts' keys, check them, take the masks off."""
        self._total = self._coordinator.unmasked(self._answers)

    def check(self, updates: Sequence[F32]) -> None:
        """Gate: the ring sum is the plain sum, and decodes to the float sum within a grid step an owner."""
        plain = (self._plain % (1 << RING_BITS)).astype(np.uint32)
        wrong = int(np.count_nonzero(plain != self._total))
        check(wrong == 0, f"fedllm: {wrong} of {plain.size} entries of the opened sum differ from the plain sum")
        off = self._codec.decode(self._total, self._survivors).update
        for owner in range(self._survivors):
            off -= updates[owner]
        worst = float(np.abs(off).max())
        allowed = self._survivors * self._codec.fixed_point.step
        check(worst <= allowed, f"fedllm: the decoded sum is {worst:.3g} off the float sum, {allowed:.3g} allowed")

    def _sent(self, owner: int, message: object, chunks: Sequence[bytes] = ()) -> None:
        if owner == 0:
            self.upload_bytes += len(wire.encode(message)) + sum(map(len, chunks))


def _plan(
    names: list[OwnerId], roster: Roster, ring: Ring, shape: graph.Graph, rates: tuple[float, float]
) -> RoundPlan:
    spec = AdapterSpec(sha256(b"base"), 2, 4, {"q_proj": (8, 8)}, (0,))
    return RoundPlan(
        version=PLAN_VERSION, federation="benchmark", round=RoundNumber(1), attempt=1, nonce=bytes(32),
        cohort=tuple(names), threshold=shape.threshold, neighbours=shape.neighbours, corruption=rates[0],
        dropout=rates[1], min_survivors=3, roster=roster.digest, spec=spec,
        head=sha256(b"head"), head_version=None, layout=spec.layout(("B",)).digest, method="ffa",
        weights=dict.fromkeys(names, 1.0), declared_records=dict.fromkeys(names, 100),
        recipe=Recipe("sgd", 1.0, 2, 8, 8, 160), mechanism=Mechanism.none(), ring=ring,
        train_deadline_s=60.0, phase_deadline_s=10.0,
    )  # fmt: skip

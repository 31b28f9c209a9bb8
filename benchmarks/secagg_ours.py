"""fedllm's secure aggregation as a provider: the state machines and the codec that rounds use."""

from __future__ import annotations

import hashlib
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.document import check
from fedllm import wire
from fedllm.adapter import AdapterSpec
from fedllm.aggregation.secagg import SecAggCoordinator, SecAggOwner
from fedllm.aggregation.vector import UpdateTail, UpdateVector
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import OwnerId, RoundNumber, sha256
from fedllm.messages.plan import Mechanism, Recipe, Ring, RoundPlan, honest_threshold
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
VALUE_BITS = 16
TAIL = UpdateTail(records=100, train_loss=1.5)
F32 = NDArray[np.float32]
T = TypeVar("T")


class Fedllm:
    """All parties of one masked sum; the methods are those of `benchmarks.secagg.Provider`.

    Parameters
    ----------
    owners, dim, dropouts : int
        Size of the cohort, entries of a vector, owners who never mask (the last ones).
    clip_range : float
        Of the fixed-point grid.
    """

    def __init__(self, *, owners: int, dim: int, dropouts: int, clip_range: float) -> None:
        self._names = [OwnerId(f"owner{i:04d}") for i in range(owners)]
        self._survivors = owners - dropouts
        self._identities = [SigningIdentity.from_seed(hashlib.sha256(name.encode()).digest()) for name in self._names]
        keys = {name: one.public for name, one in zip(self._names, self._identities, strict=True)}
        self._roster = Roster.of(keys)
        ring = Ring(RING_BITS, VALUE_BITS, clip_range)
        self._plan = _plan(self._names, self._roster, ring)
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
        self._request: UnmaskRequest | None = None
        self._answers: dict[OwnerId, UnmaskShares] = {}
        self._values = np.zeros(0, dtype=np.uint32)
        self._plain = np.zeros(self._codec.entries, dtype=np.uint64)
        self._total = np.zeros(0, dtype=np.uint32)
        self._uploaded: list[object] = []

    @property
    def upload_bytes(self) -> int:
        """All that the first owner sent, in the wire's encoding."""
        return sum(len(wire.encode(message)) for message in self._uploaded)

    def setup(self, owner: int) -> None:
        """Make an owner's keys and sign them."""
        self._owners[owner] = SecAggOwner(
            plan=self._plan, purpose=PURPOSE_UPDATE, owner=self._names[owner], identity=self._identities[owner],
            roster=self._roster, ring_bits=RING_BITS, entries=self._codec.entries, rng=OsRng(),
        )  # fmt: skip
        self._bundles[self._names[owner]] = self._sent(owner, self._owners[owner].advertise())

    def list_keys(self) -> None:
        """Check and forward everybody's keys."""
        self._listed = self._coordinator.advertised(self._bundles)

    def share(self, owner: int) -> None:
        """Check everybody's keys, deal and seal shares."""
        self._shares[self._names[owner]] = self._sent(owner, self._owners[owner].share_keys(self._listed))

    def forward(self) -> None:
        """Sort the sealed shares by receiver."""
        self._deliveries = self._coordinator.shared(self._shares)

    def mask(self, owner: int, update: F32) -> MaskedVector:
        """Quantise, open the peers' shares, agree on masks, add them, pack."""
        self._values = self._codec.encode(update, 1.0, TAIL, OsRng())
        return self._owners[owner].mask(self._deliveries[self._names[owner]], self._values)

    def collect(self, owner: int, vector: MaskedVector) -> None:
        """Add the vector; and, for the gate, what it hides."""
        self._sent(owner, vector)
        self._coordinator.add_masked(self._names[owner], vector)
        self._plain += self._values

    def confirm(self, owner: int) -> None:
        """Sign the survivors."""
        survivors = tuple(self._names[: self._survivors])
        self._signatures[self._names[owner]] = self._sent(owner, self._owners[owner].confirm(survivors))

    def settle(self) -> None:
        """Close the masking and gather signatures."""
        self._coordinator.masked({})
        self._request = self._coordinator.confirmed(self._signatures)

    def reveal(self, owner: int) -> None:
        """Check all signatures and return shares."""
        assert self._request is not None
        self._answers[self._names[owner]] = self._sent(owner, self._owners[owner].unmask(self._request))

    def open(self) -> None:
        """Open seeds and dropouts' keys, check them, take the masks off."""
        self._total = self._coordinator.unmasked(self._answers)

    def check(self, updates: list[F32]) -> None:
        """Gate: the ring sum is the plain sum, and decodes to the float sum within a grid step an owner."""
        plain = (self._plain % (1 << RING_BITS)).astype(np.uint32)
        wrong = int(np.count_nonzero(plain != self._total))
        check(wrong == 0, f"fedllm: {wrong} of {plain.size} entries of the opened sum differ from the plain sum")
        opened = self._codec.decode(self._total, self._survivors)
        off = float(np.abs(opened.update - np.sum(updates[: self._survivors], axis=0, dtype=np.float64)).max())
        allowed = self._survivors * self._codec.fixed_point.step
        check(off <= allowed, f"fedllm: the decoded sum is {off:.3g} off the float sum, {allowed:.3g} allowed")

    def _sent(self, owner: int, message: T) -> T:
        if owner == 0:
            self._uploaded.append(message)
        return message


def _plan(names: list[OwnerId], roster: Roster, ring: Ring) -> RoundPlan:
    spec = AdapterSpec(sha256(b"base"), 2, 4, {"q_proj": (8, 8)}, (0,))
    return RoundPlan(
        version=1, federation="benchmark", round=RoundNumber(1), nonce=bytes(32), cohort=tuple(names),
        threshold=honest_threshold(len(names)), min_survivors=3, roster=roster.digest, spec=spec,
        head=sha256(b"head"), head_version=None, layout=spec.layout(("B",)).digest, method="ffa",
        weights=dict.fromkeys(names, 1.0), declared_records=dict.fromkeys(names, 100),
        recipe=Recipe("sgd", 1.0, 2, 8, 8, 160), mechanism=Mechanism.none(), ring=ring,
        train_deadline_s=60.0, phase_deadline_s=10.0,
    )  # fmt: skip

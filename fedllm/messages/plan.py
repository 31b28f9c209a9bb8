"""The `RoundPlan`: everything a round is, frozen, signed by the coordinator, checked by every owner.

Its digest goes into every key derivation of secure aggregation, so that two owners who were shown different
plans (or different global adapters, which the plan names by digest) produce masks that do not cancel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from fedllm import wire
from fedllm.adapter import AdapterSpec
from fedllm.errors import VersionUnsupported
from fedllm.identity import SigningIdentity, VerifyKey
from fedllm.ids import Digest, OwnerId, RoundNumber, sha256
from fedllm.messages.mechanism import Mechanism

PLAN_VERSION = 3
PLAN_CONTEXT = "fedllm/1/plan"
NONCE_BYTES = 32
MAX_ATTEMPTS = 8
"""Attempts at one sum that an owner takes part in: each draws keys, and on a sparse graph picks, anew."""


@dataclass(frozen=True)
class Recipe:
    """Local training as fixed constants.

    Attributes
    ----------
    optimizer : str
        ``sgd`` (with DP) or ``adamw``.
    learning_rate : float
        Under DP-SGD the step is ``learning_rate / clip_norm * noisy clipped sum / (sample_rate * declared size)``.
    steps : int
        Local optimiser steps.
    batch_size : int
        Records a step without DP (sampled without replacement); unused under DP, where `sample_rate` rules.
    microbatch : int
        Records that go through the model at once; changes memory, not the result.
    max_tokens : int
        Longer records are left out and counted.
    """

    optimizer: str
    learning_rate: float
    steps: int
    batch_size: int
    microbatch: int
    max_tokens: int


@dataclass(frozen=True)
class Ring:
    """The integer ring Z_2^bits in which masked vectors are added.

    Attributes
    ----------
    bits : int
        8, 16, 24 or 32; whole bytes, so that masks are packed without loss.
    value_bits : int
        Bits of one quantised entry.
    clip_range : float
        Entries are clipped to ``[-clip_range, clip_range]`` before quantising; saturation is counted.
    """

    bits: int
    value_bits: int
    clip_range: float

    def __post_init__(self) -> None:
        """Refuse a ring that no codec packs."""
        if self.bits not in {8, 16, 24, 32} or not 1 <= self.value_bits < self.bits:
            raise ValueError(
                f"ring of {self.bits} bits with {self.value_bits}-bit values: 8, 16, 24 or 32, values smaller"
            )
        if not (math.isfinite(self.clip_range) and self.clip_range > 0):
            raise ValueError("clip_range must be positive")

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry on the wire."""
        return self.bits // 8


@dataclass(frozen=True)
class RoundPlan:
    """One round, frozen.

    Attributes
    ----------
    version : int
        Wire version; owners refuse any but `PLAN_VERSION`.
    federation, round, attempt, nonce
        Which round, and which try at its sum, from 1 on: a failed attempt is tried again on the same updates,
        under a fresh nonce (32 bytes), so that no key of it is used twice.
    cohort : tuple[OwnerId, ...]
        Owners asked, sorted.
    threshold : int
        Shamir threshold t of the holders of one owner's shares; owners recompute and enforce it
        (`fedllm.aggregation.secagg.graph`).
    neighbours : int
        Peers k that each owner deals shares to: n - 1 on the complete graph.
    corruption, dropout : float
        Shares of the cohort that may collude with the coordinator, and that may drop out, for which k and t hold.
    min_survivors : int
        Fewer never publish a sum.
    roster : Digest
        Of the roster the coordinator uses; must equal the owner's own pinned copy.
    spec : AdapterSpec
        What is adapted; names the base model by digest.
    head : Digest
        Of the global adapter state that training starts from.
    layout : Digest
        Of the layout of this round's trainable factors.
    head_version : Digest or None
        The registry version the head is, for people; None for the untrained start.
    method : str
        Name of the LoRA method, e.g. ``ffa``.
    weights : dict[OwnerId, float] or None
        Public constants in (0, 1] (required under DP, where a private count must not leak); None lets each
        owner weigh by its own masked record count over `declared_records`.
    declared_records : dict[OwnerId, int]
        Public sizes the owners declared; the DP step divides by these, never by a private count.
    recipe, mechanism, ring
        Training, privacy and arithmetic.
    train_deadline_s, phase_deadline_s : float
        Seconds allowed to training, and to every later exchange.
    """

    version: int
    federation: str
    round: RoundNumber
    attempt: int
    nonce: bytes
    cohort: tuple[OwnerId, ...]
    threshold: int
    neighbours: int
    corruption: float
    dropout: float
    min_survivors: int
    roster: Digest
    spec: AdapterSpec
    head: Digest
    head_version: Digest | None
    layout: Digest
    method: str
    weights: dict[str, float] | None
    declared_records: dict[str, int]
    recipe: Recipe
    mechanism: Mechanism
    ring: Ring
    train_deadline_s: float
    phase_deadline_s: float

    def __post_init__(self) -> None:
        """Refuse plans no honest coordinator makes."""
        if len(self.nonce) != NONCE_BYTES:
            raise ValueError(f"plan nonce has {len(self.nonce)} bytes, {NONCE_BYTES} needed")
        if self.attempt < 1:
            raise ValueError(f"attempt {self.attempt}: attempts count from 1")
        if list(self.cohort) != sorted(set(self.cohort)):
            raise ValueError("cohort must be sorted and unique")
        if not (0 <= self.corruption < 1 and 0 <= self.dropout < 1):
            raise ValueError("corruption and dropout are shares of the cohort, in [0, 1)")
        if self.weights is not None and (
            set(self.weights) != set(self.cohort) or not all(0 < w <= 1 for w in self.weights.values())
        ):
            raise ValueError("weights must cover the cohort and lie in (0, 1]")
        if set(self.declared_records) != set(self.cohort) or min(self.declared_records.values(), default=0) < 1:
            raise ValueError("declared_records must cover the cohort and be positive")
        if self.mechanism.covered and self.weights is None:
            raise ValueError("under DP weights are public constants: a private count must not leave the owner")

    @cached_property
    def encoded(self) -> bytes:
        """Canonical bytes; what is signed and hashed."""
        return wire.encode(self)

    @cached_property
    def digest(self) -> Digest:
        """H(plan), bound into every key derivation of the round."""
        return sha256(self.encoded)

    def training(self) -> tuple[object, ...]:
        """Return what decides how one round is trained: plans of several attempts at one sum agree in it."""
        return (
            self.version, self.federation, self.round, self.roster, self.spec, self.head, self.head_version,
            self.layout, self.method, self.recipe, self.mechanism, self.ring,
        )  # fmt: skip


@dataclass(frozen=True)
class SignedPlan:
    """A plan as it travels."""

    plan: bytes
    signature: bytes

    @classmethod
    def sign(cls, plan: RoundPlan, identity: SigningIdentity) -> SignedPlan:
        """Sign with the coordinator's identity."""
        return cls(plan.encoded, identity.sign(PLAN_CONTEXT, plan.encoded))

    def open(self, coordinator: VerifyKey) -> RoundPlan:
        """Return the plan if the pinned coordinator signed it and its version is spoken here.

        Raises
        ------
        SignatureInvalid, VersionUnsupported, DecodeError
        """
        coordinator.verify(PLAN_CONTEXT, self.plan, self.signature)
        version = peek_version(self.plan)
        if version != PLAN_VERSION:
            raise VersionUnsupported(
                f"plan version {version} found, {PLAN_VERSION} spoken here",
                hint="install the same fedllm release on coordinator and owners",
            )
        return wire.decode(RoundPlan, self.plan)


def peek_version(encoded: bytes) -> int:
    """Return the version field of encoded plan bytes without trusting the rest."""
    return wire.peek_int(encoded, "version")


def honest_threshold(owners: int) -> int:
    """Return ``floor(2n/3) + 1``, the least t for which two views of the survivor set cannot both unmask.

    Complete graph with own share kept: an adversary needs t shares of each kind of one owner, an honest
    owner gives one kind, so 2t > n + corrupt holds for fewer than n/3 corrupt owners (Bonawitz et al. 2017).
    """
    return 2 * owners // 3 + 1

"""What a plan costs and promises, worked out from the plan alone: nobody is contacted, nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedllm import wire
from fedllm.aggregation.secagg.keys import KEY_BYTES, SEALED_BYTES, SIGNATURE_BYTES
from fedllm.aggregation.secagg.masking import CHUNK_BYTES
from fedllm.aggregation.secagg.shamir import SHARE_BYTES
from fedllm.aggregation.secagg.terms import SumTerms
from fedllm.client.pipeline import score_codec, update_codec
from fedllm.identity import Roster
from fedllm.ids import OwnerId
from fedllm.messages.envelope import COORDINATOR, ENVELOPE_VERSION, REQUEST_ID_BYTES, Envelope, Sealed
from fedllm.messages.plan import RoundPlan
from fedllm.messages.round import Advertised, Body, Confirmed, Masked, SharedKeys, Unmasked
from fedllm.messages.secagg import (
    PURPOSE_EVALUATION,
    PURPOSE_UPDATE,
    KeyBundle,
    MaskedVector,
    ShareMessage,
    SurvivorSignature,
    UnmaskShares,
)
from fedllm.server.rounds.epsilon import advisory_epsilon

_DIGEST_BYTES = 32
_SECONDS = 1.5  # any float has the same size on the wire


@dataclass(frozen=True)
class Forecast:
    """A plan in numbers.

    Attributes
    ----------
    owners : int
        Size of the cohort.
    graph : str
        ``complete`` or ``sparse``: whom an owner shares its secrets with.
    neighbours, threshold : int
        How many peers that is, and how many of the shares open a secret.
    corruption, dropout : float
        Shares of the cohort that may collude with the coordinator, and that may drop out.
    least_owners : int
        Owners that must be there for a round to be planned.
    least_survivors : int
        Owners whose vectors must arrive, or nothing is opened.
    entries, ring_bits, entry_bytes, value_bits : int
        The masked vector, with what travels beside the update.
    upload_bytes : int
        What one owner sends in a round in which nobody is lost.
    exchanges : int
        Requests to each owner in a round in which training and scoring end in time.
    mechanism : dict
        Of one round: as planned, with epsilon (None: no guarantee), and the noise over the signal of its sum where
        owners add the noise together.
    """

    federation: str
    method: str
    owners: int
    graph: str
    neighbours: int
    threshold: int
    corruption: float
    dropout: float
    least_owners: int
    least_survivors: int
    entries: int
    ring_bits: int
    entry_bytes: int
    value_bits: int
    upload_bytes: int
    exchanges: int
    mechanism: dict[str, Any]

    @classmethod
    def of(cls, plan: RoundPlan, roster: Roster) -> Forecast:
        """Work out a plan's numbers, as an owner with this roster would see them.

        Raises
        ------
        PolicyRefused
            If the plan breaks a promise of secure aggregation.
        MissingExtra
            If dp-accounting is not installed.
        """
        entries = update_codec(plan).entries
        terms = SumTerms.of(plan, PURPOSE_UPDATE, roster, ring_bits=plan.ring.bits, entries=entries)
        replies = _replies(plan, complete=terms.complete)
        mechanism = plan.mechanism
        epsilon = advisory_epsilon([mechanism], mechanism.delta, mechanism.unit) if mechanism.covered else None
        numbers = {**mechanism.to_fields(), "epsilon": epsilon}
        if mechanism.shares is not None:
            numbers["noise_over_signal"] = mechanism.noise_over_signal(len(plan.cohort))
        return cls(
            federation=plan.federation,
            method=plan.method,
            owners=len(plan.cohort),
            graph="complete" if terms.complete else "sparse",
            neighbours=plan.neighbours,
            threshold=plan.threshold,
            corruption=plan.corruption,
            dropout=plan.dropout,
            least_owners=plan.min_survivors,
            least_survivors=terms.floor,
            entries=entries,
            ring_bits=plan.ring.bits,
            entry_bytes=plan.ring.entry_bytes,
            value_bits=plan.ring.value_bits,
            upload_bytes=sum(_sealed_bytes(plan, body) for body in replies) + _vector_bytes(plan),
            exchanges=len(replies),
            mechanism=numbers,
        )


def _replies(plan: RoundPlan, *, complete: bool) -> Sequence[Body]:
    """Return what one owner answers in a round, with zeros for content."""
    owner, purposes = plan.cohort[0], (PURPOSE_UPDATE, PURPOSE_EVALUATION)
    dealt = {str(peer): bytes(SEALED_BYTES) for peer in plan.cohort[1 : plan.neighbours + 1]}
    # on the sparse graph as many picked this owner, on average, as it picked; on the complete one all hold a share
    holds = plan.cohort if complete else plan.cohort[1 : plan.neighbours + 1]
    opened = {str(peer): bytes(SHARE_BYTES) for peer in holds}
    bundles = [KeyBundle(owner, p, bytes(KEY_BYTES), bytes(KEY_BYTES), bytes(SIGNATURE_BYTES)) for p in purposes]
    shares = [ShareMessage(owner, p, bytes(KEY_BYTES), dealt) for p in purposes]
    scores = score_codec(plan)
    return (
        Advertised(bundles[0], bundles[1], _SECONDS),
        SharedKeys(shares[0], shares[1]),
        _masked(owner, PURPOSE_UPDATE, update_codec(plan).entries, plan.ring.entry_bytes),
        Confirmed(SurvivorSignature(owner, PURPOSE_UPDATE, bytes(SIGNATURE_BYTES))),
        Unmasked(UnmaskShares(owner, PURPOSE_UPDATE, opened, {})),
        _masked(owner, PURPOSE_EVALUATION, scores.entries, scores.ring.entry_bytes),
        Confirmed(SurvivorSignature(owner, PURPOSE_EVALUATION, bytes(SIGNATURE_BYTES))),
        Unmasked(UnmaskShares(owner, PURPOSE_EVALUATION, opened, {})),
    )


def _masked(owner: OwnerId, purpose: str, entries: int, entry_bytes: int) -> Masked:
    chunks = -(-entries * entry_bytes // CHUNK_BYTES)
    return Masked(MaskedVector(owner, purpose, entries, entry_bytes, (bytes(_DIGEST_BYTES),) * chunks))


def _vector_bytes(plan: RoundPlan) -> int:
    scores = score_codec(plan)
    return update_codec(plan).entries * plan.ring.entry_bytes + scores.entries * scores.ring.entry_bytes


def _sealed_bytes(plan: RoundPlan, body: Body) -> int:
    envelope = Envelope(
        ENVELOPE_VERSION, type(body).__name__, plan.federation, plan.round, plan.cohort[0], COORDINATOR,
        bytes(REQUEST_ID_BYTES), wire.encode(body),
    )  # fmt: skip
    return len(wire.encode(Sealed(wire.encode(envelope), bytes(SIGNATURE_BYTES))))

"""From a trained adapter to the masked vector that leaves: the one place where privacy and aggregation meet.

trained state -> method's update (local minus global) -> times the owner's weight -> fixed point on the ring ->
masks. Everything before the last step stays in this process and has no wire form.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedllm.adapter import AdapterState
from fedllm.aggregation.methods import get_method
from fedllm.aggregation.secagg.owner import SecAggOwner
from fedllm.aggregation.vector import OwnerScores, ScoreVector, UpdateTail, UpdateVector
from fedllm.errors import NonFiniteUpdate, ProtocolError, StepMismatch
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import Digest, OwnerId
from fedllm.messages.plan import RoundPlan
from fedllm.messages.secagg import (
    PURPOSE_EVALUATION,
    PURPOSE_UPDATE,
    KeyBundle,
    MaskedVector,
    ShareDelivery,
    ShareMessage,
    SurvivorSignature,
    UnmaskRequest,
    UnmaskShares,
)
from fedllm.rng import Rng

RingVector = NDArray[np.uint32]


def update_codec(plan: RoundPlan) -> UpdateVector:
    """Return the codec of a plan's update sum."""
    layout = plan.spec.layout(get_method(plan.method).trainable(plan.round))
    return UpdateVector(plan.ring, len(plan.cohort), layout.size, covered=plan.mechanism.kind != "none")


def score_codec(plan: RoundPlan) -> ScoreVector:
    """Return the codec of a plan's evaluation sum."""
    return ScoreVector(len(plan.cohort))


def weight_of(plan: RoundPlan, owner: OwnerId, records: int) -> float:
    """Return this owner's weight in (0, 1].

    Under DP it is the plan's public constant; else its own record count over the largest declared one, which
    travels only inside the masked sum.
    """
    if plan.weights is not None:
        return plan.weights[owner]
    return min(1.0, max(1, records) / max(plan.declared_records.values()))


def encode_update(
    plan: RoundPlan,
    owner: OwnerId,
    *,
    head: AdapterState,
    trained: AdapterState,
    records: int,
    mean_loss: float | None,
    rng: Rng,
) -> RingVector:
    """Return this owner's vector of the update sum, before masking.

    Parameters
    ----------
    plan : RoundPlan
    owner : OwnerId
    head, trained : AdapterState
        Global and local adapter; the update is their difference in the method's factors.
    records : int
        Training records, for the weight; unused under DP.
    mean_loss : float or None
        Training loss; neither computed nor encoded under DP.
    rng : Rng
        For stochastic rounding.

    Returns
    -------
    RingVector
        uint32, shape ``(entries,)``.

    Raises
    ------
    NonFiniteUpdate
        If training diverged.
    """
    update = get_method(plan.method).update(trained, head, plan.round)
    if not np.isfinite(update).all():
        raise NonFiniteUpdate("the update of this round holds NaN or infinity and is not sent")
    tail = UpdateTail(records=records, train_loss=0.0 if mean_loss is None else mean_loss)
    return update_codec(plan).encode(update, weight_of(plan, owner, records), tail, rng)


class OwnerSums:
    """One owner's part in the two masked sums of a round: the update and the evaluation.

    Each sum has its own keys; their set-up travels together. What each step allows is decided by
    `SecAggOwner`, which answers a step once.

    Parameters
    ----------
    plan, owner, identity, roster, rng
        As in `SecAggOwner`.
    """

    def __init__(self, plan: RoundPlan, owner: OwnerId, *, identity: SigningIdentity, roster: Roster, rng: Rng) -> None:
        def make(purpose: str, ring_bits: int, entries: int) -> SecAggOwner:
            return SecAggOwner(
                plan=plan, purpose=purpose, owner=owner, identity=identity, roster=roster, ring_bits=ring_bits,
                entries=entries, rng=rng,
            )  # fmt: skip

        scores = score_codec(plan)
        self._plan = plan
        self._rng = rng
        self._sums = {
            PURPOSE_UPDATE: make(PURPOSE_UPDATE, plan.ring.bits, update_codec(plan).entries),
            PURPOSE_EVALUATION: make(PURPOSE_EVALUATION, scores.ring.bits, scores.entries),
        }
        self._delivery: ShareDelivery | None = None
        self._scores: RingVector | None = None

    def __repr__(self) -> str:
        return f"OwnerSums(round {self._plan.round}, secrets redacted)"

    def advertise(self) -> tuple[KeyBundle, KeyBundle]:
        """Return fresh keys for both sums."""
        return self._sums[PURPOSE_UPDATE].advertise(), self._sums[PURPOSE_EVALUATION].advertise()

    def share_keys(
        self, update: Sequence[KeyBundle], evaluation: Sequence[KeyBundle]
    ) -> tuple[ShareMessage, ShareMessage]:
        """Return sealed shares for both sums."""
        return self._sums[PURPOSE_UPDATE].share_keys(update), self._sums[PURPOSE_EVALUATION].share_keys(evaluation)

    def mask_update(self, values: RingVector, update: ShareDelivery, evaluation: ShareDelivery) -> MaskedVector:
        """Return the masked update, and keep the evaluation's shares for `mask_scores`.

        Raises
        ------
        StepMismatch
            If other shares for the evaluation were delivered before.
        """
        if self._delivery not in (None, evaluation):
            raise StepMismatch("shares for the evaluation were delivered before, and are taken once")
        masked = self._sums[PURPOSE_UPDATE].mask(update, values)
        self._delivery = evaluation
        return masked

    def mask_scores(self, scores: OwnerScores) -> MaskedVector:
        """Return the masked scores of this owner; asked again, the same.

        Raises
        ------
        StepMismatch
            If the shares have not been delivered yet.
        """
        if self._delivery is None:
            raise StepMismatch("scores are asked for before this owner's update was")
        if self._scores is None:  # rounding is random: what is masked twice must have been encoded once
            self._scores = score_codec(self._plan).encode(scores, self._rng)
        return self._sums[PURPOSE_EVALUATION].mask(self._delivery, self._scores)

    def bind_candidate(self, candidate: Digest) -> None:
        """Bind the scores to the adapter they are of: owners shown different ones do not open a sum."""
        self._of(PURPOSE_EVALUATION).bind(bytes.fromhex(candidate))

    def confirm(self, purpose: str, survivors: Sequence[OwnerId]) -> SurvivorSignature:
        """Sign the survivor set of one sum."""
        return self._of(purpose).confirm(survivors)

    def unmask(self, request: UnmaskRequest) -> UnmaskShares:
        """Return the shares that open one sum."""
        return self._of(request.purpose).unmask(request)

    def close(self) -> None:
        """Overwrite the secrets of both sums."""
        for each in self._sums.values():
            each.close()

    def _of(self, purpose: str) -> SecAggOwner:
        found = self._sums.get(purpose)
        if found is None:
            raise ProtocolError(f"there is no sum {purpose[:40]!r} in a round, only update and evaluation")
        return found

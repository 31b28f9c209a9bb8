"""From a trained adapter to the masked vector that leaves: the one place where an update meets privacy and aggregation.

trained state -> method's update (local minus global) -> times the owner's weight -> fixed point on the ring ->
masks; or, where the unit is an owner: update -> clipped to integers -> plus this owner's share of the noise -> masks.
Everything before the last step stays in this process and has no wire form. `fedllm.client.limits` imports both too, to
hold a plan's numbers against each other; no update comes there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fedllm.adapter import AdapterState
from fedllm.aggregation.methods import get_method
from fedllm.aggregation.noised import NoisedVector
from fedllm.aggregation.secagg.masking import MaskedInput
from fedllm.aggregation.secagg.owner import SecAggOwner
from fedllm.aggregation.vector import OwnerScores, ScoreVector, UpdateTail, UpdateVector
from fedllm.client.kept import Answers, LocalUpdate
from fedllm.client.trainer import Trained
from fedllm.errors import NonFiniteUpdate, ProtocolError, StepMismatch, TwoViews
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import Digest, OwnerId
from fedllm.messages.mechanism import SKELLAM
from fedllm.messages.plan import RoundPlan
from fedllm.messages.secagg import (
    PURPOSE_EVALUATION,
    PURPOSE_UPDATE,
    Complaint,
    KeyBundle,
    ShareDelivery,
    ShareMessage,
    SurvivorSignature,
    UnmaskRequest,
    UnmaskShares,
)
from fedllm.privacy.skellam import SumGrid
from fedllm.rng import Rng

RingVector = NDArray[np.uint32]


def update_codec(plan: RoundPlan) -> UpdateVector | NoisedVector:
    """Return the codec of a plan's update sum."""
    size, owners = plan.spec.layout(get_method(plan.method).trainable(plan.round)).size, len(plan.cohort)
    if plan.mechanism.kind == SKELLAM:
        return NoisedVector.of(plan.mechanism, ring_bits=plan.ring.bits, owners=owners, layout_size=size)
    return UpdateVector(plan.ring, owners, size, covered=plan.mechanism.covered)


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


def local_update(plan: RoundPlan, *, head: AdapterState, trained: Trained, train_s: float) -> LocalUpdate:
    """Return what training moved: local minus global in the method's factors.

    Raises
    ------
    NonFiniteUpdate
        If training diverged.
    """
    update = get_method(plan.method).update(trained.state, head, plan.round)
    if not np.isfinite(update).all():
        raise NonFiniteUpdate("the update of this round holds NaN or infinity and is not sent")
    return LocalUpdate(update, trained.records, trained.mean_loss, train_s)


def encode_update(plan: RoundPlan, owner: OwnerId, local: LocalUpdate, rng: Rng) -> RingVector:
    """Return this owner's vector of the update sum, before masking.

    Encoded anew for every attempt: cohort and weights differ, the rounding is random, and where noise is added here,
    an attempt is a release of its own, with noise of its own, that the ledger was charged for.

    Parameters
    ----------
    plan : RoundPlan
        Of this attempt.
    owner : OwnerId
    local : LocalUpdate
        Its loss is neither computed nor encoded under DP.
    rng : Rng
        For stochastic rounding, and for this owner's share of the noise.

    Returns
    -------
    RingVector
        uint32, shape ``(entries,)``.
    """
    codec = update_codec(plan)
    if isinstance(codec, NoisedVector):
        return codec.encode(SumGrid.of(plan.mechanism).noised(local.update, plan.mechanism, rng))
    tail = UpdateTail(records=local.records, train_loss=0.0 if local.mean_loss is None else local.mean_loss)
    return codec.encode(local.update, weight_of(plan, owner, local.records), tail, rng)


Observer = Callable[[OwnerId, RingVector], None]
"""Called with an owner's vector of the update sum just before it is masked: how a simulation checks the sum."""


class OwnerSums:
    """One owner's part in the two masked sums of one attempt at a round: the update and the evaluation.

    Each sum has its own keys; their set-up travels together. What each step allows is decided by
    `SecAggOwner`, which answers a step once, and by `Answers`, which remembers it over restarts.

    Parameters
    ----------
    plan, owner, identity, roster, rng
        As in `SecAggOwner`.
    answers : Answers
    observer : Observer, optional
        For simulations, where all owners are one's own.
    """

    def __init__(
        self,
        plan: RoundPlan,
        owner: OwnerId,
        *,
        identity: SigningIdentity,
        roster: Roster,
        rng: Rng,
        answers: Answers,
        observer: Observer | None = None,
    ) -> None:
        def make(purpose: str, ring_bits: int, entries: int) -> SecAggOwner:
            return SecAggOwner(
                plan=plan, purpose=purpose, owner=owner, identity=identity, roster=roster, ring_bits=ring_bits,
                entries=entries, rng=rng, once=partial(answers.once, purpose),
            )  # fmt: skip

        scores = score_codec(plan)
        self._plan = plan
        self._owner = owner
        self._rng = rng
        self._observer = observer
        self._sums = {
            PURPOSE_UPDATE: make(PURPOSE_UPDATE, plan.ring.bits, update_codec(plan).entries),
            PURPOSE_EVALUATION: make(PURPOSE_EVALUATION, scores.ring.bits, scores.entries),
        }
        self._delivery: ShareDelivery | None = None
        self._update: RingVector | None = None
        self._scores: RingVector | None = None

    def __repr__(self) -> str:
        return f"OwnerSums(round {self._plan.round}, attempt {self._plan.attempt}, secrets redacted)"

    def advertise(self) -> tuple[KeyBundle, KeyBundle]:
        """Return fresh keys for both sums."""
        return self._sums[PURPOSE_UPDATE].advertise(), self._sums[PURPOSE_EVALUATION].advertise()

    def share_keys(
        self, update: Sequence[KeyBundle], evaluation: Sequence[KeyBundle]
    ) -> tuple[ShareMessage, ShareMessage]:
        """Return sealed shares for both sums."""
        return self._sums[PURPOSE_UPDATE].share_keys(update), self._sums[PURPOSE_EVALUATION].share_keys(evaluation)

    def mask_update(self, local: LocalUpdate, update: ShareDelivery, evaluation: ShareDelivery) -> MaskedInput:
        """Return the masked update, and keep the evaluation's shares for `mask_scores`.

        Raises
        ------
        SharesUnopenable
            Naming every dealer whose shares do not open; `complaint` says so to the coordinator.
        TwoViews
            If other shares for the evaluation were delivered before.
        """
        if self._delivery not in (None, evaluation):
            raise TwoViews("shares for the evaluation were delivered before, and are taken once")
        if self._update is None:  # rounding is random: what is masked twice must have been encoded once
            self._update = encode_update(self._plan, self._owner, local, self._rng)
        masked = self._sums[PURPOSE_UPDATE].mask(update, self._update)
        if self._observer is not None:
            self._observer(self._owner, self._update)
        self._delivery = evaluation
        return masked

    def mask_scores(self, scores: OwnerScores) -> MaskedInput:
        """Return the masked scores of this owner; asked again, the same.

        Raises
        ------
        StepMismatch
            If the shares have not been delivered yet.
        SharesUnopenable
        """
        if self._delivery is None:
            raise StepMismatch("scores are asked for before this owner's update was")
        if self._scores is None:
            self._scores = score_codec(self._plan).encode(scores, self._rng)
        return self._sums[PURPOSE_EVALUATION].mask(self._delivery, self._scores)

    def complaint(self, purpose: str, dealers: Sequence[str]) -> Complaint:
        """Return what is sent instead of a vector when shares do not open."""
        return self._of(purpose).complaint([OwnerId(dealer) for dealer in dealers])

    def bind_candidate(self, candidate: Digest) -> None:
        """Bind the scores to the adapter they are of: owners shown different ones do not open a sum."""
        self._of(PURPOSE_EVALUATION).bind(bytes.fromhex(candidate))

    def confirm(self, purpose: str, survivors: Sequence[OwnerId]) -> SurvivorSignature:
        """Sign the survivor set of one sum."""
        return self._of(purpose).confirm(survivors)

    def unmask(self, request: UnmaskRequest) -> UnmaskShares:
        """Return the shares that open one sum, and overwrite that sum's secrets: nothing more is asked of it."""
        machine = self._of(request.purpose)
        shares = machine.unmask(request)
        machine.close()
        if request.purpose == PURPOSE_UPDATE:
            self._update = None
        return shares

    def close(self) -> None:
        """Overwrite the secrets of both sums."""
        for each in self._sums.values():
            each.close()
        self._update = self._scores = None

    def _of(self, purpose: str) -> SecAggOwner:
        found = self._sums.get(purpose)
        if found is None:
            raise ProtocolError(f"there is no sum {purpose[:40]!r} in a round, only update and evaluation")
        return found

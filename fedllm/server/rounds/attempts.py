"""From a signed plan to the opened sum of the updates, in as many attempts as it takes and the federation allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedllm.aggregation.methods import get_method
from fedllm.aggregation.noised import NoisedVector
from fedllm.aggregation.secagg.coordinator import SecAggCoordinator
from fedllm.aggregation.vector import ScoreVector, UpdateSum, UpdateVector
from fedllm.errors import RoundAborted
from fedllm.identity import Roster
from fedllm.ids import OwnerId
from fedllm.messages.mechanism import SKELLAM
from fedllm.messages.plan import RoundPlan, SignedPlan
from fedllm.messages.round import Ended
from fedllm.messages.secagg import PURPOSE_EVALUATION, PURPOSE_UPDATE
from fedllm.rng import Rng
from fedllm.server.plan import next_attempt
from fedllm.server.ports import RoundState
from fedllm.server.rounds.begin import begin
from fedllm.server.rounds.confirming import confirm
from fedllm.server.rounds.context import RoundContext
from fedllm.server.rounds.masking import mask
from fedllm.server.rounds.sharing import share
from fedllm.server.rounds.training import retry, train
from fedllm.server.rounds.unmasking import unmask

Opened = Callable[[RoundPlan, Sequence[OwnerId], NDArray[np.uint32]], None]
"""Called with plan, survivors and opened ring sum of the updates: how a simulation checks it entry by entry."""


_RESTARTED = frozenset({"step-mismatch", "two-views"})
"""With these an owner refuses an attempt that an earlier process of its daemon took part in."""


def update_vector(plan: RoundPlan) -> UpdateVector | NoisedVector:
    """Return the codec of a plan's update sum."""
    size, owners = plan.spec.layout(get_method(plan.method).trainable(plan.round)).size, len(plan.cohort)
    if plan.mechanism.kind == SKELLAM:
        return NoisedVector.of(plan.mechanism, ring_bits=plan.ring.bits, owners=owners, layout_size=size)
    return UpdateVector(plan.ring, owners, size, covered=plan.mechanism.covered)


def machines(plan: RoundPlan, roster: Roster) -> tuple[SecAggCoordinator, SecAggCoordinator]:
    """Return fresh machines of the update sum and the evaluation sum of one attempt."""
    vector, scores = update_vector(plan), ScoreVector(len(plan.cohort))

    def make(purpose: str, ring_bits: int, entries: int) -> SecAggCoordinator:
        return SecAggCoordinator(plan=plan, purpose=purpose, roster=roster, ring_bits=ring_bits, entries=entries)

    return (
        make(PURPOSE_UPDATE, plan.ring.bits, vector.entries),
        make(PURPOSE_EVALUATION, scores.ring.bits, scores.entries),
    )


async def open_sum(
    context: RoundContext, *, rng: Rng, opened: Opened | None = None
) -> tuple[UpdateSum, tuple[OwnerId, ...]]:
    """Return the sum of the survivors' updates, and who the survivors are.

    Owners train once. What fails before anybody was asked to unmask is tried again with the owners that are left.

    Raises
    ------
    RoundAborted
        If too few owners are left, or no further attempt is allowed.
    IntegrityError
        If the opened sum cannot be what the survivors sent.
    """
    while True:
        try:
            if context.plan.attempt == 1:
                requests = await train(context, await begin(context, _previous(context)))
            else:
                requests = await retry(context)
            survivors = await mask(context, await share(context, requests))
            context.survivors = len(survivors)
            context.enter(RoundState.CONFIRM)
            asked = await confirm(context, context.update, PURPOSE_UPDATE, survivors)
            break
        except RoundAborted as error:
            _next(context, error, rng)
    # who answers from here on never masks this update again: there is no further attempt
    context.enter(RoundState.UNMASK)
    total = await unmask(context, context.update, PURPOSE_UPDATE, asked)
    if opened is not None:
        opened(context.plan, survivors, total)
    found = update_vector(context.plan).decode(total, len(survivors))
    context.saturated = found.saturated
    return found, survivors


def _next(context: RoundContext, error: RoundAborted, rng: Rng) -> None:
    """Plan another attempt with the owners that are left and not proven wrong, or raise `error`."""
    restarted = {o for o, no in context.refusals.items() if no.code in _RESTARTED and o in context.trained}
    for owner in restarted:
        del context.refusals[owner]
    left = (context.alive | restarted) - set(context.refusals) - context.update.proven - context.evaluation.proven
    allowed = context.plan.attempt < context.federation.settings.attempts
    plan = next_attempt(context.plan, left, rng) if allowed else None
    if plan is None:
        raise error
    signed = SignedPlan.sign(plan, context.identity)
    context.attempts.append(
        {
            "attempt": context.plan.attempt,
            "code": error.code,
            "reason": error.message,
            "cohort": list(context.plan.cohort),
        }
    )
    context.known_faults += context.protocol_faults()
    context.journal.retry(plan, signed, context.measures())
    context.plan, context.signed = plan, signed
    context.update, context.evaluation = machines(plan, context.federation.roster)


def _previous(context: RoundContext) -> Ended | None:
    """Return how the round before ended: owners that were not told by a `Close` learn it from the next plan."""
    if context.number == 1:
        return None
    before = context.journal.round(context.name, context.number - 1)
    return Ended(before.number, before.state.value.lower(), before.reason)

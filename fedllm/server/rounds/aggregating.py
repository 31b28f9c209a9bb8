"""AGGREGATED: from the opened sum to a candidate, and from a scored candidate to a version."""

from __future__ import annotations

import asyncio

from fedllm.adapter import AdapterState
from fedllm.aggregation.methods import get_method
from fedllm.aggregation.rules import Rule
from fedllm.aggregation.vector import ScoreSum, UpdateSum
from fedllm.messages.mechanism import UNIT_OWNER
from fedllm.registry.model import AdapterVersion, PrivacyRecord
from fedllm.registry.store import VersionDraft
from fedllm.server.ports import EpsilonOf, RoundState
from fedllm.server.rounds.context import RoundContext
from fedllm.server.rounds.epsilon import released


def aggregate(context: RoundContext, opened: UpdateSum, rule: Rule) -> AdapterState:
    """Return the candidate: the head moved by the rule's step.

    Raises
    ------
    AdapterInvalid
        If the result is not finite.
    """
    context.enter(RoundState.AGGREGATED)
    method = get_method(context.plan.method)
    return method.apply(context.head.state, rule.apply(opened.mean), context.number)


def add_version(
    context: RoundContext,
    candidate: AdapterState,
    opened: UpdateSum,
    scores: ScoreSum | None,
    privacy: PrivacyRecord,
) -> AdapterVersion:
    """Add the candidate to the registry and name it in the journal; doing it again changes nothing.

    It is added after the owners scored it, so that the signed manifest, which never changes, says how good it
    is. Whether it is published is another question.

    Parameters
    ----------
    scores : ScoreSum or None
        None when too few owners scored it.
    """
    plan = context.plan
    metrics = {"train_s": context.train_s}
    if opened.saturated is not None:
        metrics["saturated"] = opened.saturated
    if opened.train_loss is not None:
        metrics["train_loss"] = opened.train_loss
    if scores is not None:
        metrics |= {
            "head_loss": scores.head_loss,
            "candidate_loss": scores.candidate_loss,
            "delta_std": scores.delta_std,
            "scored_by": float(scores.owners),
        }
    draft = VersionDraft(
        federation=context.name,
        base_name=context.federation.settings.base.name,
        parent=plan.head_version,
        round=context.number,
        method=plan.method,
        recipe=plan.recipe,
        metrics=metrics,
        privacy=privacy,
        cohort_size=len(plan.cohort),
        survivors=opened.owners,
        plan=plan.digest,
    )
    version = context.registry.add(candidate, draft, context.identity)
    context.journal.add_version(context.name, context.number, version.digest)
    return version


async def privacy_record(context: RoundContext, epsilon_of: EpsilonOf) -> PrivacyRecord:
    """Return the advisory statement: every round planned so far, aborted ones included, composed.

    Its unit is that of this round's mechanism; rounds of a federation that changed it bound nothing, or less.
    """
    delta, plan = context.federation.settings.delta, context.plan
    rounds = [record for record in context.journal.rounds(context.name) if record.number <= context.number]
    mechanisms = [mechanism for record in rounds for mechanism in released(record)]
    what = "all that each owner holds" if plan.mechanism.unit == UNIT_OWNER else "each owner's training records"
    return PrivacyRecord(
        unit=plan.mechanism.unit,
        relation=plan.mechanism.relation,
        epsilon=await asyncio.to_thread(epsilon_of, mechanisms, delta, plan.mechanism.unit),
        delta=delta,
        covers=f"{what} over rounds 1 to {context.number}; held-out scores are outside it",
        source="advisory",
    )

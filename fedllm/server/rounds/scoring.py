"""EVALUATING: the survivors score the candidate against the head; only the sum of their scores is opened."""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.adapter import AdapterState
from fedllm.aggregation.vector import ScoreSum, ScoreVector
from fedllm.ids import OwnerId
from fedllm.messages.round import Evaluate, FetchScores, Masked, Scoring
from fedllm.messages.secagg import PURPOSE_EVALUATION
from fedllm.server.ports import RoundState
from fedllm.server.rounds.confirming import confirm
from fedllm.server.rounds.context import RoundContext
from fedllm.server.rounds.unmasking import unmask


async def score(context: RoundContext, candidate: AdapterState, owners: Sequence[OwnerId]) -> ScoreSum:
    """Return the owners' mean scores.

    Parameters
    ----------
    candidate : AdapterState
    owners : Sequence[OwnerId]
        The survivors of the update sum: who was lost before is not waited for again.

    Raises
    ------
    RoundAborted
        If too few owners scored it.
    IntegrityError
        If the scores do not add up.
    """
    context.enter(RoundState.EVALUATING)
    machine, plan = context.evaluation, context.plan
    scoring = await context.gather("evaluate", dict.fromkeys(owners, Evaluate(candidate.to_bytes())), Scoring)
    await context.gather(
        "scores",
        dict.fromkeys(scoring, FetchScores()),
        Masked,
        check=lambda o, m: machine.add_masked(o, m.vector),
        deadline_s=plan.train_deadline_s,
    )
    survivors = machine.masked({})
    machine.bind(bytes.fromhex(candidate.digest))
    request = await confirm(context, machine, PURPOSE_EVALUATION, survivors)
    total = await unmask(context, machine, request)
    return ScoreVector(len(plan.cohort)).decode(total, len(survivors))

"""EVALUATING: the survivors score the candidate against the head; only the sum of their scores is opened."""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.adapter import AdapterState
from fedllm.aggregation.vector import ScoreSum, ScoreVector
from fedllm.ids import OwnerId
from fedllm.messages.round import Complained, Evaluate, FetchScores, Masked, Scoring
from fedllm.messages.secagg import PURPOSE_EVALUATION
from fedllm.server.ports import RoundState
from fedllm.server.rounds.asking import gather
from fedllm.server.rounds.confirming import confirm
from fedllm.server.rounds.context import RoundContext
from fedllm.server.rounds.masking import add
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

    def take(owner: OwnerId, answer: Scoring | Masked | Complained, parts: Sequence[bytes]) -> None:
        if not isinstance(answer, Scoring):
            add(machine, owner, answer, parts)

    request = Evaluate(candidate.to_bytes())
    first: dict[OwnerId, Scoring | Masked | Complained] = await gather(
        context, "evaluate", dict.fromkeys(owners, request), Scoring, Masked, Complained, check=take
    )
    later = [owner for owner, answer in first.items() if isinstance(answer, Scoring)]
    _later: dict[OwnerId, Scoring | Masked | Complained] = await gather(
        context,
        "scores",
        dict.fromkeys(later, FetchScores()),
        Masked,
        Complained,
        check=take,
        quorum=max(0, context.quorum - (len(first) - len(later))),
        deadline_s=plan.train_deadline_s,
    )
    survivors = machine.masked()
    machine.bind(bytes.fromhex(candidate.digest))
    requests = await confirm(context, machine, PURPOSE_EVALUATION, survivors)
    total = await unmask(context, machine, PURPOSE_EVALUATION, requests)
    return ScoreVector(len(plan.cohort)).decode(total, len(survivors))

"""TRAINING: ask again and again, cheaply, until each owner has trained and advertises its keys (U1)."""

from __future__ import annotations

from collections.abc import Mapping

from fedllm.ids import OwnerId
from fedllm.messages.round import Advertised, FetchAdvertise, Retry, ShareKeys, Started
from fedllm.server.ports import RoundState
from fedllm.server.rounds.asking import gather
from fedllm.server.rounds.context import RoundContext


async def train(context: RoundContext, started: Mapping[OwnerId, Started | Advertised]) -> dict[OwnerId, ShareKeys]:
    """Return what each member of U1 is asked next: everybody's signed keys, for both sums.

    Raises
    ------
    RoundAborted
        If too few owners trained in time: for this attempt, or (nobody is left to try again with) for the round.
    """
    context.enter(RoundState.TRAINING)
    done = {owner: answer for owner, answer in started.items() if isinstance(answer, Advertised)}
    asked = dict.fromkeys([owner for owner in started if owner not in done], FetchAdvertise())
    answers = done | await gather(
        context,
        "train",
        asked,
        Advertised,
        quorum=max(0, context.plan.min_survivors - len(done)),
        deadline_s=context.plan.train_deadline_s,
    )
    context.alive = set(answers)
    context.train_s = max(answer.train_s for answer in answers.values())
    return _key_lists(context, answers)


async def retry(context: RoundContext) -> dict[OwnerId, ShareKeys]:
    """Return the same for a further attempt: fresh keys for the update that each owner holds already.

    Raises
    ------
    RoundAborted
        If too few owners are left.
    """
    request = Retry(context.signed)
    answers = await gather(context, "train", dict.fromkeys(context.plan.cohort, request), Advertised)
    return _key_lists(context, answers)


def _key_lists(context: RoundContext, answers: Mapping[OwnerId, Advertised]) -> dict[OwnerId, ShareKeys]:
    context.trained |= set(answers)
    update = context.update.advertised({owner: answer.update for owner, answer in answers.items()})
    evaluation = context.evaluation.advertised({owner: answer.evaluation for owner, answer in answers.items()})
    both = {bundle.owner for bundle in update} & {bundle.owner for bundle in evaluation}
    return dict.fromkeys(sorted(both), ShareKeys(update, evaluation))

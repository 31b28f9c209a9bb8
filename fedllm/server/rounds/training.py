"""TRAINING: ask again and again, cheaply, until each owner has trained and advertises its keys (U1)."""

from __future__ import annotations

from collections.abc import Collection

from fedllm.ids import OwnerId
from fedllm.messages.round import Advertised, FetchAdvertise, ShareKeys
from fedllm.server.ports import RoundState
from fedllm.server.rounds.context import RoundContext


async def train(context: RoundContext, started: Collection[OwnerId]) -> dict[OwnerId, ShareKeys]:
    """Return what each member of U1 is asked next: everybody's signed keys, for both sums.

    Raises
    ------
    RoundAborted
        If too few owners trained in time.
    """
    context.enter(RoundState.TRAINING)
    answers = await context.gather(
        "train",
        dict.fromkeys(started, FetchAdvertise()),
        Advertised,
        deadline_s=context.plan.train_deadline_s,
    )
    context.train_s = max(answer.train_s for answer in answers.values())
    update = context.update.advertised({owner: answer.update for owner, answer in answers.items()})
    evaluation = context.evaluation.advertised({owner: answer.evaluation for owner, answer in answers.items()})
    both = {bundle.owner for bundle in update} & {bundle.owner for bundle in evaluation}
    return dict.fromkeys(sorted(both), ShareKeys(update, evaluation))

"""SHARES: collect everybody's sealed shares of its secrets and sort them by addressee (U2)."""

from __future__ import annotations

from collections.abc import Mapping

from fedllm.ids import OwnerId
from fedllm.messages.round import SendMasked, SharedKeys, ShareKeys
from fedllm.server.ports import RoundState
from fedllm.server.rounds.asking import gather
from fedllm.server.rounds.context import RoundContext


async def share(context: RoundContext, requests: Mapping[OwnerId, ShareKeys]) -> dict[OwnerId, SendMasked]:
    """Return what each member of U2 is asked next: the shares addressed to it, for both sums.

    Once U2 is closed an owner's masks can be taken out of the sum although it is gone.

    Raises
    ------
    RoundAborted
        If too few owners shared.
    """
    context.enter(RoundState.SHARES)
    answers = await gather(context, "share", requests, SharedKeys)
    update = context.update.shared({owner: answer.update for owner, answer in answers.items()})
    evaluation = context.evaluation.shared({owner: answer.evaluation for owner, answer in answers.items()})
    return {owner: SendMasked(update[owner], evaluation[owner]) for owner in sorted(set(update) & set(evaluation))}

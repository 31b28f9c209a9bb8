"""PLANNED: hand every owner of the cohort the signed plan and the head, and have training started."""

from __future__ import annotations

from fedllm.ids import OwnerId
from fedllm.messages.round import Advertised, Begin, Ended, Started
from fedllm.server.ports import RoundState
from fedllm.server.rounds.asking import gather
from fedllm.server.rounds.context import RoundContext


async def begin(context: RoundContext, previous: Ended | None) -> dict[OwnerId, Started | Advertised]:
    """Return the owners that reserved their budget and started, some of which have trained already.

    From here on epsilon is reserved at the owners: a round that aborts later has spent it.

    Parameters
    ----------
    previous : Ended or None
        How the round before ended, for owners that were not told.
    """
    context.enter(RoundState.PLANNED)
    request = Begin(context.signed, context.head.state.to_bytes(), previous)
    answers: dict[OwnerId, Started | Advertised] = await gather(
        context,
        "begin",
        dict.fromkeys(context.plan.cohort, request),
        Started,
        Advertised,
        quorum=context.plan.min_survivors,
    )
    return answers

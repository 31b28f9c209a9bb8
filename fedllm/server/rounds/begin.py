"""PLANNED: hand every owner of the cohort the signed plan and the head, and have training started."""

from __future__ import annotations

from fedllm.ids import OwnerId
from fedllm.messages.round import Begin, Started
from fedllm.server.ports import RoundState
from fedllm.server.rounds.context import RoundContext


async def begin(context: RoundContext) -> dict[OwnerId, float]:
    """Return the owners that reserved their budget and started, with the seconds each expects to train.

    From here on epsilon is reserved at the owners: a round that aborts later has spent it.
    """
    context.enter(RoundState.PLANNED)
    request = Begin(context.signed, context.head.state.to_bytes())
    started = await context.gather("begin", dict.fromkeys(context.plan.cohort, request), Started)
    return {owner: answer.expected_s for owner, answer in started.items()}

"""After the end: tell the cohort how it ended, so that owners forget the round's secrets."""

from __future__ import annotations

from contextlib import suppress

from fedllm.errors import PeerUnavailable
from fedllm.ids import OwnerId
from fedllm.messages.round import Close, Closed
from fedllm.server.rounds.asking import gather
from fedllm.server.rounds.context import RoundContext

CLOSE_DEADLINE_S = 30.0


async def close(context: RoundContext, outcome: str, reason: str | None) -> None:
    """Say goodbye; owners that cannot be reached learn of the end from the next round's plan."""
    if not context.roll.present:  # a coordinator that was started again knows nobody yet
        with suppress(PeerUnavailable):
            await context.roll.call(deadline_s=CLOSE_DEADLINE_S)
    asked = context.attempts[0]["cohort"] if context.attempts else context.plan.cohort
    there = [owner for owner in map(OwnerId, asked) if owner in context.roll.present]
    await gather(
        context,
        "close",
        dict.fromkeys(there, Close(outcome, reason)),
        Closed,
        quorum=0,
        deadline_s=min(CLOSE_DEADLINE_S, context.plan.phase_deadline_s),
    )

"""MASKED: collect and add the masked updates; whoever is in the sum when the phase closes is U3."""

from __future__ import annotations

from collections.abc import Mapping

from fedllm.ids import OwnerId
from fedllm.messages.round import Masked, SendMasked
from fedllm.server.ports import RoundState
from fedllm.server.rounds.context import RoundContext


async def mask(context: RoundContext, requests: Mapping[OwnerId, SendMasked]) -> tuple[OwnerId, ...]:
    """Return U3, which is in the journal before anybody is told.

    Raises
    ------
    RoundAborted
        If too few vectors arrived in time.
    """
    context.enter(RoundState.MASKED)
    await context.gather("mask", requests, Masked, check=lambda o, m: context.update.add_masked(o, m.vector))
    return context.update.masked({})

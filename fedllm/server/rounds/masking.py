"""MASKED: collect and add the masked updates; whoever is in the sum when the phase closes is U3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedllm.aggregation.secagg.coordinator import SecAggCoordinator
from fedllm.ids import OwnerId
from fedllm.messages.round import Complained, Masked, SendMasked
from fedllm.server.ports import RoundState
from fedllm.server.rounds.asking import gather
from fedllm.server.rounds.context import RoundContext


async def mask(context: RoundContext, requests: Mapping[OwnerId, SendMasked]) -> tuple[OwnerId, ...]:
    """Return U3, which is in the journal before anybody is told.

    Raises
    ------
    RoundAborted
        If too few vectors arrived in time.
    """
    context.enter(RoundState.MASKED)
    _answers: dict[OwnerId, Masked | Complained] = await gather(
        context, "mask", requests, Masked, Complained, check=lambda o, m, parts: add(context.update, o, m, parts)
    )
    return context.update.masked()


def add(machine: SecAggCoordinator, owner: OwnerId, answer: Masked | Complained, parts: Sequence[bytes]) -> None:
    """Take a vector, or the word that there is none because of somebody's shares, into the sum's machine."""
    if isinstance(answer, Masked):
        machine.add_masked(owner, answer.vector, parts)
    else:
        machine.complained(owner, answer.complaint)

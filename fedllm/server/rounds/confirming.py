"""CONFIRM: the survivors of a sum each sign the survivor set they were shown, once."""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.aggregation.secagg.coordinator import SecAggCoordinator
from fedllm.ids import OwnerId
from fedllm.messages.round import Confirm, Confirmed
from fedllm.messages.secagg import UnmaskRequest
from fedllm.server.rounds.asking import gather
from fedllm.server.rounds.context import RoundContext


async def confirm(
    context: RoundContext, machine: SecAggCoordinator, purpose: str, survivors: Sequence[OwnerId]
) -> dict[OwnerId, UnmaskRequest]:
    """Return the requests that open a sum: its survivors, and for each signer t signatures that it accepts.

    Raises
    ------
    RoundAborted
        If too few owners signed.
    """
    request = Confirm(purpose, tuple(survivors))
    answers = await gather(context, f"confirm/{purpose}", dict.fromkeys(survivors, request), Confirmed)
    return machine.confirmed({owner: answer.signature for owner, answer in answers.items()})

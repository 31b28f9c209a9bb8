"""UNMASK: collect the shares that open a sum, and nothing but the sum."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedllm.aggregation.secagg.coordinator import SecAggCoordinator
from fedllm.ids import OwnerId
from fedllm.messages.round import Unmask, Unmasked
from fedllm.messages.secagg import UnmaskRequest
from fedllm.server.rounds.asking import gather
from fedllm.server.rounds.context import RoundContext


async def unmask(
    context: RoundContext, machine: SecAggCoordinator, purpose: str, requests: Mapping[OwnerId, UnmaskRequest]
) -> NDArray[np.uint32]:
    """Return the ring sum over the survivors, shape ``(entries,)``.

    Raises
    ------
    RoundAborted
        If too few owners answered, or their shares do not open what was committed to.
    """
    asked = {owner: Unmask(request) for owner, request in requests.items()}
    # how many answers open every secret is the machine's business: on a sparse graph it is a matter of whose
    quorum = min(context.plan.threshold, len(asked))
    answers = await gather(context, f"unmask/{purpose}", asked, Unmasked, quorum=quorum)
    return machine.unmasked({owner: answer.shares for owner, answer in answers.items()})

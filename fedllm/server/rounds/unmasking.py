"""UNMASK: collect the shares that open a sum, and nothing but the sum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedllm.aggregation.secagg.coordinator import SecAggCoordinator
from fedllm.messages.round import Unmask, Unmasked
from fedllm.messages.secagg import UnmaskRequest
from fedllm.server.rounds.context import RoundContext


async def unmask(context: RoundContext, machine: SecAggCoordinator, request: UnmaskRequest) -> NDArray[np.uint32]:
    """Return the ring sum over the survivors, shape ``(entries,)``.

    Raises
    ------
    RoundAborted
        If too few owners answered, or their shares do not open what was committed to.
    """
    signers = [signature.owner for signature in request.signatures]
    answers = await context.gather(
        f"unmask/{request.purpose}",
        dict.fromkeys(signers, Unmask(request)),
        Unmasked,
        quorum=context.plan.threshold,
    )
    return machine.unmasked({owner: answer.shares for owner, answer in answers.items()})

"""The specification of `lora_apply`: one token at a time, float64, no cleverness.

Hu et al., *LoRA* (arXiv 2106.09685): ``y += (alpha / r) * B (A x)``; the stack holds ``(alpha / r) * B``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedllm.kernels.segments import BASE_SLOT, Segments
from fedllm.kernels.stack import LoraStack


def lora_apply(y_TO: Tensor, x_TD: Tensor, stack: LoraStack, segments: Segments) -> None:
    """Add every token's own low-rank term to `y_TO` in place.

    Parameters
    ----------
    y_TO : Tensor
        Shape ``(T, sum of O_p)``, the base layer's output; base tokens' rows are not touched.
    x_TD : Tensor
        Shape ``(T, D)``, the layer's input.
    stack : LoraStack
        Factors by slot.
    segments : Segments
        Slot of each token.
    """
    for token, slot in enumerate(segments.token_slots.tolist()):
        if slot == BASE_SLOT:
            continue
        rank = stack.ranks[slot]
        x_D = x_TD[token].to(torch.float64)
        start = 0
        for projection, b_SRO in enumerate(stack.b_PSRO):
            h_R = stack.a_SPRD[slot, projection, :rank].to(torch.float64) @ x_D
            delta_O = h_R @ b_SRO[slot, :rank].to(torch.float64)
            row = y_TO[token, start : start + b_SRO.shape[2]]
            row.copy_((row.to(torch.float64) + delta_O).to(y_TO.dtype))
            start += b_SRO.shape[2]

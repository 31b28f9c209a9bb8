"""Multi-LoRA kernels: many adapters and the base model in one batch.

`lora_apply` dispatches by device. A kernel is a pair ``plan``/``apply``: `plan_lora` runs once a step (the
metadata is shared by all layers), `lora_apply` once a layer. `fedllm.kernels.reference` is the specification
that every kernel is tested against; a GPU kernel joins here, behind the same two functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedllm.kernels import cpu
from fedllm.kernels.cpu import Plan
from fedllm.kernels.segments import BASE_SLOT, Segments, build_segments
from fedllm.kernels.stack import LoraStack, new_stack, write_slot

__all__ = [
    "BASE_SLOT",
    "LoraStack",
    "Plan",
    "Segments",
    "build_segments",
    "lora_apply",
    "new_stack",
    "plan_lora",
    "write_slot",
]


def plan_lora(segments: Segments, *, device: str | torch.device) -> Plan:
    """Prepare a batch's metadata for `lora_apply`.

    Parameters
    ----------
    segments : Segments
        Slot of each token.
    device : str or torch.device
        Where the activations are.
    """
    return cpu.plan(segments, device=device)


def lora_apply(y_TO: Tensor, x_TD: Tensor, stack: LoraStack, segments: Segments | Plan) -> None:
    """Add ``scale[s] * (x @ A[s].T) @ B[s].T`` to the rows of `y_TO` whose token uses slot `s`, in place.

    Rows of base tokens (slot ``-1``) are not written: they stay bit-identical to the base layer's output.

    Parameters
    ----------
    y_TO : Tensor
        Shape ``(T, sum of O_p)``, contiguous, the base layer's output.
    x_TD : Tensor
        Shape ``(T, D)``, same dtype as `y_TO`.
    stack : LoraStack
        Factors by slot, same dtype.
    segments : Segments or Plan
        Slot of each token; pass a plan where several layers share a batch.
    """
    if isinstance(segments, Segments):
        segments = plan_lora(segments, device=x_TD.device)
    cpu.apply(y_TO, x_TD, stack, segments)

"""Multi-LoRA kernels: many adapters and the base model in one batch.

`plan_lora` runs once a step (its metadata is shared by all layers) and chooses by device: plain torch on a CPU,
Triton on CUDA. `lora_apply` runs once a layer and follows the plan. `fedllm.kernels.reference` is the
specification that every kernel is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedllm.kernels import cpu, triton_plan
from fedllm.kernels.segments import BASE_SLOT, Segments, build_segments
from fedllm.kernels.stack import LoraStack, new_stack, write_slot
from fedllm.kernels.triton_plan import PlanBuffers

__all__ = [
    "BASE_SLOT",
    "LoraStack",
    "Plan",
    "PlanBuffers",
    "Segments",
    "build_segments",
    "lora_apply",
    "new_stack",
    "plan_lora",
    "write_slot",
]

Plan = cpu.Plan | triton_plan.Plan


def plan_lora(segments: Segments, *, device: str | torch.device) -> Plan:
    """Prepare a batch's metadata for `lora_apply`.

    A caller that captures CUDA graphs keeps `PlanBuffers` of its own instead, whose address and size stay.

    Parameters
    ----------
    segments : Segments
        Slot of each token.
    device : str or torch.device
        Where the activations are.
    """
    if torch.device(device).type == "cuda":
        return triton_plan.plan(segments, device=device)
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
    plan = plan_lora(segments, device=x_TD.device) if isinstance(segments, Segments) else segments
    if isinstance(plan, cpu.Plan):
        cpu.apply(y_TO, x_TD, stack, plan)
    elif plan.rows:
        triton_plan.check_shapes(y_TO, x_TD, stack)
        # Imported with the first batch: Triton is slow to import, and a CPU has no use for it.
        if plan.way == "decode":
            from fedllm.kernels import triton_decode

            triton_decode.apply(y_TO, x_TD, stack, plan)
        else:
            from fedllm.kernels import triton_prefill

            triton_prefill.apply(y_TO, x_TD, stack, plan)

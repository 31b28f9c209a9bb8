"""Providers of one batched-LoRA step: ours, plain torch, and vLLM's and SGLang's Triton kernels where installed.

Each takes a scene, lays its factors and metadata out as it likes, and returns what runs one step: it adds to the
scene's output in place. Layouts and metadata are made once, outside what is timed, for all providers alike.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.kernels_mixes import Scene
from fedllm.kernels import PlanBuffers, cpu, lora_apply

Step = Callable[[], None]
Provider = Callable[[Scene], Step]


def fedllm(scene: Scene) -> Step:
    """Return our Triton kernels, one shrink and one expand for all projections."""
    segments = scene.segments
    buffers = PlanBuffers(segments.adapted, len(segments.slots), device=scene.x_TD.device)
    plan = buffers.plan(segments)
    return lambda: lora_apply(scene.y_TO, scene.x_TD, scene.stack, plan)


def plain_torch(scene: Scene) -> Step:
    """Return torch's own products, grouped by adapter."""
    plan = cpu.plan(scene.segments, device=scene.x_TD.device)
    return lambda: cpu.apply(scene.y_TO, scene.x_TD, scene.stack, plan)


def vllm(scene: Scene) -> Step:
    """Return vLLM's kernels, as its Punica wrapper calls them; grid over the live adapters only."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    stack, device = scene.stack, scene.x_TD.device
    a_SRD = [stack.a_SPRD[:, p].contiguous() for p in range(len(stack.b_PSRO))]
    b_SOR = [b.transpose(1, 2).contiguous() for b in stack.b_PSRO]
    tokens = scene.segments.tokens
    meta = LoRAKernelMeta.make(len(stack.ranks), tokens, device=device)
    meta.prepare_tensors(torch.from_numpy(scene.segments.token_slots).to(device, torch.int32))
    arguments = meta.meta_args(tokens, specialize_active_lora=True)
    buffer_PTR = torch.empty(len(b_SOR), tokens, stack.max_rank, dtype=torch.float32, device=device)

    def step() -> None:
        lora_shrink(scene.x_TD, a_SRD, buffer_PTR, *arguments, 1.0)
        lora_expand(buffer_PTR, b_SOR, scene.y_TO, *arguments, 0, True)

    return step


def sglang(scene: Scene) -> Step:
    """Return SGLang's dense kernels on merged segments, as its ``triton`` backend decodes; live adapters only."""
    from sglang.kernels.ops.lora.dense.qkv_lora_b import qkv_lora_b_fwd
    from sglang.kernels.ops.lora.dense.sgemm_lora_a import sgemm_lora_a_fwd
    from sglang.srt.lora.utils import LoRABatchInfo

    stack, segments, device = scene.stack, scene.segments, scene.x_TD.device
    a_SQD = stack.a_SPRD.flatten(1, 2).contiguous()
    b_SOR = torch.cat([b.transpose(1, 2) for b in stack.b_PSRO], dim=1).contiguous()
    starts = torch.tensor(segments.starts, dtype=torch.int32, device=device)
    info = LoRABatchInfo(
        use_cuda_graph=True,
        bs=len(segments.slots),
        num_segments=len(segments.slots),
        seg_indptr=starts,
        weight_indices=torch.tensor(segments.slots, dtype=torch.int32, device=device),
        lora_ranks=stack.ranks_S,
        scalings=torch.ones(len(stack.ranks), dtype=torch.float32, device=device),
        max_len=max(b - a for a, b in zip(segments.starts, segments.starts[1:], strict=False)),
        seg_lens=starts.diff(),
        permutation=torch.from_numpy(segments.order).to(device, torch.int32),
    )
    widths = stack.widths
    offsets = torch.tensor([sum(widths[:p]) for p in range(len(widths) + 1)], dtype=torch.int32, device=device)

    def step() -> None:
        h_TQ = sgemm_lora_a_fwd(scene.x_TD, a_SQD, info, stack_num=len(widths))
        qkv_lora_b_fwd(h_TQ, b_SOR, info, offsets, max(widths), base_output=scene.y_TO, n_slices=len(widths))

    return step


def find_peers() -> tuple[dict[str, Provider], dict[str, str]]:
    """Return the peers that can be imported, and for each whose kernels are not measured the reason."""
    found: dict[str, Provider] = {}
    missing: dict[str, str] = {}
    imports = {
        "vllm": (vllm, "vllm.lora.ops.triton_ops"),
        "sglang": (sglang, "sglang.kernels.ops.lora.dense.qkv_lora_b"),
    }
    for name, (provider, module) in imports.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            missing[name] = "not measured: not installed"
            continue
        try:
            __import__(module)
        except Exception as error:  # noqa: BLE001  # another project's import may fail in any way
            missing[name] = f"not measured: {name} {installed} does not import here ({type(error).__name__})"
            continue
        found[name] = provider
    return found, missing

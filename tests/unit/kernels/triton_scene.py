"""What the tests of the Triton kernels share: poisoned memory, stale metadata, and broken copies of a kernel."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.kernels_mixes import Scene, filled_stack, poison_unused
from fedllm import kernels
from fedllm.kernels import LoraStack, PlanBuffers, triton_plan
from fedllm.kernels.tuning import Way

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANKS = (1, 3, 8, 16, 0, 40)
"""Slot 4 is empty; slot 5 needs a second block of ranks."""
WIDTHS = (9, 130)
"""Less than a tile of outputs, and two tiles."""


def poisoned_stack(
    ranks: Sequence[int] = RANKS,
    max_rank: int = 48,
    width_in: int = 70,
    widths: Sequence[int] = WIDTHS,
    dtype: torch.dtype = torch.float32,
) -> LoraStack:
    """Return a stack with NaN wherever no adapter is."""
    stack = filled_stack(ranks, max_rank, width_in, widths, dtype, DEVICE)
    poison_unused(stack)
    return stack


def unset_is_nan(rows: int, stack: LoraStack, parts: int) -> Tensor:
    """Return a workspace like `triton_plan.workspace`'s, all NaN."""
    shape = (rows, len(stack.b_PSRO), parts, stack.max_rank)
    return torch.full(shape, float("nan"), device=stack.a_SPRD.device)


def computed(scene: Scene, way: Way, plan: triton_plan.Plan | None = None) -> Tensor:
    """Return the output of `kernels.lora_apply` by way of Triton, with more capacity than is needed."""
    y_TO = scene.y_TO.clone()
    count = len(scene.segments.token_slots)
    plan = plan or PlanBuffers(count + 3, len(scene.stack.ranks), device=DEVICE).plan(scene.segments, way=way)
    kernels.lora_apply(y_TO, scene.x_TD, scene.stack, plan)
    return y_TO


def bits(values: Tensor) -> Tensor:
    """Return a tensor that compares equal only where every bit is."""
    return values.contiguous().view(torch.uint8)


def mutated(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """Return a copy of a kernel's module with one text replaced everywhere."""
    source = Path(str(module.__file__)).read_text()
    assert old in source, f"{old} is not in {module.__name__}"
    path = folder / "mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made

"""The vocabulary of multi-LoRA workloads, for the kernels' tests and their benchmark.

Punica's four popularities (arXiv 2310.18547, section 7): all rows use one adapter, each its own, adapters drawn
uniformly, or by a Zipf law; and two mixes with rows of the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedllm.kernels import LoraStack, Segments, build_segments, new_stack, reference, write_slot

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest error over the largest output (or 1): some four roundings of the type."""
POPULARITIES = ("identical", "distinct", "uniform", "skewed")
MIXES = (*POPULARITIES, "with_base", "all_base")
ZIPF = 1.5


def mix(name: str, tokens: int, slots: int, seed: int = 7) -> list[int]:
    """Return the slot of each token, ``-1`` for the base model.

    Parameters
    ----------
    name : str
        One of `MIXES`.
    tokens, slots : int
        Length of the batch, and slots to choose from.
    seed : int
        Of the draws.
    """
    draw = np.random.default_rng(seed)
    picks: dict[str, Callable[[], list[int]]] = {
        "identical": lambda: [slots - 1] * tokens,
        "distinct": lambda: np.resize(draw.permutation(slots), tokens).tolist(),
        "uniform": lambda: draw.integers(0, slots, tokens).tolist(),
        "skewed": lambda: np.minimum(draw.zipf(ZIPF, tokens) - 1, slots - 1).tolist(),
        "with_base": lambda: draw.integers(-1, slots, tokens).tolist(),
        "all_base": lambda: [-1] * tokens,
    }
    return picks[name]()


def filled_stack(
    ranks: Sequence[int], max_rank: int, width_in: int, widths: Sequence[int], dtype: torch.dtype, device: str = "cpu"
) -> LoraStack:
    """Return a stack with one random adapter a slot; rank 0 leaves a slot empty, slot 1 lacks its second projection.

    The products with a unit normal input are of order one, whatever the shapes.
    """
    gen = torch.Generator().manual_seed(3)
    stack = new_stack(len(ranks), max_rank, width_in, widths, dtype=dtype, device=device)
    for slot, rank in enumerate(ranks):
        factors = [
            None
            if slot == 1 and p == 1
            else (
                torch.randn(rank, width_in, generator=gen) / width_in**0.5,
                torch.randn(width, rank, generator=gen) / max(1, rank) ** 0.5,
            )
            for p, width in enumerate(widths)
        ]
        write_slot(stack, slot, factors if rank else [], rank, 0.5 + slot / len(ranks))
    return stack


def poison_unused(stack: LoraStack) -> None:
    """Put NaN wherever no adapter is: beyond each slot's rank, and in empty slots."""
    for slot, rank in enumerate(stack.ranks):
        stack.a_SPRD[slot, :, rank:] = float("nan")
        for b_SRO in stack.b_PSRO:
            b_SRO[slot, rank:] = float("nan")


@dataclass(frozen=True)
class Scene:
    """One batch at one layer group: its factors, input, base output and slots."""

    stack: LoraStack
    x_TD: Tensor  # noqa: N815
    y_TO: Tensor  # noqa: N815
    segments: Segments

    def wanted(self) -> Tensor:
        """Return the specification's output."""
        y_TO = self.y_TO.clone()
        reference.lora_apply(y_TO, self.x_TD, self.stack, self.segments)
        return y_TO

    def error(self, got_TO: Tensor) -> float:
        """Return the largest error over the largest output or 1; NaN, or infinite for a changed base row."""
        base_T = torch.from_numpy(self.segments.token_slots == -1).to(got_TO.device)
        if not torch.equal(got_TO[base_T].view(torch.uint8), self.y_TO[base_T].view(torch.uint8)):
            return float("inf")
        want_LO, got_LO = self.wanted()[~base_T].double(), got_TO[~base_T].double()
        if not want_LO.numel():
            return 0.0
        return float((want_LO - got_LO).abs().max() / want_LO.abs().max().clamp(min=1.0))

    def rows(self, tokens: Sequence[int]) -> Scene:
        """Return the batch of these tokens only, in this order."""
        at = torch.tensor(tokens, dtype=torch.int64, device=self.x_TD.device)
        slots = self.segments.token_slots[list(tokens)]
        return replace(self, x_TD=self.x_TD[at], y_TO=self.y_TO[at], segments=build_segments(slots))


def scene(slots: Sequence[int], stack: LoraStack, seed: int = 11, *, poison: bool = True) -> Scene:
    """Return a batch of random rows; a base token's input and output are NaN, so that any use of them shows."""
    gen = torch.Generator().manual_seed(seed)
    dtype, device = stack.a_SPRD.dtype, stack.a_SPRD.device
    x_TD = torch.randn(len(slots), stack.a_SPRD.shape[3], generator=gen)
    y_TO = torch.randn(len(slots), sum(stack.widths), generator=gen)
    segments = build_segments(slots)
    if poison:
        base_T = torch.from_numpy(segments.token_slots == -1)
        x_TD[base_T] = y_TO[base_T] = float("nan")
    return Scene(stack, x_TD.to(device, dtype), y_TO.to(device, dtype), segments)

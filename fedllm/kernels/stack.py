"""Storage of all loaded adapters' factors for one (possibly fused) linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraStack:
    """Factors of every slot for one linear layer whose output is `P` projections side by side.

    A fused ``qkv`` has three projections, a plain linear one. Storage beyond a slot's rank, and the whole of
    an empty slot, is zero: the padded kernel multiplies it.

    Parameters
    ----------
    a_SPRD : Tensor
        Shape ``(S, P, R, D)``: slots, projections, maximal rank, input width.
    b_PSRO : tuple of Tensor
        One ``(S, R, O_p)`` per projection: the PEFT ``lora_B`` transposed and already multiplied by
        ``alpha / r``, so that no kernel reads a scale.
    ranks : list of int
        True rank of each slot, 0 when empty.
    ranks_S : Tensor
        The same, int32 on the device: a kernel in a CUDA graph reads it, and a slot may be rewritten after the
        graph was captured.
    """

    a_SPRD: Tensor  # noqa: N815
    b_PSRO: tuple[Tensor, ...]  # noqa: N815
    ranks: list[int]
    ranks_S: Tensor  # noqa: N815

    @property
    def widths(self) -> tuple[int, ...]:
        """Output width of each projection."""
        return tuple(b.shape[2] for b in self.b_PSRO)

    @property
    def max_rank(self) -> int:
        """Largest rank that a slot can hold."""
        return int(self.a_SPRD.shape[2])


def new_stack(
    slots: int, max_rank: int, width_in: int, widths_out: Sequence[int], *, dtype: torch.dtype, device: str
) -> LoraStack:
    """Return a stack of empty (all zero) slots."""
    a_SPRD = torch.zeros(slots, len(widths_out), max_rank, width_in, dtype=dtype, device=device)
    b_PSRO = tuple(torch.zeros(slots, max_rank, o, dtype=dtype, device=device) for o in widths_out)
    ranks_S = torch.zeros(slots, dtype=torch.int32, device=device)
    return LoraStack(a_SPRD, b_PSRO, [0] * slots, ranks_S)


def write_slot(
    stack: LoraStack, slot: int, factors: Sequence[tuple[Tensor, Tensor] | None], rank: int, scale: float
) -> None:
    """Overwrite one slot with an adapter's factors, zeros where it has none.

    Parameters
    ----------
    stack : LoraStack
        Changed in place.
    slot : int
        Row to overwrite.
    factors : sequence of (Tensor, Tensor) or None
        Per projection PEFT's ``lora_A`` ``(r, D)`` and ``lora_B`` ``(O_p, r)``, or None.
    rank : int
        True rank `r`; 0 empties the slot.
    scale : float
        ``alpha / r``; multiplied into B before it is rounded to the stack's dtype.

    Raises
    ------
    ValueError
        If the rank is above the stack's.
    """
    if rank > stack.max_rank:
        raise ValueError(f"rank {rank} found, the stack holds up to {stack.max_rank}")
    stack.a_SPRD[slot].zero_()
    for projection, b_SRO in enumerate(stack.b_PSRO):
        b_SRO[slot].zero_()
        pair = factors[projection] if factors else None
        if pair is not None:
            a_RD, b_OR = pair
            stack.a_SPRD[slot, projection, :rank].copy_(a_RD)
            b_SRO[slot, :rank].copy_(scale * b_OR.T)
    stack.ranks[slot] = rank
    stack.ranks_S[slot] = rank

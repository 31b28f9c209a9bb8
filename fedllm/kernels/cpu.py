"""`lora_apply` in plain torch, quick where dispatch costs more than arithmetic.

Two ways. Few tokens (decode): one product with the factors of *all* slots in the live range, masked to each
token's own slot; no Python loop over slots. Many tokens (prefill), or one live slot: tokens sorted by slot,
one product per segment at the slot's true rank. Rows of base tokens are never written, so they stay
bit-identical to the base model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.kernels.segments import Segments
from fedllm.kernels.stack import LoraStack

STACKED_MAX_TOKENS = 16
"""Above this many tokens the masked product wastes more arithmetic than the segment loop costs dispatch."""


@dataclass(frozen=True)
class Plan:
    """What `apply` needs of a batch, as tensors on its device; made once a step.

    Parameters
    ----------
    segments : Segments
        The grouping.
    rows_L : Tensor or None
        Indices of adapted tokens (sorted by slot for the segment way); None when they are all, in order.
    foreign_LS : Tensor or None
        Bool ``(L, slots in range, 1, 1)``: True where the slot is not the token's own, for the stacked way;
        None selects segments.
    first : int
        First slot of the live range.
    """

    segments: Segments
    rows_L: Tensor | None  # noqa: N815
    foreign_LS: Tensor | None  # noqa: N815
    first: int


def plan(segments: Segments, *, device: str | torch.device) -> Plan:
    """Choose the way for a batch and put its metadata on the device."""
    if not segments.slots:
        return Plan(segments, None, None, 0)
    stacked = segments.tokens <= STACKED_MAX_TOKENS and len(segments.slots) > 1
    if not stacked:
        rows_L = None if segments.ordered else torch.from_numpy(segments.order).to(device)
        return Plan(segments, rows_L, None, segments.slots[0])
    first, last = segments.slots[0], segments.slots[-1]
    slots_T = torch.from_numpy(segments.token_slots)
    rows_L = None if segments.adapted == segments.tokens else torch.nonzero(slots_T >= 0).flatten()
    slots_L = slots_T if rows_L is None else slots_T[rows_L]
    foreign_LS = slots_L[:, None] != torch.arange(first, last + 1)[None, :]
    return Plan(segments, None if rows_L is None else rows_L.to(device), foreign_LS[:, :, None, None].to(device), first)


def apply(y_TO: Tensor, x_TD: Tensor, stack: LoraStack, chosen: Plan) -> None:
    """Add every adapted token's low-rank term to `y_TO` in place; see `fedllm.kernels.lora_apply`."""
    if not chosen.segments.slots:
        return
    if chosen.foreign_LS is None:
        _segments(y_TO, x_TD, stack, chosen)
    else:
        _stacked(y_TO, x_TD, stack, chosen, chosen.foreign_LS)


def _segments(y_TO: Tensor, x_TD: Tensor, stack: LoraStack, chosen: Plan) -> None:
    seg, rows_L = chosen.segments, chosen.rows_L
    x_LD = x_TD if rows_L is None else x_TD.index_select(0, rows_L)
    y_LO = y_TO if rows_L is None else y_TO.index_select(0, rows_L)
    width_in = x_TD.shape[1]
    for i, slot in enumerate(seg.slots):
        rank = stack.ranks[slot]
        if rank == 0:
            continue
        begin, end = seg.starts[i], seg.starts[i + 1]
        a_QD = stack.a_SPRD[slot, :, :rank].reshape(-1, width_in)
        h_NQ = torch.mm(x_LD[begin:end], a_QD.T)
        start = 0
        for projection, b_SRO in enumerate(stack.b_PSRO):
            stop = start + b_SRO.shape[2]
            h_NR = h_NQ[:, projection * rank : (projection + 1) * rank]
            y_LO[begin:end, start:stop].addmm_(h_NR, b_SRO[slot, :rank])
            start = stop
    if rows_L is not None:
        y_TO.index_copy_(0, rows_L, y_LO)


def _stacked(y_TO: Tensor, x_TD: Tensor, stack: LoraStack, chosen: Plan, foreign_LS: Tensor) -> None:
    rows_L, count = chosen.rows_L, foreign_LS.shape[1]
    x_LD = x_TD if rows_L is None else x_TD.index_select(0, rows_L)
    y_LO = y_TO if rows_L is None else y_TO.index_select(0, rows_L)
    live = slice(chosen.first, chosen.first + count)
    rank, projections = stack.max_rank, len(stack.b_PSRO)
    h_LQ = torch.mm(x_LD, stack.a_SPRD[live].view(-1, x_TD.shape[1]).T)
    # Filled, not multiplied by zero: a foreign adapter may overflow on this token, and 0 * inf is NaN.
    h_LSPR = h_LQ.view(-1, count, projections, rank).masked_fill_(foreign_LS, 0)
    start = 0
    for projection, b_SRO in enumerate(stack.b_PSRO):
        stop = start + b_SRO.shape[2]
        h_LK = h_LSPR[:, :, projection].reshape(-1, count * rank)
        y_LO[:, start:stop].addmm_(h_LK, b_SRO[live].view(count * rank, -1))
        start = stop
    if rows_L is not None:
        y_TO.index_copy_(0, rows_L, y_LO)

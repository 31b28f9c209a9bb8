"""`lora_apply` in plain torch, quick where dispatch costs more than arithmetic.

Two ways. Few tokens (decode): all slots of the live range at once, as one batched product over slots whose
rows are padded to the busiest slot; no Python loop over slots. Many tokens (prefill), one live slot, or slots
far apart: tokens sorted by slot, one product per segment at the slot's true rank. In both a token meets no
factor but its own slot's, so an adapter that overflows spoils no other row, and rows of base tokens are never
written: they stay bit-identical to the base model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedllm.kernels.segments import Segments
from fedllm.kernels.stack import LoraStack

PADDED_MAX_TOKENS = 32
"""Above this many tokens a product per segment is large enough to pay for its dispatch."""
_MAX_WASTE = 2
"""Padded rows per adapted token, beyond which the segment way does less work."""


@dataclass(frozen=True)
class Padding:
    """Rows of a batched product over the slots ``first`` to ``first + count - 1``.

    Parameters
    ----------
    first, count, width : int
        Live range of slots, and rows given to each.
    source_K : Tensor or None
        Token of each of the ``count * width`` rows; None when token `i` is row `i`.
    taken_L : Tensor
        Row of each adapted token, in the order of `tokens_L`.
    tokens_L : Tensor
        The adapted tokens.
    """

    first: int
    count: int
    width: int
    source_K: Tensor | None  # noqa: N815
    taken_L: Tensor  # noqa: N815
    tokens_L: Tensor  # noqa: N815


@dataclass(frozen=True)
class Plan:
    """What `apply` needs of a batch, as tensors on its device; made once a step.

    Parameters
    ----------
    segments : Segments
        The grouping.
    rows_L : Tensor or None
        Adapted tokens sorted by slot, for the segment way; None when they are all, in order.
    padding : Padding or None
        For the padded way; None selects segments.
    """

    segments: Segments
    rows_L: Tensor | None  # noqa: N815
    padding: Padding | None


def plan(segments: Segments, *, device: str | torch.device) -> Plan:
    """Choose the way for a batch and put its metadata on the device."""
    padding = _pad(segments, device)
    if padding is not None or not segments.slots:
        return Plan(segments, None, padding)
    rows_L = None if segments.ordered else torch.from_numpy(segments.order).to(device)
    return Plan(segments, rows_L, None)


def apply(y_TO: Tensor, x_TD: Tensor, stack: LoraStack, chosen: Plan) -> None:
    """Add every adapted token's low-rank term to `y_TO` in place; see `fedllm.kernels.lora_apply`."""
    if chosen.padding is not None:
        _padded(y_TO, x_TD, stack, chosen.padding)
    elif chosen.segments.slots:
        _segments(y_TO, x_TD, stack, chosen)


def _pad(segments: Segments, device: str | torch.device) -> Padding | None:
    if segments.tokens > PADDED_MAX_TOKENS or len(segments.slots) < 2:
        return None
    first = segments.slots[0]
    count = segments.slots[-1] - first + 1
    counts = np.diff(segments.starts)
    width = int(counts.max())
    if count * width > _MAX_WASTE * segments.adapted:
        return None
    slots_L = segments.token_slots[segments.order] - first
    starts_L = np.repeat(segments.starts[:-1], counts)
    taken_L = slots_L * width + np.arange(segments.adapted) - starts_L
    # A row without a token of its own repeats the slot's first one (token 0 for a slot without any); what it
    # computes is never read.
    source_K = np.zeros((count, width), dtype=np.int64)
    source_K[np.array(segments.slots) - first] = segments.order[list(segments.starts[:-1])][:, None]
    source_K.reshape(-1)[taken_L] = segments.order
    straight = np.array_equal(source_K.reshape(-1), np.arange(segments.tokens)) and segments.ordered
    tensors = (torch.from_numpy(array).to(device) for array in (source_K.reshape(-1), taken_L, segments.order))
    source, taken, tokens = tensors
    return Padding(first, count, width, None if straight else source, taken, tokens)


def _padded(y_TO: Tensor, x_TD: Tensor, stack: LoraStack, padding: Padding) -> None:
    count, width, rank = padding.count, padding.width, stack.max_rank
    live = slice(padding.first, padding.first + count)
    x_KD = x_TD if padding.source_K is None else x_TD.index_select(0, padding.source_K)
    a_SQD = stack.a_SPRD[live].flatten(1, 2)
    h_SWQ = torch.bmm(x_KD.view(count, width, -1), a_SQD.transpose(1, 2))
    deltas = [
        torch.bmm(h_SWQ[:, :, p * rank : (p + 1) * rank], b_SRO[live]).view(count * width, -1)
        for p, b_SRO in enumerate(stack.b_PSRO)
    ]
    delta_KO = deltas[0] if len(deltas) == 1 else torch.cat(deltas, dim=1)
    if padding.source_K is None:
        y_TO.add_(delta_KO)
    else:
        y_TO.index_add_(0, padding.tokens_L, delta_KO.index_select(0, padding.taken_L))


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

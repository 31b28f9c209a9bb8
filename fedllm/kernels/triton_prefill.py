"""`lora_apply` in Triton for many rows per adapter: products of tiles, all projections in one launch.

A grouped product (Punica's SGMV, arXiv 2310.18547) over a work list of tiles: rows sorted by slot are gathered,
multiplied on tensor cores with float32 sums, and scattered back, each output once. Where tiles are few the input
columns are split; the splits' sums go to the workspace and are added in their order.
"""

# Triton's interpreter needs the annotations themselves: no `from __future__ import annotations` here.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl
from torch import Tensor

from fedllm.kernels import triton_plan, tuning
from fedllm.kernels.stack import LoraStack


def apply(y_TO: Tensor, x_TD: Tensor, stack: LoraStack, plan: triton_plan.Plan) -> None:
    """Add every adapted row's low-rank term to `y_TO` in place; see `fedllm.kernels.lora_apply`."""
    projections, width_in = len(stack.b_PSRO), x_TD.shape[1]
    cut = tuning.prefill(width_in, stack.max_rank, plan.tiles, projections, processors=plan.processors)
    h_NPCR = triton_plan.workspace(plan.rows, stack, cut.splits)
    shared = {
        **triton_plan.constants(stack, cut.block_rank),
        "SPLITS": cut.splits,
        "BLOCK_ROWS": plan.block_rows,
        # The interpreter multiplies bfloat16 as integers; float32 holds the same values.
        "UPCAST": x_TD.device.type == "cpu",
    }
    _shrink[(plan.tiles, projections, cut.splits)](
        x_TD,
        stack.a_SPRD,
        stack.ranks_S,
        plan.meta_I,
        h_NPCR,
        x_TD.stride(0),
        plan.max_rows,
        plan.max_tiles,
        WIDTH_IN=width_in,
        SPLIT_IN=cut.split_in,
        BLOCK_IN=cut.block_in,
        **shared,
    )
    tiles = triton_plan.output_tiles(stack.widths, cut.block_out)
    _expand[(plan.tiles, tiles["FIRST_TILES"][-1])](
        y_TO,
        stack.b_PSRO,
        stack.ranks_S,
        plan.meta_I,
        h_NPCR,
        y_TO.stride(0),
        plan.max_rows,
        plan.max_tiles,
        BLOCK_OUT=cut.block_out,
        **tiles,
        **shared,
    )


@triton.jit
def _read_tile(meta_ptr, max_rows, max_tiles, tile, BLOCK_ROWS: tl.constexpr):
    work = meta_ptr + 2 + 2 * max_rows + tile
    nth = tl.arange(0, BLOCK_ROWS)
    rows = tl.load(work) + nth
    live = nth < tl.load(work + max_tiles)
    slot = tl.load(work + 2 * max_tiles).to(tl.int64)
    tokens = tl.load(meta_ptr + 2 + rows, mask=live, other=0).to(tl.int64)
    return rows.to(tl.int64), live, tokens, slot


@triton.jit
def _shrink(
    x_ptr,
    a_ptr,
    ranks_ptr,
    meta_ptr,
    h_ptr,
    x_stride,
    max_rows,
    max_tiles,
    WIDTH_IN: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_IN: tl.constexpr,
    MAX_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile >= tl.load(meta_ptr + 1):
        return
    projection = tl.program_id(1)
    split = tl.program_id(2)
    rows, live, tokens, slot = _read_tile(meta_ptr, max_rows, max_tiles, tile, BLOCK_ROWS)
    rank = tl.load(ranks_ptr + slot)
    x_rows = x_ptr + tokens[:, None] * x_stride
    a_slot = a_ptr + (slot * PROJECTIONS + projection) * MAX_RANK * WIDTH_IN
    h_rows = h_ptr + ((rows[:, None] * PROJECTIONS + projection) * SPLITS + split) * MAX_RANK
    for r in range(0, rank, BLOCK_RANK):
        ranks = r + tl.arange(0, BLOCK_RANK)
        total = tl.zeros([BLOCK_ROWS, BLOCK_RANK], dtype=tl.float32)
        for k in range(0, SPLIT_IN, BLOCK_IN):
            columns = split * SPLIT_IN + k + tl.arange(0, BLOCK_IN)
            inside = columns < WIDTH_IN
            x = tl.load(x_rows + columns[None, :], mask=live[:, None] & inside[None, :], other=0.0)
            mask = inside[:, None] & (ranks < rank)[None, :]
            a = tl.load(a_slot + ranks[None, :] * WIDTH_IN + columns[:, None], mask=mask, other=0.0)
            if UPCAST:
                x, a = x.to(tl.float32), a.to(tl.float32)
            total = tl.dot(x, a, total, input_precision="ieee")
        tl.store(h_rows + ranks[None, :], total, mask=live[:, None] & (ranks < rank)[None, :])


@triton.jit
def _expand(
    y_ptr,
    b_ptrs,
    ranks_ptr,
    meta_ptr,
    h_ptr,
    y_stride,
    max_rows,
    max_tiles,
    WIDTHS: tl.constexpr,
    STARTS: tl.constexpr,
    FIRST_TILES: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    SPLITS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile >= tl.load(meta_ptr + 1):
        return
    tile_out = tl.program_id(1)
    rows, live, tokens, slot = _read_tile(meta_ptr, max_rows, max_tiles, tile, BLOCK_ROWS)
    rank = tl.load(ranks_ptr + slot)
    y_rows = y_ptr + tokens * y_stride
    h_rows = h_ptr + rows * PROJECTIONS * SPLITS * MAX_RANK
    for p in tl.static_range(PROJECTIONS):
        if (rank > 0) & (tile_out >= FIRST_TILES[p]) & (tile_out < FIRST_TILES[p + 1]):
            _expand_tile(
                y_rows + STARTS[p],
                b_ptrs[p] + slot * MAX_RANK * WIDTHS[p],
                h_rows + p * SPLITS * MAX_RANK,
                live,
                rank,
                tile_out - FIRST_TILES[p],
                WIDTHS[p],
                SPLITS,
                MAX_RANK,
                BLOCK_ROWS,
                BLOCK_RANK,
                BLOCK_OUT,
                UPCAST,
            )


@triton.jit
def _expand_tile(
    y_rows,
    b_slot,
    h_rows,
    live,
    rank,
    tile,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    outputs = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = outputs < WIDTH
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUT], dtype=tl.float32)
    for r in range(0, rank, BLOCK_RANK):
        ranks = r + tl.arange(0, BLOCK_RANK)
        mask = live[:, None] & (ranks < rank)[None, :]
        h = tl.zeros([BLOCK_ROWS, BLOCK_RANK], dtype=tl.float32)
        for split in range(SPLITS):
            h += tl.load(h_rows[:, None] + split * MAX_RANK + ranks[None, :], mask=mask, other=0.0)
        mask = (ranks < rank)[:, None] & inside[None, :]
        b = tl.load(b_slot + ranks[:, None] * WIDTH + outputs[None, :], mask=mask, other=0.0)
        # Tensor cores multiply in B's dtype. The rounded part goes through them once more: the rank is small, and a
        # prompt then gets the same float32 products as decoded tokens.
        high = h.to(b.dtype)
        low = (h - high.to(tl.float32)).to(b.dtype)
        if UPCAST:
            high, low, b = high.to(tl.float32), low.to(tl.float32), b.to(tl.float32)
        total = tl.dot(high, b, total, input_precision="ieee")
        if h_rows.dtype.element_ty != y_rows.dtype.element_ty:
            total = tl.dot(low, b, total, input_precision="ieee")
    y_tile = y_rows[:, None] + outputs[None, :]
    mask = live[:, None] & inside[None, :]
    y = tl.load(y_tile, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_tile, (y + total).to(y_rows.dtype.element_ty), mask=mask)

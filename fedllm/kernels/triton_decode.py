"""`lora_apply` in Triton for few rows per adapter: a matrix-vector product a row, all projections in one launch.

Shrink: a program sums some parts of one row's product with A and writes each part's sum to the workspace. Expand:
a program adds the parts, in their order, and computes a tile of outputs. No atomics, and the parts depend on the
layer only, so a row's result has the same bits in any batch and with any split (Punica's BGMV, arXiv 2310.18547,
with S-LoRA's unpadded ranks, arXiv 2311.03285).
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
    cut = tuning.decode(width_in, stack.max_rank, plan.rows, projections, processors=plan.processors)
    h_NPCR = triton_plan.workspace(plan.rows, stack, cut.parts)
    shared = {**triton_plan.constants(stack, cut.block_rank), "PARTS": cut.parts}
    _shrink[(plan.rows, projections, cut.splits)](
        x_TD,
        stack.a_SPRD,
        stack.ranks_S,
        plan.meta_I,
        h_NPCR,
        x_TD.stride(0),
        plan.max_rows,
        WIDTH_IN=width_in,
        PART=cut.part,
        PARTS_PER_SPLIT=-(-cut.parts // cut.splits),
        BLOCK_IN=cut.block_in,
        **shared,
    )
    tiles = triton_plan.output_tiles(stack.widths, cut.block_out)
    _expand[(plan.rows, tiles["FIRST_TILES"][-1])](
        y_TO,
        stack.b_PSRO,
        stack.ranks_S,
        plan.meta_I,
        h_NPCR,
        y_TO.stride(0),
        plan.max_rows,
        PARTS_PADDED=triton.next_power_of_2(cut.parts),
        BLOCK_OUT=cut.block_out,
        **tiles,
        **shared,
    )


@triton.jit
def _shrink(
    x_ptr,
    a_ptr,
    ranks_ptr,
    meta_ptr,
    h_ptr,
    x_stride,
    max_rows,
    WIDTH_IN: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    PARTS_PER_SPLIT: tl.constexpr,
    MAX_RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    row = tl.program_id(0)
    if row >= tl.load(meta_ptr):
        return
    projection = tl.program_id(1)
    first = tl.program_id(2) * PARTS_PER_SPLIT
    token = tl.load(meta_ptr + 2 + row).to(tl.int64)
    slot = tl.load(meta_ptr + 2 + max_rows + row).to(tl.int64)
    rank = tl.load(ranks_ptr + slot)
    x_row = x_ptr + token * x_stride
    a_slot = a_ptr + (slot * PROJECTIONS + projection) * MAX_RANK * WIDTH_IN
    h_row = h_ptr + (row.to(tl.int64) * PROJECTIONS + projection) * PARTS * MAX_RANK
    for part in range(first, tl.minimum(first + PARTS_PER_SPLIT, PARTS)):
        for r in range(0, rank, BLOCK_RANK):
            ranks = r + tl.arange(0, BLOCK_RANK)
            total = tl.zeros([BLOCK_RANK], dtype=tl.float32)
            for k in range(0, PART, BLOCK_IN):
                columns = part * PART + k + tl.arange(0, BLOCK_IN)
                inside = columns < WIDTH_IN
                x = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
                mask = (ranks < rank)[:, None] & inside[None, :]
                a = tl.load(a_slot + ranks[:, None] * WIDTH_IN + columns[None, :], mask=mask, other=0.0)
                total += tl.sum(a.to(tl.float32) * x[None, :], axis=1)
            tl.store(h_row + part * MAX_RANK + ranks, total, mask=ranks < rank)


@triton.jit
def _expand(
    y_ptr,
    b_ptrs,
    ranks_ptr,
    meta_ptr,
    h_ptr,
    y_stride,
    max_rows,
    WIDTHS: tl.constexpr,
    STARTS: tl.constexpr,
    FIRST_TILES: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
    MAX_RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    row = tl.program_id(0)
    if row >= tl.load(meta_ptr):
        return
    tile = tl.program_id(1)
    token = tl.load(meta_ptr + 2 + row).to(tl.int64)
    slot = tl.load(meta_ptr + 2 + max_rows + row).to(tl.int64)
    rank = tl.load(ranks_ptr + slot)
    y_row = y_ptr + token * y_stride
    h_row = h_ptr + row.to(tl.int64) * PROJECTIONS * PARTS * MAX_RANK
    for p in tl.static_range(PROJECTIONS):
        if (rank > 0) & (tile >= FIRST_TILES[p]) & (tile < FIRST_TILES[p + 1]):
            _expand_tile(
                y_row + STARTS[p],
                b_ptrs[p] + slot * MAX_RANK * WIDTHS[p],
                h_row + p * PARTS * MAX_RANK,
                rank,
                tile - FIRST_TILES[p],
                WIDTHS[p],
                PARTS,
                PARTS_PADDED,
                MAX_RANK,
                BLOCK_RANK,
                BLOCK_OUT,
            )


@triton.jit
def _expand_tile(
    y_row,
    b_slot,
    h_row,
    rank,
    tile,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
    MAX_RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    outputs = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = outputs < WIDTH
    parts = tl.arange(0, PARTS_PADDED)
    total = tl.zeros([BLOCK_OUT], dtype=tl.float32)
    for r in range(0, rank, BLOCK_RANK):
        ranks = r + tl.arange(0, BLOCK_RANK)
        live = ranks < rank
        mask = (parts < PARTS)[:, None] & live[None, :]
        h = tl.sum(tl.load(h_row + parts[:, None] * MAX_RANK + ranks[None, :], mask=mask, other=0.0), axis=0)
        mask = live[:, None] & inside[None, :]
        b = tl.load(b_slot + ranks[:, None] * WIDTH + outputs[None, :], mask=mask, other=0.0)
        total += tl.sum(h[:, None] * b.to(tl.float32), axis=0)
    y = tl.load(y_row + outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_row + outputs, (y + total).to(y_row.dtype.element_ty), mask=inside)

"""Paged decode in Triton: flash-decoding (Dao et al. 2023) over block tables.

A program takes one key-value head of one sequence, all its query heads together, and one part of the context;
a second kernel combines the parts. The parts' number is an argument and their borders are computed on the device,
so a captured graph serves any contexts. Every part writes its weight, an empty one minus infinity; nothing is
accumulated in place. Products are of the cache's dtype, scores and sums float32.
"""

# Triton's interpreter needs the annotations themselves: no `from __future__ import annotations` here.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 64
"""Cached tokens per inner step; at head width 128 in bf16 a tile of keys is 16 KiB."""
_LOG2_E = 1.4426950408889634
_INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Read when the kernels are made, as Triton does. Its interpreter cannot multiply bfloat16."""
_PRODUCTS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    blocks_ptr,
    contexts_ptr,
    out_ptr,
    weight_ptr,
    scale,
    splits,
    window,
    q_stride_b,
    q_stride_h,
    cache_stride_block,
    cache_stride_token,
    cache_stride_head,
    blocks_stride,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOWED: tl.constexpr,
    DIRECT: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend over one part of one context; write the part's mean of values and the log2 of its weight."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    context = tl.load(contexts_ptr + row).to(tl.int32)
    first = tl.maximum(context - window, 0) if WINDOWED else context * 0
    part = tl.cdiv(tl.cdiv(context - first, splits), TILE) * TILE
    begin = first + split * part
    end = tl.minimum(begin + part, context)

    g = tl.arange(0, GROUP_PADDED)
    d = tl.arange(0, DIM_PADDED)
    n = tl.arange(0, TILE)
    heads = kv_head * GROUP + g
    live_q = (g < GROUP)[:, None] & (d < DIM)[None, :]
    q = tl.load(q_ptr + row * q_stride_b + heads[:, None] * q_stride_h + d[None, :], mask=live_q, other=0.0).to(PRODUCT)

    top = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    mixed = tl.zeros([GROUP_PADDED, DIM_PADDED], tl.float32)
    for start in range(begin, end, TILE):
        at = start + n
        live = at < end
        block = tl.load(blocks_ptr + row * blocks_stride + at // BLOCK_TOKENS, mask=live, other=0).to(tl.int64)
        token = block * cache_stride_block + (at % BLOCK_TOKENS) * cache_stride_token + kv_head * cache_stride_head
        live_kv = live[:, None] & (d < DIM)[None, :]
        k = tl.load(k_ptr + token[:, None] + d[None, :], mask=live_kv, other=0.0).to(PRODUCT)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(live[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(scores - new_top[:, None])
        v = tl.load(v_ptr + token[:, None] + d[None, :], mask=live_kv, other=0.0).to(PRODUCT)
        total = total * shrink + tl.sum(p, 1)
        mixed = mixed * shrink[:, None] + tl.dot(p.to(PRODUCT), v, input_precision=PRECISION)
        top = new_top

    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    out = row * kv_heads * GROUP + heads
    if DIRECT:
        tl.store(out_ptr + out[:, None] * DIM + d[None, :], mixed, mask=live_q)
    else:
        out = out * splits + split
        # An empty part has weight 2^-inf and writes no values: the second kernel does not read them.
        some = begin + g * 0 < end
        tl.store(out_ptr + out[:, None] * DIM + d[None, :], mixed, mask=live_q & some[:, None])
        weight = tl.where(some, top + tl.log2(tl.where(total == 0.0, 1.0, total)), float("-inf"))
        tl.store(weight_ptr + out, weight, mask=g < GROUP)


@triton.jit
def _combine(
    part_ptr,
    weight_ptr,
    out_ptr,
    splits,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
):
    """Mean of a head's parts by their weights."""
    head = tl.program_id(0)
    s = tl.arange(0, SPLITS_PADDED)
    d = tl.arange(0, DIM_PADDED)
    weight = tl.load(weight_ptr + head * splits + s, mask=s < splits, other=float("-inf"))
    live = (weight != float("-inf"))[:, None] & (d < DIM)[None, :]
    parts = tl.load(part_ptr + (head * splits + s)[:, None] * DIM + d[None, :], mask=live, other=0.0)
    share = tl.exp2(weight - tl.max(weight, 0))
    mean = tl.sum(parts * share[:, None], 0) / tl.sum(share, 0)
    tl.store(out_ptr + head * DIM + d, mean, mask=d < DIM)


def paged_decode(
    q_BNH: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks_BN: Tensor,
    contexts_B: Tensor,
    *,
    splits: int,
    window: int | None = None,
) -> Tensor:
    """Compute `fedllm.kernels.attention.paged_decode` with contexts cut into `splits` parts.

    Raises
    ------
    ValueError
        If keys and values are laid out differently, or a last dimension is not contiguous.
    """
    batch, heads, dim = q_BNH.shape
    size, kv_heads = keys.shape[1], keys.shape[2]
    if keys.stride() != values.stride() or keys.stride(3) != 1 or q_BNH.stride(2) != 1 or blocks_BN.stride(1) != 1:
        raise ValueError("keys and values need equal strides, and all a contiguous last dimension")
    group = heads // kv_heads
    out_BNH = torch.empty(batch, heads, dim, dtype=q_BNH.dtype, device=q_BNH.device)
    direct = splits == 1
    part, weight = out_BNH, out_BNH
    if not direct:
        part = torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=q_BNH.device)
        weight = torch.empty(batch, heads, splits, dtype=torch.float32, device=q_BNH.device)
    dim_padded = max(16, triton.next_power_of_2(dim))
    _attend[(batch, kv_heads, splits)](
        q_BNH,
        keys,
        values,
        blocks_BN,
        contexts_B,
        part,
        weight,
        dim**-0.5 * _LOG2_E,
        splits,
        window or 0,
        q_BNH.stride(0),
        q_BNH.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        blocks_BN.stride(0),
        GROUP=group,
        GROUP_PADDED=max(16, triton.next_power_of_2(group)),  # the least number of rows of a tensor-core product
        DIM=dim,
        DIM_PADDED=dim_padded,
        BLOCK_TOKENS=size,
        TILE=_TILE,
        WINDOWED=window is not None,
        DIRECT=direct,
        PRODUCT=_PRODUCTS[torch.float32 if _INTERPRETED else q_BNH.dtype],
        PRECISION="ieee",
    )
    if not direct:
        _combine[(batch * heads,)](
            part, weight, out_BNH, splits, DIM=dim, DIM_PADDED=dim_padded, SPLITS_PADDED=triton.next_power_of_2(splits)
        )
    return out_BNH

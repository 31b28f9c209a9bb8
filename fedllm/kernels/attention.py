"""Attention of one new token per sequence over a paged cache: the specification, and who computes it where.

PagedAttention (Kwon et al., arXiv 2309.06180). A *plan* is made once a step and serves all layers, like that of
`fedllm.kernels.lora_apply`. Triton computes it on a GPU, FlashInfer where it is installed and has the shape;
`reference` is the specification that both are tested against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from fedllm.errors import ConfigError
from fedllm.kernels.triton_plan import processors


@dataclass(frozen=True)
class DecodeShape:
    """What all layers and steps of a model share.

    Parameters
    ----------
    heads, kv_heads, head_dim : int
        Query heads, a multiple of the key-value heads, and their width.
    block_tokens : int
        Tokens per cache block.
    windows : tuple of (int or None)
        The different attention windows of the layers, in tokens; None is no window.
    dtype, device
        Of queries and cache.
    """

    heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    windows: tuple[int | None, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class DecodePlan:
    """One step's sequences, prepared.

    Parameters
    ----------
    kind : str
        ``torch``, ``triton`` or ``flashinfer``.
    blocks_BN : Tensor
        Shape ``(B, N)``, integers: cache blocks of each sequence in order. Entries beyond a context are not read.
    contexts_B : Tensor
        Shape ``(B,)``, integers, at least 1: tokens in the cache, the new one included.
    splits : int
        Parts that a context is cut into; Triton only.
    wrappers : mapping
        FlashInfer's planned wrapper by window.
    """

    kind: str
    blocks_BN: Tensor  # noqa: N815
    contexts_B: Tensor  # noqa: N815
    splits: int = 1
    wrappers: Mapping[int | None, Any] = field(default_factory=dict)


class Decoder(Protocol):
    """Makes plans of one kind."""

    def plan(self, blocks_BN: Tensor, contexts_B: Tensor) -> DecodePlan:
        """Prepare a step; outside of a captured graph."""

    def fixed(self, batch: int, width: int) -> Decoder:
        """Return a decoder whose plans keep their addresses, for graphs of one batch size and table width."""


def paged_decode(q_BNH: Tensor, keys: Tensor, values: Tensor, plan: DecodePlan, *, window: int | None = None) -> Tensor:
    """Attend with one query per sequence and head over that sequence's blocks.

    Parameters
    ----------
    q_BNH : Tensor
        Shape ``(B, heads, head_dim)``; the last dimension contiguous.
    keys, values : Tensor
        Shape ``(blocks, block_tokens, kv_heads, head_dim)``, one layer of the cache. What lies beyond a context
        may be anything, NaN included.
    plan : DecodePlan
        Of this step.
    window : int, optional
        See only the last `window` tokens of the context.

    Returns
    -------
    Tensor
        Shape ``(B, heads, head_dim)``, contiguous, in the dtype of `q_BNH`; sums are float32.
    """
    if plan.kind == "torch":
        return reference(q_BNH, keys, values, plan.blocks_BN, plan.contexts_B, window=window)
    if plan.kind == "flashinfer":
        out: Tensor = plan.wrappers[window].run(q_BNH.contiguous(), (keys, values))
        return out
    from fedllm.kernels import triton_attention

    return triton_attention.paged_decode(
        q_BNH, keys, values, plan.blocks_BN, plan.contexts_B, splits=plan.splits, window=window
    )


def reference(
    q_BNH: Tensor, keys: Tensor, values: Tensor, blocks_BN: Tensor, contexts_B: Tensor, *, window: int | None = None
) -> Tensor:
    """Return what `paged_decode` specifies: one sequence at a time, float64, no cleverness."""
    batch, heads, dim = q_BNH.shape
    size, kv_heads = keys.shape[1], keys.shape[2]
    out_BNH = torch.empty(batch, heads, dim, dtype=q_BNH.dtype, device=q_BNH.device)
    for row in range(batch):
        context = int(contexts_B[row])
        seen = torch.arange(max(0, context - (window or context)), context, device=q_BNH.device)
        where = blocks_BN[row].to(torch.int64)[seen // size]
        k_LKH, v_LKH = (cache[where, seen % size].to(torch.float64) for cache in (keys, values))
        q_KGH = q_BNH[row].to(torch.float64).view(kv_heads, heads // kv_heads, dim)
        weights_KGL = (torch.einsum("kgh,lkh->kgl", q_KGH, k_LKH) * dim**-0.5).softmax(-1)
        out_BNH[row] = torch.einsum("kgl,lkh->kgh", weights_KGL, v_LKH).reshape(heads, dim).to(q_BNH.dtype)
    return out_BNH


def choose_kind(shape: DecodeShape) -> str:
    """Return who decodes: on a GPU FlashInfer where it is installed and has the shape, else Triton; else torch."""
    if shape.device.type != "cuda":
        return "torch"
    if find_spec("flashinfer") is not None:
        from fedllm.kernels import flashinfer_attention

        if flashinfer_attention.serves(shape):
            return "flashinfer"
    return "triton"


def new_decoder(shape: DecodeShape, *, kind: str | None = None) -> Decoder:
    """Return the maker of plans for a model.

    Parameters
    ----------
    shape : DecodeShape
    kind : str, optional
        ``torch``, ``triton`` or ``flashinfer``; by device unless given.

    Raises
    ------
    ConfigError
        If the kind is another.
    """
    kind = kind or choose_kind(shape)
    if kind == "flashinfer":
        from fedllm.kernels import flashinfer_attention

        return flashinfer_attention.FlashInferDecoder(shape)
    if kind not in ("torch", "triton"):
        raise ConfigError(f"attention {kind!r} is not known: torch, triton or flashinfer")
    return _TableDecoder(shape, kind, processors(shape.device))


@dataclass(frozen=True)
class _TableDecoder:
    """The plan is the table itself: nothing to prepare, and its address is the caller's."""

    shape: DecodeShape
    kind: str
    processors: int

    def plan(self, blocks_BN: Tensor, contexts_B: Tensor) -> DecodePlan:
        batch, width = blocks_BN.shape
        programs = batch * self.shape.kv_heads
        return DecodePlan(
            self.kind, blocks_BN, contexts_B, choose_splits(programs, width * self.shape.block_tokens, self.processors)
        )

    def fixed(self, batch: int, width: int) -> Decoder:  # noqa: ARG002 - the table's shape says both
        return self


_SPLIT_TOKENS = 128
"""A part of a context shorter than this costs more to combine than it saves."""
_MAX_SPLITS = 64


def choose_splits(programs: int, longest: int, processors: int) -> int:
    """Return into how many parts contexts are cut (flash-decoding, Dao et al. 2023).

    It goes by what is known before a step is captured, never by the contexts themselves.

    Parameters
    ----------
    programs : int
        Independent pieces of work without cutting: sequences times key-value heads.
    longest : int
        Most tokens in a context.
    processors : int
        Multiprocessors of the device; two programs are wanted on each.
    """
    wanted = -(-2 * processors // programs)
    return max(1, min(wanted, -(-longest // _SPLIT_TOKENS), _MAX_SPLITS))

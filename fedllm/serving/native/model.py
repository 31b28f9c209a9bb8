"""The Llama family's forward pass over a paged KV cache, with many adapters per batch.

RMSNorm, rotary positions, grouped-query attention, SwiGLU; what differs between Llama, Mistral, Qwen2 and Qwen3 are
switches of `LlamaConfig`. All tokens of a step are one flat batch `T`; only attention looks at sequences. Fused
projections (q, k, v and gate, up) and few operators per layer keep the decode step near the cost of reading the
weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the field's usual name
from torch import Tensor

from fedllm.kernels import LoraStack, Plan, lora_apply, new_stack
from fedllm.kernels.attention import DecodePlan, DecodeShape, new_decoder, paged_decode
from fedllm.serving.native.families import LlamaConfig
from fedllm.serving.native.linear import Linear

GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Fused linear layers and the projections in each, in output order."""


@dataclass(frozen=True)
class LayerWeights:
    """One layer: two norms and four fused linears.

    The norms of queries and keys are repeated by head, so that one product serves both.
    """

    input_norm: Tensor
    post_norm: Tensor
    linears: dict[str, Linear]
    qk_norm_NH: Tensor | None = None  # noqa: N815


@dataclass(frozen=True)
class LlamaWeights:
    """A base model's tensors on one device, in one dtype."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Linear


@dataclass(frozen=True)
class Span:
    """Attention of a group of sequences that share a number of new tokens.

    Parameters
    ----------
    rows : slice
        Their tokens in the flat batch, sequence after sequence.
    blocks_BN : Tensor
        Block indices; a shorter sequence is padded with its own first block, never with another's.
    mask_B1QL : Tensor or None
        Additive causal mask in the activations' dtype, 0 or -inf, that broadcasts to ``(B, 1, G * n, L)`` with `G`
        query heads per KV head. None where the paged kernel attends: it goes by positions.
    sequences, count : int
        `B`, and new tokens per sequence `n`.
    decode : DecodePlan or None
        A plan of the paged kernel that was made before, for a captured step; else the model makes one.
    """

    rows: slice
    blocks_BN: Tensor  # noqa: N815
    mask_B1QL: Tensor | None  # noqa: N815
    sequences: int
    count: int
    decode: DecodePlan | None = None


@dataclass(frozen=True)
class StepInput:
    """Everything one forward pass needs besides weights; made once, used by all layers."""

    tokens_T: Tensor  # noqa: N815
    positions_T: Tensor  # noqa: N815
    cache_rows_T: Tensor  # noqa: N815
    spans: tuple[Span, ...]
    lora: Plan
    logit_rows: Tensor


class LlamaModel:
    """Weights, adapters and the KV cache.

    Parameters
    ----------
    config : LlamaConfig
        Shapes and switches.
    weights : LlamaWeights
        On their device.
    slots, max_rank : int
        Size of the adapter stacks.
    blocks, block_tokens : int
        Size of the KV cache. It has one block more, `scratch_block`, that no sequence is ever given.
    positions : int, optional
        Positions that are ever asked for; the base's own limit unless given.
    attention : str, optional
        How single new tokens attend: ``gathered`` blocks (the default on a CPU, and always used for prompts), or in
        place by a kind of `fedllm.kernels.attention`: ``torch``, ``triton``, ``flashinfer``; by device unless given.
    """

    def __init__(
        self,
        config: LlamaConfig,
        weights: LlamaWeights,
        *,
        slots: int,
        max_rank: int,
        blocks: int,
        block_tokens: int,
        positions: int | None = None,
        attention: str | None = None,
    ) -> None:
        self.config = config
        self.weights = weights
        self.block_tokens = block_tokens
        self.scratch_block = blocks
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self.attention = attention
        self.paged = self.device.type == "cuda" if attention is None else attention != "gathered"
        self.lora: tuple[dict[str, LoraStack], ...] = tuple(
            {group: self._new_stack(group, slots, max_rank) for group in GROUPS} for _ in weights.layers
        )
        self.cache = torch.zeros(
            (len(weights.layers), 2, blocks + 1, block_tokens, config.num_key_value_heads, config.head_dim),
            dtype=self.dtype,
            device=self.device,
        )
        self.decode_shape = DecodeShape(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            block_tokens=block_tokens,
            windows=tuple(dict.fromkeys(config.windows or (None,))),
            dtype=self.dtype,
            device=self.device,
        )
        self.decoder = new_decoder(self.decode_shape, kind=attention) if self.paged else None
        count = min(positions or config.max_position_embeddings, config.max_position_embeddings)
        self._cos_PH, self._sin_PH = _rotary_tables(config, count, self.dtype, self.device)

    def forward(self, step: StepInput) -> Tensor:
        """Return the logits of ``step.logit_rows``, shape ``(rows, vocab)``, and fill the cache."""
        cos_T1H = self._cos_PH.index_select(0, step.positions_T)[:, None]
        sin_T1H = self._sin_PH.index_select(0, step.positions_T)[:, None]
        reads = [self._read(step, span) for span in step.spans]
        x_TD = F.embedding(step.tokens_T, self.weights.embedding)
        width, eps = (self.config.hidden_size,), self.config.rms_norm_eps
        for index, layer in enumerate(self.weights.layers):
            h_TD = F.rms_norm(x_TD, width, layer.input_norm, eps)
            x_TD = x_TD + self._attention(index, layer, h_TD, cos_T1H, sin_T1H, step, reads)
            h_TD = F.rms_norm(x_TD, width, layer.post_norm, eps)
            x_TD = x_TD + self._mlp(index, layer, h_TD, step)
        x_RD = F.rms_norm(x_TD.index_select(0, step.logit_rows), width, self.weights.norm, eps)
        return self.weights.head(x_RD)

    def clear_blocks(self, blocks: list[int]) -> None:
        """Zero cache blocks before another sequence gets them.

        Attention multiplies masked positions by zero; a NaN left there by someone else's overflowing adapter
        would survive that.
        """
        self.cache.index_fill_(2, torch.tensor(blocks, device=self.device), 0)

    def _linear(self, index: int, layer: LayerWeights, group: str, x_TD: Tensor, step: StepInput) -> Tensor:
        y_TO = layer.linears[group](x_TD)
        lora_apply(y_TO, x_TD, self.lora[index][group], step.lora)
        return y_TO

    def _read(self, step: StepInput, span: Span) -> _Read:
        """Decide once a step how a span reads the cache: by the paged kernel's plan, or by a mask per window."""
        if span.decode is not None:
            return _Read(span, span.decode, {})
        if self.decoder is not None and span.count == 1:
            contexts_B = (step.positions_T[span.rows] + 1).to(torch.int32)
            return _Read(span, self.decoder.plan(span.blocks_BN, contexts_B), {})
        masks = {window: self._mask(step, span, window) for window in self.decode_shape.windows}
        return _Read(span, None, masks)

    def _mask(self, step: StepInput, span: Span, window: int | None) -> Tensor:
        if span.mask_B1QL is None:
            raise ValueError(f"a span of {span.count} new tokens has no mask, and the paged kernel takes 1")
        if window is None:
            return span.mask_B1QL
        length = span.blocks_BN.shape[1] * self.block_tokens
        last_BQ1 = step.positions_T[span.rows].view(span.sequences, span.count, 1)
        behind_BQL = torch.arange(length, device=self.device) <= last_BQ1 - window
        if span.count > 1:
            behind_BQL = behind_BQL.repeat(1, self.config.num_attention_heads // self.config.num_key_value_heads, 1)
        return span.mask_B1QL.masked_fill(behind_BQL[:, None], float("-inf"))

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        h_TD: Tensor,
        cos_T1H: Tensor,
        sin_T1H: Tensor,
        step: StepInput,
        reads: list[_Read],
    ) -> Tensor:
        cfg = self.config
        heads, kv_heads, dim = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        qkv_TNH = self._linear(index, layer, "qkv", h_TD, step).view(-1, heads + 2 * kv_heads, dim)
        turned = qkv_TNH[:, : heads + kv_heads]
        if layer.qk_norm_NH is not None:
            turned = F.rms_norm(turned, (dim,), None, cfg.rms_norm_eps) * layer.qk_norm_NH
        # sin carries the sign of rotate_half, so that a roll by half a head is all that is left of it.
        turned = torch.addcmul(turned * cos_T1H, turned.roll(dim // 2, -1), sin_T1H)
        q_TNH, k_TNH, v_TNH = turned[:, :heads], turned[:, heads:], qkv_TNH[:, heads + kv_heads :]
        keys, values = self.cache[index][0], self.cache[index][1]
        keys.view(-1, kv_heads, dim).index_copy_(0, step.cache_rows_T, k_TNH)
        values.view(-1, kv_heads, dim).index_copy_(0, step.cache_rows_T, v_TNH)
        window = cfg.window(index)
        parts = [self._attend(q_TNH[read.span.rows], keys, values, read, window) for read in reads]
        mixed_TO = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._linear(index, layer, "o", mixed_TO, step)

    def _attend(self, q_TNH: Tensor, keys: Tensor, values: Tensor, read: _Read, window: int | None) -> Tensor:
        """Attend in place, or over gathered blocks; there the query heads of one KV head count as queries."""
        cfg, span = self.config, read.span
        if read.plan is not None:
            return paged_decode(q_TNH, keys, values, read.plan, window=window).view(-1, cfg.query_width)
        kv_heads, dim = cfg.num_key_value_heads, cfg.head_dim
        group = cfg.num_attention_heads // kv_heads
        batch, count = span.sequences, span.count
        index = span.blocks_BN.flatten()
        k_BKLH = keys.index_select(0, index).view(batch, -1, kv_heads, dim).transpose(1, 2)
        v_BKLH = values.index_select(0, index).view(batch, -1, kv_heads, dim).transpose(1, 2)
        q_BKQH = q_TNH.reshape(batch, count, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
        q_BKQH = q_BKQH.reshape(batch, kv_heads, group * count, dim)
        out = F.scaled_dot_product_attention(q_BKQH, k_BKLH, v_BKLH, attn_mask=read.masks[window])
        out = out.view(batch, kv_heads, group, count, dim).permute(0, 3, 1, 2, 4)
        return out.reshape(batch * count, cfg.query_width)

    def _mlp(self, index: int, layer: LayerWeights, h_TD: Tensor, step: StepInput) -> Tensor:
        gate_up_TI = self._linear(index, layer, "gate_up", h_TD, step)
        gate_TI, up_TI = gate_up_TI.chunk(2, dim=-1)
        return self._linear(index, layer, "down", F.silu(gate_TI).mul_(up_TI), step)

    def _new_stack(self, group: str, slots: int, max_rank: int) -> LoraStack:
        shapes = [self.config.projection_shape(module) for module in GROUPS[group]]
        widths_out = [out for out, _ in shapes]
        return new_stack(slots, max_rank, shapes[0][1], widths_out, dtype=self.dtype, device=str(self.device))


@dataclass(frozen=True)
class _Read:
    span: Span
    plan: DecodePlan | None
    masks: dict[int | None, Tensor]


def _rotary_tables(cfg: LlamaConfig, positions: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and signed sin, each ``(positions, head_dim)`` (Su et al., arXiv 2104.09864)."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), cfg.rope.frequencies(cfg.head_dim))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(device, dtype), torch.cat([-sin, sin], -1).to(device, dtype)

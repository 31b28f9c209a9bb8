"""The Llama family's forward pass over a paged KV cache, with many adapters per batch.

RMSNorm, rotary positions, grouped-query attention, SwiGLU. All tokens of a step are one flat batch `T`;
only attention looks at sequences. Fused projections (q, k, v and gate, up) and few operators per layer keep
the decode step near the cost of reading the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the field's usual name
from torch import Tensor

from fedllm.kernels import LoraStack, Plan, lora_apply, new_stack


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers of a base model, under the names of its ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int

    @property
    def query_width(self) -> int:
        """Output width of ``q_proj``."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Output width of ``k_proj`` and of ``v_proj``."""
        return self.num_key_value_heads * self.head_dim

    def projection_shape(self, module: str) -> tuple[int, int]:
        """Return a projection's weight shape ``(out, in)``."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (self.query_width, hidden),
            "k_proj": (self.kv_width, hidden),
            "v_proj": (self.kv_width, hidden),
            "o_proj": (hidden, self.query_width),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }[module]


GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Fused linear layers and the projections in each, in output order."""


@dataclass(frozen=True)
class LayerWeights:
    """One layer: two norms and four fused linears, each weight ``(in, out)``.

    That is transposed: a CPU multiplies the few rows of a decode step by it up to a third faster.
    """

    input_norm: Tensor
    post_norm: Tensor
    linears: dict[str, Tensor]


@dataclass(frozen=True)
class LlamaWeights:
    """A base model's tensors on one device, in one dtype."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor


@dataclass(frozen=True)
class Span:
    """Attention of a group of sequences that share a number of new tokens.

    Parameters
    ----------
    rows : slice
        Their tokens in the flat batch, sequence after sequence.
    blocks_BN : Tensor
        Block indices; a shorter sequence is padded with its own first block, never with another's.
    mask_B1QL : Tensor
        Additive mask in the activations' dtype, 0 or -inf, that broadcasts to ``(B, 1, G * n, L)`` with `G`
        query heads per KV head.
    sequences, count : int
        `B`, and new tokens per sequence `n`.
    """

    rows: slice
    blocks_BN: Tensor  # noqa: N815
    mask_B1QL: Tensor  # noqa: N815
    sequences: int
    count: int


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
        Shapes.
    weights : LlamaWeights
        On their device.
    slots, max_rank : int
        Size of the adapter stacks.
    blocks, block_tokens : int
        Size of the KV cache.
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
    ) -> None:
        self.config = config
        self.weights = weights
        self.block_tokens = block_tokens
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self.lora: tuple[dict[str, LoraStack], ...] = tuple(
            {group: self._new_stack(group, slots, max_rank) for group in GROUPS} for _ in weights.layers
        )
        self.cache = torch.zeros(
            (len(weights.layers), 2, blocks, block_tokens, config.num_key_value_heads, config.head_dim),
            dtype=self.dtype,
            device=self.device,
        )
        self._cos_PH, self._sin_PH = _rotary_tables(config, self.dtype, self.device)

    def forward(self, step: StepInput) -> Tensor:
        """Return the logits of ``step.logit_rows``, shape ``(rows, vocab)``, and fill the cache."""
        cos_T1H = self._cos_PH.index_select(0, step.positions_T)[:, None]
        sin_T1H = self._sin_PH.index_select(0, step.positions_T)[:, None]
        x_TD = F.embedding(step.tokens_T, self.weights.embedding)
        width, eps = (self.config.hidden_size,), self.config.rms_norm_eps
        for index, layer in enumerate(self.weights.layers):
            h_TD = F.rms_norm(x_TD, width, layer.input_norm, eps)
            x_TD = x_TD + self._attention(index, layer, h_TD, cos_T1H, sin_T1H, step)
            h_TD = F.rms_norm(x_TD, width, layer.post_norm, eps)
            x_TD = x_TD + self._mlp(index, layer, h_TD, step)
        x_RD = F.rms_norm(x_TD.index_select(0, step.logit_rows), width, self.weights.norm, eps)
        return F.linear(x_RD, self.weights.head)

    def clear_blocks(self, blocks: list[int]) -> None:
        """Zero cache blocks before another sequence gets them.

        Attention multiplies masked positions by zero; a NaN left there by someone else's overflowing adapter
        would survive that.
        """
        self.cache.index_fill_(2, torch.tensor(blocks, device=self.device), 0)

    def _linear(self, index: int, layer: LayerWeights, group: str, x_TD: Tensor, step: StepInput) -> Tensor:
        y_TO = torch.mm(x_TD, layer.linears[group])
        lora_apply(y_TO, x_TD, self.lora[index][group], step.lora)
        return y_TO

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        h_TD: Tensor,
        cos_T1H: Tensor,
        sin_T1H: Tensor,
        step: StepInput,
    ) -> Tensor:
        cfg = self.config
        heads, kv_heads, dim = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        qkv_TNH = self._linear(index, layer, "qkv", h_TD, step).view(-1, heads + 2 * kv_heads, dim)
        turned = qkv_TNH[:, : heads + kv_heads]
        # sin carries the sign of rotate_half, so that a roll by half a head is all that is left of it.
        turned = torch.addcmul(turned * cos_T1H, turned.roll(dim // 2, -1), sin_T1H)
        q_TNH, k_TNH, v_TNH = turned[:, :heads], turned[:, heads:], qkv_TNH[:, heads + kv_heads :]
        keys, values = self.cache[index][0], self.cache[index][1]
        keys.view(-1, kv_heads, dim).index_copy_(0, step.cache_rows_T, k_TNH)
        values.view(-1, kv_heads, dim).index_copy_(0, step.cache_rows_T, v_TNH)
        parts = [self._attend(q_TNH[span.rows], keys, values, span) for span in step.spans]
        mixed_TO = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._linear(index, layer, "o", mixed_TO, step)

    def _attend(self, q_TNH: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """Attend over gathered blocks; the query heads of one KV head count as queries, so none is copied."""
        cfg = self.config
        kv_heads, dim = cfg.num_key_value_heads, cfg.head_dim
        group = cfg.num_attention_heads // kv_heads
        batch, count = span.sequences, span.count
        index = span.blocks_BN.flatten()
        k_BKLH = keys.index_select(0, index).view(batch, -1, kv_heads, dim).transpose(1, 2)
        v_BKLH = values.index_select(0, index).view(batch, -1, kv_heads, dim).transpose(1, 2)
        q_BKQH = q_TNH.reshape(batch, count, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
        q_BKQH = q_BKQH.reshape(batch, kv_heads, group * count, dim)
        out = F.scaled_dot_product_attention(q_BKQH, k_BKLH, v_BKLH, attn_mask=span.mask_B1QL)
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


def _rotary_tables(cfg: LlamaConfig, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and signed sin, each ``(positions, head_dim)`` (Su et al., arXiv 2104.09864)."""
    half = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32) / cfg.head_dim
    frequencies = 1.0 / (cfg.rope_theta**half)
    angles = torch.outer(torch.arange(cfg.max_position_embeddings, dtype=torch.float32), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(device, dtype), torch.cat([-sin, sin], -1).to(device, dtype)

"""What fits into a device's free memory: weights, adapter slots, one step's activations, and the rest for the cache.

Counted from shapes, before anything is loaded. Activations are an upper estimate; the share that is left free is for
the allocator, captured graphs and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedllm.errors import ConfigError
from fedllm.serving.native.families import LlamaConfig
from fedllm.serving.native.limits import EngineLimits

_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FLOAT32 = 4
_INT64 = 8
_SCORE_ROWS = 64
"""Rows of logits that the runner scores at a time, in float32."""


@dataclass(frozen=True)
class MemoryPlan:
    """Where a device's free bytes go.

    Parameters
    ----------
    weights, adapters, activations : int
        Bytes.
    block : int
        Bytes of one cache block over all layers.
    kv_blocks : int
        Blocks that fit besides.
    """

    weights: int
    adapters: int
    activations: int
    block: int
    kv_blocks: int


def weight_bytes(config: LlamaConfig, element: int) -> int:
    """Return the bytes of a base model's tensors at `element` bytes a number."""
    hidden = config.hidden_size
    layer = 2 * hidden
    for module in _MODULES:
        out, width_in = config.projection_shape(module)
        layer += out * width_in + (out if config.has_bias(module) else 0)
    if config.qk_norm:
        layer += (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    tables = (1 if config.tied else 2) * config.vocab_size * hidden
    return element * (layer * config.num_hidden_layers + tables + hidden)


def slot_bytes(config: LlamaConfig, max_rank: int, element: int) -> int:
    """Return the bytes of one adapter slot: both factors of all seven projections of all layers."""
    widths = sum(sum(config.projection_shape(module)) for module in _MODULES)
    return element * max_rank * widths * config.num_hidden_layers


def block_bytes(config: LlamaConfig, block_tokens: int, element: int) -> int:
    """Return the bytes of one cache block: keys and values of its tokens in all layers."""
    return 2 * config.num_hidden_layers * block_tokens * config.kv_width * element


def activation_bytes(config: LlamaConfig, limits: EngineLimits, element: int) -> int:
    """Return an upper estimate of what one step allocates, and of the tables that all steps share."""
    tokens, longest = limits.max_step_tokens, _longest(config, limits)
    hidden, inner = config.hidden_size, config.intermediate_size
    linears = tokens * element * (4 * hidden + 3 * (config.query_width + 2 * config.kv_width) + 4 * inner)
    # A prompt chunk gathers its sequence's keys and values, and at worst writes its scores out.
    prompt = 2 * longest * config.kv_width * element + 2 * tokens * longest * config.num_attention_heads * _FLOAT32
    logits = max(tokens, limits.max_running) * config.vocab_size * element
    logits += min(max(tokens, limits.max_running), _SCORE_ROWS) * config.vocab_size * 2 * _FLOAT32
    rotary = 2 * longest * config.head_dim * element
    tables = limits.max_running * (longest // limits.block_tokens + 5) * _INT64
    return linears + prompt + logits + rotary + tables


def plan_memory(
    config: LlamaConfig, limits: EngineLimits, *, free_bytes: int, element: int, share: float = 0.9
) -> MemoryPlan:
    """Return how many cache blocks fit beside everything else.

    Parameters
    ----------
    config : LlamaConfig
    limits : EngineLimits
        `kv_blocks` is not looked at.
    free_bytes : int
        Free on the device before the weights are loaded.
    element : int
        Bytes per number of the dtype to compute in.
    share : float
        Part of the free bytes to use.

    Raises
    ------
    ConfigError
        If there is not room for one request of `max_model_tokens`; the hint says what would fit.
    """
    budget = int(free_bytes * share)
    weights = weight_bytes(config, element)
    slot = slot_bytes(config, limits.max_rank, element)
    activations = activation_bytes(config, limits, element)
    block = block_bytes(config, limits.block_tokens, element)
    fixed = weights + slot * limits.slots + activations
    # One block more is the scratch block that padded rows of a captured step write to.
    blocks = (budget - fixed) // block - 1
    wanted = -(-_longest(config, limits) // limits.block_tokens)
    if blocks >= wanted:
        return MemoryPlan(weights, slot * limits.slots, activations, block, blocks)
    cache = (wanted + 1) * block
    raise ConfigError(
        f"{_gib(fixed + cache)} are needed, {_gib(budget)} of the device's {_gib(free_bytes)} free memory may be used: "
        f"{_gib(weights)} weights, {_gib(slot * limits.slots)} for {limits.slots} slots of rank {limits.max_rank}, "
        f"{_gib(activations)} for a step, {_gib(cache)} of cache for one request",
        hint=_advice(config, limits, budget, element, room=budget - fixed),
    )


def fit_to_device(config: LlamaConfig, limits: EngineLimits, *, element: int, device: str) -> EngineLimits:
    """Return the limits with as many cache blocks as a GPU has room for; on a CPU as they are.

    Call it before the weights are loaded.

    Raises
    ------
    ConfigError
        As `plan_memory`.
    """
    import torch

    where = torch.device(device)
    if where.type != "cuda":
        return limits
    free_bytes = int(torch.cuda.mem_get_info(where)[0])
    return replace(limits, kv_blocks=plan_memory(config, limits, free_bytes=free_bytes, element=element).kv_blocks)


def _advice(config: LlamaConfig, limits: EngineLimits, budget: int, element: int, *, room: int) -> str:
    """Return the least change that fits: fewer slots, else shorter requests, else another device."""
    block = block_bytes(config, limits.block_tokens, element)
    slot = slot_bytes(config, limits.max_rank, element)
    cache = (-(-_longest(config, limits) // limits.block_tokens) + 1) * block
    slots = limits.slots - -(-(cache - room) // slot)
    if slots >= 1:
        return f"set slots to {slots} or less"
    tokens = (room // block - 1) * limits.block_tokens
    if tokens > 0:
        return f"set max_model_tokens to {tokens} or less"
    least = weight_bytes(config, element) + slot + activation_bytes(config, limits, element) + 2 * block
    if least <= budget:
        return "lower slots and max_model_tokens together"
    return f"the base and one slot need {_gib(least)}: lower max_step_tokens, or take a smaller base or a larger device"


def _longest(config: LlamaConfig, limits: EngineLimits) -> int:
    return min(limits.max_model_tokens, config.max_position_embeddings)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"

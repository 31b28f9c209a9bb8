"""Sizes of everything bounded in the embedded engine. Plain data; no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineLimits:
    """Sizes of everything bounded.

    Parameters
    ----------
    slots, max_rank : int
        Adapter versions resident at a time, and their largest rank.
    kv_blocks, block_tokens : int
        Size of the KV cache.
    max_running, max_waiting : int
        Requests in a batch, and requests queued behind it.
    max_step_tokens : int
        Tokens of one step; bounds how long a prompt can delay other streams' next token.
    max_model_tokens : int
        Prompt and continuation together; the base's own limit if that is lower.
    patience_s : float
        Seconds, and
    patience_requests : int
        requests of others, after which a version that waits for a slot has one closed for it; see `slots`.
    """

    slots: int = 8
    max_rank: int = 16
    kv_blocks: int = 1024
    block_tokens: int = 16
    max_running: int = 16
    max_waiting: int = 64
    max_step_tokens: int = 256
    max_model_tokens: int = 4096
    patience_s: float = 0.5
    patience_requests: int = 64

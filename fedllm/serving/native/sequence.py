"""One request's state inside the engine. Plain data; no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from fedllm.ids import Digest
from fedllm.serving.engine import FinishReason, SamplingParams, TokenLogprobs, TokenScore
from fedllm.serving.native.sampler import TokenPicker


@dataclass(eq=False)
class Sequence:
    """Tokens, their blocks, and how far they are computed.

    Parameters
    ----------
    id : int
        Unique within the engine, ascending with arrival.
    slot : int
        Adapter slot, ``-1`` for the base; fixed for life.
    version : Digest
        What the slot holds: the key of the prefix cache.
    tokens : list of int
        Prompt, then output (or the tokens to score).
    prompt_length : int
        How many of them are the prompt.
    params : SamplingParams
        How to continue.
    scoring : bool
        Score the tokens after the prompt and generate none.
    scope : str
        Whose blocks of the prefix cache it may use, and adds to.
    client : str
        Who is charged for it.
    weight : float
        That client's share next to the others'.
    charged : int
        Tokens from the beginning on that are charged, or were in the prefix cache when it was admitted. What is
        computed again after a preemption is not charged again.
    prompt_cached : int or None
        Prompt tokens that the prefix cache had when it was admitted first; None before.
    """

    id: int
    slot: int
    version: Digest
    tokens: list[int] = field(repr=False)
    prompt_length: int
    params: SamplingParams
    scoring: bool = False
    scope: str = ""
    client: str = ""
    weight: float = 1.0
    charged: int = 0
    prompt_cached: int | None = None
    computed: int = 0
    cached: int = 0
    blocks: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    generator: np.random.Generator | None = None
    picker: TokenPicker | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    failure: str | None = None

    @property
    def cache_root(self) -> bytes:
        """Key of the empty beginning: of a version, within a scope."""
        version = bytes.fromhex(self.version)
        return hashlib.blake2b(self.scope.encode(), digest_size=16, key=version).digest() if self.scope else version

    @property
    def ended(self) -> bool:
        """Whether nothing more will be computed."""
        return self.finish_reason is not None or self.failure is not None

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not in the cache yet; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def given(self) -> int:
        """Number of tokens that the request came with: the prompt, and what is to be scored."""
        return len(self.tokens) if self.scoring else self.prompt_length

    @property
    def generated(self) -> int:
        """Number of output tokens."""
        return len(self.tokens) - self.prompt_length

    def append(self, token: int) -> None:
        """Add a sampled token and note the end if it is one.

        A stop token ends the sequence and is not kept.
        """
        if token in self.params.stop_token_ids:
            self.finish_reason = "stop"
            return
        self.tokens.append(token)
        if self.generated >= self.params.max_tokens:
            self.finish_reason = "length"

"""The engine port: what the endpoint needs from whatever generates tokens.

A version is loaded under its digest, leased by a request at admission and never changed afterwards: what a
request started with is what it ends with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fedllm.adapter import AdapterState
from fedllm.ids import Digest

FinishReason = Literal["stop", "length"]


class GrammarState(Protocol):
    """Where one continuation is in a grammar. Belongs to one thread at a time."""

    def allowed(self, vocabulary: int) -> NDArray[np.bool_]:
        """Return which tokens may come next, shape ``(vocabulary,)``; stop tokens where the text may end."""

    def accept(self, token: int) -> bool:
        """Go on by one allowed token; return whether the text is complete and nothing can follow."""


class Grammar(Protocol):
    """A compiled grammar; any number of continuations use it at once."""

    def start(self) -> GrammarState:
        """Return the state before the first token."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens.

    Parameters
    ----------
    max_tokens : int
        Most tokens to generate.
    temperature : float
        0 is greedy.
    top_p : float
        Nucleus mass in (0, 1].
    top_k : int
        Keep only the k likeliest tokens; 0 keeps all.
    min_p : float
        Keep only tokens at least this fraction as likely as the likeliest (arXiv 2407.01082); 0 keeps all.
    presence_penalty, frequency_penalty : float
        Subtracted from the logits of tokens generated so far: once, and once for each occurrence.
    repetition_penalty : float
        Divides positive logits, and multiplies negative ones, of tokens in prompt or output (arXiv 1909.05858).
    logit_bias : tuple of (int, float)
        Added to the logits of these tokens.
    seed : int or None
        Makes sampling repeatable; None draws from the operating system.
    continuation : int
        Which of a request's continuations this is; each has a stream of random numbers of its own.
    stop_token_ids : frozenset of int
        Generation ends after one of these; the token itself is not delivered.
    logprobs : int or None
        How many of the likeliest tokens to report beside each chosen one; None reports nothing.
    grammar : Grammar or None
        What the output must be a text of.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    continuation: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    grammar: Grammar | None = field(default=None, repr=False, compare=False)

    @property
    def plain(self) -> bool:
        """Whether the token with the largest logit is the answer and nothing else is asked."""
        return (
            self.temperature == 0.0
            and self.logprobs is None
            and self.grammar is None
            and not self.logit_bias
            and not self.penalised
        )

    @property
    def penalised(self) -> bool:
        """Whether tokens seen before count against themselves."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt bound to one version.

    Parameters
    ----------
    prompt : tuple of int
        Token ids; never printed, it may be private.
    params : SamplingParams
        How to continue it.
    scope : str
        Requests of one scope share the prefix cache; another scope learns nothing of it, not even by how fast it is.
    client : str
        Whose request it is: clients are served in token-fair order, see `fedllm.serving.fair`.
    weight : float
        That client's share next to the others'; positive.
    """

    prompt: tuple[int, ...] = field(repr=False)
    params: SamplingParams = SamplingParams()
    scope: str = ""
    client: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely the model found a chosen token, before bias, penalties, grammar and temperature.

    Parameters
    ----------
    logprob : float
        Natural logarithm of its probability.
    top : tuple of (int, float)
        The likeliest tokens and their logarithms, likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Chunk:
    """A streamed piece: new token ids, why the stream ended if it did, and logprobs (one a token) if asked for."""

    token_ids: tuple[int, ...] = field(repr=False)
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class TokenScore:
    """How the model values one given token at its place.

    Parameters
    ----------
    regret : float
        Largest logit minus the token's logit; 0 where greedy decoding would choose it.
    logprob : float
        Natural logarithm of its probability.
    """

    regret: float
    logprob: float


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for health and metrics."""

    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    slots: int
    slots_used: int
    steps: int
    preemptions: int
    prefix_hit_tokens: int
    alive: bool


class Lease(Protocol):
    """A version held in place for one request, from admission to its last token; ends with its `with` block."""

    @property
    def digest(self) -> Digest:
        """The version's digest; the base's digest for the base model."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class TokenStream(Protocol):
    """Chunks of one continuation, in order. Whoever asked for it closes it."""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache had; 0 before the first chunk."""

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> Chunk: ...

    async def aclose(self) -> None:
        """Cancel what is left; nothing happens after the end."""


class Engine(Protocol):
    """Loads versions and generates with them."""

    @property
    def base_digest(self) -> Digest:
        """Content digest of the base model."""

    @property
    def max_model_tokens(self) -> int:
        """Most tokens of prompt and continuation together."""

    async def load(self, digest: Digest, state: AdapterState) -> None:
        """Put a version in a spare slot; nothing happens if it is there.

        Raises
        ------
        AdapterInvalid
            If it does not fit this engine.
        BaseMismatch
            If it was made for another base.
        Overloaded
            If every slot is pinned or in use.
        """

    def loaded(self) -> tuple[Digest, ...]:
        """Return the digests that can be leased now."""

    def pin(self, digest: Digest) -> None:
        """Keep a loaded version from being evicted; pins count."""

    def unpin(self, digest: Digest) -> None:
        """Take one pin away; nothing happens if there is none."""

    async def unload(self, digest: Digest) -> None:
        """Wait until no request uses the version, then free its slot, unless it is pinned by then."""

    def lease(self, digest: Digest) -> Lease:
        """Hold a loaded version (or the base) for one request.

        Raises
        ------
        NotFound
            If it is not loaded.
        Overloaded
            If it is closed to new requests, because another version waits for its slot.
        """

    def generate(self, lease: Lease, request: GenerationRequest) -> TokenStream:
        """Admit a request and return its stream; close it before the lease ends.

        Raises
        ------
        Overloaded
            If the queue is full, for this client.
        RequestInvalid
            If prompt and continuation are longer than the endpoint's limit.
        """

    async def score(self, lease: Lease, prompt: Sequence[int], tokens: Sequence[int]) -> list[TokenScore]:
        """Return the scores of `tokens` as a continuation of `prompt`."""

    def stats(self) -> EngineStats:
        """Return a snapshot."""

    async def close(self) -> None:
        """Stop; streams that are open end with an error."""

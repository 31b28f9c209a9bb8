"""The engine port: what the endpoint needs from whatever generates tokens.

A version is loaded under its digest, leased by a request at admission and never changed afterwards: what a
request started with is what it ends with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Protocol, Self

from fedllm.adapter import AdapterState
from fedllm.ids import Digest

FinishReason = Literal["stop", "length"]


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
    seed : int or None
        Makes sampling repeatable; None draws from the operating system.
    stop_token_ids : frozenset of int
        Generation ends after one of these; the token itself is not delivered.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt bound to one version.

    Parameters
    ----------
    prompt : tuple of int
        Token ids; never printed, it may be private.
    params : SamplingParams
        How to continue it.
    """

    prompt: tuple[int, ...] = field(repr=False)
    params: SamplingParams = SamplingParams()


@dataclass(frozen=True)
class Chunk:
    """A streamed piece: new token ids, and why the stream ended if it did."""

    token_ids: tuple[int, ...] = field(repr=False)
    finish_reason: FinishReason | None = None


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
        """Hold a loaded version (or the base) for one request; raise `NotFound` if it is not loaded."""

    def generate(self, lease: Lease, request: GenerationRequest) -> TokenStream:
        """Admit a request and return its stream; close it before the lease ends.

        Raises
        ------
        Overloaded
            If the queue is full.
        RequestInvalid
            If prompt and continuation are longer than the endpoint's limit.
        """

    async def score(self, lease: Lease, prompt: Sequence[int], tokens: Sequence[int]) -> list[TokenScore]:
        """Return the scores of `tokens` as a continuation of `prompt`."""

    def stats(self) -> EngineStats:
        """Return a snapshot."""

    async def close(self) -> None:
        """Stop; streams that are open end with an error."""

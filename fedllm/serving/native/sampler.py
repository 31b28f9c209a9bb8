"""Choosing the next token of one sequence from its row of logits. NumPy only.

The order is: grammar, bias, penalties; then, above temperature 0, temperature, top-k, top-p, min-p, and one draw.
Logprobs are the model's own, from the logits before any of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedllm.rng import Rng
from fedllm.serving.engine import SamplingParams, TokenLogprobs

_HEADS = (512, 8192)
"""How many of the likeliest tokens top-p sorts first; nearly always enough, and then the rest is never sorted."""


def new_generator(params: SamplingParams, rng: Rng) -> np.random.Generator | None:
    """Return the continuation's own random stream, or None if it is greedy.

    Parameters
    ----------
    params : SamplingParams
        Its seed, if any, makes the stream repeatable; each continuation number has a stream of its own.
    rng : Rng
        Where a seed comes from otherwise.
    """
    if params.temperature == 0.0:
        return None
    seed = params.seed if params.seed is not None else int.from_bytes(rng.token(16), "little")
    sequence = np.random.SeedSequence(seed, spawn_key=(params.continuation,))
    return np.random.Generator(np.random.PCG64(sequence))


@dataclass(frozen=True)
class Choice:
    """A chosen token, and its logprobs if they were asked for."""

    token: int
    logprobs: TokenLogprobs | None


class TokenPicker:
    """Chooses one sequence's tokens wherever plain greedy decoding is not all that is asked.

    Parameters
    ----------
    params : SamplingParams
        How to choose.
    prompt : sequence of int
        Counts for the repetition penalty only.
    generator : np.random.Generator or None
        The sequence's random stream; one number is drawn for each token. None is greedy.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], *, generator: np.random.Generator | None) -> None:
        self._params = params
        self._generator = generator
        self._output: Counter[int] = Counter()
        self._seen = set(prompt) if params.repetition_penalty != 1.0 else set[int]()
        self._state = None if params.grammar is None else params.grammar.start()

    def pick(self, logits_V: NDArray[np.float32]) -> Choice | None:
        """Return the next token, or None if the grammar allows none.

        Parameters
        ----------
        logits_V : NDArray[np.float32]
            Shape ``(V,)``; the largest is finite.
        """
        params = self._params
        shaped_V = self._shape(logits_V)
        if not np.isfinite(shaped_V.max()):
            return None
        token = int(shaped_V.argmax()) if self._generator is None else sample(shaped_V, params, self._generator)
        return Choice(token, None if params.logprobs is None else token_logprobs(logits_V, token, params.logprobs))

    def accept(self, token: int) -> bool:
        """Note a chosen token that is kept; return whether a grammar is complete with it."""
        if self._params.penalised:
            self._output[token] += 1
            if self._params.repetition_penalty != 1.0:
                self._seen.add(token)
        return self._state is not None and self._state.accept(token)

    def _shape(self, logits_V: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits after grammar, bias and penalties; the input is not changed."""
        params = self._params
        if self._state is None and not params.logit_bias and not params.penalised:
            return logits_V
        shaped_V = logits_V.copy()
        if self._seen:
            ids = np.fromiter(self._seen, dtype=np.int64)
            found = shaped_V[ids]
            shaped_V[ids] = np.where(found > 0, found / params.repetition_penalty, found * params.repetition_penalty)
        if self._output and (params.presence_penalty or params.frequency_penalty):
            ids = np.fromiter(self._output, dtype=np.int64)
            counts = np.fromiter(self._output.values(), dtype=np.float32)
            shaped_V[ids] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * counts
        for token, bias in params.logit_bias:
            if token < shaped_V.size:
                shaped_V[token] += bias
        if self._state is not None:
            shaped_V[~self._state.allowed(shaped_V.size)] = -np.inf
        return shaped_V


def sample(logits_V: NDArray[np.float32], params: SamplingParams, generator: np.random.Generator) -> int:
    """Draw a token: temperature, then top-k, then top-p (arXiv 1904.09751), then min-p (arXiv 2407.01082).

    Parameters
    ----------
    logits_V : NDArray[np.float32]
        Shape ``(V,)``; the largest is finite, others may be minus infinity.
    params : SamplingParams
        With a temperature above 0.
    generator : np.random.Generator
        The sequence's stream; exactly one number is drawn.
    """
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the largest to minus infinity, as it should
        weights = np.exp((logits_V.astype(np.float64) - logits_V.max()) / params.temperature)
    kept = np.arange(weights.size)
    if 0 < params.top_k < weights.size:
        kept = np.argpartition(-weights, params.top_k - 1)[: params.top_k]
    if params.top_p < 1.0:
        kept = _nucleus(weights, kept, params.top_p)
    if params.min_p > 0.0:
        kept = kept[weights[kept] >= params.min_p]  # the largest weight is 1
    cumulative = np.cumsum(weights[kept])
    drawn = int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
    return int(kept[min(drawn, kept.size - 1)])


def token_logprobs(logits_V: NDArray[np.float32], token: int, count: int) -> TokenLogprobs:
    """Return a token's log probability and those of the `count` likeliest tokens."""
    wide_V = logits_V.astype(np.float64)
    largest = wide_V.max()
    total = largest + np.log(np.exp(wide_V - largest).sum())
    count = min(count, wide_V.size)
    head = np.argpartition(-wide_V, count - 1)[:count] if count else np.empty(0, dtype=np.int64)
    head = head[np.lexsort((head, -wide_V[head]))]
    top = tuple((int(t), float(wide_V[t] - total)) for t in head)
    return TokenLogprobs(float(wide_V[token] - total), top)


def _nucleus(weights: NDArray[np.float64], kept: NDArray[np.int64], top_p: float) -> NDArray[np.int64]:
    """Return the fewest likeliest of `kept` that hold `top_p` of their mass; at least one."""
    target = top_p * weights[kept].sum()
    head = kept
    for size in _HEADS:
        if kept.size > size:
            head = kept[np.argpartition(-weights[kept], size - 1)[:size]]
            if weights[head].sum() >= target:
                break
            head = kept
    head = head[np.argsort(-weights[head], kind="stable")]
    # The token that crosses the mass is kept, so at least one always is.
    return head[: int(np.searchsorted(np.cumsum(weights[head]), target)) + 1]

"""Synthetic load for the burst benchmark: when each request arrives, for which adapter, how long.

Two numbers are the defaults of BurstGPT's own generator of synthetic load (arXiv 2401.17644, repository
HPMLL/BurstGPT): inter-arrival times from a Gamma distribution of shape 0.5, and lengths from Zipf's law of 1.1. The
rest is ours and is scaled to a tiny model: lengths are cut off at 96 and 32 tokens instead of 1,024, the k-th adapter
is as popular as 1 / k, and the rate changes every few seconds, its level from a Gamma distribution of the same shape.
No real trace is used.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.document import Document, rounded

GAMMA_SHAPE, ZIPF = 0.5, 1.1
LONGEST_PROMPT, LONGEST_ANSWER = 96, 32
SPELL_S = 4.0


@dataclass(frozen=True)
class Ask:
    """One request: seconds after the start, which adapter, tokens of prompt and answer."""

    at_s: float
    adapter: int
    prompt: int
    answer: int


@dataclass(frozen=True)
class Shape:
    """How requests arrive.

    Parameters
    ----------
    gamma : float
        Shape of the inter-arrival times; 1 is a Poisson process.
    spells : bool
        Whether the rate changes every `SPELL_S` seconds.
    """

    gamma: float
    spells: bool


POISSON, BURSTY = Shape(1.0, spells=False), Shape(GAMMA_SHAPE, spells=True)


def make_trace(shape: Shape, *, rate: float, seconds: float, adapters: int, seed: int) -> list[Ask]:
    """Return about ``rate * seconds`` requests; the mean rate of every shape is the same.

    Parameters
    ----------
    shape : Shape
        How they arrive.
    rate : float
        Requests a second in the mean.
    seconds : float
        Length of the trace.
    adapters : int
        How many there are to choose from.
    seed : int
        Of all draws.
    """
    draw = np.random.default_rng(seed)
    spells = max(1, round(seconds / SPELL_S))
    levels = draw.gamma(shape.gamma, 1 / shape.gamma, spells) if shape.spells else np.ones(spells)
    # A stretch of time in which the rate is doubled holds twice as many beats of the renewal process.
    passed = np.concatenate([[0.0], np.cumsum(levels / levels.mean())]) * (seconds / spells) * rate
    gaps = draw.gamma(shape.gamma, 1 / shape.gamma, 4 * int(rate * seconds) + 16)
    beats = np.cumsum(gaps)
    at = np.interp(beats[beats < passed[-1]], passed, np.linspace(0.0, seconds, spells + 1))
    picks = draw.choice(adapters, len(at), p=_zipf(adapters, 1.0))
    prompts = 1 + draw.choice(LONGEST_PROMPT, len(at), p=_zipf(LONGEST_PROMPT, ZIPF))
    answers = 1 + draw.choice(LONGEST_ANSWER, len(at), p=_zipf(LONGEST_ANSWER, ZIPF))
    return [Ask(float(t), int(a), int(p), int(n)) for t, a, p, n in zip(at, picks, prompts, answers, strict=True)]


def describe(trace: list[Ask], shape: Shape) -> Document:
    """Return what a trace was made from, and how uneven it came out: requests by second, variance over mean."""
    counts = np.bincount([int(ask.at_s) for ask in trace])
    return {
        **asdict(shape),
        "requests": len(trace),
        "tokens": sum(ask.prompt + ask.answer for ask in trace),
        "most_in_a_second": int(counts.max()),
        "variance_over_mean": rounded(float(counts.var() / counts.mean())),
    }


def _zipf(count: int, exponent: float) -> NDArray[np.float64]:
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares

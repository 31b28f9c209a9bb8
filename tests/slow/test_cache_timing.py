"""The prefix cache's clock: from its time to first token, no tenant can tell what another has asked."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fedllm.ids import sha256
from fedllm.rng import SeededRng
from fedllm.serving.engine import GenerationRequest, SamplingParams
from fedllm.serving.native.engine import EngineLimits, NativeEngine, open_engine

TRIALS = 400
WARM_UP = 20
PROMPT_TOKENS = 512
VOCABULARY = 384
BASE = sha256(b"a base to be timed")
ALPHA = 0.001
"""Chance that the test fails though the tenants are told nothing: two-sided, for the one AUC that must be near 1/2."""
POWER = 0.99
"""Chance that it fails if the AUC is as far from 1/2 as the detectable effect says."""
CONTROL_AUC = 0.9


def make_model(folder: Path) -> None:
    """Write a random Llama whose prefill of a prompt is long against everything else that an answer takes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=383,
        bos_token_id=382,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


async def first_token_s(engine: NativeEngine, prompt: tuple[int, ...], scope: str) -> float:
    """Return the seconds from a tenant's request to its first token."""
    with engine.lease(engine.base_digest) as lease:
        begun = time.perf_counter()
        stream = engine.generate(lease, GenerationRequest(prompt, SamplingParams(max_tokens=1), scope))
        try:
            await anext(stream)
            return time.perf_counter() - begun
        finally:
            await stream.aclose()


async def measure(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (whether A had asked the prompt before, seconds of B, seconds of A asking it now), a row each trial.

    A asks either the prompt or another one of its length, by a coin; so the engine has done the same work just before B
    asks the prompt, and only the cache differs. Then A asks it. The arms are interleaved at random: what else the
    machine does meets both alike.
    """
    draw = np.random.default_rng(20261121)
    limits = EngineLimits(slots=1, max_rank=1, kv_blocks=512, max_step_tokens=PROMPT_TOKENS, max_model_tokens=1024)
    engine = await open_engine(folder, base=BASE, limits=limits, rng=SeededRng(1), dtype="float32", threads=1)
    rows = []
    try:
        for _ in range(WARM_UP + TRIALS):
            prompt, other = (tuple(map(int, draw.integers(0, 380, PROMPT_TOKENS))) for _ in range(2))
            known = bool(draw.integers(2))
            await first_token_s(engine, prompt if known else other, "a")
            rows.append((known, await first_token_s(engine, prompt, "b"), await first_token_s(engine, prompt, "a")))
    finally:
        await engine.close()
    known, b, a = zip(*rows[WARM_UP:], strict=True)
    return np.array(known), np.array(b), np.array(a)


def auc(known: np.ndarray, seconds: np.ndarray) -> float:
    """Return the chance that of a known and a new prompt the known one is faster: Mann-Whitney's U / n m."""
    from scipy.stats import mannwhitneyu

    fast, slow = seconds[known], seconds[~known]
    return float(mannwhitneyu(slow, fast).statistic) / (len(fast) * len(slow))


def margins(known: np.ndarray) -> tuple[float, float]:
    """Return (margin, detectable effect) of an AUC around 1/2, for these sizes.

    Without a difference U / n m has mean 1/2 and variance (n + m + 1) / 12 n m (Mann and Whitney 1947). The margin is
    its two-sided quantile at `ALPHA`; an AUC that is away from 1/2 by the margin and the one-sided quantile of `POWER`
    more leaves the margin with that power, or a greater one: the variance is largest at 1/2.
    """
    from scipy.stats import norm

    n, m = int(known.sum()), int((~known).sum())
    deviation = math.sqrt((n + m + 1) / (12 * n * m))
    margin = deviation * float(norm.ppf(1 - ALPHA / 2))
    return margin, margin + deviation * float(norm.ppf(POWER))


@pytest.mark.timeout(600)
def test_time_to_first_token_tells_no_tenant_what_another_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tells its own cached prompts from new ones by the clock; B, who asks the same prompts, is told nothing."""
    make_model(tmp_path)
    begun = time.monotonic()
    known, b, a = asyncio.run(measure(tmp_path))
    margin, effect = margins(known)
    control, between = auc(known, a), auc(known, b)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{TRIALS} trials, {int(known.sum())} known, {time.monotonic() - begun:.0f} s\n"
            f"same tenant:    AUC {control:.3f} (above {CONTROL_AUC}), median {1e3 * np.median(a[known]):.2f} ms known,"
            f" {1e3 * np.median(a[~known]):.2f} ms new\n"
            f"another tenant: AUC {between:.3f} (0.5 +- {margin:.3f} at alpha {ALPHA}), median"
            f" {1e3 * np.median(b[known]):.2f} ms known, {1e3 * np.median(b[~known]):.2f} ms new\n"
            f"a difference of {effect:.3f} in AUC is found with power {POWER}\n"
        )
    assert control > CONTROL_AUC
    assert abs(between - 0.5) <= margin


def test_the_margin_is_what_chance_leaves() -> None:
    """Shuffled labels leave the margin as rarely as alpha says, and a shift of the detectable effect nearly always."""
    draw = np.random.default_rng(7)
    known = np.arange(200) % 2 == 0
    margin, effect = margins(known)
    noise = [abs(auc(known, draw.normal(size=200)) - 0.5) for _ in range(2000)]
    assert sum(x > margin for x in noise) <= 10
    from scipy.stats import norm

    shift = math.sqrt(2) * float(norm.ppf(0.5 + effect))  # AUC of two normals of this distance
    found = [abs(auc(known, draw.normal(size=200) - shift * known) - 0.5) > margin for _ in range(500)]
    assert sum(found) >= 490

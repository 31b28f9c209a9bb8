"""Tokens a second of the native engine next to its peers: base requests, one adapter, eight adapters in one batch.

8 streams of about 59 random prompt tokens, greedy, no end token, rank 16 on all linears, one thread, wall time from
the first request to the last token. Prompts are new in every repetition, the same for all providers, who take
turns. The gate comes first, with base requests beside adapters in one batch. The peers are PEFT and, with
``--with-vllm``, vLLM's server: with LoRA, and for base requests a second one without.
"""

from __future__ import annotations

import asyncio
import sys
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from benchmarks.document import Document, check, model_folder, parser, rounded, run
from benchmarks.serving_figures import (
    PROMPT_TOKENS,
    RANK,
    STREAMS,
    TOLERANCE,
    WITHOUT_LORA,
    Timing,
    Timings,
    make_document,
    table,
)
from benchmarks.serving_peft import Peft
from benchmarks.serving_vllm import BASE_NAME, HINT, SPIN_S, Vllm, installed, vllm_server
from fedllm.adapter import ATTENTION_MODULES, MLP_MODULES, AdapterSpec, AdapterState
from fedllm.ids import Digest, sha256
from fedllm.rng import SeededRng
from fedllm.serving.engine import GenerationRequest, SamplingParams, TokenScore
from fedllm.serving.native.engine import EngineLimits, NativeEngine
from fedllm.serving.native.loader import choose_dtype, load_weights, read_config
from fedllm.serving.native.model import LlamaConfig, LlamaModel, StepInput

ALPHA, GATE_OUT = 32, 4
BASE = sha256(b"benchmarks.serving")
LIMITS = EngineLimits(slots=STREAMS, max_rank=RANK)
ENVIRONMENT = Path(__file__).parents[1] / ".venv-vllm"
NAMES = [f"a{i}" for i in range(STREAMS)]
NOT_ASKED = "not measured: --with-vllm asks for it"
NOT_INSTALLED = f"not measured: its environment is not installed ({HINT})"

Turn = Callable[[list[tuple[int, ...]], int], Awaitable[Timing]]
"""Prompts and tokens to make -> one batch, timed."""


class RecordingModel(LlamaModel):
    """The engine's model; while `seen` is a dictionary, it keeps logits by the input token they follow."""

    seen: dict[int, Tensor] | None = None

    def forward(self, step: StepInput) -> Tensor:
        """Compute as ever, and remember."""
        logits = super().forward(step)
        if self.seen is not None:
            tokens = step.tokens_T[step.logit_rows].tolist()
            self.seen |= {token: row.float().clone() for token, row in zip(tokens, logits, strict=True)}
        return logits


def make_adapters(config: LlamaConfig) -> list[AdapterState]:
    """Return eight random adapters that visibly change the model: A ~ N(0, 1/in), B ~ N(0, 0.04^2)."""
    modules = {name: config.projection_shape(name) for name in ATTENTION_MODULES + MLP_MODULES}
    spec = AdapterSpec(BASE, RANK, ALPHA, modules, tuple(range(config.num_hidden_layers)))
    states = []
    for seed in range(STREAMS):
        draw = np.random.default_rng(seed)
        factors = {
            name: draw.normal(0, 0.04 if name.endswith("lora_B") else shape[1] ** -0.5, shape).astype(np.float32)
            for name, shape in spec.layout().entries
        }
        states.append(AdapterState(spec, factors))
    return states


def make_prompts(seed: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Return one random prompt a stream; their last tokens differ."""
    draw = np.random.default_rng([5, seed])
    lasts = draw.choice(vocabulary, STREAMS, replace=False)
    rows = zip(PROMPT_TOKENS, lasts, strict=True)
    return [(*(int(t) for t in draw.integers(0, vocabulary, n - 1)), int(last)) for n, last in rows]


async def stream(engine: NativeEngine, version: Digest, prompt: tuple[int, ...], out: int) -> tuple[list[int], float]:
    """Return one request's tokens, and when its first came."""
    tokens: list[int] = []
    first = 0.0
    with engine.lease(version) as lease:
        source = engine.generate(lease, GenerationRequest(prompt, SamplingParams(max_tokens=out)))
        async for chunk in source:
            first = first or time.perf_counter()
            tokens += chunk.token_ids
        await source.aclose()
    return tokens, first


async def ours(engine: NativeEngine, versions: Sequence[Digest], prompts: list[tuple[int, ...]], out: int) -> Timing:
    """Time one batch of the engine."""
    start, cpu = time.perf_counter(), time.process_time()
    pairs = zip(versions, prompts, strict=True)
    results = await asyncio.gather(*(stream(engine, version, prompt, out) for version, prompt in pairs))
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    assert all(len(tokens) == out for tokens, _ in results)
    return Timing(seconds, median(first - start for _, first in results), cpu_s)


async def pefts(peft: Peft, names: Sequence[str] | None, prompts: list[tuple[int, ...]], out: int) -> Timing:
    """Time one batch of PEFT."""
    cpu = time.process_time()
    seconds, ttft_s = peft.generate(prompts, out, names)
    return Timing(seconds, ttft_s, time.process_time() - cpu)


async def vllms(server: Vllm, names: Sequence[str], prompts: list[tuple[int, ...]], out: int) -> Timing:
    """Time one batch of vLLM, and return when it is quiet."""
    start, cpu = time.perf_counter(), server.cpu_s()
    results = await server.generate(prompts, out, names)
    seconds, cpu_s = time.perf_counter() - start, server.cpu_s() - cpu
    await asyncio.sleep(SPIN_S)
    assert all(len(tokens) == out for tokens, _ in results)
    return Timing(seconds, median(first - start for _, first in results), cpu_s)


async def gate(
    engine: NativeEngine, model: RecordingModel, peft: Peft, versions: Sequence[Digest], dtype: str
) -> float:
    """Return the largest logit error over the largest logit, of a batch in which two requests are for the base.

    Three things are compared with PEFT, one sequence at a time: all logits of every request's first token; log
    probability and regret of every later token; and each token that the engine chose must be PEFT's best.

    Raises
    ------
    GateFailed
    """
    prompts = make_prompts(0, model.config.vocab_size)
    names = [BASE_NAME if i in (2, 5) else name for i, name in enumerate(NAMES)]
    asked = [BASE if name == BASE_NAME else versions[i] for i, name in enumerate(names)]
    model.seen = {}
    await asyncio.gather(*(stream(engine, v, p, 1) for v, p in zip(asked, prompts, strict=True)))
    seen, model.seen = model.seen, None
    made = await asyncio.gather(*(stream(engine, v, p, GATE_OUT) for v, p in zip(asked, prompts, strict=True)))
    chosen = [tokens for tokens, _ in made]

    async def score(version: Digest, prompt: tuple[int, ...], tokens: list[int]) -> list[TokenScore]:
        with engine.lease(version) as lease:
            return await engine.score(lease, prompt, tokens)

    scores = await asyncio.gather(*(score(v, p, t) for v, p, t in zip(asked, prompts, chosen, strict=True)))
    errors: list[float] = []
    for name, prompt, tokens, scored in zip(names, prompts, chosen, scores, strict=True):
        want_NV = peft.logits([*prompt, *tokens], name)[len(prompt) - 1 : -1]
        errors.append(compare(want_NV, seen[prompt[-1]], tokens, scored))
    worst = float(np.max(errors))  # keeps a NaN, which Python's max may drop
    check(worst <= TOLERANCE[dtype], f"logits are {worst:.2e} of the largest off PEFT's, {TOLERANCE[dtype]} allowed")
    return worst


async def gate_vllm(server: Vllm, peft: Peft, vocabulary: int, dtype: str) -> float:
    """Return by how much vLLM's tokens miss PEFT's best, over the largest logit.

    Base requests have a batch of their own: beside adapters, vLLM 0.32 on a CPU gives them an adapter.

    Raises
    ------
    GateFailed
    """
    prompts = make_prompts(0, vocabulary)
    misses: list[float] = []
    for names in ([BASE_NAME] * STREAMS, NAMES):
        made = await server.generate(prompts, GATE_OUT, names)
        for name, prompt, (tokens, _) in zip(names, prompts, made, strict=True):
            want_NV = peft.logits([*prompt, *tokens], name)[len(prompt) - 1 : -1]
            picked_N = want_NV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            misses.append(float((want_NV.amax(-1) - picked_N).max() / want_NV.abs().max()))
    worst = float(np.max(misses))
    allowed = 2 * TOLERANCE[dtype]  # two logits, each off by no more than the tolerance
    check(worst <= allowed, f"vllm: a token is {worst:.2e} of the largest logit below PEFT's best, {allowed} allowed")
    return worst


def compare(want_NV: Tensor, first_V: Tensor, tokens: Sequence[int], scored: Sequence[TokenScore]) -> float:
    """Return the largest error of one request over its largest logit; NaN if anything is.

    Parameters
    ----------
    want_NV : Tensor
        PEFT's logits at each place of `tokens`, float32.
    first_V : Tensor
        The engine's at the first place.
    tokens, scored
        What the engine chose greedily, and how it scores that.
    """
    picked_N = want_NV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    regret_N = want_NV.amax(-1) - picked_N
    logprob_N = picked_N - want_NV.logsumexp(-1)
    parts = [
        (want_NV[0] - first_V).abs().max(),
        (regret_N - torch.tensor([s.regret for s in scored])).abs().max(),
        (logprob_N - torch.tensor([s.logprob for s in scored])).abs().max(),
        regret_N.max() / 2,  # two logits, each off by no more than the tolerance, may change places
    ]
    return float(torch.stack(parts).max() / want_NV.abs().max())


def why_without(*, asked: bool) -> str | None:
    """Return why vLLM is not measured; None if it is."""
    if not asked:
        return NOT_ASKED
    return None if installed(ENVIRONMENT) else NOT_INSTALLED


async def measure_all(options: Namespace, folder: Path) -> Document:
    """Gate, then time base, one adapter and eight adapters."""
    torch.set_num_threads(1)
    config = read_config(folder)
    dtype = choose_dtype("bfloat16", "cpu")
    name = str(dtype).removeprefix("torch.")
    out, repetitions = (16, 2) if options.quick else (32, 5)
    weights = load_weights(folder, config, dtype=dtype, device="cpu")
    sizes = {"slots": LIMITS.slots, "max_rank": LIMITS.max_rank, "blocks": LIMITS.kv_blocks}
    model = RecordingModel(config, weights, block_tokens=LIMITS.block_tokens, **sizes)
    engine = NativeEngine(model, base=BASE, limits=LIMITS, rng=SeededRng("benchmark"))
    vllm: Document = {"vllm_reason": why_without(asked=options.with_vllm)}
    server: Vllm | None = None
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.close)
        adapters = make_adapters(config)
        for state in adapters:
            await engine.load(state.digest, state)
        versions = [state.digest for state in adapters]
        # The gate has its own PEFT model: the timed one must serve the base before PEFT's layers are put in.
        judge = Peft(folder, dtype)
        judge.add_adapters(adapters)
        worst = await gate(engine, model, judge, versions, name)
        if vllm["vllm_reason"] is None:
            server = await stack.enter_async_context(vllm_server(ENVIRONMENT, folder, name, adapters))
            vllm["vllm_version"] = await server.version()
            vllm["vllm_max_rel_regret"] = rounded(await gate_vllm(server, judge, config.vocab_size, name))
        del judge
        peft = Peft(folder, dtype)
        cases: dict[str, tuple[list[Digest], list[str]]] = {
            "base": ([BASE] * STREAMS, [BASE_NAME] * STREAMS),
            "one": ([versions[0]] * STREAMS, NAMES[:1] * STREAMS),
            "mixed8": (versions, NAMES),
        }
        timings: Timings = {}
        for case, (asked, names) in cases.items():
            if case == "one":
                peft.add_adapters(adapters)
                peft.use("a0")
            async with AsyncExitStack() as briefly:
                turns: dict[tuple[str, str], Turn] = {
                    ("fedllm", case): partial(ours, engine, asked),
                    ("peft", case): partial(pefts, peft, names if case == "mixed8" else None),
                }
                if server is not None:
                    turns["vllm", case] = partial(vllms, server, names)
                    if case == "base":
                        plain = await briefly.enter_async_context(vllm_server(ENVIRONMENT, folder, name))
                        turns["vllm", WITHOUT_LORA] = partial(vllms, plain, names)
                for repetition in range(repetitions + 1):
                    prompts = make_prompts(1 + repetition + 100 * list(cases).index(case), config.vocab_size)
                    for (provider, kind), turn in turns.items():
                        timing = await turn(prompts, out)
                        if repetition:  # the first one warms up
                            timings.setdefault(provider, {}).setdefault(kind, []).append(timing)
    return make_document(timings, worst, name, out, repetitions) | vllm


def measure(options: Namespace) -> Document:
    """Run everything on one event loop."""
    return asyncio.run(measure_all(options, model_folder()))


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    arguments = parser("serving", "How fast is the native engine next to its peers?")
    arguments.add_argument("--with-vllm", action="store_true", help=f"vLLM's server on a CPU beside; {HINT} first")
    return run("serving", arguments, measure, table, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Tokens a second of the native engine next to PEFT: base requests, one adapter, eight adapters in one batch.

8 streams of about 59 random prompt tokens, greedy, no end token, rank 16 on all linears, one thread, wall time from
the first request to the last token. Prompts are new in every repetition, the same for both providers, who take
turns. The gate comes first, with base requests beside adapters in one batch.
"""

from __future__ import annotations

import asyncio
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from benchmarks.document import Document, check, model_folder, parser, rounded, run
from benchmarks.serving_peft import Peft
from fedllm.adapter import ATTENTION_MODULES, MLP_MODULES, AdapterSpec, AdapterState
from fedllm.ids import Digest, sha256
from fedllm.rng import SeededRng
from fedllm.serving.engine import GenerationRequest, SamplingParams, TokenScore
from fedllm.serving.native.engine import EngineLimits, NativeEngine
from fedllm.serving.native.loader import choose_dtype, load_weights, read_config
from fedllm.serving.native.model import LlamaConfig, LlamaModel, StepInput

STREAMS, RANK, ALPHA = 8, 16, 32
PROMPT_TOKENS = (55, 56, 57, 58, 60, 61, 62, 63)
GATE_OUT = 4
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest difference of two logits, over the largest logit of the reference."""
BASE = sha256(b"benchmarks.serving")
LIMITS = EngineLimits(slots=STREAMS, max_rank=RANK)
VLLM_REASON = "not measured: no run with vLLM is wired in yet"


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


@dataclass(frozen=True)
class Timing:
    """One batch: wall seconds to its last token, median over streams to the first, CPU seconds of the process."""

    seconds: float
    ttft_s: float
    cpu_s: float


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
    names = ["__base__" if i in (2, 5) else f"a{i}" for i in range(STREAMS)]
    asked = [BASE if name == "__base__" else versions[i] for i, name in enumerate(names)]
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
    try:
        adapters = make_adapters(config)
        for state in adapters:
            await engine.load(state.digest, state)
        versions = [state.digest for state in adapters]
        # The gate has its own PEFT model: the timed one must serve the base before PEFT's layers are put in.
        judge = Peft(folder, dtype)
        judge.add_adapters(adapters)
        worst = await gate(engine, model, judge, versions, name)
        del judge
        peft = Peft(folder, dtype)
        cases: dict[str, tuple[list[Digest], list[str] | None]] = {
            "base": ([BASE] * STREAMS, None),
            "one": ([versions[0]] * STREAMS, None),
            "mixed8": (versions, [f"a{i}" for i in range(STREAMS)]),
        }
        timings: dict[str, dict[str, list[Timing]]] = {"fedllm": {}, "peft": {}}
        for case, (asked, names) in cases.items():
            if case == "one":
                peft.add_adapters(adapters)
                peft.use("a0")
            for repetition in range(repetitions + 1):
                prompts = make_prompts(1 + repetition + 100 * len(timings["peft"]), config.vocab_size)
                mine = await ours(engine, asked, prompts, out)
                cpu = time.process_time()
                theirs = Timing(*peft.generate(prompts, out, names), time.process_time() - cpu)
                if repetition:  # the first one warms up
                    timings["fedllm"].setdefault(case, []).append(mine)
                    timings["peft"].setdefault(case, []).append(theirs)
    finally:
        await engine.close()
    return _document(timings, worst, name, out, repetitions)


def _document(
    timings: dict[str, dict[str, list[Timing]]], worst: float, dtype: str, out: int, repetitions: int
) -> Document:
    providers: dict[str, Document | None] = {}
    for provider, cases in timings.items():
        fields: Document = {}
        for case, samples in cases.items():
            fields[f"{case}_tok_s"] = rounded(STREAMS * out / median(sample.seconds for sample in samples), 3)
            cpu_s = median(sample.cpu_s for sample in samples)  # steadier than wall time where cores are shared
            fields[f"{case}_cpu_s_1k"] = rounded(1000 * cpu_s / (STREAMS * out), 3)
            fields[f"ttft_{case}_s"] = rounded(median(sample.ttft_s for sample in samples), 3)
        providers[provider] = fields
    mine, theirs = providers["fedllm"], providers["peft"]
    assert mine is not None
    assert theirs is not None
    providers["vllm"] = None
    return {
        "gate": True,
        "max_rel_logit_error": rounded(worst),
        "tolerance": TOLERANCE[dtype],
        "dtype": dtype,
        "threads": 1,
        "streams": STREAMS,
        "prompt_tokens": sum(PROMPT_TOKENS) / STREAMS,
        "out_tokens": out,
        "rank": RANK,
        "repetitions": repetitions,
        "providers": providers,
        "vllm_reason": VLLM_REASON,
        **{
            f"{case}_over_peft": rounded(mine[f"{case}_tok_s"] / theirs[f"{case}_tok_s"], 3) for case in timings["peft"]
        },
        "mixed8_cpu_speedup": rounded(theirs["mixed8_cpu_s_1k"] / mine["mixed8_cpu_s_1k"], 3),
        "ttft_mixed8_over_base": rounded(mine["ttft_mixed8_s"] / mine["ttft_base_s"], 3),
    }


def measure(options: Namespace) -> Document:
    """Run everything on one event loop."""
    return asyncio.run(measure_all(options, model_folder()))


def table(document: Document) -> Table:
    """Return the document as a table."""
    d = document
    made = Table(
        title=f"serving: {d['streams']} streams, {d['out_tokens']} tokens out, {d['dtype']}, 1 thread",
        caption=f"logits within {d['max_rel_logit_error']:.1e} of PEFT's; vllm {d['vllm_reason']}",
    )
    columns = ("base_tok_s", "one_tok_s", "mixed8_tok_s", "mixed8_cpu_s_1k", "ttft_base_s", "ttft_mixed8_s")
    for column in ("provider", *columns):
        made.add_column(column, justify="left" if column == "provider" else "right")
    for name, row in document["providers"].items():
        made.add_row(name, *("-" if row is None else f"{row[column]:.3g}" for column in columns))
    return made


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    return run("serving", parser("serving", "How fast is the native engine next to PEFT?"), measure, table, argv)


if __name__ == "__main__":
    sys.exit(main())

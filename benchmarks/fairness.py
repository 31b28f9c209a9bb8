"""Does one tenant's flood hold up another? The native engine's virtual token counter next to first come, first served.

The same engine serves both: first come, first served is every request under one client's name. Two scenes, base model,
greedy, float32, one thread, no prefix shared. *Both wait*: a tenant with long requests and one with short ones always
have more in flight than run at a time; the gap is the largest difference of their service (a prompt token counts 1, an
output token 2, as they arrive) over any interval. *Flood and polite*: one tenant keeps 32 long requests in flight, the
other asks one short thing at a time; both orders serve the same lists, in turns.

Gate: each answer equals that of the same prompt alone, and the gap is within the bound of Sheng et al. (OSDI 2024).
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import median

import numpy as np
from rich.table import Table

from benchmarks.document import Document, check, model_folder, parser, rounded, run
from benchmarks.hotswap_model import make_tiny_base
from fedllm.ids import sha256
from fedllm.rng import SeededRng
from fedllm.serving.engine import GenerationRequest, SamplingParams
from fedllm.serving.fair import OUTPUT_WEIGHT, PROMPT_WEIGHT
from fedllm.serving.native.engine import EngineLimits, NativeEngine, open_engine
from fedllm.serving.native.loader import read_config

BASE = sha256(b"benchmarks.fairness")
LIMITS = EngineLimits(slots=1, max_rank=8, kv_blocks=256, max_running=4, max_waiting=64, max_step_tokens=64)
ORDERS = ("vtc", "fcfs")
TEXTS = 8
"""Different prompts of one tenant: they come again, each time in a scope of its own, so that none is cached."""
TARGETS = (
    ("throughput_vs_fcfs", ">=", 0.95),
    ("polite_ttft_p99_vtc_over_fcfs", "<", 1.0),
)
"""Musts told beside the figures and no part of the gate: wall time on shared cores is not a fact about the code."""


@dataclass(frozen=True)
class Load:
    """What one tenant asks: `requests` of one size, so many in flight at a time."""

    client: str
    prompt_tokens: int
    out_tokens: int
    in_flight: int
    requests: int

    def prompts(self, vocabulary: int) -> list[tuple[int, ...]]:
        """Return this tenant's prompts: random tokens."""
        draw = np.random.default_rng([len(self.client), self.prompt_tokens])
        return [tuple(int(t) for t in draw.integers(0, vocabulary, self.prompt_tokens)) for _ in range(TEXTS)]


@dataclass
class Turn:
    """What one pass over the loads gave.

    Parameters
    ----------
    seconds : float
        Wall time from the first request to the last token.
    cpu_s, steps : float, int
        CPU seconds of this process, and steps of the engine: steadier than wall time where cores are shared.
    tokens : int
        Output tokens.
    ttft_s : dict of str to list of float
        Seconds to each first token, by tenant.
    served : list of (str, float)
        Service in the order in which it arrived, while
    all_wait : bool
        every tenant has more to ask.
    """

    seconds: float = 0.0
    cpu_s: float = 0.0
    steps: int = 0
    tokens: int = 0
    ttft_s: dict[str, list[float]] = field(default_factory=dict)
    served: list[tuple[str, float]] = field(default_factory=list)
    all_wait: bool = True


def gap(served: Sequence[tuple[str, float]], one: str) -> float:
    """Return the largest difference, over all intervals, of `one`'s service and all other service."""
    sums = list(accumulate((amount if client == one else -amount for client, amount in served), initial=0.0))
    return max(sums) - min(sums)


def bound(loads: Sequence[Load], max_running: int) -> float:
    """Return ``2 max(w_p L, w_q M)``, with M the tokens of a full batch of the longest requests."""
    longest = max(load.prompt_tokens for load in loads)
    whole = max(load.prompt_tokens + load.out_tokens for load in loads)
    return 2 * max(PROMPT_WEIGHT * longest, OUTPUT_WEIGHT * max_running * whole)


class Bench:
    """One engine, and what every prompt's answer is when it is alone."""

    def __init__(self, engine: NativeEngine, vocabulary: int) -> None:
        self._engine = engine
        self._vocabulary = vocabulary
        self._alone: dict[tuple[int, ...], list[int]] = {}
        self._scopes = 0

    async def alone(self, loads: Sequence[Load]) -> None:
        """Note the answers to all prompts, asked one after another."""
        for load in loads:
            for prompt in load.prompts(self._vocabulary):
                self._alone[prompt] = await self._ask(load, prompt, load.client, Turn())

    async def turn(self, loads: Sequence[Load], order: str) -> Turn:
        """Serve the loads at once, in one order.

        Raises
        ------
        GateFailed
            If an answer is another than it is alone.
        """
        turn = Turn()

        async def worker(load: Load, numbers: Iterator[int], prompts: list[tuple[int, ...]]) -> None:
            for number in numbers:
                prompt = prompts[number % TEXTS]
                if number == load.requests - 1:  # from here on this tenant has less and less waiting
                    turn.all_wait = False
                made = await self._ask(load, prompt, load.client if order == "vtc" else "", turn)
                turn.tokens += len(made)
                check(made == self._alone[prompt], f"{order}: an answer to {load.client} is not what it is alone")

        workers = []
        for load in loads:
            numbers, prompts = iter(range(load.requests)), load.prompts(self._vocabulary)
            workers += [worker(load, numbers, prompts) for _ in range(load.in_flight)]
        began, cpu, steps = time.perf_counter(), time.process_time(), self._engine.stats().steps
        await asyncio.gather(*workers)
        turn.seconds, turn.cpu_s = time.perf_counter() - began, time.process_time() - cpu
        turn.steps = self._engine.stats().steps - steps
        return turn

    async def _ask(self, load: Load, prompt: tuple[int, ...], name: str, turn: Turn) -> list[int]:
        self._scopes += 1
        request = GenerationRequest(prompt, SamplingParams(max_tokens=load.out_tokens), str(self._scopes), client=name)
        tokens: list[int] = []
        with self._engine.lease(BASE) as lease:
            began = time.perf_counter()
            stream = self._engine.generate(lease, request)
            async for chunk in stream:
                cost = OUTPUT_WEIGHT * len(chunk.token_ids)
                if not tokens:
                    turn.ttft_s.setdefault(load.client, []).append(time.perf_counter() - began)
                    cost += PROMPT_WEIGHT * (len(prompt) - stream.cached_tokens)
                if turn.all_wait:
                    turn.served.append((load.client, cost))
                tokens += chunk.token_ids
            await stream.aclose()
        return tokens


def both_wait(requests: int) -> tuple[Load, Load]:
    """Return a tenant with long requests and one with short ones, of as much service in all."""
    return Load("long", 48, 16, 12, requests), Load("short", 8, 4, 12, 5 * requests)


def flood_and_polite(requests: int) -> tuple[Load, Load]:
    """Return a tenant that floods for as long as the other, one at a time, gets `requests` answers in its turn."""
    return Load("flood", 32, 8, 32, 32 * (requests + 1)), Load("polite", 8, 4, 1, requests)


async def measure_all(options: Namespace, folder: Path) -> Document:
    """Gate, gap, then both orders in turns."""
    requests, polite, repetitions = (30, 1, 3) if options.quick else (60, 3, 5)
    engine = await open_engine(folder, base=BASE, limits=LIMITS, rng=SeededRng("benchmark"), dtype="float32")
    try:
        bench = Bench(engine, read_config(folder).vocab_size)
        waiting, flood = both_wait(requests), flood_and_polite(polite)
        await bench.alone((*waiting, *flood))
        gaps = {order: gap((await bench.turn(waiting, order)).served, "long") for order in ORDERS}
        turns: dict[str, list[Turn]] = {order: [] for order in ORDERS}
        for repetition in range(repetitions):
            for order in ORDERS[:: 1 if repetition % 2 else -1]:
                turns[order].append(await bench.turn(flood, order))
        preemptions = engine.stats().preemptions
    finally:
        await engine.close()
    check(preemptions == 0, f"{preemptions} preemptions: the loads do not fit these limits")
    allowed = bound(waiting, LIMITS.max_running)
    check(gaps["vtc"] <= allowed, f"service differs by {gaps['vtc']:g} tokens, {allowed:g} allowed")
    return make_document(gaps, allowed, turns) | {"loads": [vars(load) for load in (*waiting, *flood)]}


def make_document(gaps: dict[str, float], allowed: float, turns: dict[str, list[Turn]]) -> Document:
    """Return the figures of both orders, their ratios, and which targets they meet."""
    waits = {order: [s for turn in turns[order] for s in turn.ttft_s["polite"]] for order in ORDERS}
    p99 = {order: float(np.percentile(waits[order], 99)) for order in ORDERS}
    rates = {order: [turn.tokens / turn.seconds for turn in turns[order]] for order in ORDERS}
    pairs = [ours / theirs for ours, theirs in zip(rates["vtc"], rates["fcfs"], strict=True)]
    figures: Document = {
        "throughput_vs_fcfs": rounded(median(pairs), 3),
        "polite_ttft_p99_vtc_over_fcfs": rounded(p99["vtc"] / p99["fcfs"], 3),
    }
    return {
        "gate": True,
        "dtype": "float32",
        "threads": 1,
        "max_running": LIMITS.max_running,
        "repetitions": len(pairs),
        "service_gap_tokens": gaps["vtc"],
        "service_gap_tokens_fcfs": gaps["fcfs"],
        "bound_tokens": allowed,
        **figures,
        "throughput_vs_fcfs_all": [rounded(pair, 3) for pair in pairs],
        "tok_s": {order: rounded(median(rates[order]), 3) for order in ORDERS},
        "polite_ttft_p99_s": {order: rounded(p99[order], 3) for order in ORDERS},
        "polite_ttft_p50_s": {order: rounded(median(waits[order]), 3) for order in ORDERS},
        "polite_requests": len(waits["vtc"]),
        "cpu_s_1k": {
            order: rounded(median(1000 * turn.cpu_s / turn.tokens for turn in turns[order]), 3) for order in ORDERS
        },
        "steps": {order: median(turn.steps for turn in turns[order]) for order in ORDERS},
        "targets": [
            {"figure": name, "kind": "must", "bound": f"{sign} {most:g}", "value": figures[name], "met": met}
            for name, sign, most in TARGETS
            for met in [figures[name] >= most if sign == ">=" else figures[name] < most]
        ],
    }


def table(document: Document) -> Table:
    """Return the document as a table."""
    d = document
    notes = [f"throughput {d['throughput_vs_fcfs']:g} of fcfs; two that wait, tokens of service apart at most:"]
    notes += [f"{d['service_gap_tokens']:g}, bound {d['bound_tokens']:g}; fcfs {d['service_gap_tokens_fcfs']:g}"]
    notes += [f"{t['figure']} {t['value']:g}, {t['kind']} {t['bound']}: not met" for t in d["targets"] if not t["met"]]
    made = Table(title=f"fairness: {d['model']}, {d['dtype']}, 1 thread", caption="\n".join(notes))
    made.add_column("order")
    columns = ("tok_s", "cpu_s_1k", "steps", "polite_ttft_p50_s", "polite_ttft_p99_s")
    for column in columns:
        made.add_column(column, justify="right")
    for order in ORDERS:
        made.add_row(order, *(f"{d[column][order]:.3g}" for column in columns))
    return made


def measure(options: Namespace) -> Document:
    """Run everything on one event loop, on the real base model or a tiny one."""
    if not options.tiny:
        folder = model_folder()
        return asyncio.run(measure_all(options, folder)) | {"model": folder.name}
    with tempfile.TemporaryDirectory() as work:
        make_tiny_base(Path(work))
        return asyncio.run(measure_all(options, Path(work))) | {"model": "tiny"}


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    arguments = parser("fairness", "Does one tenant's flood hold up another?")
    arguments.add_argument("--tiny", action="store_true", help="a random two-layer model instead of the real one")
    return run("fairness", arguments, measure, table, argv)


if __name__ == "__main__":
    sys.exit(main())

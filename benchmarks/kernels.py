"""Microseconds of one batched-LoRA step of a fused qkv group on a GPU, next to the bytes it cannot avoid.

By rows of the batch, rank, hidden width and popularity of the adapters. Every provider's output is compared with the
specification before it is timed. A step is captured in a CUDA graph over several copies of everything, the cache is
flushed before each replay, and CUDA events give the time. Without a GPU nothing is timed; ``--interpret`` still runs
the comparisons on small shapes, in Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
from rich.table import Table

from benchmarks.document import Document, check, parser, rounded, run
from benchmarks.kernels_mixes import POPULARITIES, TOLERANCE, Scene, mix, scene
from benchmarks.kernels_peers import Provider, Step, fedllm, find_peers, plain_torch
from fedllm.errors import NotFound
from fedllm.kernels import LoraStack, new_stack

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RANKS = (8, 16, 64)
HIDDEN = (2048, 4096, 8192)
QUICK = ((1, 32, 256), (16,), (4096,), ("identical", "distinct"))
INTERPRETED = ((1, 5, 24), (8,), (96,), POPULARITIES)
KV_SHARE = 4
"""Queries are as wide as the hidden state, keys and values a quarter: grouped-query attention of Llama 3."""
PEER_SLACK = 3
"""Peers round the shrunk values to the factors' type as well, so they may be off by more."""
COPIES, COPY_BYTES = 16, 8 << 30
"""Steps in one graph, each with factors of its own, and the memory that they may take."""
FLUSH_BYTES = 256 << 20
"""More than any cache of a GPU; written before each replay."""
REPETITIONS = 30
NO_GPU = "not measured: no CUDA device"


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    batch: int
    rank: int
    hidden: int
    mix: str

    @property
    def widths(self) -> tuple[int, int, int]:
        """Output widths of the group."""
        return self.hidden, self.hidden // KV_SHARE, self.hidden // KV_SHARE


def cases(batches: Sequence[int], ranks: Sequence[int], hidden: Sequence[int], mixes: Sequence[str]) -> Iterator[Case]:
    """Return every combination, those of one width and rank together."""
    for width in hidden:
        for rank in ranks:
            for name in mixes:
                yield from (Case(batch, rank, width, name) for batch in batches)


def make_scene(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> Scene:
    """Return a batch whose stack has a slot for each row, all of the case's rank."""
    slots = case.batch
    stack = new_stack(slots, case.rank, case.hidden, case.widths, dtype=dtype, device=device)
    gen = torch.Generator(device).manual_seed(seed)
    stack.a_SPRD.normal_(0, case.hidden**-0.5, generator=gen)
    for b_SRO in stack.b_PSRO:
        b_SRO.normal_(0, case.rank**-0.5, generator=gen)
    full = LoraStack(stack.a_SPRD, stack.b_PSRO, [case.rank] * slots, stack.ranks_S.fill_(case.rank))
    return scene(mix(case.mix, case.batch, slots), full, seed)


def floor_bytes(case: Case, live: int, item: int) -> int:
    """Return the bytes that any kernel moves: the live adapters' factors once, x once, y in and out.

    Parameters
    ----------
    case : Case
        Shapes.
    live : int
        Distinct adapters of the batch.
    item : int
        Bytes of an element.
    """
    outputs = sum(case.widths)
    factors = live * case.rank * (len(case.widths) * case.hidden + outputs)
    return item * (factors + case.batch * (case.hidden + 2 * outputs))


def gate(case: Case, providers: dict[str, Provider], dtype: torch.dtype, device: str) -> dict[str, float]:
    """Return each provider's largest error over the largest output.

    Raises
    ------
    GateFailed
        If one is above its tolerance.
    """
    errors: dict[str, float] = {}
    for name, provider in providers.items():
        batch = make_scene(case, dtype, device)
        got = Scene(batch.stack, batch.x_TD, batch.y_TO.clone(), batch.segments)
        provider(got)()
        errors[name] = batch.error(got.y_TO)
        allowed = TOLERANCE[dtype] * (PEER_SLACK if name != "fedllm" else 1)
        check(errors[name] <= allowed, f"{name} is off by {errors[name]:.2e} in {case}, {allowed:.0e} allowed")
    return errors


def seconds(steps: Sequence[Step], repetitions: int) -> float:
    """Return the median time of one step, the cache cold, all steps captured in one graph."""
    for step in steps:
        step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    return _timed(graph.replay, flush.zero_, repetitions) / len(steps)


def bandwidth(repetitions: int) -> float:
    """Return the bytes a second of a copy of 1 GiB, read and written."""
    source = torch.zeros(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    taken = _timed(lambda: target.copy_(source), lambda: None, repetitions)
    return 2 * source.numel() / taken


def _timed(action: Callable[[], Any], before: Callable[[], Any], repetitions: int) -> float:
    samples = []
    for _ in range(repetitions + 1):
        before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1000)
    return median(samples[1:])  # the first one warms up


def time_case(
    case: Case, providers: dict[str, Provider], dtype: torch.dtype, rate: float, repetitions: int
) -> Document:
    """Return one row: the floor, and each provider's time and ratio to it."""
    first = make_scene(case, dtype, "cuda")
    live = len(first.segments.slots)
    floor_s = floor_bytes(case, live, dtype.itemsize) / rate
    row: Document = asdict(case) | {"live": live, "floor_us": rounded(1e6 * floor_s, 3)}
    size = sum(t.numel() for t in (first.stack.a_SPRD, *first.stack.b_PSRO)) * dtype.itemsize
    copies = max(1, min(COPIES, COPY_BYTES // (2 * size)))  # a peer keeps the factors in its own layout, too
    scenes = [make_scene(case, dtype, "cuda", seed) for seed in range(copies)]
    for name, provider in providers.items():
        taken = seconds([provider(copy) for copy in scenes], repetitions)
        row |= {f"{name}_us": rounded(1e6 * taken, 3), f"{name}_over_floor": rounded(taken / floor_s, 3)}
    return row


def measure(options: Namespace) -> Document:
    """Gate every case, then time it where there is a GPU.

    Raises
    ------
    NotFound
        Without a GPU, unless the interpreter was asked for.
    """
    cuda = torch.cuda.is_available() and not options.interpret
    if not cuda and not options.interpret:
        raise NotFound("no CUDA device", hint="--interpret compares the kernels with the specification without one")
    providers: dict[str, Provider] = {"fedllm": fedllm, "torch": plain_torch}
    peers, missing = find_peers() if cuda else ({}, {})
    providers |= peers
    dtype = torch.bfloat16
    grid = (QUICK if options.quick else (BATCHES, RANKS, HIDDEN, POPULARITIES)) if cuda else INTERPRETED
    chosen = list(cases(*grid))
    worst = dict.fromkeys(providers, 0.0)
    rows: list[Document] = []
    rate = bandwidth(REPETITIONS) if cuda else None
    for case in chosen:
        errors = gate(case, providers, dtype, "cuda" if cuda else "cpu")
        worst = {name: max(worst[name], error) for name, error in errors.items()}
        if rate is not None:
            rows.append(time_case(case, providers, dtype, rate, 5 if options.quick else REPETITIONS))
    return {
        "gate": True,
        "cases": len(chosen),
        "dtype": str(dtype).removeprefix("torch."),
        "max_rel_error": {name: rounded(error) for name, error in worst.items()},
        "tolerance": TOLERANCE[dtype],
        "device": torch.cuda.get_device_name() if cuda else None,
        "copy_bytes_s": None if rate is None else rounded(rate),
        "triton": version("triton"),
        "peers": {name: version(name) for name in peers} | missing,
        "timings": rows if cuda else NO_GPU,
    }


def table(document: Document) -> Table:
    """Return the document as a table."""
    d = document
    off = ", ".join(f"{name} {error:.1e}" for name, error in d["max_rel_error"].items())
    made = Table(title=f"kernels: fused qkv, {d['dtype']}, us (times the floor)", caption=f"largest error: {off}")
    names = list(d["max_rel_error"])
    for column in ("hidden", "rank", "mix", "batch", "live", "floor", *names):
        made.add_column(column, justify="left" if column == "mix" else "right")
    if d["timings"] == NO_GPU:
        made.add_row("-", "-", f"{d['cases']} gates", "-", "-", "-", *["not measured"] * len(names))
        return made
    for row in d["timings"]:
        head = (str(row[key]) for key in ("hidden", "rank", "mix", "batch", "live", "floor_us"))
        made.add_row(*head, *(f"{row[f'{name}_us']:.3g} ({row[f'{name}_over_floor']:.2g})" for name in names))
    return made


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; the interpreter needs a process of its own."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser("kernels", "How near are the batched-LoRA kernels to the bytes they must move?")
    arguments.add_argument("--interpret", action="store_true", help="no timings: gates on small shapes, without a GPU")
    options = arguments.parse_args(given)
    if options.quick and not torch.cuda.is_available() and not options.interpret:
        given.append("--interpret")
        options.interpret = True
    if options.interpret and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads the variable when it is imported, and torch has imported it.
        env = os.environ | {"TRITON_INTERPRET": "1"}
        return subprocess.run([sys.executable, "-m", "benchmarks.kernels", *given], env=env, check=False).returncode
    return run("kernels", arguments, measure, table, given)


if __name__ == "__main__":
    sys.exit(main())

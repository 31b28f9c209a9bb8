"""A decode step of Llama-3-8B on a GPU: the base alone, one adapter, and as many distinct adapters as requests.

Random weights of the published shapes, bfloat16, 32 requests of 1024 tokens of context, rank 16 on all seven linears,
wall time of a step from lists of tokens to logits on the device, captured as a CUDA graph and launched one kernel at a
time. The gate comes first: captured steps, steps launched one by one, and the same step with gathered attention and
adapters in plain torch must agree on logits, with base rows beside adapters and with a batch that is padded.

Without a GPU nothing is measured. ``--tiny`` passes the same gate on a CPU in float32 with small shapes, capture
replaced by running; with ``TRITON_INTERPRET=1`` the Triton kernels are in it, interpreted, else their specification.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.document import Document, check, parser, rounded, run
from fedllm.errors import NotFound
from fedllm.kernels import build_segments, cpu, write_slot
from fedllm.kernels.attention import choose_kind
from fedllm.serving.native.families import LlamaConfig, Rope
from fedllm.serving.native.graphs import DecodeBatch, DecodeGraphs
from fedllm.serving.native.linear import new_linear
from fedllm.serving.native.model import GROUPS, LayerWeights, LlamaModel, LlamaWeights, Span, StepInput
from fedllm.serving.native.sizing import block_bytes, slot_bytes, weight_bytes

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference of two logits, over the largest logit of the plain step."""
BLOCK_TOKENS = 16
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope=Rope(500000.0),
    max_position_embeddings=8192,
)
TINY = replace(
    LLAMA_8B, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is run: shapes, requests, and where."""

    config: LlamaConfig
    dtype: torch.dtype
    device: torch.device
    requests: int
    context: int
    rank: int
    attention: str | None = None
    capture: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] | None = None


def launched(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Capture nothing: a replay launches every kernel again."""
    return step


def make_model(setting: Setting) -> LlamaModel:
    """Return random weights, one random adapter a request, and a cache full of random keys and values."""
    config, requests = setting.config, setting.requests
    gen = torch.Generator(device=setting.device).manual_seed(1)

    def draw(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=setting.dtype, device=setting.device).mul_(scale)

    def layer() -> LayerWeights:
        shapes = {group: [config.projection_shape(m) for m in modules] for group, modules in GROUPS.items()}
        linears = {g: new_linear(draw(sum(o for o, _ in s), s[0][1], scale=s[0][1] ** -0.5)) for g, s in shapes.items()}
        ones = torch.ones(config.hidden_size, dtype=setting.dtype, device=setting.device)
        return LayerWeights(ones, ones, linears)

    layers = tuple(layer() for _ in range(config.num_hidden_layers))
    tables = [draw(config.vocab_size, config.hidden_size, scale=config.hidden_size**-0.5) for _ in range(2)]
    blocks = requests * (setting.context // BLOCK_TOKENS + 1)
    model = LlamaModel(
        config, LlamaWeights(tables[0], layers, layers[0].input_norm, new_linear(tables[1])), slots=requests,
        max_rank=setting.rank, blocks=blocks, block_tokens=BLOCK_TOKENS, positions=setting.context + BLOCK_TOKENS,
        attention=setting.attention,
    )  # fmt: skip
    model.cache.normal_(generator=gen)
    for stacks in model.lora:
        for stack in stacks.values():
            width_in = int(stack.a_SPRD.shape[3])
            for slot in range(requests):
                pairs = [
                    (draw(setting.rank, width_in, scale=width_in**-0.5), draw(out, setting.rank, scale=0.04))
                    for out in stack.widths
                ]
                write_slot(stack, slot, pairs, setting.rank, 1.0)
    return model


def batch(setting: Setting, slots: Sequence[int]) -> DecodeBatch:
    """Return one decode step of requests whose contexts differ by their number, longest first."""
    width = setting.context // BLOCK_TOKENS + 1
    rows = range(len(slots))
    return DecodeBatch(
        tokens=[(7 * row + 1) % setting.config.vocab_size for row in rows],
        positions=[setting.context - 1 - row for row in rows],
        slots=slots,
        blocks=[list(range(row * width, (row + 1) * width)) for row in rows],
    )


def plain_step(model: LlamaModel, step: DecodeBatch) -> Tensor:
    """Return a step's logits by gathered attention and adapters in plain torch."""
    device, size = model.device, model.block_tokens
    width = max(step.positions) // size + 1
    positions = torch.tensor(step.positions, device=device)
    hidden = torch.arange(width * size, device=device) > positions[:, None]
    mask = torch.zeros(hidden.shape, dtype=model.dtype, device=device).masked_fill(hidden, float("-inf"))
    table = torch.tensor([list(blocks[:width]) for blocks in step.blocks], device=device)
    rows = [b[p // size] * size + p % size for b, p in zip(step.blocks, step.positions, strict=True)]
    count = len(step.tokens)
    decoder, model.decoder = model.decoder, None
    try:
        return model.forward(
            StepInput(
                tokens_T=torch.tensor(step.tokens, device=device),
                positions_T=positions,
                cache_rows_T=torch.tensor(rows, device=device),
                spans=(Span(slice(0, count), table, mask[:, None, None], count, 1),),
                lora=cpu.plan(build_segments(step.slots), device=device),
                logit_rows=torch.arange(count, device=device),
            )
        )
    finally:
        model.decoder = decoder


def gate(setting: Setting, model: LlamaModel, runs: dict[str, DecodeGraphs]) -> float:
    """Return the largest logit error of any way over the largest logit, over batches that the ways take in turn.

    Raises
    ------
    GateFailed
    """
    n = setting.requests
    batches = {
        "distinct": list(range(n)),
        "mixed": [-1 if row % 3 == 0 else (5 * row) % n for row in range(n)],
        "padded": [-1, *range(n // 2 + 1)][: n - 1],
        "base": [-1] * n,
    }
    worst = 0.0
    wanted: dict[str, Tensor] = {}
    for name, slots in batches.items():
        step = batch(setting, slots)
        wanted[name] = want = plain_step(model, step).float()
        for way, graphs in runs.items():
            error = float((graphs.forward(step).float() - want).abs().max() / want.abs().max())
            allowed = TOLERANCE[setting.dtype]
            check(error <= allowed, f"{name}, {way}: logits are {error:.2e} of the largest off, {allowed} allowed")
            worst = max(worst, error)
    felt = float((wanted["distinct"] - wanted["base"]).abs().max() / wanted["base"].abs().max())
    check(felt > 2 * TOLERANCE[setting.dtype], f"adapters move logits by {felt:.2e} only: nothing would be noticed")
    return worst


def step_ms(setting: Setting, graphs: DecodeGraphs, slots: Sequence[int], repetitions: int) -> float:
    """Return the median wall milliseconds of a step, its inputs' copy included."""
    step = batch(setting, slots)
    seconds = []
    for repetition in range(repetitions + 3):
        torch.cuda.synchronize(setting.device)
        start = time.perf_counter()
        graphs.forward(step)
        torch.cuda.synchronize(setting.device)
        if repetition >= 3:
            seconds.append(time.perf_counter() - start)
    return 1000 * median(seconds)


def choose(options: Namespace) -> Setting:
    """Return what to run here.

    Raises
    ------
    NotFound
        Without a GPU, unless ``--tiny``.
    """
    if options.tiny:
        attention = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "torch"
        return Setting(TINY, torch.float32, torch.device("cpu"), 4, 40, 3, attention, launched)
    if not torch.cuda.is_available():
        raise NotFound("no CUDA device is here", hint="run it on a GPU, or the gate alone with --tiny")
    return Setting(LLAMA_8B, torch.bfloat16, torch.device("cuda", torch.cuda.current_device()), 32, 1024, 16)


@torch.inference_mode()
def measure(options: Namespace) -> Document:
    """Gate, then time."""
    setting = choose(options)
    model = make_model(setting)
    n = setting.requests
    sizes = {"sizes": (n,), "max_tokens": setting.context + BLOCK_TOKENS, "slots": n}
    runs = {
        "graph": DecodeGraphs(model, capture=setting.capture, **sizes),
        "launched": DecodeGraphs(model, capture=launched, **sizes),
    }
    worst = gate(setting, model, runs)
    element = setting.dtype.itemsize
    document: Document = {
        "gate": True,
        "max_rel_logit_error": rounded(worst),
        "tolerance": TOLERANCE[setting.dtype],
        "dtype": str(setting.dtype).removeprefix("torch."),
        "attention": setting.attention or choose_kind(model.decode_shape),
        "requests": n,
        "context": setting.context,
        "rank": setting.rank,
        "weights_bytes": weight_bytes(setting.config, element),
        "adapters_bytes": n * slot_bytes(setting.config, setting.rank, element),
        "cache_bytes": n * (setting.context // BLOCK_TOKENS) * block_bytes(setting.config, BLOCK_TOKENS, element),
        "gpu": None,
        "step_ms": None,
        "reason": "not measured: --tiny checks logits on a CPU",
    }
    if setting.device.type != "cuda":
        return document
    cases = {"base": [-1] * n, "one": [0] * n, "distinct": list(range(n))}
    repetitions = 20 if options.quick else 200
    times = {
        way: {case: rounded(step_ms(setting, graphs, slots, repetitions)) for case, slots in cases.items()}
        for way, graphs in runs.items()
    }
    graph = times["graph"]
    read = document["weights_bytes"] + document["cache_bytes"]
    return document | {
        "gpu": torch.cuda.get_device_name(setting.device),
        "repetitions": repetitions,
        "step_ms": times,
        "distinct_over_base": rounded(graph["distinct"] / graph["base"]),
        "base_read_gb_s": rounded(read / graph["base"] / 1e6),
        "reason": None,
    }


def table(document: Document) -> Table:
    """Return the document as a table."""
    d = document
    made = Table(
        title=f"gpu_engine: {d['requests']} requests of {d['context']}, rank {d['rank']}, {d['dtype']}, {d['gpu']}",
        caption=f"logits within {d['max_rel_logit_error']:.1e} of plain torch's; {d['reason'] or d['attention']}",
    )
    for column in ("step ms", "base", "one adapter", f"{d['requests']} adapters"):
        made.add_column(column, justify="left" if column == "step ms" else "right")
    for way, cases in (d["step_ms"] or {}).items():
        made.add_row(way, *(f"{value:.3g}" for value in cases.values()))
    return made


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    arguments = parser("gpu_engine", "What do distinct adapters add to a decode step of an 8B model on a GPU?")
    arguments.add_argument("--tiny", action="store_true", help="the gate alone, small, on a CPU")
    return run("gpu_engine", arguments, measure, table, argv)


if __name__ == "__main__":
    sys.exit(main())

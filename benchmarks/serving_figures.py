"""What the serving benchmark tells: figures by provider, their ratios, and which targets they meet."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from rich.table import Table

from benchmarks.document import Document, rounded

STREAMS, RANK = 8, 16
PROMPT_TOKENS = (55, 56, 57, 58, 60, 61, 62, 63)
CASES = ("base", "one", "mixed8")
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest difference of two logits, over the largest logit of the reference."""
WITHOUT_LORA = "base_without_lora"
TARGETS = (
    ("base_over_peft", "must", ">=", 1.3),
    ("mixed8_over_better_peer", "must", ">=", 1.7),
    ("mixed8_over_better_peer", "aim", ">=", 2.5),
    ("base_over_vllm_without_lora", "aim", ">=", 1.0),
    ("ttft_mixed8_over_base", "aim", "<=", 1.3),
)
"""Told beside the figures and no part of the gate: wall time on shared cores is not a fact about the code."""


@dataclass(frozen=True)
class Timing:
    """One batch: wall seconds to its last token, median over streams to the first, CPU seconds of its processes."""

    seconds: float
    ttft_s: float
    cpu_s: float


Timings = dict[str, dict[str, list[Timing]]]
"""By provider and case."""


def make_document(timings: Timings, worst: float, dtype: str, out: int, repetitions: int) -> Document:
    """Return medians by provider and case, ratios, and the settings that they hold for.

    Parameters
    ----------
    worst : float
        The gate's largest error.
    """
    providers: dict[str, Document | None] = {"vllm": None}
    for provider, cases in timings.items():
        fields: Document = {}
        for case, samples in cases.items():
            fields[f"{case}_tok_s"] = rounded(STREAMS * out / median(sample.seconds for sample in samples), 3)
            cpu_s = median(sample.cpu_s for sample in samples)  # steadier than wall time where cores are shared
            fields[f"{case}_cpu_s_1k"] = rounded(1000 * cpu_s / (STREAMS * out), 3)
            fields[f"ttft_{case}_s"] = rounded(median(sample.ttft_s for sample in samples), 3)
        providers[provider] = fields
    figures = ratios(providers)
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
        "providers": {name: providers[name] for name in ("fedllm", "peft", "vllm")},
        **figures,
        "targets": judged(figures),
    }


def ratios(providers: dict[str, Document | None]) -> Document:
    """Return the engine's figures over its peers'; those of vLLM only where it was measured."""
    mine, peft, vllm = providers["fedllm"], providers["peft"], providers["vllm"]
    assert mine is not None
    assert peft is not None
    found = {f"{case}_over_peft": mine[f"{case}_tok_s"] / peft[f"{case}_tok_s"] for case in CASES}
    found["mixed8_cpu_speedup"] = peft["mixed8_cpu_s_1k"] / mine["mixed8_cpu_s_1k"]
    found["ttft_mixed8_over_base"] = mine["ttft_mixed8_s"] / mine["ttft_base_s"]
    if vllm is not None:
        found |= {f"{case}_over_vllm": mine[f"{case}_tok_s"] / vllm[f"{case}_tok_s"] for case in CASES}
        found["base_over_vllm_without_lora"] = mine["base_tok_s"] / vllm[f"{WITHOUT_LORA}_tok_s"]
        better = max(peft["mixed8_tok_s"], vllm["mixed8_tok_s"])
        found["mixed8_over_better_peer"] = mine["mixed8_tok_s"] / better
    return {name: rounded(value, 3) for name, value in found.items()}


def judged(figures: Document) -> list[Document]:
    """Return which of `TARGETS` the figures meet; one that needs vLLM is left out where it was not measured."""
    return [
        {"figure": name, "kind": kind, "bound": f"{sign} {bound:g}", "value": figures[name], "met": met}
        for name, kind, sign, bound in TARGETS
        if name in figures
        for met in [figures[name] >= bound if sign == ">=" else figures[name] <= bound]
    ]


def table(document: Document) -> Table:
    """Return the document as a table."""
    d = document
    said = d["vllm_reason"]
    if said is None:
        plain = d["providers"]["vllm"][f"{WITHOUT_LORA}_tok_s"]
        said = f"{d['vllm_version']}, without LoRA {plain:.3g} tok/s"
    notes = [f"logits within {d['max_rel_logit_error']:.1e} of PEFT's; vllm {said}"]
    notes += [f"{t['figure']} {t['value']:g}, {t['kind']} {t['bound']}: not met" for t in d["targets"] if not t["met"]]
    made = Table(
        title=f"serving: {d['streams']} streams, {d['out_tokens']} tokens out, {d['dtype']}, 1 thread",
        caption="\n".join(notes),
    )
    columns = ("base_tok_s", "one_tok_s", "mixed8_tok_s", "mixed8_cpu_s_1k", "ttft_base_s", "ttft_mixed8_s")
    for column in ("provider", *columns):
        made.add_column(column, justify="left" if column == "provider" else "right")
    for name, row in document["providers"].items():
        made.add_row(name, *("-" if row is None else f"{row[column]:.3g}" for column in columns))
    return made

"""Bursts over many adapters while their versions are swapped: first tokens, goodput, and does the scale signal help.

Real native engines follow a signed registry. Requests arrive as in a synthetic trace (see `benchmarks.burst_trace`),
whether or not the ones before have ended; beside it the same mean rate arrives as a Poisson process. A request's
clock starts when it was due. Each version has a token of its own that it says, so that an answer shows which version
spoke; aliases move to new versions all the while. ``goodput`` counts requests a second that had their first token and
their mean token gap within the objectives.

In the part ``autoscaled`` the product's scale signal starts and stops engines between 1 and 3, on a clock that runs
faster as the day is shorter. The engines share this process and its cores: the part shows that the signal follows and
that nothing is lost when the fleet changes, not that three engines are faster than one.
"""

from __future__ import annotations

import asyncio
import sys
from argparse import ArgumentParser, Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.table import Table

from benchmarks.burst_fleet import NARROW, SPEED_UP, Fleet, Scene
from benchmarks.burst_trace import BURSTY, POISSON, Ask, Shape, describe, make_trace
from benchmarks.document import Document, check, model_folder, parser, rounded, run
from benchmarks.hotswap import publish
from benchmarks.hotswap_model import ForcingAdapters, make_tiny_base
from fedllm.basemodel.inspect import open_base
from fedllm.clock import SystemClock
from fedllm.identity import SigningIdentity
from fedllm.ids import AliasName, Digest
from fedllm.registry.store import Registry
from fedllm.serving.native.engine import EngineLimits

RANK, SLOTS, ADAPTERS = 4, 6, 24
TTFT_S, GAP_S = 1.0, 0.1
LOAD, HEAVY = 0.5, 0.6
MOST_RATE = 40.0
_SEED = 20240131


class Swaps:
    """Moves aliases to new versions, the popular ones more often, until told to stop."""

    def __init__(self, registry: Registry, aliases: tuple[AliasName, ...], spare: list[Digest]) -> None:
        self._registry = registry
        self._aliases = aliases
        self._spare = spare
        self._at: dict[AliasName, Digest] = {}
        self.done = 0

    def first(self, versions: list[Digest]) -> None:
        """Point each alias at its first version."""
        for alias, version in zip(self._aliases, versions, strict=True):
            self._move(alias, version)

    async def keep_on(self, every_s: float) -> None:
        """Move one alias after another."""
        draw = np.random.default_rng(_SEED)
        while True:
            await asyncio.sleep(every_s)
            alias = self._aliases[int(len(self._aliases) * draw.uniform() ** 2)]
            version = self._spare.pop(0)
            self._spare.append(self._at[alias])
            self._move(alias, version)
            self.done += 1

    def _move(self, alias: AliasName, version: Digest) -> None:
        self._registry.promote(alias, version, expected=self._at.get(alias), actor="benchmark", reason="burst")
        self._at[alias] = version


def measure(options: Namespace) -> Document:
    """Check every adapter, find what one engine can do, then play the traces."""
    with TemporaryDirectory(prefix="fedllm-burst-") as name:
        work = Path(name)
        if options.real:
            base = model_folder()
        else:
            base = work / "tiny"
            base.mkdir()
            make_tiny_base(base)
        digest = open_base(base).digest
        coordinator = SigningIdentity.generate()
        registry = Registry(work / "registry", coordinator.public, SystemClock())
        token_of = publish(registry, ForcingAdapters(base, digest, RANK), 2 * ADAPTERS, coordinator)
        order = list(token_of)
        aliases = tuple(AliasName(f"bench/a{number}") for number in range(ADAPTERS))
        limits = EngineLimits(slots=SLOTS, max_rank=RANK, max_running=8, max_waiting=100_000, patience_s=0.1)
        scene = Scene(
            base, digest, work / "registry", coordinator.public, token_of, aliases, limits,
            "bfloat16" if options.real else "float32",
        )  # fmt: skip
        swaps = Swaps(registry, aliases, order[ADAPTERS:])
        swaps.first(order[:ADAPTERS])
        try:
            parts = asyncio.run(_measure(scene, swaps, options.seconds or (12.0 if options.quick else 60.0)))
        finally:
            registry.close()
    gate(parts)
    return {
        "gate": True,
        "model": base.name,
        "adapters": ADAPTERS,
        "slots": SLOTS,
        "rank": RANK,
        "objectives": {"ttft_s": TTFT_S, "token_gap_s": GAP_S},
        "swaps": swaps.done,
        **parts,
        "behind_the_router": "not measured: engines share this process, and requests do not pass the front door",
    }


async def _measure(scene: Scene, swaps: Swaps, seconds: float) -> Document:
    capacity = await _capacity(scene, seconds / 3)
    rate = min(MOST_RATE, LOAD * capacity)
    found: Document = {"capacity_requests_per_s": rounded(capacity), "mean_requests_per_s": rounded(rate)}
    swapping = asyncio.create_task(swaps.keep_on(seconds / 20))
    try:
        for name, shape in (("poisson", POISSON), ("bursty", BURSTY)):
            found[name] = await _part(scene, shape, rate=rate, seconds=seconds, most=1)
        narrow = await _rate(scene, seconds / 3, in_flight=NARROW)
        heavy = _part(scene, BURSTY, rate=HEAVY * narrow, seconds=2 * seconds, most=3, in_flight=NARROW)
        found["autoscaled"] = {"one_engine_requests_per_s": rounded(narrow), **await heavy}
    finally:
        swapping.cancel()
        with suppress(asyncio.CancelledError):
            await swapping
    return found


async def _capacity(scene: Scene, seconds: float) -> float:
    """Ask every adapter once, which is the gate, then many at once; return requests a second."""
    gate_fleet = Fleet(scene, most=1, objective_s=TTFT_S)
    await gate_fleet.play([Ask(0.0, adapter, 8, 4) for adapter in range(len(scene.aliases))])
    tally = gate_fleet.tally
    check(tally.failed == 0 and tally.mixed == 0, f"{tally.failed} adapters failed, {tally.mixed} spoke for others")
    check(len(tally.versions) == len(scene.aliases), f"{len(tally.versions)} of {len(scene.aliases)} adapters spoke")
    return await _rate(scene, seconds)


async def _rate(scene: Scene, seconds: float, *, in_flight: int | None = None) -> float:
    """Return the requests a second of one engine that has always something to do."""
    asks = make_trace(POISSON, rate=50.0, seconds=seconds, adapters=len(scene.aliases), seed=_SEED)
    fleet = Fleet(scene, most=1, objective_s=TTFT_S, in_flight=in_flight)
    return len(asks) / await fleet.play([replace(ask, at_s=0.0) for ask in asks])


async def _part(
    scene: Scene, shape: Shape, *, rate: float, seconds: float, most: int, in_flight: int | None = None
) -> Document:
    trace = make_trace(shape, rate=rate, seconds=seconds, adapters=len(scene.aliases), seed=_SEED)
    fleet = Fleet(scene, most=most, objective_s=TTFT_S, in_flight=in_flight)
    took = await fleet.play(trace)
    tally = fleet.tally
    good = sum(ttft <= TTFT_S and (gap or 0.0) <= GAP_S for ttft, gap in zip(tally.ttfts, tally.gaps, strict=True))
    gaps = [gap for gap in tally.gaps if gap is not None]
    found: Document = {
        "trace": describe(trace, shape),
        "seconds": rounded(took),
        "failed": tally.failed,
        "unanswered": len(trace) - len(tally.ttfts) - tally.failed,
        "mixed_version": tally.mixed,
        "reasons": sorted(tally.reasons),
        "versions_heard": len(tally.versions),
        "ttft_s_p50": rounded(float(np.percentile(tally.ttfts or [0.0], 50))),
        "ttft_s_p99": rounded(float(np.percentile(tally.ttfts or [0.0], 99))),
        "token_gap_s_p50": rounded(float(np.percentile(gaps or [0.0], 50))),
        "token_gap_s_p99": rounded(float(np.percentile(gaps or [0.0], 99))),
        "goodput": rounded(good / took),
        "within_objectives": rounded(good / len(trace)),
    }
    if most > 1:
        wanted, there = ([row[column] for row in fleet.seen] for column in (0, 1))
        found["signal"] = {
            "clock_speed": SPEED_UP,
            "looks": len(fleet.seen),
            "wanted_most": max(wanted, default=1),
            "wanted_mean": rounded(float(np.mean(wanted or [1]))),
            "replicas_most": max(there, default=1),
            "replicas_mean": rounded(float(np.mean(there or [1]))),
            "moves": int((np.diff(wanted) != 0).sum()),
            "reasons": {reason: sum(row[2] == reason for row in fleet.seen) for reason in {r[2] for r in fleet.seen}},
        }
    return found


def gate(parts: Document) -> None:
    """Raise `GateFailed` unless every request of every part was answered, by one version."""
    for name in ("poisson", "bursty", "autoscaled"):
        for count in ("failed", "unanswered", "mixed_version"):
            found = parts[name][count]
            check(found == 0, f"{name}: {count} is {found}, 0 allowed ({', '.join(parts[name]['reasons'])})")


def table(document: Document) -> Table:
    """Return the document as a table."""
    d = document
    made = Table(title=f"burst: {d['adapters']} adapters of {d['model']} in {d['slots']} slots, {d['swaps']} swaps")
    for column in ("", "poisson", "bursty", "autoscaled"):
        made.add_column(column, justify="left" if not column else "right")
    parts = [d[name] for name in ("poisson", "bursty", "autoscaled")]
    for key in ("requests", "most_in_a_second", "variance_over_mean"):
        made.add_row(key, *(f"{part['trace'][key]:g}" for part in parts))
    for key in (
        "failed", "mixed_version", "ttft_s_p50", "ttft_s_p99", "token_gap_s_p99", "goodput", "within_objectives",
    ):  # fmt: skip
        made.add_row(key, *(f"{part[key]:g}" for part in parts))
    for key in ("wanted_most", "wanted_mean", "replicas_most", "moves"):
        made.add_row(f"signal: {key}", "", "", f"{d['autoscaled']['signal'][key]:g}")
    return made


def arguments() -> ArgumentParser:
    """Return the command line."""
    made = parser("burst", "What do bursts cost while versions swap, and does the scale signal follow?")
    made.add_argument("--real", action="store_true", help="the real base model instead of a random two-layer one")
    made.add_argument("--seconds", type=float, default=0.0, help="length of a trace; 0: 60, or 12 when quick")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    return run("burst", arguments(), measure, table, argv)


if __name__ == "__main__":
    sys.exit(main())

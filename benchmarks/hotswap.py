"""Versions swapped under streams: does a stream fail, change its version or stall, and how long does a swap take.

A real endpoint on loopback follows a signed registry. Eight clients stream without a pause while the alias moves.
Each adapter makes one token certain, so that a client can tell from the tokens alone which version spoke, and hold
that against the digest in the answer's header. A ninth client asks for one token at a time: it hears a new version
first.

``flip_to_first_token_s`` is from the alias's flip in the endpoint to the first token of the new version that a
client holds; ``publish_to_first_token_s`` is from the move in the registry, which the endpoint reads every 0.2 s.
``stall_steps`` is the time that a swap holds the step thread between two steps (one slot copy), in median steps, both
in CPU seconds of that thread: on shared cores wall time measures the neighbours too, and is given beside it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from argparse import ArgumentParser, Namespace
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import httpx
import numpy as np
from rich.table import Table

from benchmarks.document import Document, check, model_folder, parser, rounded, run
from benchmarks.hotswap_model import ForcingAdapters, make_tiny_base
from benchmarks.hotswap_server import Server, Stopwatches
from benchmarks.hotswap_tiers import measure_tiers
from fedllm.basemodel.inspect import open_base
from fedllm.clock import SystemClock
from fedllm.identity import SigningIdentity
from fedllm.ids import AliasName, Digest, sha256
from fedllm.messages.plan import Recipe
from fedllm.registry.model import PrivacyRecord
from fedllm.registry.store import Registry, VersionDraft
from fedllm.serving.native.engine import EngineLimits
from fedllm.serving.tenants import create_tenant

STREAMS, RANK, SLOTS = 8, 4, 4
ALIAS = AliasName("bench/live")
SHORTEST = 16
DEADLINE_S = 30.0
QUIET_S = 0.5
MOST_STALL_STEPS = 1.0


@dataclass
class Tally:
    """What the clients saw."""

    requests: int = 0
    tokens: int = 0
    failed: int = 0
    mixed: int = 0
    reasons: set[str] = field(default_factory=set)
    first_seen: dict[Digest, float] = field(default_factory=dict)
    seen: asyncio.Event = field(default_factory=asyncio.Event)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    """End and length of every pause between two chunks of a stream, seconds."""


class Clients:
    """Streams that never pause.

    Parameters
    ----------
    url, key : str
        The endpoint, and a tenant's key.
    token_of : dict of Digest to int
        What each version says.
    """

    def __init__(self, url: str, key: str, token_of: dict[Digest, int]) -> None:
        limits = httpx.Limits(max_connections=2 * STREAMS)
        headers = {"authorization": f"Bearer {key}"}
        self._http = httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=60, trust_env=False)
        self._token_of = token_of
        self._stopping = False
        self.tally = Tally()

    async def follow(self, index: int) -> None:
        """Ask again and again until told to stop."""
        count = 0
        while not self._stopping:
            try:
                length = SHORTEST + (5 * index + count) % SHORTEST if index < STREAMS else 1
                await self._one(length, prompt=[3 + index, 5 + count % 200, 7])
            except (httpx.HTTPError, ValueError, KeyError) as error:
                self._fail(type(error).__name__)
                await asyncio.sleep(0.1)
            count += 1

    async def stop(self) -> None:
        """Let the last requests end."""
        self._stopping = True

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _one(self, length: int, prompt: list[int]) -> None:
        body = {"model": ALIAS, "prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "return_token_ids": True}
        self.tally.requests += 1
        async with self._http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                await answer.aread()
                return self._fail(f"status {answer.status_code}")
            version = Digest(answer.headers["x-fedllm-version"])
            said: list[int] = []
            before, ended = 0.0, False
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    ended = True
                    break
                now = time.perf_counter()
                chunk = json.loads(line[6:])
                said += chunk["choices"][0]["token_ids"]
                if before:
                    self.tally.gaps.append((now, now - before))
                elif version not in self.tally.first_seen:
                    self.tally.first_seen[version] = now
                    self.tally.seen.set()
                before = now
        self.tally.tokens += len(said)
        if not ended or len(said) != length:
            return self._fail(f"{len(said)} of {length} tokens")
        if set(said) != {self._token_of[version]}:
            self.tally.mixed += 1
        return None

    def _fail(self, reason: str) -> None:
        self.tally.failed += 1
        self.tally.reasons.add(reason)


async def swap_all(clients: Clients, registry: Registry, order: list[Digest]) -> list[tuple[float, float]]:
    """Move the alias through all versions under load; return when each was published, and first heard of."""
    tally = clients.tally
    tasks = [asyncio.create_task(clients.follow(i)) for i in range(STREAMS + 1)]
    windows: list[tuple[float, float]] = []
    try:
        for previous, version in pairwise(order):
            if not windows:
                await asyncio.sleep(2.0)  # warm, all streams running
            tally.seen.clear()
            published = time.perf_counter()
            registry.promote(ALIAS, version, expected=previous, actor="benchmark", reason="swap")
            with suppress(TimeoutError):
                async with asyncio.timeout(DEADLINE_S):
                    while version not in tally.first_seen:
                        await tally.seen.wait()
                        tally.seen.clear()
            check(version in tally.first_seen, f"version {version[:8]} was not heard within {DEADLINE_S:g} s")
            windows.append((published, tally.first_seen[version]))
            await asyncio.sleep(QUIET_S)
    finally:
        await clients.stop()
        await asyncio.gather(*tasks)
        await clients.aclose()
    return windows


def publish(
    registry: Registry, adapters: ForcingAdapters, count: int, coordinator: SigningIdentity
) -> dict[Digest, int]:
    """Add `count` versions, each with a token of its own; return the token of each, in order."""
    recipe = Recipe("sgd", 0.1, 1, 1, 1, 64)
    privacy = PrivacyRecord("record", "add-or-remove-one", None, 1e-5, "nothing: a benchmark", "advisory")
    token_of: dict[Digest, int] = {}
    for number, token in enumerate(adapters.tokens(count), 1):
        draft = VersionDraft("bench", "base", None, number, "ffa", recipe, {}, privacy, 3, 3, sha256(b"plan"))
        token_of[registry.add(adapters.make(token), draft, coordinator).digest] = token
    return token_of


def measure(options: Namespace) -> Document:
    """Swap under load, then check what is left behind; then serve 2,000 adapters through a few slots."""
    with TemporaryDirectory(prefix="fedllm-hotswap-") as name:
        work = Path(name)
        if options.tiny:
            base = work / "tiny"
            base.mkdir()
            make_tiny_base(base)
        else:
            base = model_folder()
        digest = open_base(base).digest
        swaps = min(options.swaps, 20) if options.quick else options.swaps
        coordinator = SigningIdentity.generate()
        registry = Registry(work / "registry", coordinator.public, SystemClock())
        token_of = publish(registry, ForcingAdapters(base, digest, RANK), swaps + 1, coordinator)
        order = list(token_of)
        registry.promote(ALIAS, order[0], expected=None, actor="benchmark", reason="first")
        key = create_tenant(work / "tenants.toml", "bench", [ALIAS])
        limits = EngineLimits(slots=SLOTS, max_rank=2 * RANK, max_running=2 * STREAMS)
        server = Server(
            base, work / "registry", work / "tenants.toml",
            digest=digest, key=coordinator.public, limits=limits, dtype="float32" if options.tiny else "bfloat16",
        )  # fmt: skip
        server.start()
        try:
            clients = Clients(server.url, key, token_of)
            windows = asyncio.run(swap_all(clients, registry, order))
        finally:
            server.stop()
            registry.close()
        found = summarise(clients.tally, windows, server, order)
        gate(found, clients.tally)
        tiers = measure_tiers(work / "tiers", adapters=options.adapters, requests=200 if options.quick else 1000)
    return {"gate": True, "model": "tiny" if options.tiny else base.name, **found, "tiers": tiers}


def summarise(tally: Tally, windows: list[tuple[float, float]], server: Server, order: list[Digest]) -> Document:
    """Return the figures of the swaps."""
    watches: Stopwatches = server.watches
    stats = server.stats
    assert stats is not None
    step_s, copies_s = median(watches.steps), watches.copies[1:]  # the first came before any stream
    step_cpu, copies_cpu = median(watches.steps_cpu), watches.copies_cpu[1:]
    flips = [tally.first_seen[version] - watches.flips[version] for version in order[1:]]
    publishes = [end - began for began, end in windows]
    during = [gap for end, gap in tally.gaps if any(a <= end and end - gap <= b for a, b in windows)]
    quiet = [gap for end, gap in tally.gaps if not any(a <= end and end - gap <= b for a, b in windows)]
    return {
        "swaps": len(windows),
        "streams": STREAMS,
        "rank": RANK,
        "requests": tally.requests,
        "tokens": tally.tokens,
        "failed": tally.failed,
        "mixed_version": tally.mixed,
        "refused": server.refused,
        "slots_leaked": stats.slots_used - 1,
        "requests_leaked": server.requests_held,
        "blocks_leaked": stats.total_blocks - stats.free_blocks,
        "step_s_p50": rounded(step_s),
        "copy_s_p50": rounded(median(copies_s)),
        "stall_steps_p50": rounded(median(copies_cpu) / step_cpu),
        "stall_steps_p99": rounded(float(np.percentile(copies_cpu, 99)) / step_cpu),
        "stall_steps_wall_p99": rounded(float(np.percentile(copies_s, 99)) / step_s),
        "flip_to_first_token_s_p50": rounded(median(flips)),
        "flip_to_first_token_s_p99": rounded(float(np.percentile(flips, 99))),
        "publish_to_first_token_s_p50": rounded(median(publishes)),
        "publish_to_first_token_s_p99": rounded(float(np.percentile(publishes, 99))),
        "token_gap_s_p50": rounded(median(gap for _, gap in tally.gaps)),
        "token_gap_quiet_s_p99": rounded(float(np.percentile(quiet or [0.0], 99))),
        "token_gap_in_swaps_s_p99": rounded(float(np.percentile(during or [0.0], 99))),
    }


def gate(found: Document, tally: Tally) -> None:
    """Raise `GateFailed` unless nothing failed, mixed or leaked, and no swap held the streams up by a step."""
    reasons = f" ({', '.join(sorted(tally.reasons))})" if tally.reasons else ""
    for name in ("failed", "mixed_version", "refused", "slots_leaked", "requests_leaked", "blocks_leaked"):
        check(found[name] == 0, f"{name} is {found[name]}, 0 allowed{reasons}")
    stall = found["stall_steps_p99"]
    check(stall <= MOST_STALL_STEPS, f"stall_steps_p99 is {stall}, {MOST_STALL_STEPS:g} allowed")


def table(document: Document) -> Table:
    """Return the document as a table."""
    d = document
    made = Table(title=f"hotswap: {d['swaps']} swaps of {d['model']} under {d['streams']} streams", show_header=False)
    for name in (
        "requests", "failed", "mixed_version", "slots_leaked", "stall_steps_p99", "flip_to_first_token_s_p50",
        "flip_to_first_token_s_p99", "publish_to_first_token_s_p99", "token_gap_s_p50", "token_gap_quiet_s_p99",
        "token_gap_in_swaps_s_p99",
    ):  # fmt: skip
        made.add_row(name, f"{d[name]:g}")
    for name, value in d["tiers"].items():
        made.add_row(f"tiers: {name}", f"{value:g}")
    return made


def arguments() -> ArgumentParser:
    """Return the command line."""
    made = parser("hotswap", "Do versions swap under streams without a failure, a mixture or a stall?")
    made.add_argument("--swaps", type=int, default=100, help="moves of the alias")
    made.add_argument("--tiny", action="store_true", help="a random two-layer model instead of the real one")
    made.add_argument("--adapters", type=int, default=2000, help="versions registered in the second part")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    return run("hotswap", arguments(), measure, table, argv)


if __name__ == "__main__":
    sys.exit(main())

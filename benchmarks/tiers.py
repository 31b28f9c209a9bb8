"""Thousands of adapters behind one endpoint with room for 16 in memory and 8 in slots: hits and waits by tier.

The product's engine, tiers, disk, versions and watcher follow a signed registry on loopback. Streams ask one thing
after another, adapters by Zipf popularity: ``calm`` has fewer streams than slots, ``pressed`` has more, so that
versions wait for a slot in turn. A request's tier is where its version was found: in a slot, in memory, on disk, or
in the registry alone; a request that joins another's fetch counts as that fetch does.

Each adapter makes one token certain, so an answer tells by itself which version spoke. A rare input
position cannot be forced, so an answer with a token that is not its version's is asked for again alone.

Gate: no request failed, no answer by another version, no wait for a slot beyond the bound of
`fedllm.serving.native.slots`, nothing held afterwards. Times are from the request for a version to the first token,
in this process: HTTP and authentication are not in them.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from benchmarks.document import Document, check, model_folder, parser, rounded, run
from benchmarks.tiers_endpoint import TIERS, Note, NotedEndpoint, Room, Wait, open_endpoint
from benchmarks.tiers_model import ManyAdapters, make_wide_base
from benchmarks.tiers_registry import SignedRegistry
from benchmarks.tiers_traffic import OUT_TOKENS, PROMPT_TOKENS, LeastRecentlyUsed, Scene, Traffic
from fedllm.basemodel.inspect import open_base
from fedllm.serving.native.engine import EngineLimits
from fedllm.serving.native.loader import read_config

ROOM = Room()
STREAMS = {"calm": 4, "pressed": 16}
EXPONENT = 1.0
LIMITS = EngineLimits(slots=ROOM.slots, max_rank=4, kv_blocks=512, max_running=16, patience_s=ROOM.patience_s)
COLUMNS = {
    "requests": "requests",
    "share": "share",
    "ttft p50 s": "ttft_s_p50",
    "p90 s": "ttft_s_p90",
    "to memory": "to_memory_s_p50",
    "slot": "to_slot_s_p50",
    "warm": "to_warm_s_p50",
    "token": "to_token_s_p50",
}
QUANTILES = tuple(range(0, 101, 5))


def bound(place: int, longest_request_s: float, longest_copy_s: float, room: Room) -> float:
    """Return how long a version with `place` others before it may wait for a slot; see `serving.native.slots`."""
    unpinned = room.slots - room.pinned
    return (1 + place // unpinned) * (room.patience_s + 2 * longest_request_s + longest_copy_s)


def starvation(waits: Sequence[Wait], notes: Sequence[Note], copies_s: Sequence[float], room: Room) -> Document:
    """Return the waits for a slot beside their bound, which is of the longest request and copy seen.

    Raises
    ------
    GateFailed
        If one waited longer than its bound.
    """
    request_s = max((note.ended_s - note.admitted_s for note in notes), default=0.0)
    copy_s = max(copies_s, default=0.0)
    shares = [wait.seconds / bound(wait.place, request_s, copy_s, room) for wait in waits]
    for wait, share in zip(waits, shares, strict=True):
        check(share <= 1, f"a version waited {wait.seconds:.3g} s at place {wait.place}, {share:.3g} of its bound")
    return {
        "waits": len(waits),
        "wait_s_p50": _quantile([wait.seconds for wait in waits], 50),
        "wait_s_max": _quantile([wait.seconds for wait in waits], 100),
        "furthest_place": max((wait.place for wait in waits), default=0),
        "request_s_max": rounded(request_s),
        "copy_s_max": rounded(copy_s),
        "bound_s_of_the_first": rounded(bound(0, request_s, copy_s, room)),
        "largest_share_of_bound": _quantile(shares, 100),
    }


def by_tier(notes: Sequence[Note]) -> dict[str, Document]:
    """Return each tier's share of the requests, and where its time to the first token went."""
    found: dict[str, Document] = {}
    for tier in TIERS:
        mine = [note for note in notes if note.tier == tier]
        ttft = [note.first_s - note.asked_s for note in mine]
        found[tier] = {
            "requests": len(mine),
            "share": rounded(len(mine) / max(1, len(notes))),
            "in_a_closed_slot": sum(note.closed for note in mine),
            "ttft_s_p50": _quantile(ttft, 50),
            "ttft_s_p90": _quantile(ttft, 90),
            "ttft_s_max": _quantile(ttft, 100),
            "to_memory_s_p50": _quantile([note.held_s - note.asked_s for note in mine], 50),
            "to_slot_s_p50": _quantile([note.admitted_s - note.held_s for note in mine], 50),
            "to_warm_s_p50": _quantile([note.leased_s - note.admitted_s for note in mine], 50),
            "to_token_s_p50": _quantile([note.first_s - note.leased_s for note in mine], 50),
            "ttft_s_quantiles": [_quantile(ttft, q) for q in QUANTILES],
        }
    return found


def summarise(scene: Scene, room: Room) -> Document:
    """Return a scene's figures.

    Raises
    ------
    GateFailed
        If a request failed, an answer was wrong, or a wait was beyond its bound.
    """
    reasons = f" ({'; '.join(scene.reasons[:3])})" if scene.reasons else ""
    check(scene.failed == 0, f"{scene.failed} requests failed, 0 allowed{reasons}")
    check(scene.wrong == 0, f"{scene.wrong} answers are by another version, 0 allowed{reasons}")
    ttft = [note.first_s - note.asked_s for note in scene.notes]
    return {
        "streams": scene.streams,
        "requests": len(scene.notes),
        "seconds": rounded(scene.seconds),
        "failed": scene.failed,
        "wrong_version": scene.wrong,
        "asked_again": scene.missed,
        "excused": scene.excused,
        "ttft_s_p50": _quantile(ttft, 50),
        "ttft_s_p90": _quantile(ttft, 90),
        "tiers": by_tier(scene.notes),
        "starvation": starvation(scene.waits, scene.notes, scene.copies_s, room),
    }


def left_behind(endpoint: NotedEndpoint, room: Room) -> None:
    """Raise `GateFailed` if a request, a block, a queue or a byte too many is held after the traffic."""
    engine, tiers = endpoint.engine, endpoint.tiers
    stats = engine.stats()
    held = sum(engine._slots.requests(digest) for digest in engine.loaded())
    check(held == 0, f"{held} requests are still counted on slots")
    check(engine._slots.waiting() == (), "versions still wait for slots")
    check(stats.free_blocks == stats.total_blocks, f"{stats.total_blocks - stats.free_blocks} blocks are held")
    check(len(tiers.held()) <= room.in_memory, f"{len(tiers.held())} versions in memory, {room.in_memory} allowed")


async def measure_all(work: Path, base: Path, registry: SignedRegistry, options: Namespace) -> Document:
    """Fill memory and disk, then both scenes."""
    requests, fill = (80, 100) if options.quick else (options.requests, options.fill)
    dtype = "float32" if options.tiny else "bfloat16"
    async with open_endpoint(work, base, registry, ROOM, LIMITS, dtype) as endpoint:
        served = len(endpoint.watcher._versions.served.versions)
        check(served == len(registry.digests), f"{served} aliases are served of {len(registry.digests)}")
        traffic = Traffic(endpoint, registry, read_config(base).vocab_size, EXPONENT)
        await traffic.fill(fill, seed=10)
        scenes: dict[str, Document] = {}
        caches = {room: LeastRecentlyUsed(room) for room in (ROOM.slots, ROOM.in_memory)}
        for seed, (name, streams) in enumerate(STREAMS.items(), 11):
            scene = await traffic.scene(streams, requests, seed)
            scenes[name] = summarise(scene, ROOM)
            scenes[name]["share_in_an_lru_cache_of"] = {
                str(room): rounded(cache.hits(scene.picks) / requests) for room, cache in caches.items()
            }
        left_behind(endpoint, ROOM)
        hits, counted = endpoint.tiers.hits, sum(scene["requests"] + scene["asked_again"] for scene in scenes.values())
        told = hits.slot + hits.memory + hits.fetched
        check(told == counted, f"the tiers count {told} requests, {counted} were asked")
    return {
        "dtype": dtype,
        "threads": 1,
        "exponent": EXPONENT,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUT_TOKENS,
        "fill": fill,
        "first_sync_s": rounded(endpoint.first_sync_s),
        "asked_of_registry": dict(registry.asked),
        "found_on_disk": dict(endpoint.cache.hits),
        "quantiles": list(QUANTILES),
        "scenes": scenes,
    }


def measure(options: Namespace) -> Document:
    """Sign the versions, then serve them, of the real base model or a tiny one."""
    with tempfile.TemporaryDirectory(prefix="fedllm-tiers-") as name:
        work = Path(name)
        base = work / "tiny"
        if options.tiny:
            base.mkdir()
            make_wide_base(base)
        else:
            base = model_folder()
        began = time.perf_counter()
        adapters = ManyAdapters(base, open_base(base).digest)
        registry = SignedRegistry(work / "registry", adapters, options.adapters)
        signed_s = time.perf_counter() - began
        with registry:
            found = asyncio.run(measure_all(work, base, registry, options))
    weights = 1.0 / np.arange(1, options.adapters + 1) ** EXPONENT
    return {
        "gate": True,
        "model": "tiny" if options.tiny else base.name,
        "adapters": options.adapters,
        **vars(ROOM),
        "version_bytes": registry.version_bytes,
        "signed_s": rounded(signed_s),
        "traffic_of_the_first": {
            str(count): rounded(float(weights[:count].sum() / weights.sum())) for count in (ROOM.slots, ROOM.in_memory)
        },
        **found,
    }


def table(document: Document) -> Table:
    """Return the document as a table."""
    d = document
    notes = []
    for name, scene in d["scenes"].items():
        s = scene["starvation"]
        notes.append(
            f"{name}: {scene['requests']} requests of {scene['streams']} streams, failed {scene['failed']}, by another "
            f"version {scene['wrong_version']}; longest wait for a slot {_shown(s['wait_s_max'])} s, "
            f"{_shown(s['largest_share_of_bound'])} of its bound"
        )
    title = f"tiers: {d['adapters']} adapters of {d['model']}, {d['slots']} slots, {d['in_memory']} in memory"
    made = Table(title=title, caption="\n".join(notes))
    made.add_column("found in")
    for column in COLUMNS:
        made.add_column(column, justify="right")
    for name, scene in d["scenes"].items():
        for tier, row in scene["tiers"].items():
            made.add_row(f"{name}: {tier}", *(_shown(row[field]) for field in COLUMNS.values()))
    return made


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) >= 5e-4 else "0"


def _quantile(values: Sequence[float], percent: float) -> float | None:
    return rounded(float(np.percentile(values, percent)), 3) if values else None


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    arguments = parser("tiers", "Are thousands of adapters served right with room for few, and how fast by tier?")
    arguments.add_argument("--tiny", action="store_true", help="a random two-layer model instead of the real one")
    arguments.add_argument(
        "--adapters", type=int, default=2000, help="versions in the registry, 1.3 MB of temporary files each"
    )
    arguments.add_argument("--requests", type=int, default=600, help="of each scene; 80 with --quick")
    arguments.add_argument("--fill", type=int, default=1000, help="draws that fill memory and disk; 100 with --quick")
    return run("tiers", arguments, measure, table, argv)


if __name__ == "__main__":
    sys.exit(main())

"""The second part of the hotswap benchmark: 2,000 adapters of the tiny base behind one endpoint, 32 clients.

The traffic, the registry and the checks are those of `benchmarks.tiers`, which gives figures by tier.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.document import Document, check, rounded
from benchmarks.tiers import left_behind
from benchmarks.tiers_endpoint import Room, open_endpoint
from benchmarks.tiers_model import WIDE_VOCAB, ManyAdapters, make_wide_base
from benchmarks.tiers_registry import SignedRegistry
from benchmarks.tiers_traffic import Traffic
from fedllm.basemodel.inspect import open_base
from fedllm.serving.native.engine import EngineLimits

ROOM = Room(slots=6, pinned=2, patience_s=0.05)
CLIENTS, EXPONENT = 32, 1.0


def measure_tiers(work: Path, *, adapters: int, requests: int) -> Document:
    """Serve Zipf traffic over `adapters` aliases.

    Raises
    ------
    GateFailed
        If a request fails or is answered by another version, or anything is held afterwards.
    """
    base = work / "base"
    base.mkdir(parents=True)
    make_wide_base(base)
    registry = SignedRegistry(work / "registry", ManyAdapters(base, open_base(base).digest), adapters)
    with registry:
        return asyncio.run(_measure(work, base, registry, requests))


async def _measure(work: Path, base: Path, registry: SignedRegistry, requests: int) -> Document:
    limits = EngineLimits(slots=ROOM.slots, max_rank=1, kv_blocks=512, max_running=16, patience_s=ROOM.patience_s)
    async with open_endpoint(work, base, registry, ROOM, limits, "float32") as endpoint:
        scene = await Traffic(endpoint, registry, WIDE_VOCAB, EXPONENT).scene(CLIENTS, requests, seed=11)
        check(scene.failed + scene.wrong == 0, f"{scene.failed} failed, {scene.wrong} wrong: {scene.reasons[:3]}")
        left_behind(endpoint, ROOM)
    found = Counter(note.tier for note in scene.notes)
    waits = [note.leased_s - note.asked_s for note in scene.notes]
    return {
        "adapters": len(registry.digests),
        "slots": ROOM.slots,
        "in_memory": ROOM.in_memory,
        "requests": requests,
        "failed": 0,
        "first_sync_s": rounded(endpoint.first_sync_s),
        "slot_hits": rounded(found["slot"] / requests),
        "memory_hits": rounded(found["memory"] / requests),
        "fetched": rounded((found["disk"] + found["registry"]) / requests),
        "from_registry": registry.asked["versions"],
        "from_disk": endpoint.cache.hits["versions"],
        "lease_wait_s_p50": rounded(median(waits)),
        "lease_wait_s_p99": rounded(float(np.percentile(waits, 99))),
        "lease_wait_s_max": rounded(max(waits)),
    }

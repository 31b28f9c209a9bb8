"""Thousands of adapters behind one endpoint with room for 16 in memory and few slots: Zipf traffic, hits by tier.

The popularity of the k-th adapter is as 1 / k. The registry is reached over HTTP (in this process) by the product's
client, so that every manifest's signature and every file's digest is checked on each way up, from disk too.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from statistics import median

import httpx
import numpy as np

from benchmarks.document import Document, check, rounded
from benchmarks.hotswap_model import HIDDEN, make_tiny_base
from fedllm.adapter import AdapterSpec, AdapterState, to_peft
from fedllm.basemodel.inspect import open_base
from fedllm.clock import SystemClock
from fedllm.identity import SigningIdentity
from fedllm.ids import AliasName, Digest, sha256
from fedllm.messages.plan import Recipe
from fedllm.registry.model import (
    MANIFEST_VERSION,
    AdapterVersion,
    AliasTable,
    FileRecord,
    Manifest,
    PrivacyRecord,
    SignedManifest,
)
from fedllm.registry.remote import HttpVersionSource, aliases_to_json, manifest_to_json
from fedllm.rng import OsRng
from fedllm.serving.disk import CachingClient, DiskCache
from fedllm.serving.engine import GenerationRequest, SamplingParams
from fedllm.serving.metrics import Counters
from fedllm.serving.native.engine import EngineLimits, NativeEngine, open_engine
from fedllm.serving.tenants import Tenant
from fedllm.serving.tiers import Tiers
from fedllm.serving.versions import Versions
from fedllm.serving.watch import AliasWatcher

SLOTS, PINNED, IN_MEMORY, CLIENTS, TOKENS = 6, 2, 16, 32, 8
DISK_SHARE = 4
"""The disk has room for one version in so many."""


class Registry:
    """A signed registry in memory that answers like the coordinator's API."""

    def __init__(self, base: Digest, count: int) -> None:
        self.coordinator = SigningIdentity.generate()
        self.answers: dict[str, bytes] = {}
        self.digests: dict[AliasName, Digest] = {}
        self.version_bytes = self.state_bytes = 0
        rows = []
        spec = AdapterSpec(base, 1, 2, {"q_proj": (HIDDEN, HIDDEN)}, (0,))
        draw = np.random.default_rng(7)
        for number in range(1, count + 1):
            flat = draw.normal(size=spec.layout().size).astype(np.float32)
            state = AdapterState(spec, spec.layout().unflatten(flat))
            files = to_peft(state, base_name="tiny")
            records = {name: FileRecord(sha256(data), len(data)) for name, data in files.items()}
            manifest = Manifest(
                version=MANIFEST_VERSION, federation=f"f{number}", number=1, parent=None, round=1, base=base, spec=spec,
                files=records, state=state.digest, method="ffa", recipe=Recipe("sgd", 0.1, 1, 1, 1, 64), metrics={},
                privacy=PrivacyRecord("record", "add-or-remove-one", None, 1e-5, "nothing: a benchmark", "advisory"),
                cohort_size=3, survivors=3, plan=sha256(b"plan"), created=1.7e9,
            )  # fmt: skip
            version = AdapterVersion.of(manifest)
            row = manifest_to_json(SignedManifest.sign(manifest, self.coordinator), version)
            rows.append(row)
            self.digests[AliasName(f"bench/a{number}")] = version.digest
            self.answers[f"/v1/versions/{version.digest}"] = json.dumps(row).encode()
            self.answers |= {f"/v1/blobs/{records[name].sha256}": data for name, data in files.items()}
            self.version_bytes = len(json.dumps(row)) + sum(map(len, files.values()))
            self.state_bytes = flat.nbytes
        self.answers["/v1/versions"] = json.dumps({"versions": rows}).encode()
        aliases = aliases_to_json(AliasTable(1, self.digests), self.coordinator)
        self.answers["/v1/aliases"] = json.dumps(aliases).encode()
        self.manifests_asked = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer one request."""
        self.manifests_asked += request.url.path.startswith("/v1/versions/")
        data = self.answers.get(request.url.path)
        return httpx.Response(404) if data is None else httpx.Response(200, content=data)


def measure_tiers(work: Path, *, adapters: int, requests: int) -> Document:
    """Serve Zipf traffic over `adapters` aliases.

    Raises
    ------
    GateFailed
        If a request fails or is answered by another version, or anything is held afterwards.
    """
    work.mkdir()
    base = work / "base"
    base.mkdir()
    make_tiny_base(base)
    registry = Registry(open_base(base).digest, adapters)
    return asyncio.run(_measure(work, base, registry, requests))


async def _measure(work: Path, base: Path, registry: Registry, requests: int) -> Document:
    limits = EngineLimits(slots=SLOTS, max_rank=1, kv_blocks=512, max_running=16, patience_s=0.05)
    key, clock = registry.coordinator.public, SystemClock()
    cache = DiskCache(work / "disk", key, max_bytes=len(registry.digests) * registry.version_bytes // DISK_SHARE)
    client = CachingClient(cache, base_url="http://registry", transport=httpx.MockTransport(registry))
    source = HttpVersionSource("http://registry", key, client=client)
    engine = await open_engine(base, base=open_base(base).digest, limits=limits, rng=OsRng(), dtype="float32")
    try:
        tiers = Tiers(engine, source, memory_bytes=IN_MEMORY * registry.state_bytes)
        versions = Versions(engine, source, "base", tiers=tiers)
        watcher = AliasWatcher(source, engine, versions, Counters(), clock, pin_aliases=PINNED)
        began = time.perf_counter()
        await watcher.poll()
        sync_s = time.perf_counter() - began
        tenant = Tenant("bench", "0" * 64, tuple(registry.digests))
        check(len(versions.visible(tenant)) == len(registry.digests), f"{len(versions.served.versions)} aliases served")
        waits = await _traffic(engine, versions, tenant, registry, requests)
        stats = engine.stats()
        held = sum(engine._slots.requests(digest) for digest in engine.loaded())
        check(held == 0, f"{held} requests are still counted on slots")
        check(engine._slots.waiting() == (), "versions still wait for slots")
        check(stats.free_blocks == stats.total_blocks, f"{stats.total_blocks - stats.free_blocks} blocks are held")
        check(len(tiers.held()) <= IN_MEMORY, f"{len(tiers.held())} versions in memory, {IN_MEMORY} allowed")
        hits = tiers.hits
    finally:
        await engine.close()
        await source.aclose()
    total = hits.slot + hits.memory + hits.fetched
    return {
        "adapters": len(registry.digests),
        "slots": SLOTS,
        "in_memory": IN_MEMORY,
        "requests": requests,
        "failed": 0,
        "first_sync_s": rounded(sync_s),
        "slot_hits": rounded(hits.slot / total),
        "memory_hits": rounded(hits.memory / total),
        "fetched": rounded(hits.fetched / total),
        "from_registry": registry.manifests_asked,
        "from_disk": cache.hits["versions"],
        "lease_wait_s_p50": rounded(median(waits)),
        "lease_wait_s_p99": rounded(float(np.percentile(waits, 99))),
        "lease_wait_s_max": rounded(max(waits)),
    }


async def _traffic(
    engine: NativeEngine, versions: Versions, tenant: Tenant, registry: Registry, requests: int
) -> list[float]:
    """Ask as `CLIENTS` clients do, each for its next adapter when it has its answer; return waits for a lease."""
    names = list(registry.digests)
    weights = 1.0 / np.arange(1, len(names) + 1)
    picks = np.random.default_rng(11).choice(len(names), size=requests, p=weights / weights.sum())
    left = iter([names[i] for i in picks])
    waits: list[float] = []

    async def client() -> None:
        for name in left:
            began = time.perf_counter()
            lease = await versions.lease(name, tenant)
            waits.append(time.perf_counter() - began)
            check(lease.digest == registry.digests[name], f"{name} was answered by {lease.digest[:8]}")
            with lease:
                stream = engine.generate(lease, GenerationRequest((1, 2, 3), SamplingParams(max_tokens=TOKENS)))
                count = 0
                async for chunk in stream:
                    count += len(chunk.token_ids)
                await stream.aclose()
            check(count == TOKENS, f"{name} answered {count} tokens of {TOKENS}")

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    check(len(waits) == requests, f"{len(waits)} of {requests} requests were served")
    return waits

"""The endpoint of the tiers benchmark: the product's parts, with a note on each request's way up the tiers."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.tiers_registry import SignedRegistry
from fedllm.adapter import AdapterState
from fedllm.basemodel.inspect import open_base
from fedllm.clock import SystemClock
from fedllm.ids import Digest
from fedllm.registry.model import FetchedVersion
from fedllm.registry.remote import HttpVersionSource
from fedllm.rng import OsRng
from fedllm.serving.disk import CachingClient, DiskCache
from fedllm.serving.engine import Lease
from fedllm.serving.metrics import Counters
from fedllm.serving.native.engine import EngineLimits, NativeEngine, open_engine
from fedllm.serving.native.stream import SlotLease
from fedllm.serving.tenants import Tenant
from fedllm.serving.tiers import HeldVersion, TierHits, Tiers
from fedllm.serving.versions import Versions
from fedllm.serving.watch import AliasWatcher

TIERS = ("slot", "memory", "disk", "registry")


@dataclass
class Note:
    """One request: the tier in which its version was found, and when it got how far (seconds of a monotonic clock).

    Parameters
    ----------
    asked_s, held_s, admitted_s, leased_s, first_s, ended_s : float
        It was asked, its version was in memory, was in a slot, was warm; its first token came, its slot was let go.
        What was not to be waited for has the time of what came before.
    """

    asked_s: float
    tier: str = ""
    held_s: float = 0.0
    admitted_s: float = 0.0
    leased_s: float = 0.0
    first_s: float = 0.0
    ended_s: float = 0.0
    closed: bool = False
    """Its version was in a slot that was closed to it, for another that had waited too long."""


@dataclass(frozen=True)
class Wait:
    """One wait for a slot: how many other versions were queued before it, and its length."""

    place: int
    seconds: float


_NOTE: ContextVar[Note | None] = ContextVar("note", default=None)
_MISSED: ContextVar[list[str] | None] = ContextVar("missed", default=None)


class NotedHits(TierHits):
    """Counts, and tells the request whose context it is counted in."""

    def __setattr__(self, name: str, value: int) -> None:
        super().__setattr__(name, value)
        note = _NOTE.get()
        if note is not None:
            note.tier = name
            note.held_s = note.admitted_s = note.asked_s


class NotedCache(DiskCache):
    """Tells the fetch in whose context it is asked what it has not."""

    def get(self, kind: str, digest: str) -> bytes | None:
        """Return a kept answer, or None; see `DiskCache`."""
        data = super().get(kind, digest)
        missed = _MISSED.get()
        if data is None and missed is not None:
            missed.append(digest)
        return data


class NotedSource(HttpVersionSource):
    """Knows of each version whether its last fetch needed the registry."""

    origins: dict[str, str]

    async def fetch(self, digest: str) -> FetchedVersion:
        """Fetch a version; see `HttpVersionSource`."""
        missed: list[str] = []
        token = _MISSED.set(missed)
        try:
            fetched = await super().fetch(digest)
        finally:
            _MISSED.reset(token)
        self.origins[digest] = "registry" if missed else "disk"
        return fetched


class NotedTiers(Tiers):
    """Notes when a version was in memory, and where it came from."""

    origins: dict[str, str]

    async def lease(self, digest: Digest, *, bounded: bool = True) -> Lease:
        """Hold a version for one request; see `Tiers`."""
        note = _NOTE.get()
        if note is not None:
            note.closed = digest in self._engine.loaded() and not self._engine.admits(digest)
        return await super().lease(digest, bounded=bounded)

    async def hold(self, digest: Digest) -> HeldVersion:
        """Bring a version into memory; see `Tiers`."""
        held = await super().hold(digest)
        note = _NOTE.get()
        if note is not None:
            note.held_s = note.admitted_s = time.perf_counter()
            if note.tier == "fetched":
                note.tier = self.origins[digest]
        return held


@dataclass(frozen=True)
class Room:
    """Sizes of the tiers, and how versions wait for a slot."""

    slots: int = 8
    in_memory: int = 16
    disk_share: int = 4
    """The disk has room for one version in so many."""
    pinned: int = 0
    patience_s: float = 0.5


@dataclass
class NotedEndpoint:
    """The parts that requests go through, and what was noted of them."""

    engine: NativeEngine
    tiers: NotedTiers
    watcher: AliasWatcher
    cache: NotedCache
    tenant: Tenant
    first_sync_s: float
    waits: list[Wait] = field(default_factory=list)
    copies_s: list[float] = field(default_factory=list)

    @asynccontextmanager
    async def lease(self, alias: str, note: Note) -> AsyncIterator[SlotLease]:
        """Hold the alias's version as the front door does, and note it."""
        token = _NOTE.set(note)
        try:
            lease: Any = await self.watcher.lease(alias, self.tenant)
        finally:
            _NOTE.reset(token)
        note.leased_s = time.perf_counter()
        with lease:
            yield lease
        note.ended_s = time.perf_counter()

    def watch(self) -> None:
        """Time the waits for a slot and the copies into one."""
        admit, write = self.engine.admit, self.engine._write

        async def noted_admit(digest: Digest, state: AdapterState) -> SlotLease:
            began, queue = time.perf_counter(), self.engine._slots.waiting()
            place = queue.index(digest) if digest in queue else len(queue)
            lease = await admit(digest, state)
            now = time.perf_counter()
            self.waits.append(Wait(place, now - began))
            note = _NOTE.get()
            if note is not None:
                note.admitted_s = now
            return lease

        async def timed_write(state: AdapterState, slot: int) -> None:
            began = time.perf_counter()
            await write(state, slot)
            self.copies_s.append(time.perf_counter() - began)

        _replace(self.engine, "admit", noted_admit)
        _replace(self.engine, "_write", timed_write)


def _replace(engine: NativeEngine, name: str, function: Callable[..., Awaitable[Any]]) -> None:
    setattr(engine, name, function)  # a function: mypy forbids to assign to a method


@asynccontextmanager
async def open_endpoint(
    work: Path, base: Path, registry: SignedRegistry, room: Room, limits: EngineLimits, dtype: str
) -> AsyncIterator[NotedEndpoint]:
    """Open the engine, and follow the registry until every alias is served."""
    key, clock, origins = registry.coordinator.public, SystemClock(), dict[str, str]()
    most = len(registry.digests) * registry.version_bytes // room.disk_share
    cache = NotedCache(work / "disk", key, max_bytes=most)
    client = CachingClient(cache, base_url=registry.url, trust_env=False)
    source = NotedSource(registry.url, key, client=client)
    engine = await open_engine(base, base=open_base(base).digest, limits=limits, rng=OsRng(), dtype=dtype)
    try:
        tiers = NotedTiers(engine, source, memory_bytes=room.in_memory * registry.state_bytes)
        source.origins = tiers.origins = origins
        tiers.hits = NotedHits()
        versions = Versions(engine, source, "base", tiers=tiers)
        watcher = AliasWatcher(source, engine, versions, Counters(), clock, pin_aliases=room.pinned)
        began = time.perf_counter()
        await watcher.poll()
        tenant = Tenant("bench", (), tuple(registry.digests))
        endpoint = NotedEndpoint(engine, tiers, watcher, cache, tenant, time.perf_counter() - began)
        endpoint.watch()
        yield endpoint
        await watcher.drained()
    finally:
        await engine.close()
        await source.aclose()

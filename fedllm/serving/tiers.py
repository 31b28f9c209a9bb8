"""Adapter versions in tiers: slots of the engine, validated factors in memory, files on disk, the registry.

Thousands of versions are served with room for few. A request names one; what is missing is fetched up the tiers
beside the step loop, once however many ask, and the engine hands out slots in turn. The tier on disk belongs to the
way to the registry; see `fedllm.serving.disk`.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Protocol

from fedllm.adapter import AdapterSpec, AdapterState, from_peft
from fedllm.errors import AdapterInvalid, BaseMismatch, FedllmError, Overloaded
from fedllm.ids import Digest
from fedllm.registry.model import AdapterVersion, FetchedVersion, VersionSource
from fedllm.serving.engine import Engine, GenerationRequest, Lease, SamplingParams

_FETCHES = 4
_BAD_KEPT = 1024


class SlotEngine(Engine, Protocol):
    """An engine that gives its slots to waiting versions in turn."""

    @property
    def max_rank(self) -> int:
        """Largest rank that a slot holds."""

    async def check(self, state: AdapterState) -> None:
        """Raise `AdapterInvalid` or `BaseMismatch` if an adapter does not fit; takes no slot."""

    def admits(self, digest: Digest) -> bool:
        """Whether `lease` gives this version to one more request now."""

    async def admit(self, digest: Digest, state: AdapterState) -> Lease:
        """Hold a version for one request, waiting in turn until it has a slot."""


@dataclass(eq=False)
class HeldVersion:
    """A version whose factors are in memory: signed, complete, finite, and fit for this engine."""

    version: AdapterVersion
    state: AdapterState = field(repr=False)
    size: int
    warm: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)
    warmed: bool = False


@dataclass
class TierHits:
    """How many leases found their version in each tier; `fetched` ones came from the source, disk included."""

    slot: int = 0
    memory: int = 0
    fetched: int = 0


def open_version(fetched: FetchedVersion) -> AdapterState:
    """Parse a fetched version's files and check them against its manifest.

    Raises
    ------
    AdapterInvalid
        If names, shapes, rank or values are unusable, or are not what the manifest says.
    """
    manifest = fetched.version.manifest
    state = from_peft(fetched.files, base=manifest.base)
    if state.digest != manifest.state:
        raise AdapterInvalid(f"{fetched.version.name}: its factors are not the state that its manifest names")
    return state


class Tiers:
    """Leases of versions, wherever they are.

    Parameters
    ----------
    engine : SlotEngine
        Holds versions in slots.
    source : VersionSource
        Where versions that are not in memory come from.
    memory_bytes : int
        Bytes of factors kept in memory; the least recently used go first.
    max_waiting : int
        Requests that may wait for versions to come up; more are refused.
    """

    def __init__(
        self, engine: SlotEngine, source: VersionSource, *, memory_bytes: int = 1 << 30, max_waiting: int = 64
    ) -> None:
        self._engine = engine
        self._source = source
        self._memory_bytes = memory_bytes
        self._max_waiting = max_waiting
        self._memory: OrderedDict[Digest, HeldVersion] = OrderedDict()
        self._held_bytes = 0
        self._fetching: dict[Digest, asyncio.Task[HeldVersion]] = {}
        self._warming: dict[Digest, HeldVersion] = {}
        self._gate = asyncio.Semaphore(_FETCHES)
        self._bad: OrderedDict[Digest, FedllmError] = OrderedDict()
        self._unloads: set[asyncio.Task[None]] = set()
        self.waiting = 0
        self.hits = TierHits()

    @property
    def held_bytes(self) -> int:
        """Bytes of factors in memory."""
        return self._held_bytes

    def held(self) -> tuple[Digest, ...]:
        """Return the versions in memory, least recently used first."""
        return tuple(self._memory)

    def check_spec(self, spec: AdapterSpec) -> None:
        """Raise `AdapterInvalid` or `BaseMismatch` for what a manifest alone shows to be unusable here."""
        if spec.base != self._engine.base_digest:
            raise BaseMismatch(
                f"adapter is for base {spec.base[:8]}, this endpoint serves base {self._engine.base_digest[:8]}"
            )
        if spec.rank > self._engine.max_rank:
            raise AdapterInvalid(
                f"adapter has rank {spec.rank}, this endpoint holds up to {self._engine.max_rank}",
                hint="raise max_rank",
            )

    async def lease(self, digest: Digest, *, bounded: bool = True) -> Lease:
        """Hold a version for one request, fetching and loading it first where needed.

        Parameters
        ----------
        digest : Digest
            A version of the source.
        bounded : bool
            Whether `max_waiting` counts; a hot load is not refused because many wait.

        Raises
        ------
        AdapterInvalid, BaseMismatch
            If this engine can never serve it.
        Overloaded
            If too many wait, or every slot is pinned.
        FedllmError
            What the source raises.
        """
        self._refuse_bad(digest)
        if self._engine.admits(digest):
            self.hits.slot += 1
            lease = self._engine.lease(digest)
            warming = self._warming.get(digest)
            if warming is not None:
                await self._warm(warming, lease)
            return lease
        if bounded and self.waiting >= self._max_waiting:
            raise Overloaded(f"{self.waiting} requests wait for adapters to load, which is the limit")
        self.waiting += 1
        try:
            if digest in self._memory:
                self.hits.memory += 1
            else:
                self.hits.fetched += 1
            held = await self.hold(digest)
            lease = await self._engine.admit(digest, held.state)
        finally:
            self.waiting -= 1
        await self._warm(held, lease)
        return lease

    async def hold(self, digest: Digest) -> HeldVersion:
        """Bring a version into memory and validate it; see `lease` for the errors."""
        self._refuse_bad(digest)
        held = self._memory.get(digest)
        if held is not None:
            self._memory.move_to_end(digest)
            return held
        task = self._fetching.get(digest)
        if task is None:
            task = asyncio.create_task(self._fetch(digest))
            self._fetching[digest] = task
            task.add_done_callback(lambda done: self._fetched(digest, done))
        return await asyncio.shield(task)

    async def _fetch(self, digest: Digest) -> HeldVersion:
        async with self._gate:
            fetched = await self._source.fetch(digest)
            try:
                self.check_spec(fetched.version.manifest.spec)
                state = await asyncio.to_thread(open_version, fetched)
                await self._engine.check(state)
            except (AdapterInvalid, BaseMismatch) as error:
                self._remember_bad(digest, error)
                raise
        return HeldVersion(fetched.version, state, sum(factor.nbytes for factor in state.factors.values()))

    def _fetched(self, digest: Digest, done: asyncio.Task[HeldVersion]) -> None:
        del self._fetching[digest]
        if done.cancelled() or done.exception() is not None:
            return
        held = done.result()
        self._memory[digest] = held
        self._held_bytes += held.size
        while self._held_bytes > self._memory_bytes:
            _, dropped = self._memory.popitem(last=False)
            self._held_bytes -= dropped.size

    async def _warm(self, held: HeldVersion, lease: Lease) -> None:
        """Generate one token once: an adapter that computes nonsense is found before anyone is served by it."""
        try:
            if held.warmed:
                return
            self._warming[lease.digest] = held
            async with held.warm:
                self._refuse_bad(lease.digest)
                if not held.warmed:
                    stream = self._engine.generate(lease, GenerationRequest((0,), SamplingParams(max_tokens=1)))
                    try:
                        async for _ in stream:
                            pass
                    finally:
                        await stream.aclose()
                    held.warmed = True
            self._warming.pop(lease.digest, None)
        except BaseException as error:
            self._warming.pop(lease.digest, None)
            with lease:
                if isinstance(error, AdapterInvalid):
                    self._remember_bad(lease.digest, error)
                    self._unload(lease.digest)
            raise

    def _unload(self, digest: Digest) -> None:
        task = asyncio.create_task(self._engine.unload(digest))
        self._unloads.add(task)
        task.add_done_callback(self._unloads.discard)

    def _remember_bad(self, digest: Digest, error: FedllmError) -> None:
        self._bad[digest] = error
        if len(self._bad) > _BAD_KEPT:
            self._bad.popitem(last=False)

    def _refuse_bad(self, digest: Digest) -> None:
        error = self._bad.get(digest)
        if error is not None:
            raise type(error)(error.message, hint=error.hint)

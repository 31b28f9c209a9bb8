"""Engines of the burst benchmark: real native engines that follow a signed registry, and who of them gets a request."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.burst_trace import Ask
from benchmarks.document import check
from fedllm.clock import SystemClock
from fedllm.errors import FedllmError
from fedllm.identity import VerifyKey
from fedllm.ids import AliasName, Digest
from fedllm.registry.remote import LocalVersionSource
from fedllm.rng import OsRng
from fedllm.serving.autoscale import Autoscaler, Bounds, DemandMeter, autoscale_body
from fedllm.serving.engine import GenerationRequest, SamplingParams
from fedllm.serving.metrics import Counters
from fedllm.serving.native.engine import EngineLimits, NativeEngine, open_engine
from fedllm.serving.records import RequestRecord
from fedllm.serving.tenants import Tenant
from fedllm.serving.versions import Versions
from fedllm.serving.watch import AliasWatcher

START_S = 60.0
NARROW = 1
"""Requests in flight at one engine where the signal says how many there are: all share these cores, and an engine that
batches everything would leave nothing for a second one to do."""
SPEED_UP = 20.0
_LOOK_S = 0.25


@dataclass(frozen=True)
class Scene:
    """What every engine serves."""

    base: Path
    digest: Digest
    registry: Path
    key: VerifyKey
    token_of: dict[Digest, int]
    aliases: tuple[AliasName, ...]
    limits: EngineLimits
    dtype: str

    @property
    def tenant(self) -> Tenant:
        """Who may use all of it."""
        return Tenant("bench", "0" * 64, tuple(self.aliases))


@dataclass
class Tally:
    """What became of the requests."""

    ttfts: list[float] = field(default_factory=list)
    gaps: list[float | None] = field(default_factory=list)
    versions: set[Digest] = field(default_factory=set)
    failed: int = 0
    mixed: int = 0
    doubtful: list[tuple[Digest, tuple[int, ...], list[int]]] = field(default_factory=list)
    """Answers with a token that is not their version's own: version, prompt and tokens."""
    reasons: set[str] = field(default_factory=set)


class Replica:
    """One engine with its tiers and the watcher of its aliases."""

    def __init__(self, scene: Scene, engine: NativeEngine) -> None:
        source = LocalVersionSource(scene.registry, scene.key, SystemClock())
        self.engine = engine
        self._scene = scene
        self._versions = Versions(engine, source, "base")
        self._watcher = AliasWatcher(source, engine, self._versions, Counters(), SystemClock(), pin_aliases=1)
        self._watching = asyncio.create_task(self._watcher.run())
        self.in_flight = 0

    @classmethod
    async def start(cls, scene: Scene) -> Replica:
        """Load the base, and return when the aliases are served."""
        engine = await open_engine(scene.base, base=scene.digest, limits=scene.limits, rng=OsRng(), dtype=scene.dtype)
        replica = cls(scene, engine)
        async with asyncio.timeout(START_S):
            await replica._watcher.synced.wait()
        return replica

    async def answer(self, ask: Ask, due: float, tally: Tally) -> RequestRecord:
        """Serve one request that was due at a time of `time.perf_counter`."""
        alias, said, first, version = self._scene.aliases[ask.adapter], list[int](), None, None
        prompt = tuple(3 + (ask.adapter + 7 * i) % 200 for i in range(ask.prompt))
        status = 200
        try:
            with await self._watcher.lease(alias, self._scene.tenant) as lease:
                version = lease.digest
                stream = self.engine.generate(lease, GenerationRequest(prompt, SamplingParams(max_tokens=ask.answer)))
                async for chunk in stream:
                    first = first or time.perf_counter()
                    said += chunk.token_ids
                await stream.aclose()
            check(len(said) == ask.answer, f"{len(said)} of {ask.answer} tokens")
        except (FedllmError, AssertionError) as error:
            tally.failed, status = tally.failed + 1, 500
            tally.reasons.add(type(error).__name__)
        ended = time.perf_counter()
        ttft = first - due if first else None
        record = RequestRecord(
            "", "bench", "", "other", alias, version, status, len(prompt), len(said), 0, due, ttft, ended - due
        )
        if status == 200 and ttft is not None and version is not None:
            tally.ttfts.append(ttft)
            tally.gaps.append(record.gap_s)
            tally.versions.add(version)
            if set(said) != {self._scene.token_of[version]}:
                tally.doubtful.append((version, prompt, said))
        return record

    async def settle(self, tally: Tally) -> None:
        """Ask for doubtful answers again, one at a time and by digest: only what a version does not say is mixed.

        An adapter forces its token with the square of a projection of the input; about one input in two thousand has
        next to none, and the base's own token wins.
        """
        for version, prompt, said in tally.doubtful:
            with await self._versions.tiers.lease(version) as lease:
                params = SamplingParams(max_tokens=len(said))
                stream = self.engine.generate(lease, GenerationRequest(prompt, params, scope="again"))
                again = [token async for chunk in stream for token in chunk.token_ids]
                await stream.aclose()
            tally.mixed += again != said

    async def close(self) -> None:
        """Stop following, and check that nothing is left behind."""
        self._watching.cancel()
        with suppress(asyncio.CancelledError):
            await self._watching
        await self._watcher.drained()
        stats = self.engine.stats()
        await self.engine.close()
        held = stats.total_blocks - stats.free_blocks
        check(held == 0, f"{held} blocks are held after the last request")


class FastClock(SystemClock):
    """The signal's clock, sped up as the trace's days are shortened."""

    def monotonic(self) -> float:
        """Return seconds that pass `SPEED_UP` times as fast."""
        return SPEED_UP * super().monotonic()


class Fleet:
    """One to a few engines in this process behind one queue; the scale signal says how many.

    Parameters
    ----------
    scene : Scene
        What they serve.
    most : int
        Most engines.
    in_flight : int, optional
        Most requests at one engine; what does not fit waits in the queue that the signal sees. No limit by default.
    objective_s : float
        Seconds to the first token that the signal plans for.
    """

    def __init__(self, scene: Scene, *, most: int, objective_s: float, in_flight: int | None = None) -> None:
        self._scene = scene
        self._in_flight = in_flight
        self._most = most
        self._replicas: list[Replica] = []
        self._leaving: list[Replica] = []
        self._queue: deque[tuple[Ask, float, asyncio.Future[None]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        clock = FastClock()
        self._meter = DemandMeter(clock, lambda: len(self._queue), lambda: max(1, len(self._replicas)))
        self._scaler = Autoscaler(clock, Bounds(1, most), objective_s=SPEED_UP * objective_s)
        self.seen: list[tuple[int, int, str]] = []
        self.tally = Tally()

    async def play(self, trace: list[Ask]) -> float:
        """Send every request when it is due, whatever became of the others; return seconds until the last ended."""
        self._replicas = [await Replica.start(self._scene)]
        scaling = asyncio.create_task(self._scale()) if self._most > 1 else None
        loop, began = asyncio.get_running_loop(), time.perf_counter()
        ends: list[asyncio.Future[None]] = []
        try:
            for ask in trace:
                await asyncio.sleep(max(0.0, began + ask.at_s - time.perf_counter()))
                ends.append(loop.create_future())
                self._queue.append((ask, began + ask.at_s, ends[-1]))
                self._serve()
            await asyncio.gather(*ends)
            took = time.perf_counter() - began
            await self._replicas[0].settle(self.tally)
        finally:
            if scaling is not None:
                scaling.cancel()
                with suppress(asyncio.CancelledError):
                    await scaling
            await asyncio.gather(*self._tasks)
            for replica in [*self._replicas, *self._leaving]:
                await replica.close()
        return took

    def _serve(self) -> None:
        """Hand out what waits, to the engine with the least in flight."""
        while self._queue:
            replica = min(self._replicas, key=lambda r: r.in_flight)
            if self._in_flight is not None and replica.in_flight >= self._in_flight:
                return
            ask, due, end = self._queue.popleft()
            replica.in_flight += 1
            task = asyncio.create_task(self._one(replica, ask, due, end))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _one(self, replica: Replica, ask: Ask, due: float, end: asyncio.Future[None]) -> None:
        try:
            self._meter.observe(await replica.answer(ask, due, self.tally))
        finally:
            replica.in_flight -= 1
            end.set_result(None)
            self._serve()

    async def _scale(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            body = autoscale_body(self._scaler, self._meter.demand())
            wanted = body["wanted_replicas"]
            self.seen.append((wanted, len(self._replicas), body["reason"]))
            if wanted > len(self._replicas):
                self._replicas.append(await Replica.start(self._scene))
                self._serve()
            elif wanted < len(self._replicas):
                # It gets no new request; its running ones end.
                self._leaving.append(self._replicas.pop())

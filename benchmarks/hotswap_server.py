"""The endpoint that the hotswap benchmark asks: the product's parts on a loopback port, with stopwatches in."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import uvicorn

from fedllm.clock import SystemClock
from fedllm.identity import VerifyKey
from fedllm.ids import Digest
from fedllm.registry.model import AdapterVersion
from fedllm.registry.remote import LocalVersionSource
from fedllm.rng import OsRng
from fedllm.serving.access import Access
from fedllm.serving.api import Endpoint, create_app
from fedllm.serving.engine import EngineStats
from fedllm.serving.metrics import Counters
from fedllm.serving.native.engine import EngineLimits, open_engine
from fedllm.serving.tenants import TenantFile
from fedllm.serving.text import TextCodec
from fedllm.serving.versions import Versions
from fedllm.serving.watch import AliasWatcher


@dataclass
class Stopwatches:
    """Wall and CPU seconds of every step and slot copy, on the step thread; when each version went live."""

    steps: list[float] = field(default_factory=list)
    steps_cpu: list[float] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)
    copies_cpu: list[float] = field(default_factory=list)
    flips: dict[Digest, float] = field(default_factory=dict)


class Server:
    """One endpoint in a thread of this process.

    Parameters
    ----------
    base, registry, tenants : Path
        Base model, registry folder, tenants file.
    digest : Digest
        The base's.
    key : VerifyKey
        The registry's.
    limits : EngineLimits
        Sizes.
    dtype : str
        ``bfloat16`` or ``float32``.
    """

    def __init__(
        self,
        base: Path,
        registry: Path,
        tenants: Path,
        *,
        digest: Digest,
        key: VerifyKey,
        limits: EngineLimits,
        dtype: str,
    ) -> None:
        self._given = (base, registry, tenants, digest, key, limits, dtype)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.watches = Stopwatches()
        self.stats: EngineStats | None = None
        self.requests_held = 0
        self.refused = 0
        self._uvicorn: uvicorn.Server | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="endpoint")

    def start(self) -> None:
        """Return when the port answers and the first aliases are served."""
        self._thread.start()
        while self._uvicorn is None or not self._uvicorn.started:
            if not self._thread.is_alive():
                raise RuntimeError("the endpoint did not start; see its log")
            time.sleep(0.01)

    def stop(self) -> None:
        """Drain, then take the last figures."""
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True
        self._thread.join()

    async def _run(self) -> None:
        base, registry, tenants, digest, key, limits, dtype = self._given
        logging.getLogger("fedllm").setLevel(logging.ERROR)
        engine = await open_engine(base, base=digest, limits=limits, rng=OsRng(), dtype=dtype)
        clock, counters = SystemClock(), Counters()
        source = LocalVersionSource(registry, key, clock)
        versions = Versions(engine, source, "base")
        watcher = AliasWatcher(source, engine, versions, counters, clock)
        runner: Any = engine._runner
        runner.run = _timed(runner.run, self.watches.steps, self.watches.steps_cpu)
        runner.write_adapter = _timed(runner.write_adapter, self.watches.copies, self.watches.copies_cpu)
        flip = versions.flip

        def stamped(alias: str, version: AdapterVersion | None) -> AdapterVersion | None:
            previous = flip(alias, version)
            if version is not None:
                self.watches.flips[version.digest] = time.perf_counter()
            return previous

        setattr(versions, "flip", stamped)  # noqa: B010 - mypy forbids to assign to a method
        access = Access(TenantFile(tenants), clock, observers=[counters])
        endpoint = Endpoint(engine, versions, watcher, TextCodec(base), access, counters, clock, OsRng())
        watching = asyncio.create_task(watcher.run())
        await watcher.synced.wait()
        config = uvicorn.Config(create_app(endpoint), log_config=None, access_log=False, lifespan="off", ws="none")
        self._uvicorn = uvicorn.Server(config)
        await self._uvicorn.serve(sockets=[self._listener])
        watching.cancel()
        await watcher.drained()
        # One step more, so that what was cancelled last has left the step thread's books.
        with await versions.tiers.lease(engine.loaded()[0]) as lease:
            await engine.score(lease, [0], [0])
        self.stats = engine.stats()
        self.requests_held = sum(engine._slots.requests(version) for version in engine.loaded())
        self.refused = counters.value("fedllm_versions_refused_total")
        await engine.close()


def _timed(function: Callable[..., None], wall: list[float], cpu: list[float]) -> Callable[..., None]:
    @wraps(function)
    def timed(*arguments: Any) -> None:
        began, began_cpu = time.perf_counter(), time.thread_time()
        function(*arguments)
        cpu.append(time.thread_time() - began_cpu)
        wall.append(time.perf_counter() - began)

    return timed

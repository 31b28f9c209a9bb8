"""A whole endpoint on loopback, on a thread of its own: real sockets, the tiny model, a registry in memory."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from patience import PATIENCE_S
from unit.serving.registry_fake import FakeSource, make_version
from unit.serving.tiny_llama import make_adapter, make_forcing_adapter, running_engine

from fedllm.clock import SystemClock
from fedllm.ids import Digest
from fedllm.rng import OsRng
from fedllm.serving.access import Access
from fedllm.serving.api import Endpoint, create_app
from fedllm.serving.feedback import Feedbacks
from fedllm.serving.metrics import Counters
from fedllm.serving.process import _server
from fedllm.serving.records import RequestRecord
from fedllm.serving.tenants import TenantFile, create_tenant
from fedllm.serving.text import TextCodec
from fedllm.serving.versions import Versions
from fedllm.serving.watch import AliasWatcher


class Heard:
    """An observer that keeps what it is told."""

    def __init__(self, records: list[RequestRecord]) -> None:
        self.records = records

    def observe(self, record: RequestRecord) -> None:
        """Keep it."""
        self.records.append(record)


class Ratings:
    """Keeps what apps said of answers."""

    def __init__(self, kept: list[tuple[str, str, bool]]) -> None:
        self._kept = kept

    def note_feedback(self, version: Digest, alias: str, good: bool, *, changed: bool = False) -> None:
        """Keep one."""
        self._kept.append((version, alias, good))


@contextmanager
def live_endpoint(
    folder: Path, tenants: Path, *, stall_s: float = 30.0, body_s: float = 30.0, **sizes: int
) -> Iterator[SimpleNamespace]:
    """Serve two versions of ``acme/tools`` (the live one always says ``B``) on a free port.

    Yields
    ------
    SimpleNamespace
        ``url``, ``port``, ``key`` of a tenant who may use everything, ``poor_key`` of one who may use nothing,
        ``old`` and ``new`` digests, ``letter`` (token of ``B``), ``engine``, ``records`` of ended requests, and
        ``ratings``.
    """
    world = SimpleNamespace(
        key=create_tenant(tenants, "acme", ["acme/tools", "base"]),
        poor_key=create_tenant(tenants, "poor", []),
        letter=TextCodec(folder).encode("B")[0],
    )
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    world.port = listener.getsockname()[1]
    world.url = f"http://127.0.0.1:{world.port}"

    async def serve() -> None:
        async with running_engine(folder, **{"kv_blocks": 256, **sizes}) as engine:
            source, counters = FakeSource(), Counters()
            versions = Versions(engine, source, "tiny")
            watcher = AliasWatcher(source, engine, versions, counters, SystemClock())
            world.old = source.publish("acme/tools", make_version(make_adapter(1), 1))
            forced = make_forcing_adapter(folder, world.letter)
            world.new = source.publish("acme/tools", make_version(forced, 2))
            await watcher.poll()
            codec, clock = TextCodec(folder), SystemClock()
            world.records, world.ratings = [], []
            feedbacks = Feedbacks(Ratings(world.ratings))
            access = Access(TenantFile(tenants), clock, observers=[counters, Heard(world.records), feedbacks])
            endpoint = Endpoint(
                engine, versions, watcher, codec, access, counters, clock, OsRng(), stall_s, body_s, feedbacks=feedbacks
            )
            world.engine = engine
            world.server = _server(create_app(endpoint))
            await world.server.serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    while not hasattr(world, "server") or not world.server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield world
    finally:
        world.server.should_exit = True
        thread.join(PATIENCE_S)


def wait_idle(world: SimpleNamespace, seconds: float = PATIENCE_S) -> None:
    """Wait until nothing runs and nothing waits in the engine."""
    end = time.monotonic() + seconds
    while (stats := world.engine.stats()).running or stats.waiting:
        assert time.monotonic() < end, stats
        time.sleep(0.02)

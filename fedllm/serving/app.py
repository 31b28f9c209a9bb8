"""Composition root of the endpoint: settings in, a serving process out."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fedllm.basemodel.inspect import open_base
from fedllm.clock import Clock, SystemClock
from fedllm.config import ServeSettings
from fedllm.errors import MissingExtra
from fedllm.identity import VerifyKey
from fedllm.registry.model import VersionSource
from fedllm.registry.remote import HttpVersionSource, LocalVersionSource
from fedllm.rng import OsRng, Rng
from fedllm.serving.autoscale import MOST_REPLICAS, Autoscaler, Bounds, DemandMeter, autoscale_body
from fedllm.serving.disk import CachingClient, DiskCache
from fedllm.serving.metrics import Counters
from fedllm.serving.process import listening, running, serve_until_signalled, serving_beside
from fedllm.serving.surroundings import admin_app, follow_demand, open_surroundings
from fedllm.serving.text import TextCodec
from fedllm.serving.tiers import Tiers
from fedllm.serving.versions import Versions
from fedllm.serving.watch import AliasWatcher
from fedllm.telemetry import event

if TYPE_CHECKING:
    from fedllm.serving.native.engine import NativeEngine

_LOG = logging.getLogger("fedllm.serving")
_MIB = 1 << 20


def run(settings: ServeSettings) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests end.

    Parameters
    ----------
    settings : ServeSettings
        See `fedllm.config`.

    Raises
    ------
    PortBusy
        If the address is taken.
    BaseUnsupported
        If the base folder is not one that the engine computes exactly.
    ConfigError, NotFound
        If the key, the tenants file or the registry is unusable.
    MissingExtra
        If ``fedllm[serve]`` is not installed.
    """
    try:
        import uvicorn

        import fedllm.serving.native.engine  # noqa: F401 - a missing package is named before a port is taken
    except ModuleNotFoundError as error:
        raise MissingExtra("serve", error.name or "torch") from None
    event(_LOG, "starting", uvicorn=uvicorn.__version__, device=settings.device, threads=settings.threads)
    with ExitStack() as stack:
        listener = stack.enter_context(listening(settings.host, settings.port))
        wanted = settings.admin_port
        admin = stack.enter_context(listening(settings.admin_host, wanted)) if wanted else None
        asyncio.run(_serve(settings, listener, admin))


def open_source(registry: str, key: VerifyKey, clock: Clock, *, cache: DiskCache | None = None) -> VersionSource:
    """Return a reader of a coordinator's URL, with or without a tier on disk, or of a shared registry folder."""
    if registry.startswith(("http://", "https://")):
        return HttpVersionSource(registry, key, client=CachingClient(cache, base_url=registry) if cache else None)
    return LocalVersionSource(Path(registry), key, clock)


def _open_cache(settings: ServeSettings, key: VerifyKey) -> DiskCache | None:
    if not settings.cache:
        return None
    return DiskCache(Path(settings.cache).expanduser(), key, max_bytes=settings.cache_mb * _MIB)


async def _serve(settings: ServeSettings, listener: socket.socket, admin: socket.socket | None) -> None:
    from fedllm.serving.api import Endpoint, create_app

    clock, rng, counters = SystemClock(), OsRng(), Counters()
    key = VerifyKey.parse(settings.coordinator_key)
    source = open_source(settings.registry, key, clock, cache=_open_cache(settings, key))
    codec = TextCodec(settings.base)
    async with AsyncExitStack() as stack:
        # The meter asks for the queue's length from the first request on, which comes after the engine.
        engines: list[NativeEngine] = []
        meter = DemandMeter(clock, lambda: engines[0].stats().waiting if engines else 0)
        around = await stack.enter_async_context(
            open_surroundings(settings, clock, rng, counters, service="fedllm-endpoint", observers=[meter])
        )
        engine = await _open_engine(settings, rng)
        engines.append(engine)
        stack.push_async_callback(engine.close)
        tiers = Tiers(engine, source, memory_bytes=settings.memory_mb * _MIB, max_waiting=settings.max_waiting)
        versions = Versions(engine, source, settings.base.resolve().name, tiers=tiers)
        watcher = AliasWatcher(source, engine, versions, counters, clock, pin_aliases=settings.pin_aliases)
        endpoint = Endpoint(
            engine, versions, watcher, codec, around.access, counters, clock, rng,
            prompt_log=around.prompt_log, feedbacks=around.feedbacks,
        )  # fmt: skip
        await stack.enter_async_context(running(watcher.run()))
        counters.follow("fedllm_tier_leases_total", lambda: asdict(versions.tiers.hits))
        if admin is not None:
            scaler = Autoscaler(clock, Bounds(1, MOST_REPLICAS), objective_s=settings.ttft_objective_s)
            follow_demand(counters, scaler, meter)
            app = admin_app(
                around,
                lambda: counters.render(engine.stats()),
                lambda: autoscale_body(scaler, meter.demand()),
            )
            await stack.enter_async_context(serving_beside(app, admin))
        event(_LOG, "listening", host=settings.host, port=listener.getsockname()[1], base=versions.base_name)
        await serve_until_signalled(create_app(endpoint), listener)
    event(_LOG, "stopped")


async def _open_engine(settings: ServeSettings, rng: Rng) -> NativeEngine:
    from fedllm.serving.native.engine import EngineLimits, open_engine

    limits = EngineLimits(
        slots=settings.slots,
        max_rank=settings.max_rank,
        kv_blocks=settings.kv_blocks,
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        patience_s=settings.slot_patience_s,
    )
    return await open_engine(
        settings.base,
        base=open_base(settings.base).digest,
        limits=limits,
        rng=rng,
        dtype=settings.dtype,
        device=settings.device,
        threads=settings.threads,
    )

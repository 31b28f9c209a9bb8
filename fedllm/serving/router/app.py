"""Composition root of the router: settings in, a routing process out."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING

from fedllm.clock import SystemClock
from fedllm.config import RouteSettings
from fedllm.errors import MissingExtra
from fedllm.identity import VerifyKey
from fedllm.rng import OsRng, Rng
from fedllm.serving.app import open_source
from fedllm.serving.autoscale import MOST_REPLICAS, Autoscaler, Bounds, DemandMeter, autoscale_body
from fedllm.serving.metrics import Counters
from fedllm.serving.process import listening, running, serve_until_signalled, serving_beside
from fedllm.serving.router.aliases import AliasFollower
from fedllm.serving.router.dispatch import Dispatcher
from fedllm.serving.router.fleet import Fleet
from fedllm.serving.router.kinds import KindEntry, NativeKind
from fedllm.serving.router.models import Models
from fedllm.serving.router.predictions import Predictions
from fedllm.serving.router.replica_file import ReplicaConfig, no_options
from fedllm.serving.router.reply import Router
from fedllm.serving.router.waiting import WaitingLine
from fedllm.serving.surroundings import admin_app, follow_demand, open_surroundings
from fedllm.serving.vllm import VllmKind, VllmOptions
from fedllm.telemetry import event

if TYPE_CHECKING:
    import httpx

_LOG = logging.getLogger("fedllm.serving.router")
_MIB = 1 << 20


def run(settings: RouteSettings) -> None:
    """Route until SIGTERM or SIGINT, then let running requests end.

    Parameters
    ----------
    settings : RouteSettings
        See `fedllm.config`.

    Raises
    ------
    PortBusy
        If an address is taken.
    ConfigError, NotFound
        If the key, the tenants file, the replicas file, the registry or the usage store is unusable.
    MissingExtra
        If ``fedllm[serve]`` is not installed.
    """
    try:
        import uvicorn

        import fedllm.serving.router.api  # noqa: F401 - a missing package is named before a port is taken
    except ModuleNotFoundError as error:
        raise MissingExtra("serve", error.name or "fastapi") from None
    event(_LOG, "starting", uvicorn=uvicorn.__version__)
    with ExitStack() as stack:
        listener = stack.enter_context(listening(settings.host, settings.port))
        wanted = settings.admin_port
        admin = stack.enter_context(listening(settings.admin_host, wanted)) if wanted else None
        asyncio.run(_route(settings, listener, admin))


def replica_kinds(base_name: str, rng: Rng) -> Mapping[str, KindEntry]:
    """Return what can serve behind a router, by the name that ``replicas.toml`` has for it."""

    def native(config: ReplicaConfig, client: httpx.AsyncClient) -> NativeKind:
        return NativeKind(config, client, base_name=base_name)

    def vllm(config: ReplicaConfig, client: httpx.AsyncClient) -> VllmKind:
        if not isinstance(config.options, VllmOptions):
            raise TypeError("options were read by another kind")
        return VllmKind(config, client, config.options, rng, base_name=base_name)

    return {
        "native": KindEntry(no_options, native),
        "vllm": KindEntry(lambda table, where: VllmOptions.read(table, where=where), vllm),
    }


async def _route(settings: RouteSettings, listener: socket.socket, admin: socket.socket | None) -> None:
    from fedllm.serving.router.api import create_app

    clock, rng, counters = SystemClock(), OsRng(), Counters()
    source = open_source(settings.registry, VerifyKey.parse(settings.coordinator_key), clock)
    fleet = Fleet(
        settings.replicas,
        replica_kinds(settings.base_name, rng),
        clock,
        rng,
        ttft_objective_s=settings.ttft_objective_s,
        max_in_flight=settings.max_in_flight,
        health_s=settings.health_s,
    )
    line = WaitingLine(fleet, clock, max_waiting=settings.max_waiting, wait_s=settings.wait_s)
    models = Models(source, settings.base_name)
    follower = AliasFollower(source, models, fleet, counters, clock)
    meter = DemandMeter(clock, lambda: len(line), lambda: len(fleet.replicas))
    async with AsyncExitStack() as stack:
        around = await stack.enter_async_context(
            open_surroundings(settings, clock, rng, counters, service="fedllm-router", observers=[meter])
        )
        router = Router(
            around.access,
            models,
            follower,
            fleet,
            Dispatcher(line, clock),
            clock,
            rng,
            Predictions(settings.predictions_mb * _MIB) if settings.predictions_mb else None,
            around.prompt_log,
            around.feedbacks,
        )
        for work in (fleet.run(), follower.run()):
            await stack.enter_async_context(running(work))
        if admin is not None:
            scaler = Autoscaler(clock, Bounds(1, MOST_REPLICAS), objective_s=settings.ttft_objective_s)
            follow_demand(counters, scaler, meter, lambda: float(line.backlog_tokens))
            _follow_replicas(counters, fleet, line)

            async def drain(name: str) -> None:
                fleet.drain(name)

            async def resume(name: str) -> None:
                fleet.resume(name)

            app = admin_app(
                around,
                lambda: counters.render(None),
                lambda: autoscale_body(scaler, meter.demand(backlog_tokens=float(line.backlog_tokens))),
                replicas=fleet.rows,
                drain=drain,
                resume=resume,
            )
            await stack.enter_async_context(serving_beside(app, admin))
        event(_LOG, "listening", host=settings.host, port=listener.getsockname()[1], base=settings.base_name)
        await serve_until_signalled(create_app(router), listener)
    event(_LOG, "stopped")


def _follow_replicas(counters: Counters, fleet: Fleet, line: WaitingLine) -> None:
    """Let the exposition read the state of replicas and queue."""
    counters.follow("fedllm_router_waiting", lambda: len(line))
    counters.follow(
        "fedllm_replica_up",
        lambda: {n: float(r.healthy and r.breaker.state == "closed") for n, r in fleet.replicas.items()},
    )
    counters.follow("fedllm_replica_in_flight", lambda: {n: r.in_flight for n, r in fleet.replicas.items()})
    counters.follow("fedllm_replica_limit", lambda: {n: r.limit.value for n, r in fleet.replicas.items()})

"""What stands around the routes of an endpoint and of a router alike: who may ask, what is kept, who is told.

Opened in the order in which it is needed and closed in the other: what was counted last is stored before the process
ends.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.clock import Clock
from fedllm.config import RouteSettings, ServeSettings
from fedllm.errors import ConfigError
from fedllm.rng import Rng
from fedllm.serving.access import Access
from fedllm.serving.autoscale import Autoscaler, Demand, DemandMeter
from fedllm.serving.feedback import Feedbacks
from fedllm.serving.metrics import Counters
from fedllm.serving.process import running
from fedllm.serving.records import RequestObserver
from fedllm.serving.tenants import TenantFile

if TYPE_CHECKING:
    from fedllm.serving.prompt_log import PromptLog
    from fedllm.serving.report import Reporter
    from fedllm.serving.tracing import OtlpTracer
    from fedllm.serving.usage import UsageStore

Settings = ServeSettings | RouteSettings
Act = Callable[[str], Awaitable[None]]


@dataclass(frozen=True)
class Surroundings:
    """What the composition roots hand to the routes.

    Parameters
    ----------
    access : Access
        The front door, which tells all observers.
    tenants : TenantFile
    counters : Counters
    feedbacks : Feedbacks
    usage : UsageStore or None
    prompt_log : PromptLog or None
    """

    access: Access
    tenants: TenantFile
    counters: Counters
    feedbacks: Feedbacks
    usage: UsageStore | None
    prompt_log: PromptLog | None


@asynccontextmanager
async def open_surroundings(
    settings: Settings,
    clock: Clock,
    rng: Rng,
    counters: Counters,
    *,
    service: str,
    observers: Sequence[RequestObserver] = (),
) -> AsyncIterator[Surroundings]:
    """Open what the settings name; nothing is kept or sent that they do not name.

    Parameters
    ----------
    settings : ServeSettings or RouteSettings
    clock, rng, counters
    service : str
        ``fedllm-endpoint`` or ``fedllm-router``: its name in traces and reports.
    observers : sequence of RequestObserver
        Who else hears of every ended request.

    Raises
    ------
    ConfigError, NotFound
        If the tenants file, the usage store or the observer's token is unusable.
    """
    async with AsyncExitStack() as stack:
        tenants = TenantFile(settings.tenants)
        usage = await _usage(settings, clock, stack)
        reporter = await _reporter(settings, clock, rng, service, stack)
        feedbacks = Feedbacks(reporter)
        kept: list[RequestObserver] = [item for item in (usage, reporter) if item is not None]
        access = Access(
            tenants,
            clock,
            observers=[counters, feedbacks, *kept, *observers],
            spent=usage.spent if usage is not None else None,
            tracer=_tracer(settings, counters, service, stack),
        )
        yield Surroundings(access, tenants, counters, feedbacks, usage, await _prompts(settings, tenants, clock, stack))


def admin_app(
    around: Surroundings,
    metrics: Callable[[], str],
    autoscale: Callable[[], dict[str, Any]],
    *,
    replicas: Callable[[], list[dict[str, Any]]] | None = None,
    drain: Act | None = None,
    resume: Act | None = None,
) -> Any:
    """Return the admin listener's application; see `fedllm.serving.admin_api.AdminState` for its parts."""
    from fedllm.serving.admin_api import AdminState, create_admin_app

    return create_admin_app(
        AdminState(
            authenticate=lambda headers: around.access.caller(headers).tenant,
            metrics=metrics,
            usage=around.usage,
            autoscale=autoscale,
            tenants=lambda: [
                {"name": t.name, "weight": t.weight, "operator": t.operator, "allow": list(t.allow)}
                for t in around.tenants.table.tenants
            ],
            replicas=replicas,
            drain=drain,
            resume=resume,
        )
    )


def follow_demand(
    counters: Counters, scaler: Autoscaler, meter: DemandMeter, backlog: Callable[[], float] | None = None
) -> None:
    """Show in the exposition what ``/autoscale`` says; `backlog` where the waiting tokens are known."""

    def demand() -> Demand:
        return meter.demand(backlog_tokens=None if backlog is None else backlog())

    counters.follow("fedllm_wanted_replicas", lambda: scaler.wanted(demand()).replicas)
    counters.follow("fedllm_replicas", lambda: demand().replicas)
    counters.follow("fedllm_backlog_tokens", lambda: demand().backlog_tokens)


async def _usage(settings: Settings, clock: Clock, stack: AsyncExitStack) -> UsageStore | None:
    if not settings.usage:
        return None
    from fedllm.serving.usage import open_usage

    store = await asyncio.to_thread(open_usage, settings.usage, clock)
    stack.push_async_callback(store.close)
    return store


def _tracer(settings: Settings, counters: Counters, service: str, stack: AsyncExitStack) -> OtlpTracer | None:
    if not settings.traces:
        return None
    from fedllm.serving.tracing import open_tracer

    tracer = open_tracer(settings.traces, service)
    counters.follow("fedllm_spans_lost_total", lambda: tracer.lost)
    stack.push_async_callback(asyncio.to_thread, tracer.close)
    return tracer


async def _prompts(settings: Settings, tenants: TenantFile, clock: Clock, stack: AsyncExitStack) -> PromptLog | None:
    if not settings.prompt_log:
        return None
    from fedllm.serving.prompt_log import PromptLog

    log = PromptLog(Path(settings.prompt_log).expanduser(), clock)  # noqa: ASYNC240 - nothing is served yet
    stack.push_async_callback(log.close)
    await stack.enter_async_context(running(log.run(lambda: tenants.table.tenants)))
    return log


async def _reporter(settings: Settings, clock: Clock, rng: Rng, service: str, stack: AsyncExitStack) -> Reporter | None:
    if not settings.observations_token:
        return None
    from fedllm.serving.report import Reporter

    if not settings.registry.startswith(("http://", "https://")):
        raise ConfigError(
            f"observations_token is set, and the registry is {settings.registry!r}: reports go to a coordinator's URL",
            hint="leave observations_token out, or set registry to the coordinator's address",
        )
    host = re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().lower()).strip("-")[:40] or "host"
    token = Path(settings.observations_token).expanduser()  # noqa: ASYNC240 - nothing is served yet
    reporter = Reporter(settings.registry, token, f"{service}-{host}-{settings.port}", clock, rng)
    stack.push_async_callback(reporter.aclose)
    await stack.enter_async_context(running(reporter.run()))
    return reporter

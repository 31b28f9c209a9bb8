"""The admin listener's HTTP face: whole metrics, usage, load and replicas, for operators only.

Who may ask is decided before a path is looked at: a route that is added here later is closed too, and a stranger cannot
tell which paths exist.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from fedllm.errors import AuthenticationError, ConfigError, FedllmError, NotFound, Overloaded, RequestInvalid
from fedllm.ids import check_name
from fedllm.serving.answers import error_status, http_error_body
from fedllm.serving.tenants import Tenant
from fedllm.serving.usage import UsageStore
from fedllm.serving.usage_rows import GROUPS, csv_lines, utc_seconds
from fedllm.telemetry import event

MAX_PAGE = 1000
_PAGE = 100
_LARGEST = (1 << 63) - 1
_BOUNDS = ("since", "until", "tenant")
_LOG = logging.getLogger("fedllm.serving.admin")


@dataclass(frozen=True)
class AdminState:
    """What the routes show; made by the composition root.

    Parameters
    ----------
    authenticate : callable
        Returns who sent these headers (names in lower case), or raises `AuthenticationError`.
    metrics : callable
        Returns the whole exposition.
    usage : UsageStore or None
        None: no usage is kept.
    autoscale : callable
        Returns what a scaler needs to know.
    tenants : callable
        Returns the tenants as plain data, without hashes.
    replicas : callable or None
        Returns a router's replicas; None: this is no router.
    drain, resume : callable or None
        Take a replica out of service by name, and back; raise `NotFound` if there is none of that name.
    """

    authenticate: Callable[[Mapping[str, str]], Tenant]
    metrics: Callable[[], str]
    usage: UsageStore | None
    autoscale: Callable[[], dict[str, Any]]
    tenants: Callable[[], list[dict[str, Any]]]
    replicas: Callable[[], list[dict[str, Any]]] | None
    drain: Callable[[str], Awaitable[None]] | None
    resume: Callable[[str], Awaitable[None]] | None = None


class Gate:
    """The outermost layer: nobody but an operator passes, and what nobody foresaw becomes a 500 without its text."""

    def __init__(self, app: Any, state: AdminState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass an operator's request on; answer any other."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._let_in(scope, receive, send)

    async def _let_in(self, scope: Any, receive: Any, send: Any) -> None:
        started = False

        async def note(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            tenant = self._state.authenticate({name.lower(): text for name, text in Request(scope).headers.items()})
            if not tenant.operator:
                refusal = "this key is no operator's (fedllm tenant add --operator makes one)"
                answer = JSONResponse(http_error_body(403, refusal, AuthenticationError.code), 403)
                await answer(scope, receive, note)
                return
            await self._app(scope, receive, note)
        except Exception as error:  # noqa: BLE001 - a traceback in the log would quote the request
            if not isinstance(error, FedllmError):
                event(_LOG, "admin request failed", level=logging.ERROR, kind=type(error).__name__, started=started)
            if not started:  # of an answer that was begun, the server cuts the connection
                await _refusal(error)(scope, receive, send)


def create_admin_app(state: AdminState) -> FastAPI:
    """Return the ASGI application of the admin listener.

    Parameters
    ----------
    state : AdminState
    """
    app = FastAPI(title="fedllm admin", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, state=state)
    _add_refusals(app)
    _add_status(app, state)
    _add_usage(app, state)
    _add_replicas(app, state)
    return app


def _add_refusals(app: FastAPI) -> None:
    @app.exception_handler(FedllmError)
    async def refused(_: Request, error: FedllmError) -> Response:
        return _refusal(error)

    @app.exception_handler(404)
    async def no_path(*_: object) -> Response:
        return JSONResponse(http_error_body(404, "there is no such path"), 404)

    @app.exception_handler(405)
    async def no_method(_: Request, error: Exception) -> Response:
        headers = getattr(error, "headers", None)
        return JSONResponse(http_error_body(405, "this path takes another method"), 405, headers=headers)


def _add_status(app: FastAPI, state: AdminState) -> None:
    @app.get("/health")
    async def health(request: Request) -> Response:
        _parameters(request)
        return _json({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:  # scrapers add parameters of their own
        return PlainTextResponse(state.metrics(), media_type="text/plain; version=0.0.4")

    @app.get("/autoscale")
    async def autoscale(request: Request) -> Response:
        _parameters(request)
        return _json(state.autoscale())

    @app.get("/tenants")
    async def tenants(request: Request) -> Response:
        _parameters(request)
        return _json({"data": state.tenants()})


def _add_usage(app: FastAPI, state: AdminState) -> None:
    def store() -> UsageStore:
        if state.usage is None:
            raise NotFound("no usage is kept here", hint="'usage' in the settings names a file or a database")
        return state.usage

    @app.get("/usage")
    async def usage(request: Request) -> Response:
        """Show one page; ``next`` is the ``after`` of the page behind it, null at the end."""
        given = _parameters(request, *_BOUNDS, "limit", "after")
        limit = _whole(given, "limit", _PAGE, least=1, most=MAX_PAGE)
        after = _whole(given, "after", 0, least=0, most=_LARGEST)
        bounds = _bounds(given)
        rows = await asyncio.to_thread(store().rows, *bounds, limit=limit + 1, after=after)
        page = rows[:limit]
        more = page[-1].serial if len(rows) > limit else None
        return _json({"data": [row.as_dict() for row in page], "next": more})

    @app.get("/usage.csv")
    async def usage_csv(request: Request) -> Response:
        rows = store().every(*_bounds(_parameters(request, *_BOUNDS)))
        first = await asyncio.to_thread(next, lines := csv_lines(rows))  # a store that cannot be read has its status

        def pieces() -> Any:
            yield first
            yield from lines

        headers = {"content-disposition": "attachment; filename=usage.csv", "cache-control": "no-store"}
        return StreamingResponse(pieces(), media_type="text/csv; charset=utf-8", headers=headers)

    @app.get("/usage/totals")
    async def totals(request: Request) -> Response:
        given = _parameters(request, *_BOUNDS, "by")
        by = tuple(given.get("by", "tenant").split(","))
        if len(set(by)) != len(by) or not set(by) <= set(GROUPS):
            raise RequestInvalid(f"by is {given['by'][:80]!r}: some of {', '.join(GROUPS)} allowed, each once")
        since, until, tenant = _bounds(given)
        found = await asyncio.to_thread(store().totals, since, until, by, tenant=tenant)
        return _json({"by": list(by), "data": [total.as_dict() for total in found]})


def _add_replicas(app: FastAPI, state: AdminState) -> None:
    @app.get("/replicas")
    async def replicas(request: Request) -> Response:
        _parameters(request)
        if state.replicas is None:
            raise _no_router()
        return _json({"data": state.replicas()})

    @app.post("/replicas/{name}/drain")
    async def drain(request: Request, name: str) -> Response:
        _parameters(request)
        if state.drain is None:
            raise _no_router()
        await state.drain(name)
        return _json({"name": name, "state": "draining"})

    @app.post("/replicas/{name}/resume")
    async def resume(request: Request, name: str) -> Response:
        _parameters(request)
        if state.resume is None:
            raise _no_router()
        await state.resume(name)
        return _json({"name": name, "state": "serving"})


def _json(body: dict[str, Any]) -> Response:
    return JSONResponse(body, headers={"cache-control": "no-store"})


def _refusal(error: Exception) -> Response:
    if not isinstance(error, FedllmError):
        return JSONResponse(http_error_body(500, "the admin listener failed; its log says where"), 500)
    status = error_status(error)
    message = error.message if error.hint is None else f"{error.message} ({error.hint})"
    headers = {"retry-after": str(max(1, round(error.retry_after_s)))} if isinstance(error, Overloaded) else {}
    return JSONResponse(http_error_body(status, message, error.code), status, headers=headers)


def _no_router() -> NotFound:
    return NotFound("there are no replicas here: this is no router", hint="ask the admin listener of 'fedllm route'")


def _parameters(request: Request, *allowed: str) -> dict[str, str]:
    """Return the query parameters, each given once and known to the route."""
    given: dict[str, str] = {}
    for name, text in request.query_params.multi_items():
        if name not in allowed:
            known = ", ".join(allowed) or "none"
            raise RequestInvalid(f"query parameter {name[:40]!r} is not known here: {known} allowed")
        if name in given:
            raise RequestInvalid(f"query parameter {name!r} is given more than once")
        given[name] = text
    return given


def _bounds(given: Mapping[str, str]) -> tuple[float | None, float | None, str | None]:
    tenant = given.get("tenant")
    try:
        since, until = (utc_seconds(given[n], what=n) if n in given else None for n in ("since", "until"))
        return since, until, None if tenant is None else check_name(tenant, what="tenant")
    except ConfigError as error:
        raise RequestInvalid(error.message, hint=error.hint) from None


def _whole(given: Mapping[str, str], name: str, default: int, *, least: int, most: int) -> int:
    text = given.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(most)) and least <= int(text) <= most):
        raise RequestInvalid(f"{name} is {text[:40]!r}: a whole number from {least} to {most} allowed")
    return int(text)

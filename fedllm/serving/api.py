"""The OpenAI-compatible HTTP face; the only file of the endpoint that imports the web framework."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from fedllm.clock import Clock
from fedllm.errors import AuthenticationError, FedllmError, MissingExtra, NotReady, Overloaded, RequestInvalid
from fedllm.rng import Rng
from fedllm.serving.answers import chunk_body, error_body, error_status, full_body, http_error_body, usage_body
from fedllm.serving.delivery import STALL_S, send_events
from fedllm.serving.engine import Engine, Lease
from fedllm.serving.generation import Generation, fit, tokenize
from fedllm.serving.metrics import Counters
from fedllm.serving.openai import CompletionRequest, read_chat, read_completion, read_json, read_score
from fedllm.serving.openapi import openapi_document
from fedllm.serving.status import health_body, model_rows
from fedllm.serving.structured import Grammars
from fedllm.serving.tenants import Tenant, TenantFile
from fedllm.serving.text import TextCodec
from fedllm.serving.versions import Versions
from fedllm.serving.watch import AliasWatcher
from fedllm.telemetry import event

VERSION_HEADER = "x-fedllm-version"
MAX_BODY_BYTES = 1024 * 1024
BODY_S = 30.0
_LOG = logging.getLogger("fedllm.serving")
_DISCARDED_BYTES = 8 * MAX_BODY_BYTES
_LONG_BYTES = 16 * 1024
_GONE_POLL_S = 0.25
_GONE = 499

T = TypeVar("T")


@dataclass(frozen=True)
class Endpoint:
    """Everything the routes need; made by the composition root.

    Parameters
    ----------
    stall_s : float
        Seconds after which a client that does not read its stream is cut off.
    body_s : float
        Seconds that a request's body may take to arrive.
    """

    engine: Engine
    versions: Versions
    watcher: AliasWatcher
    codec: TextCodec
    tenants: TenantFile
    counters: Counters
    clock: Clock
    rng: Rng
    stall_s: float = STALL_S
    body_s: float = BODY_S


class ClientGone(Exception):
    """Nobody is left to answer."""


class EventStream(Response):
    """Server-sent events of one generation, which is counted and closed whatever becomes of the client."""

    def __init__(self, endpoint: Endpoint, request: Request, generation: Generation, *, chat: bool) -> None:
        super().__init__()
        self._endpoint = endpoint
        self._request = request
        self._generation = generation
        self._chat = chat
        self._outcome = _GONE

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG002 - ASGI's signature
        """Send the events, then close the generation."""
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            VERSION_HEADER: self._generation.version,
        }
        try:
            await send_events(receive, send, self._events(), headers, stall_s=self._endpoint.stall_s)
        finally:
            _count_tokens(self._endpoint, self._request, self._generation)
            _count(self._endpoint, self._request, self._outcome)
            await self._generation.aclose()

    async def _events(self) -> AsyncIterator[bytes]:
        generation, chat = self._generation, self._chat
        try:
            async for chunk in generation.chunks():
                yield _event(chunk_body(generation, chunk, chat=chat))
        except FedllmError as error:
            # The status line is out already: the error becomes an event, which OpenAI's client raises.
            self._outcome = error_status(error)
            yield _event(error_body(error))
            return
        except Exception:
            self._outcome = 500
            raise
        # All is generated: a client that leaves on reading the last line has had its answer.
        self._outcome = 200
        if generation.request.include_usage:
            yield _event(usage_body(generation, chat=chat))
        yield b"data: [DONE]\n\n"


class Guard:
    """The outermost layer: what nobody foresaw becomes a 500 in OpenAI's shape, and a log line without its text."""

    def __init__(self, app: Any, endpoint: Endpoint) -> None:
        self._app = app
        self._endpoint = endpoint

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on."""
        started = False

        async def note(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception as error:  # noqa: BLE001 - a traceback in the server's log would quote the request
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            at = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "?"
            event(_LOG, "request-failed", level=logging.ERROR, kind=type(error).__name__, at=at)
            if not started:
                _count(self._endpoint, Request(scope), 500)
                await JSONResponse(http_error_body(500, "the endpoint failed; its log says where"), 500)(
                    scope, receive, send
                )


def create_app(endpoint: Endpoint) -> FastAPI:
    """Return the ASGI application.

    Parameters
    ----------
    endpoint : Endpoint
        A started engine and its surroundings.
    """
    app = FastAPI(title="fedllm endpoint", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, endpoint=endpoint)
    grammars = Grammars(endpoint.codec)

    _add_refusals(app, endpoint)
    _add_status(app, endpoint)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        tenant = _tenant(endpoint, request)
        asked = read_chat(await _body(endpoint, request), stop_token_ids=endpoint.codec.stop_token_ids)
        return await _complete(endpoint, grammars, request, tenant, asked, chat=True)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        tenant = _tenant(endpoint, request)
        asked = read_completion(await _body(endpoint, request), stop_token_ids=endpoint.codec.stop_token_ids)
        return await _complete(endpoint, grammars, request, tenant, asked, chat=False)

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        tenant = _tenant(endpoint, request)
        asked = read_score(await _body(endpoint, request))
        with await _lease(endpoint, request, tenant, asked.model) as lease:
            work = endpoint.engine.score(lease, asked.prompt, asked.tokens)
            computed = True
            try:
                scores = await _unless_gone(request, work)
            except (RequestInvalid, Overloaded):
                computed = False
                raise
            finally:
                if computed:
                    endpoint.counters.tokens(tenant.name, prompt=len(asked.prompt) + len(asked.tokens))
            version = lease.digest
        _count(endpoint, request, 200)
        body = {
            "object": "score",
            "model": asked.model,
            "system_fingerprint": version,
            "regrets": [s.regret for s in scores],
            "logprobs": [s.logprob for s in scores],
        }
        return JSONResponse(body, headers={VERSION_HEADER: version})

    return app


_ROUTES = {"/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/score", "/metrics"}


def _add_refusals(app: FastAPI, endpoint: Endpoint) -> None:
    @app.exception_handler(FedllmError)
    async def refused(request: Request, error: FedllmError) -> Response:
        _count(endpoint, request, error_status(error))
        headers = {"x-should-retry": "true"} if isinstance(error, NotReady) else {}
        if isinstance(error, MissingExtra):
            headers["x-should-retry"] = "false"
        if isinstance(error, Overloaded):
            headers["retry-after"] = str(max(1, round(error.retry_after_s)))
        if getattr(request.state, "unread", False):
            headers["connection"] = "close"
        return JSONResponse(error_body(error), error_status(error), headers=headers)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, _: Exception) -> Response:
        _count(endpoint, request, _GONE)
        return Response(status_code=_GONE)  # for nobody: the server drops it

    @app.exception_handler(404)
    async def no_path(*_: object) -> Response:
        return JSONResponse(http_error_body(404, "there is no such path"), 404)

    @app.exception_handler(405)
    async def no_method(_: Request, error: Exception) -> Response:
        headers = getattr(error, "headers", None)
        return JSONResponse(http_error_body(405, "this path takes another method"), 405, headers=headers)


def _add_status(app: FastAPI, endpoint: Endpoint) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        tenant = _tenant(endpoint, request)
        _count(endpoint, request, 200)
        return JSONResponse({"object": "list", "data": model_rows(endpoint.engine, endpoint.versions, tenant)})

    @app.get("/health")
    async def health(request: Request) -> Response:
        try:
            tenant = _tenant(endpoint, request)
        except AuthenticationError:
            tenant = None
        body = health_body(endpoint.engine, endpoint.versions, endpoint.watcher, tenant)
        return JSONResponse(body, 503 if body["status"] == "failed" else 200)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        tenant = _tenant(endpoint, request)
        text = endpoint.counters.render(endpoint.engine.stats(), None if tenant.operator else tenant)
        return PlainTextResponse(text, media_type="text/plain")

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return JSONResponse(openapi_document())


async def _complete(
    endpoint: Endpoint, grammars: Grammars, request: Request, tenant: Tenant, asked: CompletionRequest, *, chat: bool
) -> Response:
    limit = endpoint.engine.max_model_tokens
    if request.state.body_bytes > _LONG_BYTES:
        # Templates and tokenizers take about a second for a megabyte: not on the loop that serves everybody.
        prompt = await asyncio.to_thread(tokenize, asked, endpoint.codec, limit=limit)
    else:
        prompt = tokenize(asked, endpoint.codec, limit=limit)
    grammar = await _unless_gone(request, grammars.compile(asked.shapes)) if asked.shapes else None
    lease = await _lease(endpoint, request, tenant, asked.model)
    try:
        generation = await Generation(
            ("chatcmpl-" if chat else "cmpl-") + endpoint.rng.token(12).hex(),
            int(endpoint.clock.now()),
            fit(asked, prompt, limit=limit),
            prompt,
            lease,
            endpoint.codec,
        ).open(endpoint.engine, grammar, scope=tenant.name)
    except BaseException:
        with lease:
            raise
    if asked.stream:
        return EventStream(endpoint, request, generation, chat=chat)
    try:
        body = await _unless_gone(request, full_body(generation, chat=chat))
        version = generation.version
    finally:
        _count_tokens(endpoint, request, generation)
        await generation.aclose()
    _count(endpoint, request, 200)
    return JSONResponse(body, headers={VERSION_HEADER: version})


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _lease(endpoint: Endpoint, request: Request, tenant: Tenant, model: str) -> Lease:
    """Lease a version, but not for a client that leaves while it waits for one."""
    task = asyncio.ensure_future(endpoint.watcher.lease(model, tenant))
    try:
        return await _unless_gone(request, asyncio.shield(task))
    except BaseException:
        task.cancel()
        task.add_done_callback(_release)
        raise


def _release(task: asyncio.Future[Lease]) -> None:
    """Give a lease back that came too late."""
    if not task.cancelled() and task.exception() is None:
        with task.result():
            pass


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Await work, but cancel it when the client has left."""
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=_GONE_POLL_S)
            if done:
                return task.result()
            if await request.is_disconnected():
                raise ClientGone
    finally:
        task.cancel()


def _tenant(endpoint: Endpoint, request: Request) -> Tenant:
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    tenant = endpoint.tenants.authenticate(key.strip() if kind.lower() == "bearer" else "")
    request.state.tenant = tenant.name
    return tenant


async def _body(endpoint: Endpoint, request: Request) -> object:
    """Return the body's JSON; one that is too long is read on for a while, so that its sender hears why."""
    data, size = bytearray(), 0
    request.state.unread = True
    try:
        async with asyncio.timeout(endpoint.body_s):
            async for part in _parts(request):
                size += len(part)
                if size <= MAX_BODY_BYTES:
                    data += part
                elif size > _DISCARDED_BYTES:
                    break
    except TimeoutError:
        raise RequestInvalid(f"the body has not arrived within {endpoint.body_s:g} s") from None
    request.state.unread = size > _DISCARDED_BYTES
    request.state.body_bytes = size
    if size > MAX_BODY_BYTES:
        raise RequestInvalid(f"the body is longer than {MAX_BODY_BYTES} bytes")
    return read_json(bytes(data))


async def _parts(request: Request) -> AsyncIterator[bytes]:
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


def _count(endpoint: Endpoint, request: Request, status: int) -> None:
    """Count a request's end; a client that left has status 499."""
    path = request.url.path
    route, tenant = path if path in _ROUTES else "other", getattr(request.state, "tenant", "")
    endpoint.counters.add("fedllm_requests_total", route=route, status=str(status), tenant=tenant)


def _count_tokens(endpoint: Endpoint, request: Request, generation: Generation) -> None:
    """Count what was computed, whether or not anyone stayed to read it."""
    prompt, completion = len(generation.prompt), generation.completion_tokens
    endpoint.counters.tokens(request.state.tenant, prompt=prompt, completion=completion)

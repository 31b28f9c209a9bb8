"""The OpenAI-compatible HTTP face; the only file of the endpoint that imports the web framework."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from fedllm.clock import Clock
from fedllm.errors import AuthenticationError, FedllmError, NotReady, Overloaded, RequestInvalid
from fedllm.rng import Rng
from fedllm.serving.engine import Engine
from fedllm.serving.generation import Generation, chunk_body, fit, full_body, tokenize, usage_body
from fedllm.serving.metrics import Counters
from fedllm.serving.openai import (
    CompletionRequest,
    error_body,
    error_status,
    read_chat,
    read_completion,
    read_score,
)
from fedllm.serving.tenants import BASE_ACCESS, Tenant, TenantFile
from fedllm.serving.text import TextCodec
from fedllm.serving.versions import Versions
from fedllm.serving.watch import AliasWatcher

VERSION_HEADER = "x-fedllm-version"
MAX_BODY_BYTES = 4 * 1024 * 1024
_GONE_POLL_S = 0.25

T = TypeVar("T")


@dataclass(frozen=True)
class Endpoint:
    """Everything the routes need; made by the composition root."""

    engine: Engine
    versions: Versions
    watcher: AliasWatcher
    codec: TextCodec
    tenants: TenantFile
    counters: Counters
    clock: Clock
    rng: Rng


class EventStream(StreamingResponse):
    """Server-sent events of one generation, which is closed even if the client left before the first."""

    def __init__(self, generation: Generation, events: AsyncIterator[bytes]) -> None:
        headers = {VERSION_HEADER: generation.version, "cache-control": "no-cache"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._generation = generation

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events, then close the generation."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._generation.aclose()


def create_app(endpoint: Endpoint) -> FastAPI:
    """Return the ASGI application.

    Parameters
    ----------
    endpoint : Endpoint
        A started engine and its surroundings.
    """
    app = FastAPI(title="fedllm endpoint", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(FedllmError)
    async def refused(request: Request, error: FedllmError) -> Response:
        endpoint.counters.add(
            "fedllm_requests_total",
            route=request.url.path if request.url.path in _ROUTES else "other",
            status=str(error_status(error)),
            tenant=getattr(request.state, "tenant", ""),
        )
        headers = {"x-should-retry": "true"} if isinstance(error, NotReady) else {}
        if isinstance(error, Overloaded):
            headers["retry-after"] = str(max(1, round(error.retry_after_s)))
        return JSONResponse(error_body(error), error_status(error), headers=headers)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        tenant = _tenant(endpoint, request)
        _count(endpoint, tenant, "/v1/models")
        return JSONResponse({"object": "list", "data": _models(endpoint, tenant)})

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        tenant = _tenant(endpoint, request)
        asked = read_chat(await _body(request), stop_token_ids=endpoint.codec.stop_token_ids)
        return await _complete(endpoint, request, tenant, asked, chat=True)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        tenant = _tenant(endpoint, request)
        asked = read_completion(await _body(request), stop_token_ids=endpoint.codec.stop_token_ids)
        return await _complete(endpoint, request, tenant, asked, chat=False)

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        tenant = _tenant(endpoint, request)
        asked = read_score(await _body(request))
        with await endpoint.versions.lease(asked.model, tenant) as lease:
            work = endpoint.engine.score(lease, asked.prompt, asked.tokens)
            scores = await _unless_gone(request, work)
            version = lease.digest
        _count(endpoint, tenant, "/v1/score")
        body = {
            "object": "score",
            "model": asked.model,
            "system_fingerprint": version,
            "regrets": [s.regret for s in scores],
            "logprobs": [s.logprob for s in scores],
        }
        return JSONResponse(body, headers={VERSION_HEADER: version})

    @app.get("/health")
    async def health(request: Request) -> Response:
        return JSONResponse(_health(endpoint, request))

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        _tenant(endpoint, request)
        return PlainTextResponse(endpoint.counters.render(endpoint.engine.stats()), media_type="text/plain")

    return app


_ROUTES = {"/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/score", "/metrics"}


async def _complete(
    endpoint: Endpoint, request: Request, tenant: Tenant, asked: CompletionRequest, *, chat: bool
) -> Response:
    route = "/v1/chat/completions" if chat else "/v1/completions"
    limit = endpoint.engine.max_model_tokens
    prompt = tokenize(asked, endpoint.codec, limit=limit)
    lease = await endpoint.versions.lease(asked.model, tenant)
    try:
        generation = Generation(
            ("chatcmpl-" if chat else "cmpl-") + endpoint.rng.token(12).hex(),
            int(endpoint.clock.now()),
            fit(asked, prompt, limit=limit),
            prompt,
            lease,
            endpoint.engine,
            endpoint.codec.decoder(),
        )
    except BaseException:
        with lease:
            raise
    if asked.stream:
        return EventStream(generation, _events(endpoint, tenant, generation, route, chat=chat))
    try:
        body = await _unless_gone(request, full_body(generation, chat=chat))
        version = generation.version
    finally:
        await generation.aclose()
    _count(endpoint, tenant, route, generation)
    return JSONResponse(body, headers={VERSION_HEADER: version})


async def _events(
    endpoint: Endpoint, tenant: Tenant, generation: Generation, route: str, *, chat: bool
) -> AsyncIterator[bytes]:
    first = True
    try:
        async for chunk in generation.chunks():
            yield _event(chunk_body(generation, chunk, chat=chat, first=first))
            first = False
    except FedllmError as error:
        # The status line is out already: the error becomes an event, which OpenAI's client raises.
        yield _event(error_body(error))
        return
    if generation.request.include_usage:
        yield _event(usage_body(generation, chat=chat))
    yield b"data: [DONE]\n\n"
    _count(endpoint, tenant, route, generation)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Await work, but cancel it when the client has left."""
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=_GONE_POLL_S)
            if done:
                return task.result()
            if await request.is_disconnected():
                raise RequestInvalid("the client left")
    finally:
        task.cancel()


def _tenant(endpoint: Endpoint, request: Request) -> Tenant:
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    tenant = endpoint.tenants.authenticate(key.strip() if kind.lower() == "bearer" else "")
    request.state.tenant = tenant.name
    return tenant


async def _body(request: Request) -> object:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise RequestInvalid(f"the body is longer than {MAX_BODY_BYTES} bytes")
    try:
        return json.loads(bytes(data))
    except ValueError:
        raise RequestInvalid("the body is not JSON") from None


def _count(endpoint: Endpoint, tenant: Tenant, route: str, generation: Generation | None = None) -> None:
    counters = endpoint.counters
    counters.add("fedllm_requests_total", route=route, status="200", tenant=tenant.name)
    if generation is not None:
        counters.add("fedllm_prompt_tokens_total", len(generation.prompt), tenant=tenant.name)
        counters.add("fedllm_completion_tokens_total", generation.completion_tokens, tenant=tenant.name)


def _models(endpoint: Endpoint, tenant: Tenant) -> list[dict[str, Any]]:
    versions = endpoint.versions
    rows: list[dict[str, Any]] = []
    if tenant.may_use(BASE_ACCESS):
        digest = endpoint.engine.base_digest
        rows.append({"id": versions.base_name, "created": 0, "parent": None, "version": None, "digest": digest})
    for alias, version in sorted(versions.visible(tenant).items()):
        rows.append(
            {
                "id": alias,
                "created": int(version.manifest.created),
                "parent": versions.base_name,
                "version": version.name,
                "digest": version.digest,
            }
        )
    return [{"object": "model", "owned_by": "fedllm", **row} for row in rows]


def _health(endpoint: Endpoint, request: Request) -> dict[str, Any]:
    """Return liveness for anyone, and what is served and refused for those with a key."""
    watcher, versions = endpoint.watcher, endpoint.versions
    status = "ok" if watcher.synced.is_set() else "starting"
    summary = {"status": status, "base": versions.base_name, "epoch": versions.served.epoch}
    try:
        tenant = _tenant(endpoint, request)
    except AuthenticationError:
        return summary
    visible = versions.visible(tenant)
    refused = {alias: asdict(r) for alias, r in watcher.refused.items() if tenant.may_use(alias)}
    return summary | {
        "aliases": {alias: {"version": v.name, "digest": v.digest} for alias, v in visible.items()},
        "refused": refused,
        "source_error": watcher.source_error,
        "engine": asdict(endpoint.engine.stats()),
    }

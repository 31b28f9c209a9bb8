"""The OpenAI-compatible HTTP face; the only file of the endpoint that imports the web framework."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from fedllm.errors import AuthenticationError, FedllmError
from fedllm.serving.access import Ticket
from fedllm.serving.answers import error_body, error_status, http_error_body, refusal_headers
from fedllm.serving.completions import Completion, complete, score
from fedllm.serving.endpoint import VERSION_HEADER, Endpoint
from fedllm.serving.feedback import feedback_body, read_feedback
from fedllm.serving.generation import tokenize
from fedllm.serving.intake import GONE, VISIT, ClientGone, Guard, Visit
from fedllm.serving.openai import CompletionRequest, read_chat, read_completion, read_score
from fedllm.serving.openapi import openapi_document
from fedllm.serving.status import health_body, model_rows
from fedllm.serving.structured import Grammars

__all__ = ["Endpoint", "create_app"]
_ROUTES = {"/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/score", "/v1/feedback", "/metrics"}
_LONG_BYTES = 16 * 1024


class EventStream(Response):
    """A streamed completion."""

    def __init__(self, completion: Completion) -> None:
        super().__init__()
        self._completion = completion

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG002 - ASGI's signature
        """Send it."""
        await self._completion.stream(receive, send)


def create_app(endpoint: Endpoint) -> FastAPI:
    """Return the ASGI application.

    Parameters
    ----------
    endpoint : Endpoint
        A started engine and its surroundings.
    """
    app = FastAPI(title="fedllm endpoint", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, access=endpoint.access, routes=_ROUTES)
    grammars = Grammars(endpoint.codec)

    _add_refusals(app)
    _add_status(app, endpoint)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        visit = _visit(request)
        ticket = visit.enter(request.headers)
        body = await visit.body(request.receive, body_s=endpoint.body_s)
        asked = read_chat(body, stop_token_ids=endpoint.codec.stop_token_ids)
        return await _answer(endpoint, grammars, request, ticket, asked, chat=True)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        visit = _visit(request)
        ticket = visit.enter(request.headers)
        body = await visit.body(request.receive, body_s=endpoint.body_s)
        asked = read_completion(body, stop_token_ids=endpoint.codec.stop_token_ids)
        return await _answer(endpoint, grammars, request, ticket, asked, chat=False)

    @app.post("/v1/score")
    async def scores(request: Request) -> Response:
        visit = _visit(request)
        ticket = visit.enter(request.headers)
        asked = read_score(await visit.body(request.receive, body_s=endpoint.body_s))
        body = await score(endpoint, ticket, asked, request.is_disconnected)
        return JSONResponse(body, headers={VERSION_HEADER: body["system_fingerprint"], **ticket.headers()})

    @app.post("/v1/feedback")
    async def feedback(request: Request) -> Response:
        visit = _visit(request)
        ticket = visit.enter(request.headers)
        rated = read_feedback(await visit.body(request.receive, body_s=endpoint.body_s))
        return JSONResponse(feedback_body(endpoint.feedbacks, ticket, rated), headers=ticket.headers())

    return app


def _add_refusals(app: FastAPI) -> None:
    @app.exception_handler(FedllmError)
    async def refused(request: Request, error: FedllmError) -> Response:
        visit = _visit(request)
        visit.end(error_status(error))
        headers = refusal_headers(error) | visit.rates()
        if visit.unread:
            headers["connection"] = "close"
        return JSONResponse(error_body(error), error_status(error), headers=headers)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, _: Exception) -> Response:
        _visit(request).end(GONE)
        return Response(status_code=GONE)  # for nobody: the server drops it

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
        ticket = _visit(request).enter(request.headers)
        rows = model_rows(endpoint.engine, endpoint.versions, ticket.caller.tenant)
        return JSONResponse({"object": "list", "data": rows}, headers=ticket.headers())

    @app.get("/health")
    async def health(request: Request) -> Response:
        try:
            tenant = _visit(request).identify(request.headers).tenant
        except AuthenticationError:
            tenant = None
        body = health_body(endpoint.engine, endpoint.versions, endpoint.watcher, tenant)
        return JSONResponse(body, 503 if body["status"] == "failed" else 200)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        caller = _visit(request).identify(request.headers)
        tenant = caller.tenant
        if caller.delegated:  # the router counts for its tenants; one of the same name here is somebody else
            return PlainTextResponse("", media_type="text/plain")
        text = endpoint.counters.render(endpoint.engine.stats(), None if tenant.operator else tenant)
        return PlainTextResponse(text, media_type="text/plain")

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return JSONResponse(openapi_document())


async def _answer(
    endpoint: Endpoint, grammars: Grammars, request: Request, ticket: Ticket, asked: CompletionRequest, *, chat: bool
) -> Response:
    visit, limit = _visit(request), endpoint.engine.max_model_tokens
    if visit.body_bytes > _LONG_BYTES:
        # Templates and tokenizers take about a second for a megabyte: not on the loop that serves everybody.
        prompt = await asyncio.to_thread(tokenize, asked, endpoint.codec, limit=limit)
    else:
        prompt = tokenize(asked, endpoint.codec, limit=limit)
    gone = request.is_disconnected
    completion = await complete(endpoint, grammars, ticket, asked, prompt, gone, chat=chat)
    if asked.stream:
        visit.streams = True
        return EventStream(completion)
    body = await completion.body(gone)
    return JSONResponse(body, headers=completion.headers)


def _visit(request: Request) -> Visit:
    visit: Visit = request.scope[VISIT]
    return visit

"""The router's OpenAI-compatible HTTP face; the only file of the router that imports the web framework."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from fedllm.errors import AuthenticationError, FedllmError
from fedllm.serving.answers import error_body, error_status, http_error_body, refusal_headers
from fedllm.serving.feedback import feedback_body, read_feedback
from fedllm.serving.intake import GONE, VISIT, ClientGone, Guard, Visit
from fedllm.serving.openapi import openapi_document
from fedllm.serving.router.dispatch import BadGateway
from fedllm.serving.router.reply import Router, Streamed, answer
from fedllm.serving.router.status import health_body
from fedllm.serving.router.stream import BAD_GATEWAY
from fedllm.serving.router.upstream import Declined

__all__ = ["Router", "create_app"]
_COMPLETIONS = ("/v1/chat/completions", "/v1/completions")
_ROUTES = {"/v1/models", "/v1/feedback", *_COMPLETIONS}
_DOCUMENTED = {*_ROUTES, "/health"}


class EventStream(Response):
    """A streamed completion."""

    def __init__(self, streamed: Streamed) -> None:
        super().__init__()
        self._streamed = streamed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG002 - ASGI's signature
        """Send it."""
        await self._streamed.send(receive, send)


def create_app(router: Router) -> FastAPI:
    """Return the ASGI application.

    Parameters
    ----------
    router : Router
        Whose fleet and follower run.
    """
    app = FastAPI(title="fedllm router", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, access=router.access, routes=_ROUTES)
    _add_refusals(app)
    _add_status(app, router)
    for route in _COMPLETIONS:
        _add_completions(app, router, route)

    @app.post("/v1/feedback")
    async def feedback(request: Request) -> Response:
        visit = _visit(request)
        ticket = visit.enter(request.headers)
        rated = read_feedback(await visit.body(request.receive, body_s=router.body_s))
        return JSONResponse(feedback_body(router.feedbacks, ticket, rated), headers=ticket.headers())

    return app


def _add_completions(app: FastAPI, router: Router, route: str) -> None:
    @app.post(route)
    async def completions(request: Request) -> Response:
        visit = _visit(request)
        ticket = visit.enter(request.headers)
        body = await visit.body(request.receive, body_s=router.body_s)
        reply = await answer(router, ticket, route, body, request.is_disconnected)
        if isinstance(reply, Streamed):
            visit.streams = True
            return EventStream(reply)
        return JSONResponse(reply.body, headers=reply.headers)


def _add_refusals(app: FastAPI) -> None:
    @app.exception_handler(FedllmError)
    async def refused(request: Request, error: FedllmError) -> Response:
        visit = _visit(request)
        visit.end(error_status(error))
        headers = refusal_headers(error) | visit.rates()
        if visit.unread:
            headers["connection"] = "close"
        return JSONResponse(error_body(error), error_status(error), headers=headers)

    @app.exception_handler(Declined)
    async def declined(request: Request, error: Declined) -> Response:
        return JSONResponse(error.body, error.status, headers=_visit(request).rates())

    @app.exception_handler(BadGateway)
    async def bad_gateway(request: Request, error: BadGateway) -> Response:
        return JSONResponse(error.body, BAD_GATEWAY, headers={"x-should-retry": "true"} | _visit(request).rates())

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


def _add_status(app: FastAPI, router: Router) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        ticket = _visit(request).enter(request.headers)
        rows = router.models.rows(ticket.caller.tenant)
        return JSONResponse({"object": "list", "data": rows}, headers=ticket.headers())

    @app.get("/health")
    async def health(request: Request) -> Response:
        try:
            tenant = _visit(request).identify(request.headers).tenant
        except AuthenticationError:
            tenant = None
        body = health_body(router, tenant)
        return JSONResponse(body, 503 if body["status"] == "failed" else 200)

    @app.get("/openapi.json")
    async def openapi() -> Response:
        document = openapi_document()
        paths = {path: item for path, item in document["paths"].items() if path in _DOCUMENTED}
        return JSONResponse({**document, "info": {**document["info"], "title": "fedllm router"}, "paths": paths})


def _visit(request: Request) -> Visit:
    visit: Visit = request.scope[VISIT]
    return visit

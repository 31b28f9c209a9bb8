"""A request on its way in and out: its body, its client who may leave, its end. Plain ASGI; no web framework."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from fedllm.errors import RequestInvalid
from fedllm.serving.access import Access, Caller, Ticket
from fedllm.serving.answers import http_error_body
from fedllm.serving.delivery import Message, Receive, Send
from fedllm.serving.openai import read_json
from fedllm.telemetry import event

MAX_BODY_BYTES = 1024 * 1024
BODY_S = 30.0
GONE = 499
"""Status of a request whose client left; nobody receives it."""
VISIT = "fedllm.visit"
"""Where a request's `Visit` is in its ASGI scope."""
_DISCARDED_BYTES = 8 * MAX_BODY_BYTES
_GONE_POLL_S = 0.25
_LOG = logging.getLogger("fedllm.serving")

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody is left to answer."""


class Visit:
    """One request: who makes it, its ticket, and its end, which is told once.

    Parameters
    ----------
    access : Access
    route : str
        Path of the request, or ``other``.

    Attributes
    ----------
    streams : bool
        The end is told by whoever streams the answer, not with its status line.
    body_bytes : int
        Length of the body that was read.
    unread : bool
        Whether some of the body may still be on its way.
    """

    def __init__(self, access: Access, route: str) -> None:
        self._access = access
        self._route = route
        self._caller: Caller | None = None
        self._ended = False
        self.ticket: Ticket | None = None
        self.streams = False
        self.body_bytes = 0
        self.unread = False

    def identify(self, headers: Mapping[str, str]) -> Caller:
        """Return who asks, or raise `AuthenticationError`."""
        self._caller = self._access.caller(headers)
        return self._caller

    def enter(self, headers: Mapping[str, str]) -> Ticket:
        """Return the request's ticket, or raise `AuthenticationError` or `QuotaExceeded`."""
        self.ticket = self._access.open(self.identify(headers), route=self._route, headers=headers)
        return self.ticket

    def end(self, status: int) -> None:
        """Tell the request's end; only the first call counts."""
        if self._ended:
            return
        self._ended = True
        if self.ticket is not None:
            self.ticket.end(status)
        else:
            self._access.refused(route=self._route, status=status, caller=self._caller)

    def rates(self) -> dict[str, str]:
        """Return the rate limit headers of the answer."""
        return self._access.headers(self._caller) if self._caller is not None else {}

    async def body(self, receive: Receive, *, body_s: float) -> object:
        """Return the body's JSON; one that is too long is read on for a while, so that its sender hears why.

        Raises
        ------
        RequestInvalid
            If it is too long, too slow or not JSON.
        ClientGone
            If the client leaves meanwhile.
        """
        data, size = bytearray(), 0
        self.unread = True
        try:
            async with asyncio.timeout(body_s):
                async for part in _parts(receive):
                    size += len(part)
                    if size <= MAX_BODY_BYTES:
                        data += part
                    elif size > _DISCARDED_BYTES:
                        break
        except TimeoutError:
            raise RequestInvalid(f"the body has not arrived within {body_s:g} s") from None
        self.unread = size > _DISCARDED_BYTES
        self.body_bytes = size
        if size > MAX_BODY_BYTES:
            raise RequestInvalid(f"the body is longer than {MAX_BODY_BYTES} bytes")
        return read_json(bytes(data))


class Guard:
    """The outermost layer: every request has a `Visit` that is ended, whatever happens.

    What nobody foresaw becomes a 500 in OpenAI's shape, and a log line without its text.

    Parameters
    ----------
    app
        The ASGI application.
    access : Access
    routes : set of str
        Paths that records name.
    """

    def __init__(self, app: Any, *, access: Access, routes: set[str]) -> None:
        self._app = app
        self._access = access
        self._routes = routes

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        path = scope.get("path", "")
        visit = scope[VISIT] = Visit(self._access, path if path in self._routes else "other")
        started = False

        async def note(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start" and visit.ticket is not None and not visit.streams:
                visit.end(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception as error:  # noqa: BLE001 - a traceback in the server's log would quote the request
            visit.end(500)
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            at = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "?"
            event(_LOG, "request-failed", level=logging.ERROR, kind=type(error).__name__, at=at)
            if not started:
                await _send_failure(send)
        finally:
            if visit.ticket is not None:
                visit.end(GONE)  # cancelled before there was an answer


async def unless_gone(gone: Callable[[], Awaitable[bool]], work: Awaitable[T]) -> T:
    """Await work, but cancel it when the client has left.

    Parameters
    ----------
    gone : callable
        Whether the client has left.
    work : awaitable

    Raises
    ------
    ClientGone
        If it has.
    """
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=_GONE_POLL_S)
            if done:
                return task.result()
            if await gone():
                raise ClientGone
    finally:
        task.cancel()


async def _parts(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


async def _send_failure(send: Send) -> None:
    body = json.dumps(http_error_body(500, "the endpoint failed; its log says where")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": body})

"""A reverse proxy in front of the SuperLink: owners reach its Fleet API and nothing else, and wait less.

A SuperLink serves three APIs on one port, and two of them start code on every node without asking who is
there; here only ``POST /v1/fleet/...`` passes. A SuperNode that asks for messages and gets none sleeps for
three seconds, so a request for messages is held back until something was pushed: a long poll, well within the
30 s that Flower's client waits for a response. That a SuperNode asks also tells that the reply it worked on is
there in full, because it does one thing after another.

An ASGI application: uvicorn reads what comes from outside, httpx passes it on, once and without decoding it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import httpx

from fedllm import telemetry
from fedllm.errors import PortBusy
from fedllm.relay.ports import LOOPBACK
from fedllm.relay.service import MAX_HEAD

if TYPE_CHECKING:
    import uvicorn

_LOG = logging.getLogger(__name__)
HOLD_S = 25.0
"""Seconds that a request for messages is held when the one before brought nothing."""
AGAIN_S = 5.0
"""Seconds that it is held when the one before brought a message: another may have been pushed with that."""
IDLE_S = 60.0
"""Seconds until a peer that does not go on is hung up on."""
MAX_BODY = 2 * MAX_HEAD
"""Bytes of a request; the largest that a SuperNode makes holds a reply's head."""
_PULL = b"/v1/fleet/pull-messages"
_PATH = re.compile(rb"/v1/fleet/[a-z-]{1,64}")
# RFC 9110, 7.6.1: of one connection only. An expectation is met here.
_HOP_BY_HOP = frozenset(
    (b"connection", b"expect", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)
_MAX_HEADERS = 1 << 15
_MAX_HELD_BODY = 4096
_MAX_NODES = 10_000
_MAX_CONNECTIONS = 4096
_STOP_S = 1

_Headers = list[tuple[bytes, bytes]]
_Receive = Callable[[], Coroutine[Any, Any, dict[str, Any]]]
_Send = Callable[[dict[str, Any]], Awaitable[None]]


def names_node(body: bytes, node: str) -> bool:
    """Whether the body of a request names a node: its id, a number, as it stands in a protobuf message."""
    number, encoded = int(node), bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number]) in body


def _end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> _Headers:
    lower = [(name.lower(), value) for name, value in headers]
    named = {token.strip().lower() for name, value in lower if name == b"connection" for token in value.split(b",")}
    return [(name, value) for name, value in lower if name not in _HOP_BY_HOP | named]


async def _blocks(receive: _Receive) -> AsyncIterator[bytes]:
    """Yield a request's body as it comes."""
    more = True
    while more:
        async with asyncio.timeout(IDLE_S):
            message = await receive()
        if message["type"] != "http.request":
            raise ConnectionResetError("the node went in the middle of a request")
        yield message["body"]
        more = message["more_body"]


async def _refuse(send: _Send, status: int) -> None:
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


class FleetProxy:
    """Listens for SuperNodes; start with `open`.

    Parameters
    ----------
    port : int
        Loopback port of the SuperLink.
    asked : Callable[[bytes], Awaitable[None]]
        Called with the body of each request for messages, which holds the node's id, when it comes.
    """

    def __init__(self, port: int, asked: Callable[[bytes], Awaitable[None]]) -> None:
        self._superlink = f"http://{LOOPBACK}:{port}"
        self._on_asked = asked
        self._client: httpx.AsyncClient
        self._server: uvicorn.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._pushes = 0
        self._pushed = asyncio.Event()
        self._closing = False
        self._asked: dict[bytes, tuple[int, float]] = {}

    async def open(self, host: str, port: int) -> int:
        """Listen; return the port.

        Raises
        ------
        PortBusy
            If another program listens there.
        """
        try:
            listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            raise PortBusy(
                f"another program listens on {host}:{port}, or the address is not ours ({error.strerror})",
                hint="choose another flower_port",
            ) from None
        # accepted sockets inherit it; a body that follows its head would wait 40 ms for an acknowledgement
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # a new connection for each request: on a kept one it could be lost, and be owed a repetition
        limits = httpx.Limits(max_connections=_MAX_CONNECTIONS, max_keepalive_connections=0)
        self._client = httpx.AsyncClient(trust_env=False, verify=False, timeout=IDLE_S, limits=limits)  # noqa: S501
        self._server = _server(self._respond)
        self._tasks = [
            asyncio.create_task(self._server.serve(sockets=[listener]), name="fleet-proxy"),
            asyncio.create_task(_sweep(self._server), name="fleet-proxy-sweep"),
        ]
        return int(listener.getsockname()[1])

    def pushed(self) -> None:
        """Let the requests for messages through: there are some."""
        self._pushes += 1
        self._pushed.set()
        self._pushed = asyncio.Event()

    async def close(self) -> None:
        """Stop listening and end every connection."""
        if self._server is None:
            return
        self._closing = True
        self.pushed()
        self._server.should_exit = True
        serving, sweep = self._tasks
        await serving
        sweep.cancel()
        await asyncio.gather(sweep, return_exceptions=True)
        await self._client.aclose()

    async def _respond(self, scope: dict[str, Any], receive: _Receive, send: _Send) -> None:
        """Answer a request: the ASGI application."""
        headers, names = _end_to_end(scope["headers"]), {name for name, _ in scope["headers"]}
        length = -1 if b"transfer-encoding" in names else int(dict(headers).get(b"content-length", -1))
        if scope["method"] != "POST" or not _PATH.fullmatch(scope["raw_path"]) or scope["query_string"]:
            status = 404
        elif not 0 <= length <= MAX_BODY:
            status = 411 if length < 0 else 413
        else:
            await self._pass_on(scope["raw_path"], headers, length, receive, send)
            return
        telemetry.event(_LOG, "request refused", level=logging.WARNING, status=status)
        await _refuse(send, status)

    async def _pass_on(self, path: bytes, headers: _Headers, length: int, receive: _Receive, send: _Send) -> None:
        body: AsyncIterator[bytes] | bytes = _blocks(receive)
        node = None
        try:
            if path == _PULL and length <= _MAX_HELD_BODY:
                node = body = b"".join([block async for block in _blocks(receive)])
                await self._on_asked(node)
                await self._hold(node, receive)
            if self._closing:
                await _refuse(send, 503)
                return
            pushes = self._pushes
            # made here, not by the client, which would add headers of its own
            request = httpx.Request("POST", self._superlink + path.decode(), headers=headers, content=body)
            response = await self._client.send(request, stream=True)
        except httpx.HTTPError:
            await _refuse(send, 502)  # Flower's client tries again
            return
        except OSError:
            await _refuse(send, 408)  # the node went, or does not go on
            return
        except asyncio.CancelledError:
            await _refuse(send, 503)  # uvicorn has done waiting, and would send what is not tried again
            return
        received = await self._pass_back(response, send)
        if node is not None and received is not None and response.status_code == httpx.codes.OK:
            # the body names the node; an answer of no bytes is an answer without messages
            self._asked.pop(node, None)
            self._asked[node] = pushes, AGAIN_S if received else HOLD_S
            if len(self._asked) > _MAX_NODES:
                del self._asked[next(iter(self._asked))]

    async def _pass_back(self, response: httpx.Response, send: _Send) -> int | None:
        """Pass a response to a node; return the bytes of its body, None if it broke off."""
        received = 0
        try:
            headers = _end_to_end(response.headers.raw)
            await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
            async for block in response.aiter_raw():
                received += len(block)
                async with asyncio.timeout(IDLE_S):
                    await send({"type": "http.response.body", "body": block, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except (httpx.HTTPError, TimeoutError, asyncio.CancelledError) as error:
            # the response stays unfinished, so uvicorn ends the connection
            telemetry.event(_LOG, "connection ended", level=logging.DEBUG, error=type(error).__name__)
            return None
        finally:
            await response.aclose()
        return received

    async def _hold(self, node: bytes, receive: _Receive) -> None:
        """Wait for a push if there was none since the node's last request; raise if the node goes meanwhile."""
        pushes, hold_s = self._asked.get(node, (-1, 0.0))
        if pushes != self._pushes:
            return
        gone = asyncio.create_task(receive())
        push = asyncio.create_task(self._pushed.wait())
        try:
            await asyncio.wait({gone, push}, timeout=hold_s, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise ConnectionResetError("the node went while it waited")
        finally:
            gone.cancel()
            push.cancel()
            await asyncio.gather(gone, push, return_exceptions=True)


def _server(app: Callable[..., Awaitable[None]]) -> uvicorn.Server:
    import uvicorn  # an owner's machine, which takes commands from this package, has none

    class Server(uvicorn.Server):
        def capture_signals(self) -> nullcontext[None]:  # type: ignore[override]
            """Leave signals alone: the process handles them, for more than this server."""
            return nullcontext()

    config = uvicorn.Config(
        app, interface="asgi3", http="h11", ws="none", lifespan="off", log_config=None, access_log=False,
        proxy_headers=False, server_header=False, date_header=False,
        h11_max_incomplete_event_size=_MAX_HEADERS, limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=int(IDLE_S), timeout_graceful_shutdown=_STOP_S,
    )  # fmt: skip
    return Server(config)


async def _sweep(server: uvicorn.Server) -> None:
    """Hang up where no request came for `IDLE_S`, or the last bytes are not read.

    uvicorn waits without end for the rest of a head, and asyncio for a peer that reads.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

    before: dict[H11Protocol, RequestResponseCycle | None] = {}
    while True:
        await asyncio.sleep(IDLE_S)
        idle: dict[H11Protocol, RequestResponseCycle | None] = {}
        for each in server.server_state.connections:
            if not isinstance(each, H11Protocol):
                continue
            if each.cycle is None or each.cycle.response_complete or each.transport.is_closing():
                idle[each] = each.cycle
                if each in before and before[each] is each.cycle:
                    each.transport.abort()
        before = idle

"""A reverse proxy in front of the SuperLink: owners reach its Fleet API and nothing else, and wait less.

A SuperLink serves three APIs on one port, and two of them start code on every node without asking who is
there; here only ``POST /v1/fleet/...`` passes. A SuperNode that asks for messages and gets none sleeps for
three seconds, so a request for messages is held back until something was pushed: a long poll, well within the
30 s that Flower's client waits for a response. Requests are passed on once and unchanged. That a SuperNode asks
also tells that the reply it worked on is there in full, because it does one thing after another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fedllm import telemetry
from fedllm.errors import DecodeError, PortBusy
from fedllm.relay.ports import LOOPBACK

_LOG = logging.getLogger(__name__)
HOLD_S = 25.0
"""Seconds that a request for messages is held when the one before brought nothing."""
AGAIN_S = 5.0
"""Seconds that it is held when the one before brought a message: another may have been pushed with that."""
IDLE_S = 60.0
_PULL = b"/v1/fleet/pull-messages"
_PATH = re.compile(rb"/v1/fleet/[a-z-]{1,64}")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*)")
_HOP_BY_HOP = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"upgrade"))
_MAX_HEAD = 1 << 15
_MAX_HELD_BODY = 4096
_MAX_NODES = 10_000
_BLOCK = 1 << 18


@dataclass(frozen=True)
class _Head:
    """First line and headers of a request or response, without those that concern one connection only."""

    first: bytes
    headers: tuple[bytes, ...]
    length: int

    def packed(self, connection: bytes) -> bytes:
        return b"\r\n".join((self.first, *self.headers, b"connection: " + connection, b"", b""))


def _parse(head: bytes) -> _Head:
    first, *lines = head[:-4].split(b"\r\n")
    kept, lengths = [], []
    for line in lines:
        match = _HEADER.fullmatch(line)
        name = match[1].lower() if match else b"transfer-encoding"
        if match is None or name == b"transfer-encoding":
            raise DecodeError("a header that is not passed on")
        if name == b"content-length":
            lengths.append(match[2].strip())
        if name not in _HOP_BY_HOP:
            kept.append(line)
    # one length, in digits: with two, or with another encoding, proxy and server could disagree on where a body ends
    if len(lengths) != 1 or not re.fullmatch(rb"[0-9]{1,12}", lengths[0]):
        raise DecodeError("no content length, or more than one")
    return _Head(first, tuple(kept), int(lengths[0]))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int) -> None:
    while count:
        block = await asyncio.wait_for(reader.read(min(count, _BLOCK)), IDLE_S)
        if not block:
            raise ConnectionResetError("the stream ended in the middle of a body")
        count -= len(block)
        writer.write(block)
        await writer.drain()


def names_node(body: bytes, node: str) -> bool:
    """Whether the body of a request names a node: its id, a number, as it stands in a protobuf message."""
    number, encoded = int(node), bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number]) in body


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
        self._port = port
        self._on_asked = asked
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._pushes = 0
        self._pushed = asyncio.Event()
        self._asked: dict[bytes, tuple[int, float]] = {}

    async def open(self, host: str, port: int) -> None:
        """Listen.

        Raises
        ------
        PortBusy
            If another program listens there.
        """
        try:
            self._server = await asyncio.start_server(self._accept, host, port, limit=_MAX_HEAD)
        except OSError as error:
            raise PortBusy(
                f"another program listens on {host}:{port}, or the address is not ours ({error.strerror})",
                hint="choose another flower_port",
            ) from None

    def pushed(self) -> None:
        """Let the requests for messages through: there are some."""
        self._pushes += 1
        self._pushed.set()
        self._pushed = asyncio.Event()

    async def close(self) -> None:
        """Stop listening and end every connection."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            telemetry.event(_LOG, "connection ended", level=logging.DEBUG, error=type(error).__name__)
        except DecodeError as error:
            telemetry.event(_LOG, "request refused", level=logging.WARNING, error=error.message)
            await self._refuse(writer, b"400 Bad Request")
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Pass one request and its response on; return whether the connection can be used again."""
        request = _parse(await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), IDLE_S))
        method, _, rest = request.first.partition(b" ")
        path = rest.removesuffix(b" HTTP/1.1")
        if method != b"POST" or not _PATH.fullmatch(path):
            raise DecodeError("a request that is not for the Fleet API")
        held = b""
        if path == _PULL and request.length <= _MAX_HELD_BODY:
            held = await asyncio.wait_for(reader.readexactly(request.length), IDLE_S)
            await self._on_asked(held)
            await self._hold(held, reader)
        pushes = self._pushes
        try:
            up_reader, up_writer = await asyncio.open_connection(LOOPBACK, self._port, limit=_MAX_HEAD)
        except OSError:
            await self._refuse(writer, b"502 Bad Gateway")  # Flower's client tries again
            return False
        try:
            up_writer.write(request.packed(b"close") + held)
            await _copy(reader, up_writer, request.length - len(held))
            response = _parse(await asyncio.wait_for(up_reader.readuntil(b"\r\n\r\n"), IDLE_S))
            writer.write(response.packed(b"keep-alive"))
            await _copy(up_reader, writer, response.length)
        finally:
            up_writer.close()
        if held and response.first.split()[1:2] == [b"200"]:
            # the body names the node; an answer of no bytes is an answer without messages
            self._asked.pop(held, None)
            self._asked[held] = pushes, AGAIN_S if response.length else HOLD_S
            if len(self._asked) > _MAX_NODES:
                del self._asked[next(iter(self._asked))]
        return True

    async def _hold(self, node: bytes, reader: asyncio.StreamReader) -> None:
        """Wait for a push if there was none since the node's last request; raise if the node goes meanwhile."""
        pushes, hold_s = self._asked.get(node, (-1, 0.0))
        if pushes != self._pushes:
            return
        gone = asyncio.create_task(reader.read(1))
        push = asyncio.create_task(self._pushed.wait())
        try:
            await asyncio.wait({gone, push}, timeout=hold_s, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise ConnectionResetError("the node went while it waited")
        finally:
            gone.cancel()
            push.cancel()
            await asyncio.gather(gone, push, return_exceptions=True)

    async def _refuse(self, writer: asyncio.StreamWriter, status: bytes) -> None:
        with contextlib.suppress(OSError):
            writer.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            await writer.drain()

"""The envelope service: gRPC without protobuf, opaque bytes both ways, on unix sockets only their user can reach.

Owner's side: unary-stream ``Deliver``, served by the daemon; the request goes in, the reply's head comes out, then
one message for each of its parts. Coordinator's side: stream-stream ``Link``, served by the coordinator, called
by the ServerApp relay. Names and frames are repeated in the relay bundle, which must not import fedllm.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import stat
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from fedllm import telemetry
from fedllm.errors import ConfigError, DecodeError, PortBusy
from fedllm.relay.carrier import Reply

_LOG = logging.getLogger(__name__)
SERVICE = "fedllm.Relay"
DELIVER = f"/{SERVICE}/Deliver"
LINK = f"/{SERVICE}/Link"
MAX_SOCKET_PATH = 100
"""Bytes; Linux allows 107 for a unix socket's path, macOS 103."""
UNHURRIED = (("grpc.http2.bdp_probe", 0),)
"""On a unix socket a window of 64 KiB is as fast as any; without this, gRPC grows it to megabytes of read-ahead."""
UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))

MAX_REQUEST = 256 << 20
"""Bytes of the largest request that a daemon reads, an adapter of 64 million parameters in it."""
MAX_CALLS = 16
"""Requests that are served at once; with `MAX_REQUEST` it bounds what a hostile relay can make a daemon hold."""
MAX_HEAD = 64 << 20
"""Bytes of the largest head that is taken from an owner."""
MAX_PART = (4 << 20) + 4096
"""Bytes of the largest part: a chunk of 4 MiB, and some for whoever wraps it."""
MAX_PARTS = 4096
STALL_S = 30.0
"""Seconds that one part may take."""
PER_PART_S = 5.0
"""Seconds that each part adds to what all of them may take, so that a trickle ends too."""

Deliver = Callable[[bytes], Awaitable[Reply]]
LinkHandler = Callable[[AsyncIterator[bytes], Callable[[bytes], Awaitable[None]]], Awaitable[None]]
"""Called once per connection with the frames that come up and a function that sends one down."""


def _identity(data: bytes) -> bytes:
    return data


class EnvelopeServer:
    """A gRPC server on one unix socket; start with `serve_deliver` or `serve_link`."""

    def __init__(self, server: grpc.aio.Server, path: Path) -> None:
        self._server = server
        self.path = path

    async def stop(self, grace_s: float = 1.0) -> None:
        """Stop serving and remove the socket."""
        await self._server.stop(grace_s)
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


async def serve_deliver(path: Path, deliver: Deliver) -> EnvelopeServer:
    """Serve ``Deliver`` on a unix socket.

    Parameters
    ----------
    path : Path
        The socket; its folder is made or set to mode 0700, the socket to 0600.
    deliver : Deliver
        Sealed request to reply. Must not raise; if it does, the caller learns nothing of why.

    Raises
    ------
    ConfigError
        If the path is too long for a socket.
    PortBusy
        If another process serves there.
    """
    underway: set[asyncio.Future[Reply]] = set()

    def ended(work: asyncio.Future[Reply]) -> None:
        underway.discard(work)
        if not work.cancelled():
            work.exception()  # retrieved: the caller that it would go to may be gone

    async def handle(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        # what the daemon has begun it ends: a caller that goes away in the middle asks again, for the recorded answer
        work = asyncio.ensure_future(deliver(request))
        underway.add(work)
        work.add_done_callback(ended)
        try:
            reply = await asyncio.shield(work)
        except Exception as error:  # noqa: BLE001 - the boundary: the relay is hostile and learns nothing of why
            telemetry.event(_LOG, "deliver failed", level=logging.ERROR, error=type(error).__name__)
            await context.abort(grpc.StatusCode.INTERNAL, "failed")
            raise AssertionError("abort raises") from None
        with contextlib.suppress(grpc.aio.BaseError):  # a caller that is gone asks again
            await context.write(reply.head)
            for part in reply.parts:
                await context.write(part)

    method = grpc.unary_stream_rpc_method_handler(handle, _identity, _identity)
    limits = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", MAX_REQUEST))
    return await _serve(path, "Deliver", method, limits)


async def serve_link(path: Path, link: LinkHandler) -> EnvelopeServer:
    """Serve ``Link`` on a unix socket; errors as in `serve_deliver`."""

    async def handle(frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await link(frames, context.write)

    method = grpc.stream_stream_rpc_method_handler(handle, _identity, _identity)
    return await _serve(path, "Link", method, UNLIMITED)


async def _serve(path: Path, name: str, method: Any, limits: Iterable[tuple[str, int]]) -> EnvelopeServer:
    prepare_socket(path)
    server = grpc.aio.server(options=(*limits, *UNHURRIED), maximum_concurrent_rpcs=MAX_CALLS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {name: method}),))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    path.chmod(0o600)  # noqa: ASYNC240 - one quick call
    return EnvelopeServer(server, path)


def prepare_socket(path: Path) -> None:
    """Make the folder private, and remove a socket that nobody serves any more.

    Raises
    ------
    ConfigError, PortBusy
    """
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ConfigError(
            f"socket path of {len(os.fsencode(path))} bytes, at most {MAX_SOCKET_PATH} allowed: {path}",
            hint="choose a home folder with a shorter path",
        )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.parent.chmod(0o700)
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise ConfigError(f"{path} exists and is not a socket", hint="move it away")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
    raise PortBusy(f"another process serves {path}", hint="is this program running already?")


def deliver_channel(path: Path) -> grpc.aio.Channel:
    """Return a channel to an owner's socket; call it with `deliver_over` or `start_delivery`."""
    options = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", MAX_HEAD), *UNHURRIED)
    return grpc.aio.insecure_channel(f"unix:{path}", options=options)


class Delivery:
    """A reply on its way: its head is here, its parts are read when asked for; made by `start_delivery`.

    Attributes
    ----------
    head : bytes
    """

    def __init__(self, call: grpc.aio.UnaryStreamCall[bytes, bytes], head: bytes) -> None:
        self._call = call
        self.head = head

    async def each_part(
        self, *, stall_s: float = STALL_S, per_part_s: float = PER_PART_S
    ) -> AsyncGenerator[bytes, None]:
        """Read one part after another; between them gRPC's flow control stops the sender.

        Parameters
        ----------
        stall_s : float
            Seconds that one part may take, the end of the stream too.
        per_part_s : float
            All of them may take `stall_s` and this for each that came; the reader's own time does not count.

        Raises
        ------
        DecodeError
            If a part is larger than `MAX_PART`, or there are more than `MAX_PARTS`.
        TimeoutError
            If the sender stalls.
        grpc.aio.AioRpcError
            If the call ends with an error, its own deadline included.
        """
        loop, count, left_s = asyncio.get_running_loop(), 0, stall_s
        try:
            while True:
                began_s = loop.time()
                part = await asyncio.wait_for(self._call.read(), min(stall_s, left_s))
                left_s += per_part_s - (loop.time() - began_s)
                if part is grpc.aio.EOF:
                    return
                count += 1
                if count > MAX_PARTS or len(part) > MAX_PART:
                    raise DecodeError(
                        f"part {count} of a reply has {len(part)} bytes; "
                        f"at most {MAX_PARTS} parts of {MAX_PART} bytes are allowed"
                    )
                yield part
        finally:
            self.cancel()

    async def reply(self) -> Reply:
        """Read all parts; errors as in `each_part`."""
        async with aclosing(self.each_part()) as parts:
            return Reply(self.head, tuple([part async for part in parts]))

    def cancel(self) -> None:
        """Give the rest of the reply up; nothing if it is complete."""
        self._call.cancel()


async def start_delivery(channel: grpc.aio.Channel, request: bytes, *, timeout_s: float) -> Delivery:
    """Send one request and wait for the reply's head.

    Parameters
    ----------
    timeout_s : float
        For head and parts together.

    Raises
    ------
    grpc.aio.AioRpcError
        If there is no answer in time.
    DecodeError
        If the answer has no head.
    """
    method = channel.unary_stream(DELIVER, request_serializer=_identity, response_deserializer=_identity)
    call = method(request, timeout=timeout_s)
    head = await call.read()
    if head is grpc.aio.EOF:
        raise DecodeError("a reply without a head")
    return Delivery(call, head)


async def deliver_over(channel: grpc.aio.Channel, request: bytes, *, timeout_s: float) -> Reply:
    """Send one request and read the whole reply; errors as in `start_delivery` and `Delivery.each_part`."""
    return await (await start_delivery(channel, request, timeout_s=timeout_s)).reply()


def pack_frame(header: dict[str, Any], *parts: bytes) -> bytes:
    """Return one frame of the link: length of the JSON header (4 bytes, big endian), header, parts.

    The header's ``sizes`` is set to the lengths of the parts.
    """
    encoded = json.dumps({**header, "sizes": [len(p) for p in parts]}).encode()
    return b"".join((struct.pack(">I", len(encoded)), encoded, *parts))


def unpack_frame(frame: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Return header and parts of a frame; raise `DecodeError` if it is none."""
    try:
        (size,) = struct.unpack_from(">I", frame)
        header = json.loads(frame[4 : 4 + size])
        sizes = [int(n) for n in header["sizes"]]
    except (struct.error, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DecodeError(f"link frame of {len(frame)} bytes is malformed ({type(error).__name__})") from None
    if min(sizes, default=0) < 0 or 4 + size + sum(sizes) != len(frame):
        raise DecodeError(f"link frame of {len(frame)} bytes does not hold the parts it names")
    parts, at = [], 4 + size
    for each in sizes:
        parts.append(frame[at : at + each])
        at += each
    return header, parts

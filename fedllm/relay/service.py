"""The envelope service: gRPC without protobuf, opaque bytes both ways, on unix sockets only their user can reach.

Owner's side: unary ``Deliver(bytes) -> bytes``, served by the daemon. Coordinator's side: stream-stream
``Link``, served by the coordinator, called by the ServerApp relay. Names and frames are repeated in the
relay bundle, which must not import fedllm.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from fedllm import telemetry
from fedllm.errors import ConfigError, DecodeError, PortBusy

_LOG = logging.getLogger(__name__)
SERVICE = "fedllm.Relay"
DELIVER = f"/{SERVICE}/Deliver"
LINK = f"/{SERVICE}/Link"
MAX_SOCKET_PATH = 100
"""Bytes; Linux allows 107 for a unix socket's path, macOS 103."""
UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))

Deliver = Callable[[bytes], Awaitable[bytes]]
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
        Sealed request to sealed reply. Must not raise; if it does, the caller learns nothing of why.

    Raises
    ------
    ConfigError
        If the path is too long for a socket.
    PortBusy
        If another process serves there.
    """

    async def handle(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        try:
            return await deliver(request)
        except Exception as error:  # noqa: BLE001 - the boundary: the relay is hostile and learns nothing of why
            telemetry.event(_LOG, "deliver failed", level=logging.ERROR, error=type(error).__name__)
            await context.abort(grpc.StatusCode.INTERNAL, "failed")
            raise AssertionError("abort raises") from None

    method = grpc.unary_unary_rpc_method_handler(handle, _identity, _identity)
    return await _serve(path, "Deliver", method)


async def serve_link(path: Path, link: LinkHandler) -> EnvelopeServer:
    """Serve ``Link`` on a unix socket; errors as in `serve_deliver`."""

    async def handle(frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await link(frames, context.write)

    method = grpc.stream_stream_rpc_method_handler(handle, _identity, _identity)
    return await _serve(path, "Link", method)


async def _serve(path: Path, name: str, method: Any) -> EnvelopeServer:
    prepare_socket(path)
    server = grpc.aio.server(options=UNLIMITED)
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
    """Return a channel to an owner's socket; call it with `deliver_over`."""
    return grpc.aio.insecure_channel(f"unix:{path}", options=UNLIMITED)


async def deliver_over(channel: grpc.aio.Channel, request: bytes, *, timeout_s: float) -> bytes:
    """Send one request over a channel; raises ``grpc.aio.AioRpcError`` when there is no answer in time."""
    call = channel.unary_unary(DELIVER, request_serializer=_identity, response_deserializer=_identity)
    reply: bytes = await call(request, timeout=timeout_s)
    return reply


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
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise DecodeError(f"link frame of {len(frame)} bytes is malformed ({type(error).__name__})") from None
    if min(sizes, default=0) < 0 or 4 + size + sum(sizes) != len(frame):
        raise DecodeError(f"link frame of {len(frame)} bytes does not hold the parts it names")
    parts, at = [], 4 + size
    for each in sizes:
        parts.append(frame[at : at + each])
        at += each
    return header, parts

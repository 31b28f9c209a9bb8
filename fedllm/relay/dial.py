"""The owner's end of the direct transport: dials the coordinator and hands its requests to the daemon's socket.

A program of its own, on grpc and the standard library alone, because it runs without read access to data, keys
of identity and ledger; it is started from a copy, and frames and names are repeated here. It knows nothing of
what the bytes say. One stream to the coordinator; down come requests, up go replies: a head, then parts of at
most 4 MiB, each a message of its own, never two replies at once. A lost stream is dialled again, and what was
under way on it is forgotten: the coordinator asks again and the daemon answers from its record.

Usage: ``dial.py --address HOST:PORT --name NAME --tls FOLDER --socket SOCKET``, with ``tls.key``, ``tls.pem`` and
``coordinator.pem`` in the folder.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import struct
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

OWNER = "/fedllm.Relay/Owner"
DELIVER = "/fedllm.Relay/Deliver"
PROTOCOL = 1
FIRST_PAUSE_S = 0.1
LAST_PAUSE_S = 5.0
WELCOME_S = 20.0
AT_ONCE = 4
"""Requests in the daemon's hands at a time; more wait here."""
MOST_WAITING = 64
_DAEMON_PAUSE_S = 0.2
_DAEMON_GONE_S = 3.0
"""A daemon that is restarted by its supervisor serves its socket again within this."""
_UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
_TO_DAEMON = (
    *_UNLIMITED,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
_TO_COORDINATOR = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", 1 << 30),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
)


@dataclass(frozen=True)
class Options:
    """What the command line gave.

    Attributes
    ----------
    address : str
        ``host:port`` of the coordinator.
    name : str
        Name in the coordinator's certificate.
    tls : Path
        Folder of the three PEM files.
    socket : Path
        The daemon's.
    """

    address: str
    name: str
    tls: Path
    socket: Path


class DaemonSilent(Exception):
    """The daemon gave no whole reply; the message is gRPC's code."""


def _identity(data: bytes) -> bytes:
    return data


def pack(header: dict[str, Any], *parts: bytes) -> bytes:
    """Return one frame: length of the JSON header (4 bytes, big endian), header, parts."""
    encoded = json.dumps({**header, "sizes": [len(p) for p in parts]}).encode()
    return b"".join((struct.pack(">I", len(encoded)), encoded, *parts))


def unpack(frame: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Return header and parts of a frame; raise ValueError or the like if it is none."""
    (size,) = struct.unpack_from(">I", frame)
    header = json.loads(frame[4 : 4 + size])
    parts, at = [], 4 + size
    for each in header["sizes"]:
        parts.append(frame[at : at + each])
        at += each
    return header, parts


def say(what: str) -> None:
    """Write one line of the log."""
    sys.stderr.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {what}\n")
    sys.stderr.flush()


def in_words(code: grpc.StatusCode, details: str) -> str:
    """Return why a connection was not made or has ended, for people."""
    low = details.lower()
    if code is not grpc.StatusCode.UNAVAILABLE:
        return f"the coordinator said {code.name}: {details[:200]}"
    for signs, words in _WORDS:
        if any(sign in low for sign in signs):
            return words
    return details[:200] or "no reason given"


_WORDS = (
    (("certificate_verify_failed", "hostname verification"),
     "who answers there has another certificate than the one pinned here, or an expired one"),
    (("handshake failed",), "who answers there does not speak TLS as the coordinator does"),
    (("refused",), "nobody listens there"),
    (("keepalive", "ping", "timed out", "timeout"), "no sign of life in time"),
    (("closed", "reset", "broken pipe"),
     "the other end hung up; if it does so at once, it does not know this owner's certificate"),
)  # fmt: skip


class Dialler:
    """Keeps one stream to the coordinator.

    Parameters
    ----------
    options : Options
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        read = (options.tls / name for name in ("coordinator.pem", "tls.key", "tls.pem"))
        self._credentials = grpc.ssl_channel_credentials(*(path.read_bytes() for path in read))

    async def keep(self) -> None:
        """Dial until cancelled."""
        pause_s, before = FIRST_PAUSE_S, ""
        async with grpc.aio.insecure_channel(f"unix:{self._options.socket}", options=_TO_DAEMON) as daemon:
            while True:
                began_s = time.monotonic()
                connected, why = await self._line(daemon)
                if connected:
                    say(f"lost {self._options.address}: {why}")
                elif why != before:  # one line for as long as it stays the same
                    say(f"not connected to {self._options.address}: {why}")
                before = "" if connected else why
                if time.monotonic() - began_s > LAST_PAUSE_S:
                    pause_s = FIRST_PAUSE_S
                # spread out, or all owners would come back in the same moment
                await asyncio.sleep(pause_s * (0.5 + os.urandom(1)[0] / 256))
                pause_s = min(2 * pause_s, LAST_PAUSE_S)

    async def _line(self, daemon: grpc.aio.Channel) -> tuple[bool, str]:
        """Serve one stream until it ends; return whether there was one, and why it ended."""
        options = (("grpc.ssl_target_name_override", self._options.name), *_TO_COORDINATOR)
        connected = False
        async with grpc.aio.secure_channel(self._options.address, self._credentials, options=options) as channel:
            call = channel.stream_stream(OWNER, request_serializer=_identity, response_deserializer=_identity)()
            try:
                await _greet(call)
                connected = True
                say(f"connected to {self._options.address}")
                await _Line(call, daemon).serve()
            except Exception as error:  # noqa: BLE001 - whatever it was, it ends this stream only, and is said
                return connected, _why(error)
            finally:
                call.cancel()
        return connected, "the coordinator ended the stream"


def _why(error: BaseException) -> str:
    found = [error]
    for each in found:
        if isinstance(each, BaseExceptionGroup):
            found += each.exceptions
    for each in found:
        if isinstance(each, grpc.aio.AioRpcError):
            return in_words(each.code(), each.details() or "")
    if isinstance(found[-1], EOFError):
        return "the coordinator ended the stream"
    if isinstance(found[-1], TimeoutError):
        return "no sign of life in time"
    return f"{type(found[-1]).__name__} while speaking with the coordinator"


async def _greet(call: Any) -> None:
    await call.write(pack({"op": "hello", "protocol": PROTOCOL}))
    frame = await asyncio.wait_for(call.read(), WELCOME_S)
    if frame is grpc.aio.EOF:
        raise EOFError
    if unpack(frame)[0]["op"] != "welcome":
        raise ValueError("no welcome")


class _Line:
    """One stream: takes requests down and sends replies up, each whole before the next."""

    def __init__(self, call: Any, daemon: grpc.aio.Channel) -> None:
        self._call = call
        self._daemon = daemon
        self._up = asyncio.Lock()
        self._free = asyncio.Semaphore(AT_ONCE)
        self._tags: set[str] = set()

    async def serve(self) -> None:
        """Answer requests until the stream ends; always by an exception, which ends what is under way."""
        async with asyncio.TaskGroup() as answering:
            while (frame := await self._call.read()) is not grpc.aio.EOF:
                header, parts = unpack(frame)
                if header["op"] != "ask" or len(parts) != 1 or len(self._tags) >= MOST_WAITING:
                    raise ValueError("not a request, or too many")
                tag, until_s = str(header["tag"]), time.monotonic() + float(header["deadline_s"])
                self._tags.add(tag)
                answering.create_task(self._answer(tag, parts[0], until_s))
            raise EOFError

    async def _answer(self, tag: str, request: bytes, until_s: float) -> None:
        async with self._free:
            await self._pass(tag, request, until_s)
        self._tags.discard(tag)

    async def _pass(self, tag: str, request: bytes, until_s: float) -> None:
        """Have the daemon answer one request, and send its reply up as it comes."""
        try:
            async with contextlib.aclosing(self._deliver(request, until_s)) as messages:
                head = await anext(messages)
                part = await anext(messages, None)
                async with self._up:
                    await self._send("head", tag, head, more=part is not None)
                    while part is not None:
                        await self._send("part", tag, part)
                        part = await anext(messages, None)
                        if part is None:
                            await self._send("end", tag)
        except DaemonSilent as silence:
            say(f"the daemon gave no whole answer: {silence}")
            async with self._up:
                await self._send("failed", tag)

    async def _send(self, op: str, tag: str, *parts: bytes, **more: bool) -> None:
        await self._call.write(pack({"op": op, "tag": tag, **more}, *parts))

    async def _deliver(self, request: bytes, until_s: float) -> AsyncGenerator[bytes, None]:
        """Yield the messages of the daemon's reply; try again for a moment where nobody serves its socket."""
        gone_s = min(until_s, time.monotonic() + _DAEMON_GONE_S)
        method = self._daemon.unary_stream(DELIVER, request_serializer=_identity, response_deserializer=_identity)
        count = 0
        while True:
            call = method(request, timeout=max(0.0, until_s - time.monotonic()))
            try:
                async for message in call:
                    count += 1
                    yield message
                if not count:
                    raise DaemonSilent("nothing in it")
                return
            except grpc.aio.AioRpcError as error:
                again = error.code() is grpc.StatusCode.UNAVAILABLE and not count and time.monotonic() < gone_s
                if not again:
                    raise DaemonSilent(error.code().name) from None
            finally:
                call.cancel()
            await asyncio.sleep(_DAEMON_PAUSE_S)


async def _until_told(options: Options) -> None:
    dialling = asyncio.current_task()
    assert dialling is not None  # noqa: S101 - a coroutine that runs has a task
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, dialling.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await Dialler(options).keep()
    say("stopped")


def main(arguments: Sequence[str]) -> int:
    """Dial until SIGTERM."""
    parser = argparse.ArgumentParser(prog="fedllm-dial")
    parser.add_argument("--address", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--tls", required=True, type=Path)
    parser.add_argument("--socket", required=True, type=Path)
    asyncio.run(_until_told(Options(**vars(parser.parse_args(arguments)))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""One owner's stream of the direct transport, as the coordinator sees it, and what is reported of a request on it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from fedllm.errors import DecodeError
from fedllm.relay.carrier import Reply
from fedllm.relay.service import pack_frame, unpack_frame


@dataclass
class Vector:
    """A reply with parts stands waiting on its stream; `go` is set to whether its parts are wanted."""

    go: asyncio.Future[bool]


class Lost:
    """The stream that the request was sent on is gone."""


class Failed:
    """The owner's end has no answer."""


Event = Reply | Vector | Lost | Failed


@dataclass(eq=False)
class Parcel:
    """One request to one node, and what its streams report of it; `settled` once there is nothing more to hear."""

    tag: str
    data: bytes = field(repr=False)
    began_s: float
    until_s: float
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    waiting: asyncio.Future[bool] | None = None
    settled: bool = False

    def hear(self, event: Event) -> None:
        """Take a report."""
        if not self.settled:
            self.settled = isinstance(event, Reply | Failed)
            self.waiting = event.go if isinstance(event, Vector) else None
            self.events.put_nowait(event)

    def close(self) -> None:
        """Let go of a stream that waits for word about its parts."""
        self.settled = True
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_result(False)


class Line:
    """One owner's stream."""

    def __init__(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        self._context = context
        self.outbox: asyncio.Queue[Parcel] = asyncio.Queue()
        self.replaced = asyncio.Event()

    async def read(self) -> tuple[dict[str, Any], list[bytes]]:
        """Return the next frame.

        Raises
        ------
        EOFError
            At the end of the stream.
        DecodeError
            If it is no frame.
        """
        frame = await self._context.read()
        if frame is grpc.aio.EOF:
            raise EOFError
        header, parts = unpack_frame(frame)
        if len(parts) > 1 or not isinstance(header.get("op"), str):
            raise DecodeError(f"frame of {len(frame)} bytes with {len(parts)} parts is none of this protocol")
        return header, parts

    async def write(self, header: dict[str, Any], *parts: bytes) -> None:
        """Send one frame."""
        await self._context.write(pack_frame(header, *parts))

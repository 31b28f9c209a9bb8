"""One connected relay run, as the coordinator sees it: what is written to it, and when it is over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine

import grpc
import grpc.aio

from fedllm.relay.parcels import Assembly
from fedllm.relay.service import pack_frame

Write = Callable[[bytes], Awaitable[None]]


class Run:
    """A connected relay run.

    Parameters
    ----------
    write : Write
        Sends one frame down; a second call before the first has returned is an error that loses its frame.
    assembly : Assembly

    Attributes
    ----------
    nodes : tuple[str, ...]
        What it reported last.
    ended : asyncio.Event
        Set when nothing more is read from it.
    """

    def __init__(self, write: Write, assembly: Assembly) -> None:
        self._write = write
        self._writing = asyncio.Lock()
        self._underway: asyncio.Task[None] | None = None
        self._over = asyncio.Event()
        self.assembly = assembly
        self.nodes: tuple[str, ...] = ()
        self.ended = asyncio.Event()

    def end(self) -> None:
        """Have the stream ended; the run's successor sends again what is pending."""
        self._over.set()

    async def until_over(self, work: Coroutine[None, None, None]) -> None:
        """Do something for as long as the run lasts."""
        tasks = [asyncio.create_task(work), asyncio.create_task(_wait(self._over))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def send(self, header: dict[str, object], *blobs: bytes) -> None:
        """Send one frame down, unless the run is over first; a write that fails ends the run.

        Whoever is cancelled while the frame stands in flow control leaves it to be written: a frame cannot be
        taken back, and the next one must wait for it.
        """
        await self.until_over(self._send(header, *blobs))

    async def written(self) -> None:
        """Wait for a frame that stands in flow control: gRPC does not end a stream before that."""
        if self._underway is not None:
            await asyncio.shield(self._underway)

    async def _send(self, header: dict[str, object], *blobs: bytes) -> None:
        await self._writing.acquire()
        self._underway = asyncio.create_task(self._pass(pack_frame(header, *blobs)))
        self._underway.add_done_callback(lambda _: self._writing.release())
        await asyncio.shield(self._underway)

    async def _pass(self, frame: bytes) -> None:
        try:
            await self._write(frame)
        except (grpc.RpcError, grpc.aio.BaseError):
            self.end()


async def _wait(event: asyncio.Event) -> None:
    await event.wait()

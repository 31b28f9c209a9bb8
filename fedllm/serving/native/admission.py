"""Requests that wait until their version has a slot: the asyncio face of `SlotTable`. No torch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fedllm.errors import FedllmError, Overloaded, ProcessDied
from fedllm.ids import Digest
from fedllm.serving.native.slots import SlotTable

Write = Callable[[int], Awaitable[None]]
"""Copies one version into the slot of this index."""


class SlotQueue:
    """Leads requests to slots: at once, or in turn after a copy. Belongs to the event loop.

    Parameters
    ----------
    table : SlotTable
        Only changed through this object.
    """

    def __init__(self, table: SlotTable) -> None:
        self.table = table
        self._loop = asyncio.get_running_loop()
        self._waiters: dict[Digest, list[asyncio.Future[int]]] = {}
        self._writes: dict[Digest, Write] = {}
        self._copies: set[asyncio.Task[None]] = set()
        self._released = asyncio.Event()

    def admits(self, digest: Digest) -> bool:
        """Whether `acquire_now` would succeed."""
        return self.table.admits(digest, self._loop.time())

    def acquire_now(self, digest: Digest) -> int:
        """Count a request on a loaded version and return the slot; see `SlotTable.acquire`."""
        return self.table.acquire(digest, self._loop.time())

    async def acquire(self, digest: Digest, write: Write, *, wait: bool = True) -> int:
        """Count a request on a version, waiting until it is in a slot.

        Parameters
        ----------
        digest : Digest
            The version.
        write : Write
            Copies it; called at most once for all that wait for it.
        wait : bool
            Whether to wait in turn if no slot is to be had now.

        Raises
        ------
        Overloaded
            If every slot is pinned; without `wait`, also if every slot is in use.
        """
        if self.admits(digest):
            return self.acquire_now(digest)
        if not self.table.loading(digest):
            if not wait and (self.table.waiting() or not self.table.spare()):
                raise Overloaded(
                    f"all {self.table.count} adapter slots are pinned or in use",
                    hint="raise the number of slots, or retry when requests have ended",
                )
            self.table.wait(digest, self._loop.time())
            self._writes[digest] = write
        turn: asyncio.Future[int] = self._loop.create_future()
        self._waiters.setdefault(digest, []).append(turn)
        self.serve()
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # its turn came in the same moment
                self.release(digest)
            elif not any(not waiter.done() for waiter in self._waiters.get(digest, ())):
                self._forget(digest)
            raise

    def release(self, digest: Digest) -> None:
        """Count one request less, and serve the queue."""
        self.table.release(digest)
        self._released.set()
        self.serve()

    async def drained(self, digest: Digest) -> None:
        """Wait until no request uses a version."""
        while self.table.requests(digest):
            self._released.clear()
            await self._released.wait()

    def serve(self) -> None:
        """Give slots to those whose turn it is; call it whenever one may have fallen free."""
        while (granted := self.table.grant()) is not None:
            digest, index = granted
            write = self._writes.pop(digest)
            if index is None:
                self._admit(digest)
            else:
                copy = asyncio.create_task(self._copy(digest, index, write))
                self._copies.add(copy)
                copy.add_done_callback(self._copies.discard)

    async def _copy(self, digest: Digest, index: int, write: Write) -> None:
        try:
            await write(index)
        except BaseException as error:
            self.table.free(digest)
            self._fail(digest, error)
            self.serve()
            if not isinstance(error, Exception):
                raise
        else:
            self.table.commit(digest)
            self._admit(digest)
            self.serve()

    def _admit(self, digest: Digest) -> None:
        waiters = [turn for turn in self._waiters.pop(digest, []) if not turn.done()]
        index = self.table.admit_waiting(digest, len(waiters))
        for turn in waiters:
            turn.set_result(index)

    def _fail(self, digest: Digest, error: BaseException) -> None:
        known = error if isinstance(error, FedllmError) else ProcessDied(f"loading failed ({type(error).__name__})")
        for turn in self._waiters.pop(digest, []):
            if not turn.done():
                turn.set_exception(known)

    def _forget(self, digest: Digest) -> None:
        self._waiters.pop(digest, None)
        self._writes.pop(digest, None)
        self.table.leave(digest)
        self.serve()

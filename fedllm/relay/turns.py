"""Replies of many nodes one after another, and one vector at a time: what several carriers do alike."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable

from fedllm.relay.carrier import Reply


class Turn:
    """Whose vector may be in memory: taken before its parts are read, given back when the reader has done with it."""

    def __init__(self) -> None:
        self._holder: str | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def free(self) -> None:
        """Wait, in order of asking, until nobody holds the turn."""
        loop = asyncio.get_running_loop()
        while self._holder is not None:
            place = loop.create_future()
            self._waiting.append(place)
            try:
                await place
            finally:
                # one is woken at a time, and the next only if this one did not take the turn at once
                loop.call_soon(self._wake)

    async def take(self, node: str) -> None:
        """Wait until nobody holds the turn, and hold it."""
        await self.free()
        self._holder = node

    def give_back(self, node: str) -> None:
        """End the turn of `node`; nothing if it has none."""
        if self._holder == node:
            self._holder = None
            self._wake()

    def _wake(self) -> None:
        while self._waiting and self._holder is None:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return


Ask = Callable[[str, Turn], Awaitable[Reply | None]]
"""Asks one node. Takes the turn before it reads parts, and returns holding it; None for no answer."""


async def as_they_come(nodes: Iterable[str], ask: Ask) -> AsyncGenerator[tuple[str, Reply], None]:
    """Ask all nodes at once and yield the replies as they come, each node once at most.

    While the reader is busy with a reply that has parts, no other node's parts are read. Closing the generator
    cancels what is left and waits for its end.

    Parameters
    ----------
    nodes : Iterable[str]
        Asked in this order; those that answer without waiting are yielded in this order.
    ask : Ask
        What it raises ends the iteration and is raised here.
    """
    turn = Turn()
    done: asyncio.Queue[tuple[str, asyncio.Task[Reply | None]]] = asyncio.Queue()

    async def one(node: str) -> Reply | None:
        reply = None
        try:
            reply = await ask(node, turn)
        finally:
            if reply is None or not reply.parts:
                turn.give_back(node)
        return reply

    # a task is let go with its reply: nothing here keeps a vector once it was yielded
    waiting: set[asyncio.Task[Reply | None]] = set()
    for node in nodes:
        task = asyncio.create_task(one(node))
        task.add_done_callback(lambda task, node=node: done.put_nowait((node, task)))  # type: ignore[misc]
        waiting.add(task)
    try:
        while waiting:
            node, task = await done.get()
            waiting.discard(task)
            reply = task.result()
            del task
            if reply is not None:
                yield node, reply
                del reply
                turn.give_back(node)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

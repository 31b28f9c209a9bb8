"""The carrier of simulations and tests: calls handlers in this process, loses and repeats messages on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from fedllm.clock import Clock

Handler = Callable[[bytes], Awaitable[bytes]]


class Direction(StrEnum):
    """Which way a message goes."""

    TO_OWNER = "to-owner"
    TO_COORDINATOR = "to-coordinator"


@dataclass(frozen=True)
class Passage:
    """One message on its way; `index` counts all messages of a carrier from 0, in order of sending."""

    index: int
    node: str
    direction: Direction
    data: bytes = field(repr=False)


Predicate = Callable[[Passage], bool]


def _never(_passage: Passage) -> bool:
    return False


@dataclass(frozen=True)
class Faults:
    """What goes wrong, each by a predicate over the message.

    Attributes
    ----------
    drop : Predicate
        The message is lost; the node misses this exchange.
    duplicate : Predicate
        A request is delivered twice, its first reply is the one that returns.
    delay_s : Callable[[Passage], float]
        Seconds the message is late; past the exchange's deadline it arrives, unheard.
    tamper : Callable[[Passage], bytes]
        What arrives instead.
    reorder : Callable[[Sequence[str]], Sequence[str]]
        Order in which the nodes of one exchange are asked.
    """

    drop: Predicate = _never
    duplicate: Predicate = _never
    delay_s: Callable[[Passage], float] = lambda _passage: 0.0
    tamper: Callable[[Passage], bytes] = lambda passage: passage.data
    reorder: Callable[[Sequence[str]], Sequence[str]] = lambda nodes: nodes


class MemoryCarrier:
    """Delivers to handlers in this process.

    Parameters
    ----------
    handlers : Mapping[str, Handler]
        Node to its daemon's ``handle``. The mapping is read at every exchange, so removing an entry is a death.
    clock : Clock, optional
        Makes the delays; without one a delay past the deadline is a drop and a shorter one is nothing.
    faults : Faults

    Attributes
    ----------
    log : list[Passage]
        Every message that was sent, in order, delivered or not.
    """

    def __init__(
        self, handlers: Mapping[str, Handler], *, clock: Clock | None = None, faults: Faults | None = None
    ) -> None:
        self._handlers = handlers
        self._clock = clock
        self._faults = faults or Faults()
        self.log: list[Passage] = []

    @property
    def patience_s(self) -> float:
        """Nothing reconnects in memory."""
        return 0.0

    async def nodes(self) -> tuple[str, ...]:
        """Return the names of the handlers that are there."""
        return tuple(sorted(self._handlers))

    async def exchange(self, outbound: Mapping[str, bytes], *, deadline_s: float) -> dict[str, bytes]:
        """Deliver every request and return the replies that were not lost; see `Carrier`."""
        order = list(self._faults.reorder(sorted(outbound)))
        replies = await asyncio.gather(*(self._one(node, outbound[node], deadline_s) for node in order))
        return {node: reply for node, reply in zip(order, replies, strict=True) if reply is not None}

    async def close(self) -> None:
        """Nothing to stop."""

    async def _one(self, node: str, data: bytes, deadline_s: float) -> bytes | None:
        handler = self._handlers.get(node)
        request, request_late_s = await self._pass(node, Direction.TO_OWNER, data, deadline_s)
        if request is None or handler is None:
            return None
        reply = await handler(self._faults.tamper(request))
        if self._faults.duplicate(request):
            await handler(self._faults.tamper(request))
        answer, _ = await self._pass(node, Direction.TO_COORDINATOR, reply, deadline_s - request_late_s)
        return None if answer is None or request_late_s >= deadline_s else self._faults.tamper(answer)

    async def _pass(self, node: str, direction: Direction, data: bytes, left_s: float) -> tuple[Passage | None, float]:
        passage = Passage(len(self.log), node, direction, data)
        self.log.append(passage)
        if self._faults.drop(passage):
            return None, 0.0
        late_s = self._faults.delay_s(passage)
        if late_s and self._clock is not None:
            await self._clock.sleep(late_s)
        if late_s >= left_s and direction is Direction.TO_COORDINATOR:
            return None, late_s
        return passage, late_s

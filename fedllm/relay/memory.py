"""The carrier of simulations and tests: calls handlers in this process, loses and repeats messages on demand."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import StrEnum

from fedllm.clock import Clock
from fedllm.relay.carrier import Reply
from fedllm.relay.turns import Turn, as_they_come

Handler = Callable[[bytes], Awaitable[Reply]]


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
    parts: tuple[bytes, ...] = field(default=(), repr=False)


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
        What arrives instead of the request, or of a reply's head.
    tamper_parts : Callable[[Passage], tuple[bytes, ...]]
        What arrives instead of a reply's parts.
    reorder : Callable[[Sequence[str]], Sequence[str]]
        Order in which the nodes of one exchange are asked.
    """

    drop: Predicate = _never
    duplicate: Predicate = _never
    delay_s: Callable[[Passage], float] = lambda _passage: 0.0
    tamper: Callable[[Passage], bytes] = lambda passage: passage.data
    tamper_parts: Callable[[Passage], tuple[bytes, ...]] = lambda passage: passage.parts
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
    log : list[Passage], optional
        Every message that is sent, delivered or not, is appended, with its parts: give one only where all the
        vectors of a round may stay in memory.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        *,
        clock: Clock | None = None,
        faults: Faults | None = None,
        log: list[Passage] | None = None,
    ) -> None:
        self._handlers = handlers
        self._clock = clock
        self._faults = faults or Faults()
        self._log = log
        self._sent = 0

    @property
    def patience_s(self) -> float:
        """Nothing reconnects in memory."""
        return 0.0

    async def nodes(self) -> tuple[str, ...]:
        """Return the names of the handlers that are there."""
        return tuple(sorted(self._handlers))

    async def exchange(
        self, outbound: Mapping[str, bytes], *, deadline_s: float
    ) -> AsyncGenerator[tuple[str, Reply], None]:
        """Deliver every request and yield the replies that were not lost; see `Carrier`.

        Where nothing is late the replies come in the order in which the nodes are asked.
        """
        order = self._faults.reorder(sorted(outbound))

        async def ask(node: str, turn: Turn) -> Reply | None:
            return await self._one(node, outbound[node], deadline_s, turn)

        async with aclosing(as_they_come(order, ask)) as replies:
            async for node, reply in replies:
                yield node, reply
                del reply

    async def close(self) -> None:
        """Nothing to stop."""

    async def _one(self, node: str, data: bytes, deadline_s: float, turn: Turn) -> Reply | None:
        handler = self._handlers.get(node)
        request, request_late_s = await self._pass(node, Direction.TO_OWNER, Reply(data), deadline_s)
        if request is None or handler is None:
            return None
        await turn.free()  # a handler makes its vector when it is called
        reply = await handler(self._faults.tamper(request))
        if self._faults.duplicate(request):
            await handler(self._faults.tamper(request))
        answer, _ = await self._pass(node, Direction.TO_COORDINATOR, reply, deadline_s - request_late_s)
        if answer is None or request_late_s >= deadline_s:
            return None
        if answer.parts:
            await turn.take(node)
        return Reply(self._faults.tamper(answer), self._faults.tamper_parts(answer))

    async def _pass(
        self, node: str, direction: Direction, message: Reply, left_s: float
    ) -> tuple[Passage | None, float]:
        passage = Passage(self._sent, node, direction, message.head, message.parts)
        self._sent += 1
        if self._log is not None:
            self._log.append(passage)
        if self._faults.drop(passage):
            return None, 0.0
        late_s = self._faults.delay_s(passage)
        if late_s and self._clock is not None:
            await self._clock.sleep(late_s)
        if late_s >= left_s and direction is Direction.TO_COORDINATOR:
            return None, late_s
        return passage, late_s

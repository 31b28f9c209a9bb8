"""Token-fair order between clients: the virtual token counter (Sheng et al., OSDI 2024, arXiv 2401.00588). Pure Python.

Every client has a counter of the service that it has had, over its weight. The queued client with the least counter
goes first, ties by arrival; within a client nothing overtakes, so that one client alone has plain first come, first
served. What is served is said by `charge`: a prompt token counts `PROMPT_WEIGHT`, an output token `OUTPUT_WEIGHT`.

**Who comes back** with nothing queued is lifted to the least counter of the queued clients, or, if there are none, to
that of the client from which something was taken last. What a client has running makes no difference, as in the paper:
who waits for nothing is owed nothing. Whoever is given back (`push_front`) is lifted only to the *floor*: the largest
counter at which something was taken or to which somebody was lifted. Nobody's counter is ever below the floor, so that
an idle client's counter which the floor has reached can be forgotten: it comes back to the same place.

**The bound** (Theorem 4.4 of the paper). Let U be the most that one client can be charged between two takings of its
items. A taken client's counter is the floor at that moment, so that none is more than U above the floor, and
none that waits is below it. Two clients that both wait all the time have therefore had, over any interval, amounts of
service over weight that differ by 2 U at most. Where a prompt is computed before anything else is taken,
``U <= max(PROMPT_WEIGHT * L, OUTPUT_WEIGHT * M) / weight``, with L the longest prompt and M the tokens that fit a
running batch: prompts and outputs of as many sequences as run at a time, each of the longest length.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from fedllm.errors import Overloaded

PROMPT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
"""What a token of either kind costs: one of output takes a step of its own, those of a prompt share one."""

MOST_IDLE = 4096
"""Idle clients that are remembered. If more are, everybody below their median is lifted to it: nobody gains by being
forgotten, and who waits loses at most U of what it was owed. With fewer tenants it never happens."""

_FEW = 64
_REBASE = 2.0**32
"""Counters are brought back to zero from here, long before a float loses a token."""

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items of many clients, in token-fair order. Belongs to one thread.

    Choosing the head looks at every client that has something queued: hundreds, a queue being bounded. Only
    differences of counters mean anything: all are lowered together now and then. Memory is bounded by what is
    queued, `MOST_IDLE`, and the clients whose weight is not 1.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[tuple[int, T]]] = {}
        self._counters: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._floor = 0.0
        self._last: str | None = None
        self._size = 0
        self._newest = 0
        self._foremost = 0
        self._sweep_above = _FEW

    def push(self, client: str, item: T, *, weight: float = 1.0) -> None:
        """Queue an item behind its client's others.

        Parameters
        ----------
        client : str
            Whose it is.
        item : T
            What waits.
        weight : float
            The client's share next to the others', from now on; positive.
        """
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"weight is {weight}, positive and finite is allowed")
        if weight == 1.0:
            self._weights.pop(client, None)
        else:
            self._weights[client] = weight
        if client not in self._queues:
            self._floor = self._level()
            self._enter(client)
        self._newest += 1
        self._queues[client].append((self._newest, item))
        self._size += 1

    def push_front(self, client: str, item: T) -> None:
        """Give back an item that was taken: before its client's others, and first among equal counters."""
        if client not in self._queues:
            self._enter(client)
        self._foremost -= 1
        self._queues[client].appendleft((self._foremost, item))
        self._size += 1

    def peek(self) -> T | None:
        """Return what `pop` would take; None if nothing is queued."""
        return self._queues[self._head()][0][1] if self._queues else None

    def pop(self) -> T:
        """Take the first item of the client with the least counter.

        Raises
        ------
        IndexError
            If nothing is queued.
        """
        if not self._queues:
            raise IndexError("pop from an empty queue")
        client = self._head()
        self._floor = self.counter(client)
        self._last = client
        item = self._queues[client].popleft()[1]
        self._size -= 1
        self._leave_if_empty(client)
        if self._floor >= _REBASE:
            self._counters = {name: value - self._floor for name, value in self._counters.items()}
            self._floor = 0.0
        return item

    def remove(self, item: T) -> bool:
        """Drop an item wherever it waits; return whether it was there. Nobody is charged for it."""
        for client, queue in self._queues.items():
            for entry in queue:
                if entry[1] == item:
                    queue.remove(entry)
                    self._size -= 1
                    self._leave_if_empty(client)
                    return True
        return False

    def charge(self, client: str, tokens: float) -> None:
        """Count `tokens`, times what their kind costs, as service of a client, queued or not."""
        self._counters[client] = self.counter(client) + tokens / self._weights.get(client, 1.0)
        if len(self._counters) - len(self._queues) > self._sweep_above:
            self._forget()

    def counter(self, client: str) -> float:
        """Return a client's service over its weight; the floor for one that is not known."""
        return max(self._counters.get(client, 0.0), self._floor)

    def clients(self) -> tuple[str, ...]:
        """Return the clients that have something queued."""
        return tuple(self._queues)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[T]:
        """Yield what is queued in the order in which it would be taken if nobody were charged meanwhile."""
        waiting = [(self.counter(c), arrival, item) for c, queue in self._queues.items() for arrival, item in queue]
        yield from (item for _, _, item in sorted(waiting, key=lambda entry: entry[:2]))

    def _head(self) -> str:
        return min(self._queues, key=lambda client: (self.counter(client), self._queues[client][0][0]))

    def _level(self) -> float:
        if self._queues:
            return min(self.counter(client) for client in self._queues)
        return self._floor if self._last is None else self.counter(self._last)

    def _enter(self, client: str) -> None:
        self._queues[client] = deque()
        self._counters[client] = self.counter(client)

    def _leave_if_empty(self, client: str) -> None:
        if not self._queues[client]:
            del self._queues[client]
            if self._counters[client] <= self._floor:
                del self._counters[client]

    def _forget(self) -> None:
        idle = sorted(value for client, value in self._counters.items() if client not in self._queues)
        if sum(value > self._floor for value in idle) > MOST_IDLE:
            self._floor = max(self._floor, idle[len(idle) // 2])
        self._counters = {
            client: value for client, value in self._counters.items() if client in self._queues or value > self._floor
        }
        self._sweep_above = max(_FEW, 2 * (len(self._counters) - len(self._queues)))


class Places:
    """A bounded number of requests in flight that one client cannot take from all others.

    A client is refused if `limit` places are taken and it holds its share of them or more (`limit` over the number of
    clients that hold any), or if the `reserve` behind the limit is taken, too.

    Parameters
    ----------
    limit : int
        Places for everybody.
    reserve : int
        Places behind them for clients below their share.
    """

    def __init__(self, limit: int, reserve: int) -> None:
        self.limit = limit
        self.reserve = reserve
        self._held: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._held.total()

    def take(self, client: str) -> None:
        """Take a place.

        Raises
        ------
        Overloaded
            If there is none for this client.
        """
        taken, held = len(self), self._held[client]
        if taken >= self.limit + self.reserve:
            raise Overloaded(
                f"{self.limit + self.reserve} requests are in flight, which is the limit with its reserve",
                hint="retry later",
            )
        if taken >= self.limit and held * len(self._held) >= self.limit:
            raise Overloaded(
                f"{self.limit} requests are in flight, which is the limit, and this client holds its share: {held}",
                hint="retry later",
            )
        self._held[client] += 1

    def release(self, client: str) -> None:
        """Give a place back."""
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]

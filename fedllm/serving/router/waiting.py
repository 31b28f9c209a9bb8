"""Where requests wait for a place at a replica: fairly between tenants, bounded in number and in time.

Every request passes through the queue, so that none overtakes; mostly it leaves at once. What waits is taken in
token-fair order as soon as a replica has room. A request that only a replica without room may serve holds up nobody.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from fedllm.clock import Clock
from fedllm.errors import NotReady, Overloaded
from fedllm.ids import Digest
from fedllm.serving import fair
from fedllm.serving.router.fleet import Fleet
from fedllm.serving.router.placement import place
from fedllm.serving.router.replica import Replica


class NoneLeft(Exception):
    """Every replica that has the version, healthy or not, has been tried."""


@dataclass(eq=False)
class Want:
    """A request that wants a place.

    Parameters
    ----------
    tenant : str
        Whose it is.
    weight : float
        The tenant's share.
    key : bytes
        See `fedllm.serving.router.placement.placement_key`.
    digest : Digest or None
        The version bound to it; None: the base.
    prompt_tokens, tokens : int
        Estimates: of its prompt, and of all that it may use.
    until_s : float
        On the monotonic clock: it waits no longer.
    tried : set of str
        Replicas that failed it.
    """

    tenant: str
    weight: float
    key: bytes
    digest: Digest | None
    prompt_tokens: int
    tokens: int
    until_s: float
    tried: set[str] = field(default_factory=set)
    granted: asyncio.Future[Place] | None = None


class Place:
    """One request's place at one replica, until `release`."""

    def __init__(self, line: WaitingLine, replica: Replica, want: Want, *, began_s: float) -> None:
        self.replica = replica
        self.began_s = began_s
        self._line = line
        self._tokens = want.tokens
        self.trial = replica.breaker.begin()
        self._held = True
        replica.in_flight += 1
        replica.tokens += want.tokens
        replica.limit.began(replica.in_flight)

    def release(self) -> None:
        """Give the place back; a second time does nothing."""
        if not self._held:
            return
        self._held = False
        self.replica.in_flight -= 1
        self.replica.tokens -= self._tokens
        # If the end said something about the replica, its circuit has heard of it; if not, this was no trial.
        self.replica.breaker.abandon(trial=self.trial)
        self._line.pump()


class WaitingLine:
    """Grants places.

    Parameters
    ----------
    fleet : Fleet
        Whose replicas have them; it says when that changes.
    clock : Clock
    max_waiting : int
        Requests that may wait; behind it as many for tenants below their share of them.
    wait_s : float
        Seconds that a request may wait, its retries included.
    """

    def __init__(self, fleet: Fleet, clock: Clock, *, max_waiting: int, wait_s: float) -> None:
        self._fleet = fleet
        self._clock = clock
        self._queue: fair.FairQueue[Want] = fair.FairQueue()
        self._places = fair.Places(max_waiting, max_waiting)
        self._max_waiting = max_waiting
        self.wait_s = wait_s
        self.backlog_tokens = 0
        fleet.on_change = self.pump

    def __len__(self) -> int:
        return len(self._queue)

    def charge(self, tenant: str, tokens: float) -> None:
        """Count tokens, times what their kind costs, as service of a tenant."""
        self._queue.charge(tenant, tokens)

    async def take(self, want: Want) -> Place:
        """Return a place at a replica that has not failed the request, waiting for it if need be.

        Raises
        ------
        Overloaded
            If too many wait.
        NotReady
            If there is no place in time.
        NoneLeft
            If all replicas have failed it.
        """
        if want.tried and want.tried >= {
            name for name, r in self._fleet.replicas.items() if not r.draining and r.has(want.digest)
        }:
            raise NoneLeft
        want.granted = asyncio.get_running_loop().create_future()
        self._queue.push(want.tenant, want, weight=want.weight)
        self.pump()
        if want.granted.done():
            return want.granted.result()
        return await self._wait(want, want.granted)

    def pump(self) -> None:
        """Grant what can be granted."""
        while self._grant():
            pass

    async def _wait(self, want: Want, granted: asyncio.Future[Place]) -> Place:
        try:
            self._places.take(want.tenant)
        except Overloaded:
            self._queue.remove(want)
            raise Overloaded(
                f"{len(self._queue)} requests wait for a replica, {self._max_waiting} are allowed", hint="retry later"
            ) from None
        self.backlog_tokens += want.tokens
        try:
            async with asyncio.timeout(max(0.0, want.until_s - self._clock.monotonic())):
                return await asyncio.shield(granted)
        except BaseException as error:
            self._queue.remove(want)
            if granted.done():  # granted in the very moment in which nobody wanted it any more
                granted.result().release()
            if isinstance(error, TimeoutError):
                raise NotReady(f"no replica had room within {self.wait_s:g} s", hint="retry later") from None
            raise
        finally:
            self.backlog_tokens -= want.tokens
            self._places.release(want.tenant)

    def _grant(self) -> bool:
        if not any(replica.room for replica in self._fleet.replicas.values()):
            return False
        for want in self._queue:
            replica = self._choose(want)
            if replica is None:
                continue
            if self._queue.peek() is want:
                self._queue.pop()
            else:
                self._queue.remove(want)
            self._queue.charge(want.tenant, fair.PROMPT_WEIGHT * want.prompt_tokens)
            if want.granted is not None:
                want.granted.set_result(Place(self, replica, want, began_s=self._clock.monotonic()))
            return True
        return False

    def _choose(self, want: Want) -> Replica | None:
        able = {
            name: replica
            for name, replica in self._fleet.replicas.items()
            if replica.healthy and not replica.draining and name not in want.tried and replica.has(want.digest)
        }
        order = place(want.key, {name: replica.tokens for name, replica in able.items()})
        return next((able[name] for name in order if able[name].room), None)

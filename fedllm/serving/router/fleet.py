"""The replicas: who joins and leaves as the file says, and who is healthy.

A replica that leaves the file is drained: it gets nothing new, what runs there ends, then its connections are closed.
One whose address or key changes leaves and joins again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from fedllm.clock import Clock
from fedllm.errors import FedllmError, NotFound
from fedllm.rng import Rng
from fedllm.serving.router.breaker import Breaker
from fedllm.serving.router.kinds import KindEntry
from fedllm.serving.router.limits import AdaptiveLimit
from fedllm.serving.router.replica import Replica
from fedllm.serving.router.replica_file import ReplicaConfig, read_replicas
from fedllm.telemetry import event

_LOG = logging.getLogger("fedllm.serving.router")
CONNECT_S = 2.0
STALL_S = 120.0
"""Seconds without a byte after which a replica has lost a stream."""
_LOOK_S = 5.0
_KEEPALIVE_S = 4.0
"""Below the five seconds after which uvicorn closes an idle connection: a request must not meet a closed one."""


def _nothing() -> None:
    """Stand in until somebody wants to know."""


class Fleet:
    """The replicas of one router.

    Parameters
    ----------
    path : Path
        ``replicas.toml``, read again all the time. If it cannot be read then, the replicas known so far stay.
    kinds : Mapping of str to KindEntry
        By name.
    clock : Clock
    rng : Rng
        For the breakers' jitter.
    ttft_objective_s : float
        What limits of requests in flight adapt to.
    max_in_flight : int
        Those limits are never above.
    health_s : float
        Seconds between two looks at a replica, and at the file.

    Raises
    ------
    NotFound, ConfigError
        If the file cannot be read the first time.
    """

    def __init__(
        self,
        path: Path,
        kinds: Mapping[str, KindEntry],
        clock: Clock,
        rng: Rng,
        *,
        ttft_objective_s: float,
        max_in_flight: int,
        health_s: float,
    ) -> None:
        self._path = path
        self._kinds = kinds
        self._clock = clock
        self._rng = rng
        self._objective_s = ttft_objective_s
        self._max_in_flight = max_in_flight
        self._health_s = health_s
        self._watching: dict[Replica, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._logged = ""
        self.replicas: dict[str, Replica] = {}
        self.on_change: Callable[[], None] = _nothing
        self._first = read_replicas(path, kinds={name: kind.options for name, kind in kinds.items()})

    async def run(self) -> None:
        """Follow file and health until cancelled, then close all connections."""
        self.apply(self._first)
        try:
            while True:
                await self._clock.sleep(self._health_s)
                self.refresh()
                # An open circuit passes again after a while, and nothing else would tell those who wait.
                self.on_change()
        finally:
            await self._close()

    def refresh(self) -> None:
        """Read the file again and apply it."""
        try:
            found = read_replicas(self._path, kinds={name: kind.options for name, kind in self._kinds.items()})
        except (FedllmError, OSError, UnicodeDecodeError) as error:
            failure = error.code if isinstance(error, FedllmError) else type(error).__name__
            if failure != self._logged:
                event(_LOG, "replicas file unreadable, last list kept", level=logging.ERROR, code=failure)
            self._logged = failure
            return
        self._logged = ""
        self.apply(found)

    def apply(self, found: Mapping[str, ReplicaConfig]) -> None:
        """Let replicas leave and join so that they are those found."""
        for name, replica in list(self.replicas.items()):
            if found.get(name) != replica.config:
                del self.replicas[name]
                self._leave(replica)
        for name, config in found.items():
            if name not in self.replicas:
                self._join(config)

    def drain(self, name: str) -> None:
        """Give a replica nothing new until `resume`; what runs there goes on."""
        self._named(name).draining = True
        event(_LOG, "replica draining", replica=name)

    def resume(self, name: str) -> None:
        """Take a drained replica into use again."""
        self._named(name).draining = False
        event(_LOG, "replica resumed", replica=name)
        self.on_change()

    def rows(self) -> list[dict[str, Any]]:
        """Return every replica's state for an operator."""
        return [replica.row() for _, replica in sorted(self.replicas.items())]

    def _named(self, name: str) -> Replica:
        if name not in self.replicas:
            raise NotFound(f"there is no replica {name[:64]!r}", hint=f"known: {', '.join(sorted(self.replicas))}")
        return self.replicas[name]

    def _join(self, config: ReplicaConfig) -> None:
        client = httpx.AsyncClient(
            base_url=config.url,
            headers={"accept-encoding": "identity"},
            timeout=httpx.Timeout(STALL_S, connect=CONNECT_S, pool=None),
            limits=httpx.Limits(
                max_connections=None,
                max_keepalive_connections=self._max_in_flight,
                keepalive_expiry=_KEEPALIVE_S,
            ),
            trust_env=False,
        )
        replica = Replica(
            config,
            self._kinds[config.kind].make(config, client),
            client,
            AdaptiveLimit(self._objective_s, self._max_in_flight),
            Breaker(self._clock, self._rng),
        )
        self.replicas[config.name] = replica
        self._watching[replica] = asyncio.create_task(self._watch(replica))
        event(_LOG, "replica joined", replica=config.name, kind=config.kind)

    def _leave(self, replica: Replica) -> None:
        replica.draining = True
        event(_LOG, "replica leaves", replica=replica.name, in_flight=replica.in_flight)
        task = asyncio.create_task(self._part(replica))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _part(self, replica: Replica) -> None:
        watching = self._watching.pop(replica)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        while replica.in_flight:
            await self._clock.sleep(self._health_s)
        await replica.client.aclose()
        event(_LOG, "replica left", replica=replica.name)

    async def _watch(self, replica: Replica) -> None:
        while True:
            try:
                async with asyncio.timeout(_LOOK_S):
                    healthy = await replica.kind.health(replica.client)
            except Exception:  # noqa: BLE001 - silence, nonsense, a closed connection: it cannot take requests
                healthy = False
            if replica.seen(healthy=healthy):
                event(_LOG, "replica healthy" if healthy else "replica unhealthy", replica=replica.name)
                self.on_change()
            await self._clock.sleep(self._health_s)

    async def _close(self) -> None:
        tasks = [*self._watching.values(), *self._leaving]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for replica in self._watching:
            await replica.client.aclose()

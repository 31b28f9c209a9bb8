"""One replica as the router knows it: its state, what is in flight there, and whether it may be given more."""

from __future__ import annotations

from typing import Any

import httpx

from fedllm.ids import Digest
from fedllm.serving.router.breaker import Breaker
from fedllm.serving.router.kinds import ReplicaKind
from fedllm.serving.router.limits import AdaptiveLimit
from fedllm.serving.router.replica_file import ReplicaConfig

_MISSES = 2


class Replica:
    """A replica and its state.

    Parameters
    ----------
    config : ReplicaConfig
    kind : ReplicaKind
    client : httpx.AsyncClient
        Its base address is the replica's.
    limit : AdaptiveLimit
        Of requests in flight.
    breaker : Breaker
    """

    def __init__(
        self,
        config: ReplicaConfig,
        kind: ReplicaKind,
        client: httpx.AsyncClient,
        limit: AdaptiveLimit,
        breaker: Breaker,
    ) -> None:
        self.config = config
        self.kind = kind
        self.client = client
        self.limit = limit
        self.breaker = breaker
        self.healthy = False
        self.draining = False
        self.in_flight = 0
        self.tokens = 0
        self.prepared: set[Digest] = set()
        self.cannot: set[Digest] = set()
        self._misses = 0

    @property
    def name(self) -> str:
        """Its name in ``replicas.toml``."""
        return self.config.name

    @property
    def room(self) -> bool:
        """Whether one more request may begin here now."""
        return self.healthy and not self.draining and self.breaker.passes and self.in_flight < self.limit.value

    def has(self, digest: Digest | None) -> bool:
        """Whether it serves a version (None: the base), or loads it when asked."""
        if digest is None or digest in self.prepared:
            return True
        return self.kind.on_demand and digest not in self.cannot

    def seen(self, *, healthy: bool) -> bool:
        """Take in one look at its health; return whether that changed what is known.

        One missed look is no proof: it takes two. A replica that comes back is a new process, whose circuit begins
        closed and which has nothing prepared.
        """
        self._misses = 0 if healthy else self._misses + 1
        if healthy == self.healthy or (self.healthy and self._misses < _MISSES):
            return False
        self.healthy = healthy
        if healthy:
            self.breaker.success()
            self.prepared.clear()
            self.cannot.clear()
        return True

    def row(self) -> dict[str, Any]:
        """Return its state for an operator."""
        return {
            "name": self.name,
            "url": self.config.url,
            "kind": self.config.kind,
            "healthy": self.healthy,
            "draining": self.draining,
            "breaker": self.breaker.state,
            "in_flight": self.in_flight,
            "tokens": self.tokens,
            "limit": self.limit.value,
            "versions": sorted(self.prepared),
        }

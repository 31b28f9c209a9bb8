"""How a router speaks to one replica: which model name it sends, who it says is asking, how it learns of health.

A native replica is a ``fedllm serve`` process. It loads a version when it is asked for it, by the name
``alias@digest``, and believes whom a request is for from a key that is marked ``router`` in its tenants file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from fedllm.errors import AdapterInvalid, PeerUnavailable
from fedllm.registry.model import AdapterVersion
from fedllm.serving.access import SCOPE_HEADER, TENANT_HEADER, WEIGHT_HEADER, Ticket
from fedllm.serving.endpoint import VERSION_HEADER
from fedllm.serving.router.replica_file import OptionReader, ReplicaConfig

_PROBE_TENANT = "router-probe"


class ReplicaKind(Protocol):
    """What a router must know of one replica, whatever serves there.

    Attributes
    ----------
    on_demand : bool
        Whether the replica loads a version by itself when a request names it; if not, it gets requests only for
        versions that it was prepared for.
    min_ready : int or None
        Replicas that must have a version before an alias moves to it; None: all that are healthy.
    """

    on_demand: bool

    @property
    def min_ready(self) -> int | None:
        """See above."""

    def body(
        self, asked: dict[str, Any], version: AdapterVersion | None, alias: str, scope: str = ""
    ) -> dict[str, Any]:
        """Return the body to send: as asked for, with this replica's name of the version (of the base, if None).

        `scope` says whose prefix cache is used. Raise `RequestInvalid` or
        `fedllm.serving.router.upstream.ReplicaFailed` if the request, or this replica, cannot be asked so.
        """

    def headers(self, ticket: Ticket, alias: str) -> dict[str, str]:
        """Return the headers to send: this router's key, and who is asking."""

    def answered(self, headers: Mapping[str, str] | None, body: Mapping[str, Any]) -> list[str]:
        """Return every digest that an answer, or one event of a stream (headers are None), says it was made by."""

    async def health(self, client: httpx.AsyncClient) -> bool:
        """Whether it can take requests; an `httpx.HTTPError` says no as well."""

    async def prepare(self, version: AdapterVersion, alias: str) -> None:
        """Have a version ready, and prove it by one token; raise a `FedllmError` if that cannot be."""

    async def unload(self, version: AdapterVersion) -> None:
        """Let go of a version that no alias serves and no request holds."""


@dataclass(frozen=True)
class KindEntry:
    """One kind, as ``replicas.toml`` names it.

    Parameters
    ----------
    options : OptionReader
        Reads what the kind wants to know beyond the common keys.
    make : callable
        Makes the kind of one replica; the client's base address is the replica's.
    """

    options: OptionReader
    make: Callable[[ReplicaConfig, httpx.AsyncClient], ReplicaKind]


class NativeKind:
    """A ``fedllm serve`` process.

    Parameters
    ----------
    config : ReplicaConfig
    client : httpx.AsyncClient
        Its base address is the replica's.
    base_name : str
        Model id of the base there.
    """

    on_demand = True
    min_ready: int | None = 1

    def __init__(self, config: ReplicaConfig, client: httpx.AsyncClient, *, base_name: str) -> None:
        self._name = config.name
        self._key = {"authorization": f"Bearer {config.key}"}
        self._client = client
        self._base_name = base_name

    def body(
        self,
        asked: dict[str, Any],
        version: AdapterVersion | None,
        alias: str,
        scope: str = "",  # noqa: ARG002 - it goes with the headers
    ) -> dict[str, Any]:
        """Return the body for ``alias@digest``: an alias alone could move on the way."""
        return {**asked, "model": self._base_name if version is None else f"{alias}@{version.digest}"}

    def headers(self, ticket: Ticket, alias: str) -> dict[str, str]:
        """Return key, tenant, weight, scope of the prefix cache, and trace."""
        return {
            **self._key,
            TENANT_HEADER: ticket.caller.tenant.name,
            WEIGHT_HEADER: f"{ticket.weight:g}",
            SCOPE_HEADER: ticket.scope(alias),
            **ticket.trace,
        }

    def answered(self, headers: Mapping[str, str] | None, body: Mapping[str, Any]) -> list[str]:
        """Return the header's digest and the fingerprint's."""
        said = [] if headers is None else [headers.get(VERSION_HEADER, "")]
        return [*said, str(body.get("system_fingerprint"))]

    async def health(self, client: httpx.AsyncClient) -> bool:
        """Whether it follows its registry and serves this router's base."""
        answer = await client.get("/health")
        body = answer.json() if answer.is_success else {}
        return isinstance(body, dict) and body.get("status") == "ok" and body.get("base") == self._base_name

    async def prepare(self, version: AdapterVersion, alias: str) -> None:
        """Ask for one token, which loads the version."""
        body = self.body({"prompt": "a", "max_tokens": 1, "temperature": 0}, version, alias)
        # It is the router that asks, for no tenant; the cache's scope keeps the probe apart from everybody's prompts.
        headers = {**self._key, TENANT_HEADER: _PROBE_TENANT, SCOPE_HEADER: _PROBE_TENANT}
        try:
            answer = await self._client.post("/v1/completions", json=body, headers=headers)
        except httpx.HTTPError as error:
            raise PeerUnavailable(f"replica {self._name} does not answer ({type(error).__name__})") from None
        said = f"replica {self._name} answered {answer.status_code} to a probe of {version.name}"
        if answer.status_code == httpx.codes.BAD_REQUEST:
            raise AdapterInvalid(said, hint="its log says why")
        if not answer.is_success:
            raise PeerUnavailable(said)
        if set(self.answered(answer.headers, answer.json())) != {version.digest}:
            raise PeerUnavailable(f"replica {self._name} answered a probe of {version.name} by another version")

    async def unload(self, version: AdapterVersion) -> None:
        """Leave it to the replica, which frees slots as others need them."""

"""Which version a model id means behind a router, and how many requests hold each version.

Model ids are those of an endpoint (`fedllm.serving.versions`): the base's name, ``tenant/name`` (alias),
``tenant/name@vN`` and ``tenant/name@digest8``. The version is bound once, at admission; a replica is always told the
whole digest.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from fedllm.errors import FedllmError, NotFound, NotReady, PeerUnavailable
from fedllm.ids import Digest
from fedllm.registry.model import AdapterVersion, VersionSource
from fedllm.registry.pins import find_version, matches
from fedllm.serving.router.job import Bound
from fedllm.serving.tenants import BASE_ACCESS, Tenant

_PINS_KEPT = 4096


class Models:
    """Binds requests to versions.

    Parameters
    ----------
    source : VersionSource
        Lists the versions that pins mean.
    base_name : str
        Model id of the base.

    Attributes
    ----------
    served : Mapping of str to AdapterVersion
        By alias; replaced as a whole.
    held_back : dict of str to str
        Alias to the name of the version that no replica could be made ready for.
    """

    def __init__(self, source: VersionSource, base_name: str) -> None:
        self._source = source
        self._pins: OrderedDict[tuple[str, str], AdapterVersion] = OrderedDict()
        self.base_name = base_name
        self.epoch = -1
        self.served: Mapping[str, AdapterVersion] = MappingProxyType({})
        self.held_back: dict[str, str] = {}
        self.flights = Flights()

    def flip(self, alias: str, version: AdapterVersion | None) -> AdapterVersion | None:
        """Point an alias at a version (or at none) in one assignment; return what it served before."""
        previous = self.served.get(alias)
        table = {name: v for name, v in self.served.items() if name != alias}
        if version is not None:
            table[alias] = version
        self.served = MappingProxyType(table)
        return previous

    async def bind(self, model: str, tenant: Tenant) -> Bound:
        """Return what a model id means now.

        Raises
        ------
        NotFound
            If the id means nothing here or is not on the tenant's access list; the two look the same.
        NotReady
            If the aliases are not known yet, no replica could be made ready for this one, or the registry cannot say
            now what a pin means.
        """
        unknown = NotFound(f"model {model[:128]!r} does not exist here, or this key may not use it")
        if model == self.base_name:
            if not tenant.may_use(BASE_ACCESS):
                raise unknown
            return Bound(BASE_ACCESS, None)
        alias, at, pin = model.partition("@")
        live = self.served.get(alias)
        if not tenant.may_use(alias):
            raise unknown
        if live is None:
            if self.epoch < 0 or alias in self.held_back:
                raise NotReady(f"{alias} is not served yet", hint="retry later")
            raise unknown
        if not at or matches(live, pin):
            return Bound(alias, live)
        try:
            version = await self._find(live.manifest.federation, pin)
        except (NotReady, PeerUnavailable):
            raise
        except FedllmError as error:
            raise NotReady(f"{model[:128]} cannot be looked up: {error.message}", hint=error.hint) from None
        if version is None:
            raise unknown
        return Bound(alias, version)

    def rows(self, tenant: Tenant) -> list[dict[str, Any]]:
        """Return OpenAI's model objects for what a tenant may use."""
        found: list[dict[str, Any]] = []
        if tenant.may_use(BASE_ACCESS):
            digest = next((v.manifest.base for v in self.served.values()), None)
            found.append({"id": self.base_name, "created": 0, "parent": None, "version": None, "digest": digest})
        found += [
            {
                "id": alias,
                "created": int(version.manifest.created),
                "parent": self.base_name,
                "version": version.name,
                "digest": version.digest,
            }
            for alias, version in sorted(self.served.items())
            if tenant.may_use(alias)
        ]
        return [{"object": "model", "owned_by": "fedllm", **row} for row in found]

    async def _find(self, federation: str, pin: str) -> AdapterVersion | None:
        """Return the version of a pin; what a pin once meant it means for ever, the registry gone or not."""
        known = self._pins.get((federation, pin))
        if known is not None:
            self._pins.move_to_end((federation, pin))
            return known
        version = await find_version(self._source, federation, pin)
        if version is None:
            return None
        self._pins[federation, pin] = version
        if len(self._pins) > _PINS_KEPT:
            self._pins.popitem(last=False)
        return version


class Flights:
    """Requests in flight by version, those that wait for a replica included."""

    def __init__(self) -> None:
        self._counts: Counter[Digest | None] = Counter()
        self._ended = asyncio.Event()

    @contextmanager
    def hold(self, digest: Digest | None) -> Iterator[None]:
        """Count a request in for as long as it lasts."""
        self._counts[digest] += 1
        try:
            yield
        finally:
            self._counts[digest] -= 1
            if not self._counts[digest]:
                del self._counts[digest]
                self._ended.set()

    async def drained(self, digest: Digest) -> None:
        """Wait until none does."""
        while self._counts[digest]:
            self._ended.clear()
            await self._ended.wait()

"""Which version a model id means, and a lease on it: resolved once, at admission.

Model ids: the base's name, ``tenant/name`` (alias), ``tenant/name@vN`` and ``tenant/name@digest8`` (pins). A pin
reaches any version of the federation that the alias serves, and no other federation's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fedllm.adapter import AdapterState, from_peft
from fedllm.errors import AdapterInvalid, NotFound, Overloaded
from fedllm.ids import Digest
from fedllm.registry.model import AdapterVersion, FetchedVersion, VersionSource
from fedllm.serving.engine import Engine, Lease
from fedllm.serving.tenants import BASE_ACCESS, Tenant

_MIN_PREFIX = 8
_LEASE_TRIES = 3


@dataclass(frozen=True)
class ServedAliases:
    """What the endpoint serves now. Replaced as a whole; `epoch` grows with every replacement."""

    epoch: int
    versions: Mapping[str, AdapterVersion]


def open_version(fetched: FetchedVersion) -> AdapterState:
    """Parse a fetched version's files and check them against its manifest.

    Raises
    ------
    AdapterInvalid
        If names, shapes, rank or values are unusable, or are not what the manifest says.
    """
    manifest = fetched.version.manifest
    state = from_peft(fetched.files, base=manifest.base)
    if state.digest != manifest.state:
        raise AdapterInvalid(f"{fetched.version.name}: its factors are not the state that its manifest names")
    return state


class Versions:
    """Resolves model ids to leases.

    Parameters
    ----------
    engine : Engine
        Holds the loaded versions.
    source : VersionSource
        Where versions that are not loaded come from.
    base_name : str
        Model id of the base.
    """

    def __init__(self, engine: Engine, source: VersionSource, base_name: str) -> None:
        self._engine = engine
        self._source = source
        self.base_name = base_name
        self.served = ServedAliases(0, MappingProxyType({}))

    def flip(self, alias: str, version: AdapterVersion | None) -> AdapterVersion | None:
        """Point an alias at a loaded version (or at none) in one assignment; return what it served before."""
        previous = self.served.versions.get(alias)
        table = {name: v for name, v in self.served.versions.items() if name != alias}
        if version is not None:
            table[alias] = version
        self.served = ServedAliases(self.served.epoch + 1, MappingProxyType(table))
        return previous

    def visible(self, tenant: Tenant) -> dict[str, AdapterVersion]:
        """Return the served aliases on a tenant's access list."""
        return {a: v for a, v in self.served.versions.items() if tenant.may_use(a)}

    async def lease(self, model: str, tenant: Tenant) -> Lease:
        """Bind a request to a version.

        Raises
        ------
        NotFound
            If the id means nothing here or is not on the tenant's access list; the two look the same.
        Overloaded
            If a pinned version finds no spare slot.
        """
        unknown = NotFound(f"model {model[:128]!r} does not exist here, or this key may not use it")
        if model == self.base_name:
            if not tenant.may_use(BASE_ACCESS):
                raise unknown
            return self._engine.lease(self._engine.base_digest)
        alias, at, pin = model.partition("@")
        live = self.served.versions.get(alias)
        if live is None or not tenant.may_use(alias):
            raise unknown
        if not at:
            return self._engine.lease(live.digest)
        version = live if _matches(live, pin) else await self._find(live.manifest.federation, pin)
        if version is None:
            raise unknown
        return await self._lease_loaded(version.digest)

    async def _find(self, federation: str, pin: str) -> AdapterVersion | None:
        found = {
            v.digest: v
            for v in await self._source.versions()
            if v.manifest.federation == federation and _matches(v, pin)
        }
        return next(iter(found.values())) if len(found) == 1 else None

    async def _lease_loaded(self, digest: Digest) -> Lease:
        for _ in range(_LEASE_TRIES):
            if digest not in self._engine.loaded():
                fetched = await self._source.fetch(digest)
                await self._engine.load(digest, open_version(fetched))
            # Another load may have evicted it between the end of ours and this line.
            if digest in self._engine.loaded():
                return self._engine.lease(digest)
        raise Overloaded(f"version {digest[:8]} is evicted as fast as it loads", hint="raise the number of slots")


def _matches(version: AdapterVersion, pin: str) -> bool:
    if pin.startswith("v") and pin[1:].isdigit():
        return version.number == int(pin[1:])
    return len(pin) >= _MIN_PREFIX and version.digest.startswith(pin)

"""Which version a model id means, and a lease on it: resolved once, at admission.

Model ids: the base's name, ``tenant/name`` (alias), ``tenant/name@vN`` and ``tenant/name@digest8`` (pins). A pin
reaches any version of the federation that the alias serves, and no other federation's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fedllm.errors import AdapterInvalid, BaseMismatch, FedllmError, NotFound, NotReady, PeerUnavailable, RequestInvalid
from fedllm.ids import Digest
from fedllm.registry.model import AdapterVersion, VersionSource
from fedllm.registry.pins import find_version, matches
from fedllm.serving.engine import Lease
from fedllm.serving.tenants import BASE_ACCESS, Tenant
from fedllm.serving.tiers import SlotEngine, Tiers

_PINS_KEPT = 4096


@dataclass(frozen=True)
class ServedAliases:
    """What the endpoint serves now. Replaced as a whole; `epoch` grows with every replacement."""

    epoch: int
    versions: Mapping[str, AdapterVersion]


def _ignore(alias: str, digest: Digest, error: FedllmError) -> None:
    """Stand in until somebody wants to know."""


class Versions:
    """Resolves model ids to leases.

    Parameters
    ----------
    engine : SlotEngine
        Holds the loaded versions.
    source : VersionSource
        Lists the versions that pins mean.
    base_name : str
        Model id of the base.
    tiers : Tiers, optional
        Where leases come from; by default tiers of its own over `engine` and `source`.
    """

    def __init__(
        self, engine: SlotEngine, source: VersionSource, base_name: str, *, tiers: Tiers | None = None
    ) -> None:
        self._engine = engine
        self._source = source
        self._pins: OrderedDict[tuple[str, str], AdapterVersion] = OrderedDict()
        self.tiers = tiers or Tiers(engine, source)
        self.base_name = base_name
        self.served = ServedAliases(0, MappingProxyType({}))
        self.on_refused: Callable[[str, Digest, FedllmError], None] = _ignore

    def flip(self, alias: str, version: AdapterVersion | None) -> AdapterVersion | None:
        """Point an alias at a version (or at none) in one assignment; return what it served before."""
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
        """Bind a request to a version; one that is not loaded is fetched and waits for a slot in turn.

        Raises
        ------
        NotFound
            If the id means nothing here or is not on the tenant's access list; the two look the same.
        RequestInvalid
            If a pin means a version that this endpoint cannot serve.
        Overloaded
            If too many wait, or every slot is pinned.
        NotReady, PeerUnavailable
            If the version cannot be had now.
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
        version: AdapterVersion | None = live
        try:
            if at and not matches(live, pin):
                version = await self._find(live.manifest.federation, pin)
            if version is not None:
                self.tiers.check_spec(version.manifest.spec)
                return await self.tiers.lease(version.digest)
        except (AdapterInvalid, BaseMismatch) as error:
            if at:
                raise RequestInvalid(f"{model[:128]}: {error.message}") from None
            self.on_refused(alias, live.digest, error)
            raise NotReady(f"{alias}: {live.name} is refused: {error.message}") from None
        except (NotReady, PeerUnavailable):
            raise
        except FedllmError as error:
            # A bad signature or a lost file is between registry and endpoint: never the tenant's 401 or 404.
            raise NotReady(f"{model[:128]} cannot be loaded: {error.message}", hint=error.hint) from None
        raise unknown

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

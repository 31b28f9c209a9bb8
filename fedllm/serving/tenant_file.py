"""What the tenants file says, and how it is written.

::

    [tenants.acme]
    allow = ["acme/tools", "base"]    # nothing else exists for it
    weight = 2.0                      # its share of a busy engine; 1.0 unless said
    [tenants.acme.limits]
    requests_per_minute = 60
    [tenants.acme.keys.key-1]
    sha256 = "..."
    created = 2026-11-21T12:00:00Z
    [aliases."acme/tools"]
    share_cache = true                # and only for tenants that say so too
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from typing import Any, TypeVar

from fedllm.config import unknown_key
from fedllm.errors import ConfigError, DecodeError
from fedllm.ids import check_alias, check_digest, check_name
from fedllm.serving.keys import ApiKey
from fedllm.serving.quota import LIMITS, Limits
from fedllm.serving.tenant_toml import Table, stamp

T = TypeVar("T")

BASE_ACCESS = "base"
"""In an access list: the base model without an adapter."""
ANY_ACCESS = "*"
"""In the access list of a router only: whatever its own tenants may use."""
RETENTION_DAYS = 30
MIN_WEIGHT, MAX_WEIGHT = 0.1, 10.0


@dataclass(frozen=True)
class Tenant:
    """A tenant and what it may use.

    Parameters
    ----------
    name : str
        The tenant's name.
    keys : tuple of ApiKey
        Several may be valid at once, so that apps can change over.
    allow : tuple of str
        Aliases it may use, and ``base`` for the base model; nothing else is visible to it.
    operator : bool
        Whether it sees the whole endpoint's counters: they tell of other tenants.
    router : bool
        Whether it speaks for tenants of its own: their names, weights and scopes are believed from its keys.
    weight : float
        Share of a busy engine, `MIN_WEIGHT` to `MAX_WEIGHT`.
    limits : Limits
        What it may ask at most.
    share_cache : bool
        Whether it shares the prefix cache of aliases that are shared too.
    log_prompts : bool
        Whether its prompts and answers may be kept.
    retention_days : int
        Days that they are kept.
    """

    name: str
    keys: tuple[ApiKey, ...] = ()
    allow: tuple[str, ...] = ()
    operator: bool = False
    router: bool = False
    weight: float = 1.0
    limits: Limits = field(default=Limits())
    share_cache: bool = False
    log_prompts: bool = False
    retention_days: int = RETENTION_DAYS

    def may_use(self, name: str) -> bool:
        """Whether an alias (or ``base``) is on the access list."""
        return name in self.allow or (self.router and ANY_ACCESS in self.allow and bool(name))


@dataclass(frozen=True)
class TenantTable:
    """What the file says.

    Parameters
    ----------
    tenants : tuple of Tenant
    shared : frozenset of str
        Aliases whose prefix cache is shared among the tenants that share theirs.
    """

    tenants: tuple[Tenant, ...] = ()
    shared: frozenset[str] = frozenset()

    def tenant(self, name: str) -> Tenant | None:
        """Return the tenant of this name, if there is one."""
        return next((tenant for tenant in self.tenants if tenant.name == name), None)


def parse_table(tables: Table, where: str) -> TenantTable:
    """Return what the file's tables mean.

    Parameters
    ----------
    tables : dict
        As TOML has them.
    where : str
        The file's name, for errors.

    Raises
    ------
    ConfigError
        If they are malformed; the message names the tenant and the key, the hint the nearest known key.
    """
    if any(isinstance(table, dict) and "key_sha256" in table for table in tables.values()):
        raise ConfigError(
            f"{where} has the form of an older release: [NAME] with key_sha256",
            hint="write [tenants.NAME] with allow, and [tenants.NAME.keys.key-1] with sha256 and created; "
            "or make it anew with 'fedllm tenant add'",
        )
    _known(tables, ["tenants", "aliases"], where)
    tenants = tuple(
        _tenant(check_name(name, what="tenant"), _a(dict, table, f"{where}: tenant {name!r}"), where)
        for name, table in _a(dict, tables.get("tenants", {}), f"{where}: tenants").items()
    )
    hashes = [key.sha256 for tenant in tenants for key in tenant.keys]
    if len(set(hashes)) < len(hashes):
        raise ConfigError(f"{where}: one key is listed twice", hint="give each tenant a key of its own")
    shared = set()
    for alias, table in _a(dict, tables.get("aliases", {}), f"{where}: aliases").items():
        at = f"{where}: alias {check_alias(alias)!r}"
        _known(_a(dict, table, at), ["share_cache"], at)
        if _a(bool, table.get("share_cache", False), f"{at}: share_cache"):
            shared.add(alias)
    return TenantTable(tenants, frozenset(shared))


def format_table(table: TenantTable) -> Table:
    """Return the tables that `parse_table` reads back; what is as by default is left out."""
    tables: Table = {"tenants": {tenant.name: _format(tenant) for tenant in table.tenants}}
    if table.shared:
        tables["aliases"] = {alias: {"share_cache": True} for alias in sorted(table.shared)}
    return tables


_PLAIN = [field.name for field in fields(Tenant) if field.name not in ("name", "keys", "allow", "limits")]


def _tenant(name: str, table: dict[str, Any], where: str) -> Tenant:
    at = f"{where}: tenant {name!r}"
    _known(table, ["allow", "limits", "keys", *_PLAIN], at)
    flags = {
        flag: _a(bool, table.get(flag, False), f"{at}: {flag}")
        for flag in ("operator", "router", "share_cache", "log_prompts")
    }
    weight = table.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not MIN_WEIGHT <= weight <= MAX_WEIGHT:
        raise ConfigError(f"{at}: weight is {weight!r}, {MIN_WEIGHT:g} to {MAX_WEIGHT:g} allowed")
    limits = _a(dict, table.get("limits", {}), f"{at}: limits")
    _known(limits, list(LIMITS), f"{at}: limits")
    keys = _a(dict, table.get("keys", {}), f"{at}: keys")
    return Tenant(
        name,
        tuple(_api_key(check_name(key, what="key"), _a(dict, t, f"{at}: key {key!r}"), at) for key, t in keys.items()),
        tuple(_access(entry, at, router=flags["router"]) for entry in _a(list, table.get("allow", []), f"{at}: allow")),
        weight=float(weight),
        limits=Limits(**{limit: _count(value, f"{at}: {limit}") for limit, value in limits.items()}),
        retention_days=_count(table.get("retention_days", RETENTION_DAYS), f"{at}: retention_days"),
        **flags,
    )


def _api_key(name: str, table: dict[str, Any], where: str) -> ApiKey:
    at = f"{where}: key {name!r}"
    _known(table, ["sha256", "created", "expires", "revoked"], at)
    try:
        digest = check_digest(_a(str, table.get("sha256", ""), f"{at}: sha256"), what=f"{at}: sha256")
    except DecodeError as error:
        raise ConfigError(error.message) from None
    times: dict[str, float] = {}
    for what in ("created", "expires", "revoked"):
        value = table.get(what)
        if value is None and what != "created":
            continue
        if not isinstance(value, datetime) or value.tzinfo is None:
            raise ConfigError(f"{at}: {what} is no time with a zone", hint=f"e.g. {what} = 2026-01-31T12:00:00Z")
        times[what] = value.timestamp()
    return ApiKey(name, digest, **times)


def _access(entry: object, where: str, *, router: bool) -> str:
    if entry == BASE_ACCESS or (entry == ANY_ACCESS and router):
        return str(entry)
    if entry == ANY_ACCESS:
        raise ConfigError(f"{where}: {ANY_ACCESS!r} is for routers only", hint="list the aliases it may use")
    return check_alias(_a(str, entry, f"{where}: an entry of allow"))


def _count(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**53:
        raise ConfigError(f"{where} is {value!r}, a whole number from 1 on expected", hint="leave it out for no limit")
    return value


def _known(table: dict[str, Any], known: list[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise unknown_key(key, known, where=where)


def _a(kind: type[T], value: object, where: str) -> T:
    if not isinstance(value, kind):
        raise ConfigError(f"{where} is a {type(value).__name__}, a {kind.__name__} expected")
    return value


def _format(tenant: Tenant) -> Table:
    plain = Tenant(tenant.name)
    made: Table = {"allow": list(tenant.allow)}
    made |= {name: getattr(tenant, name) for name in _PLAIN if getattr(tenant, name) != getattr(plain, name)}
    if limits := {name: value for name, value in asdict(tenant.limits).items() if value is not None}:
        made["limits"] = limits
    if tenant.keys:
        made["keys"] = {key.name: _format_key(key) for key in tenant.keys}
    return made


def _format_key(key: ApiKey) -> Table:
    times = {"created": key.created, "expires": key.expires, "revoked": key.revoked}
    return {"sha256": key.sha256, **{what: stamp(value) for what, value in times.items() if value is not None}}

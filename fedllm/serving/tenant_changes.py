"""Changes to tenants of the file: keys turned over and taken back, access and limits changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedllm.clock import Clock
from fedllm.config import unknown_key
from fedllm.errors import NotFound
from fedllm.rng import Rng
from fedllm.serving.quota import LIMITS
from fedllm.serving.tenants import Tenant, TenantTable, edit_table, new_key


def rotate_key(
    path: Path, name: str, rng: Rng, clock: Clock, *, overlap_s: float, expires_s: float | None = None
) -> str:
    """Give a tenant a new key and return it; it is stored nowhere.

    Parameters
    ----------
    path : Path
        The tenants file.
    name : str
        The tenant.
    overlap_s : float
        Seconds after which the keys that are valid now expire, unless they would earlier.
    expires_s : float, optional
        Seconds that the new key lives; for ever by default.

    Raises
    ------
    NotFound
        If there is no such tenant.
    """
    secrets = []

    def turn(tenant: Tenant) -> Tenant:
        now = clock.now()
        until = now + overlap_s
        old = tuple(
            replace(key, expires=until) if key.state(now) == "valid" and key.state(until) == "valid" else key
            for key in tenant.keys
        )
        key, secret = new_key(old, rng, now, expires=None if expires_s is None else now + expires_s)
        secrets.append(secret)
        return replace(tenant, keys=(*old, key))

    change_tenant(path, name, turn)
    return secrets[0]


def revoke_keys(path: Path, name: str, clock: Clock, *, key: str | None = None) -> list[str]:
    """Take back one key of a tenant, or all of them; return the names of those that were still good for something.

    Raises
    ------
    NotFound
        If there is no such tenant or key.
    """
    revoked: list[str] = []

    def take(tenant: Tenant) -> Tenant:
        if key is not None and key not in [known.name for known in tenant.keys]:
            raise NotFound(f"tenant {name!r} has no key {key!r}", hint="fedllm tenant list shows the keys' names")
        now = clock.now()
        chosen = [known.name for known in tenant.keys if key in (None, known.name) and known.revoked is None]
        revoked[:] = chosen
        return replace(
            tenant, keys=tuple(replace(known, revoked=now) if known.name in chosen else known for known in tenant.keys)
        )

    change_tenant(path, name, take)
    return revoked


def change_access(path: Path, name: str, *, allow: Sequence[str] = (), deny: Sequence[str] = ()) -> tuple[str, ...]:
    """Put aliases on a tenant's access list and take others off; return the new list.

    Raises
    ------
    NotFound
        If there is no such tenant, or what is to be denied is not on the list.
    ConfigError
        If an alias is malformed.
    """

    def change(tenant: Tenant) -> Tenant:
        for alias in deny:
            if alias not in tenant.allow:
                raise NotFound(f"{alias!r} is not on the access list of {name!r}", hint="fedllm tenant list shows it")
        kept = [alias for alias in tenant.allow if alias not in deny]
        return replace(tenant, allow=tuple(dict.fromkeys([*kept, *allow])))

    return change_tenant(path, name, change).allow


def set_limits(path: Path, name: str, changes: Mapping[str, int | None]) -> Tenant:
    """Set limits of a tenant, or lift them with None; return the tenant as it is then.

    Raises
    ------
    NotFound
        If there is no such tenant.
    ConfigError
        If there is no such limit, or a number is not allowed.
    """
    for limit in changes:
        if limit not in LIMITS:
            raise unknown_key(limit, list(LIMITS), where="limits")
    return change_tenant(path, name, lambda tenant: replace(tenant, limits=replace(tenant.limits, **changes)))


def remove_tenant(path: Path, name: str) -> None:
    """Take a tenant and its keys out of the file; raise `NotFound` if it is not there."""

    def remove(table: TenantTable) -> TenantTable:
        _known(table, name)
        return replace(table, tenants=tuple(tenant for tenant in table.tenants if tenant.name != name))

    edit_table(path, remove)


def change_tenant(path: Path, name: str, change: Callable[[Tenant], Tenant]) -> Tenant:
    """Replace one tenant by what `change` makes of it, and return that; raise `NotFound` if it is not there."""
    changed = []

    def edit(table: TenantTable) -> TenantTable:
        changed.append(change(_known(table, name)))
        return replace(table, tenants=tuple(changed[0] if t.name == name else t for t in table.tenants))

    edit_table(path, edit)
    return changed[0]


def _known(table: TenantTable, name: str) -> Tenant:
    tenant = table.tenant(name)
    if tenant is None:
        raise NotFound(f"there is no tenant {name!r}", hint="fedllm tenant list shows who there is")
    return tenant

"""Who may ask the endpoint, and for what: tenants, their hashed API keys, and the file that they are in."""

from __future__ import annotations

import dataclasses
import hmac
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fedllm.clock import Clock, SystemClock
from fedllm.errors import AuthenticationError, ConfigError, FedllmError
from fedllm.rng import OsRng, Rng
from fedllm.serving.keys import ApiKey, hash_key, new_secret
from fedllm.serving.quota import Limits
from fedllm.serving.tenant_file import BASE_ACCESS, RETENTION_DAYS, Tenant, TenantTable, format_table, parse_table
from fedllm.serving.tenant_toml import locked, read_tables, write_tables
from fedllm.telemetry import event

__all__ = [
    "BASE_ACCESS",
    "RETENTION_DAYS",
    "Tenant",
    "TenantFile",
    "TenantTable",
    "authenticate",
    "create_tenant",
    "edit_table",
    "load_table",
    "load_tenants",
    "new_key",
]
_LOG = logging.getLogger("fedllm.serving.tenants")


def load_table(path: Path) -> TenantTable:
    """Read the file.

    Raises
    ------
    NotFound
        If there is no file.
    ConfigError
        If it is malformed; the message names the tenant and the key, an unknown key's hint the nearest known one.
    """
    return parse_table(read_tables(path), str(path))


def load_tenants(path: Path) -> list[Tenant]:
    """Return the tenants of the file; raises what `load_table` raises."""
    return list(load_table(path).tenants)


def create_tenant(
    path: Path,
    name: str,
    allow: Sequence[str],
    *,
    operator: bool = False,
    rng: Rng | None = None,
    clock: Clock | None = None,
    router: bool = False,
    weight: float = 1.0,
    limits: Limits | None = None,
    share_cache: bool = False,
    log_prompts: bool = False,
    expires_s: float | None = None,
) -> str:
    """Add a tenant to the file and return its key, which is stored nowhere.

    Parameters
    ----------
    path : Path
        The TOML file; made if it does not exist, readable by its owner only.
    name : str
        A new tenant's name.
    allow : sequence of str
        Aliases ``tenant/name`` it may use, ``base`` for the base model; ``*`` for a router.
    operator, router, weight, limits, share_cache, log_prompts
        See `Tenant`.
    rng : Rng, optional
        Source of the key; the operating system by default.
    clock : Clock, optional
        Stamps the key; the machine's by default.
    expires_s : float, optional
        Seconds that the key lives; for ever by default.

    Raises
    ------
    ConfigError
        If the name is taken, or an alias or a value is malformed.
    """
    now = (clock or SystemClock()).now()
    key, secret = new_key((), rng or OsRng(), now, expires=None if expires_s is None else now + expires_s)
    made = Tenant(name, (key,), tuple(allow), operator, router, weight, limits or Limits(), share_cache, log_prompts)

    def add(table: TenantTable) -> TenantTable:
        if table.tenant(name) is not None:
            raise ConfigError(f"tenant {name!r} is in {path} already", hint="choose another name")
        return dataclasses.replace(table, tenants=(*table.tenants, made))

    edit_table(path, add, create=True)
    return secret


def edit_table(path: Path, edit: Callable[[TenantTable], TenantTable], *, create: bool = False) -> None:
    """Change the file under its lock; what would not be read again is not written.

    Parameters
    ----------
    path : Path
    edit : callable
        Returns the new table, or raises and leaves the file as it is.
    create : bool
        Whether to begin with an empty table where there is no file.
    """
    if not create and not path.exists():
        read_tables(path)
    with locked(path):
        table = TenantTable() if create and not path.exists() else load_table(path)
        tables = format_table(edit(table))
        parse_table(tables, str(path))
        write_tables(path, tables)


def new_key(keys: Sequence[ApiKey], rng: Rng, now: float, *, expires: float | None = None) -> tuple[ApiKey, str]:
    """Return what is kept of a further key of a tenant, and the key."""
    numbers = [int(key.name[4:]) for key in keys if re.fullmatch("key-[0-9]{1,9}", key.name)]
    secret = new_secret(rng)
    return ApiKey(f"key-{max(numbers, default=0) + 1}", hash_key(secret), float(int(now)), expires), secret


def authenticate(tenants: Iterable[Tenant], secret: str, now: float) -> tuple[Tenant, ApiKey]:
    """Return whose key this is, and which; every hash is compared, in constant time.

    Parameters
    ----------
    tenants : iterable of Tenant
    secret : str
        The key, as it was sent.
    now : float
        Seconds since the Unix epoch.

    Raises
    ------
    AuthenticationError
        If it is nobody's; or if it was revoked or has expired, which only who has it is told.
    """
    digest = hash_key(secret)
    found: tuple[Tenant, ApiKey] | None = None
    for tenant in tenants:
        for key in tenant.keys:
            if hmac.compare_digest(digest, key.sha256):
                found = tenant, key
    if found is None:
        raise AuthenticationError("the API key is missing or not known here", hint="fedllm tenant add prints one")
    state = found[1].state(now)
    if state != "valid":
        verb = "has expired" if state == "expired" else "was revoked"
        raise AuthenticationError(
            f"the API key {found[1].name!r} {verb}", hint="ask the operator for a new one: fedllm tenant rotate"
        )
    return found


class TenantFile:
    """The tenants of a file that may change while it is served.

    Parameters
    ----------
    path : Path
        Read again when it changes. If it cannot be read then, the tenants known so far stay, and the log says why:
        a slip of the pen must not lock everybody out, and its text is nobody's who asks over HTTP.

    Raises
    ------
    NotFound, ConfigError
        If it cannot be read the first time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._stamp()
        self._malformed: object = None
        self._table = load_table(path)
        self._logged: object = None

    @property
    def table(self) -> TenantTable:
        """What the file says now, or said when it could last be read."""
        self._refresh()
        return self._table

    def authenticate(self, secret: str, now: float) -> tuple[Tenant, ApiKey]:
        """Return whose key this is, and which, or raise `AuthenticationError`."""
        return authenticate(self.table.tenants, secret, now)

    def _refresh(self) -> None:
        stamp = self._stamp()
        # What cannot be parsed is not parsed again by every request: a long file takes a while.
        if stamp is not None and stamp in (self._seen, self._malformed):
            return
        try:
            self._table = load_table(self._path)
            self._seen, self._malformed, self._logged = stamp, None, None
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the file, the last good list serves on
            self._malformed = stamp if isinstance(error, ConfigError) else None
            failure = error.code if isinstance(error, FedllmError) else type(error).__name__
            if self._logged != (stamp, failure):
                self._logged = (stamp, failure)
                event(_LOG, "tenants file unreadable, last list kept", level=logging.ERROR, code=failure)

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_ino, stat.st_size

"""Who may ask the endpoint, and for what: hashed API keys and default-deny access lists in a TOML file.

A key is 256 random bits, so a plain SHA-256 of it cannot be searched; the file holds nothing that logs in.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from fedllm.errors import AuthenticationError, ConfigError, FedllmError, NotFound
from fedllm.ids import check_alias, check_name
from fedllm.rng import KEY_BYTES, OsRng, Rng
from fedllm.telemetry import event

BASE_ACCESS = "base"
"""In an access list: the base model without an adapter."""
_PREFIX = "fedllm-"
_DIGEST = re.compile("[0-9a-f]{64}")
_FIELDS = {"key_sha256", "allow"}
_LOG = logging.getLogger("fedllm.serving.tenants")


@dataclass(frozen=True)
class Tenant:
    """A tenant and what it may use.

    Parameters
    ----------
    name : str
        The tenant's name.
    key_sha256 : str
        Hex SHA-256 of its API key.
    allow : tuple of str
        Aliases it may use, and ``base`` for the base model; nothing else is visible to it.
    operator : bool
        Whether it sees the whole endpoint's counters: they tell of other tenants.
    """

    name: str
    key_sha256: str = field(repr=False)
    allow: tuple[str, ...] = ()
    operator: bool = False

    def may_use(self, name: str) -> bool:
        """Whether an alias (or ``base``) is on the access list."""
        return name in self.allow


def create_tenant(path: Path, name: str, allow: list[str], *, operator: bool = False, rng: Rng | None = None) -> str:
    """Add a tenant to the file and return its key, which is stored nowhere.

    Parameters
    ----------
    path : Path
        The TOML file; made if it does not exist, readable by its owner only.
    name : str
        A new tenant's name.
    allow : list of str
        Aliases ``tenant/name`` it may use, and ``base`` for the base model.
    operator : bool
        Whether its key reads the whole endpoint's counters.
    rng : Rng, optional
        Source of the key; the operating system by default.

    Raises
    ------
    ConfigError
        If the name is taken or an alias is malformed.
    """
    check_name(name, what="tenant")
    for entry in allow:
        _check_access(entry)
    tenants = load_tenants(path) if path.exists() else []
    if any(tenant.name == name for tenant in tenants):
        raise ConfigError(f"tenant {name!r} is in {path} already", hint="choose another name")
    key = _PREFIX + base64.urlsafe_b64encode((rng or OsRng()).token(KEY_BYTES)).rstrip(b"=").decode()
    _write(path, [*tenants, Tenant(name, _hash(key), tuple(allow), operator)])
    return key


def load_tenants(path: Path) -> list[Tenant]:
    """Read the file.

    Raises
    ------
    NotFound
        If there is no file.
    ConfigError
        If it is malformed; the message names the tenant and the field.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"there is no tenants file {path}", hint="fedllm tenant add NAME --allow ALIAS") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML ({error})") from None
    tenants = []
    for name, table in tables.items():
        check_name(name, what="tenant")
        if not isinstance(table, dict) or not _FIELDS <= set(table) <= _FIELDS | {"operator"}:
            raise ConfigError(f"tenant {name!r} in {path} needs exactly key_sha256 and allow, and may have operator")
        digest, allow, operator = table["key_sha256"], table["allow"], table.get("operator", False)
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest) or not isinstance(allow, list):
            raise ConfigError(f"tenant {name!r} in {path}: key_sha256 has 64 hex digits, allow is a list")
        if not isinstance(operator, bool):
            raise ConfigError(f"tenant {name!r} in {path}: operator is true or false")
        tenants.append(Tenant(name, digest, tuple(_check_access(entry) for entry in allow), operator))
    return tenants


def authenticate(tenants: list[Tenant], key: str) -> Tenant:
    """Return the tenant whose key this is; every hash is compared, in constant time.

    Raises
    ------
    AuthenticationError
        If it is nobody's.
    """
    digest = _hash(key)
    found: Tenant | None = None
    for tenant in tenants:
        if hmac.compare_digest(digest, tenant.key_sha256):
            found = tenant
    if found is None:
        raise AuthenticationError("the API key is missing or not known here", hint="fedllm tenant add prints one")
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
        self._tenants = load_tenants(path)
        self._logged: object = None

    def authenticate(self, key: str) -> Tenant:
        """Return the tenant whose key this is, or raise `AuthenticationError`."""
        self._refresh()
        return authenticate(self._tenants, key)

    def _refresh(self) -> None:
        stamp = self._stamp()
        if stamp is not None and stamp == self._seen:
            return
        try:
            self._tenants = load_tenants(self._path)
            self._seen, self._logged = stamp, None
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the file, the last good list serves on
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


def _check_access(entry: object) -> str:
    if entry == BASE_ACCESS:
        return BASE_ACCESS
    if not isinstance(entry, str):
        raise ConfigError(f"an access list holds aliases as text, a {type(entry).__name__} found")
    return check_alias(entry)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _write(path: Path, tenants: list[Tenant]) -> None:
    # Names, digests and aliases are plain ASCII, whose JSON form is also TOML.
    tables = [
        f"[{t.name}]\nkey_sha256 = {json.dumps(t.key_sha256)}\nallow = {json.dumps(list(t.allow))}\n"
        + ("operator = true\n" if t.operator else "")
        for t in tenants
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write("\n".join(tables))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)

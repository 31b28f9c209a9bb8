"""Distinct types for names and digests, so that one is never passed where another is meant."""

from __future__ import annotations

import hashlib
import re
from typing import NewType

from fedllm.errors import ConfigError, DecodeError

OwnerId = NewType("OwnerId", str)
"""A data owner's name in a roster, e.g. ``north``."""
FederationName = NewType("FederationName", str)
RoundNumber = NewType("RoundNumber", int)
"""Rounds of a federation count from 1 and never repeat, aborted ones included."""
TenantId = NewType("TenantId", str)
AliasName = NewType("AliasName", str)
"""``tenant/name``: the only mutable name an adapter has."""
Digest = NewType("Digest", str)
"""Lower-case hex SHA-256, 64 characters."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9_-]{0,62}[a-z0-9])?")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_name(value: str, *, what: str) -> str:
    """Return `value` if it is a usable name, else raise.

    Parameters
    ----------
    value : str
        1 to 64 characters of ``a-z 0-9 _ -``, beginning and ending with a letter or digit.
    what : str
        What is being named; goes into the error.

    Raises
    ------
    ConfigError
        If the name has another form.
    """
    if not _NAME.fullmatch(value):
        raise ConfigError(
            f"{what} {value!r} is not a name: 1 to 64 of a-z, 0-9, '_', '-', not '_' or '-' at an end",
            hint="choose a short lower-case name",
        )
    return value


def check_alias(value: str) -> AliasName:
    """Return `value` as an alias ``tenant/name``, or raise `ConfigError`."""
    tenant, slash, name = value.partition("/")
    if not slash:
        raise ConfigError(f"alias {value!r} has no '/': an alias is tenant/name", hint="e.g. acme/tools")
    check_name(tenant, what="tenant")
    check_name(name, what="alias name")
    return AliasName(value)


def sha256(data: bytes | memoryview) -> Digest:
    """Return the lower-case hex SHA-256 of `data`."""
    return Digest(hashlib.sha256(data).hexdigest())


def check_digest(value: str, *, what: str) -> Digest:
    """Return `value` as a digest, or raise `DecodeError` naming `what`."""
    if not _DIGEST.fullmatch(value):
        raise DecodeError(f"{what} is not a SHA-256 digest: {len(value)} characters, 64 hex digits expected")
    return Digest(value)

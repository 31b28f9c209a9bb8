"""The join file: what an operator sends to every owner, and an owner's people approve."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.clock import SystemClock
from fedllm.errors import ConfigError, NotFound
from fedllm.identity import Roster, VerifyKey
from fedllm.ids import OwnerId, check_name

if TYPE_CHECKING:
    from fedllm.relay.tls import Certificate

VERSION = 1
_TYPES = {
    "fedllm_join": int, "federation": str, "coordinator_key": str, "superlink": str, "transport": str, "base": str,
    "max_tokens": int, "roster": dict,
}  # fmt: skip
_DIRECT_TYPES = {"direct": str, "certificate": str}
"""Keys that a join file has if its transport is direct, and only then."""


@dataclass(frozen=True)
class Offer:
    """What a join file says.

    Attributes
    ----------
    federation : str
    coordinator_key : VerifyKey
    superlink, transport : str
        Where the federation's messages go, and by what.
    base : str
        Digest of the base model that is fine-tuned.
    max_tokens : int
    roster : Roster
    direct : str or None
        Address that the owner dials; on the direct transport only.
    certificate : Certificate or None
        The coordinator's, for TLS; on the direct transport only.
    """

    federation: str
    coordinator_key: VerifyKey
    superlink: str
    transport: str
    base: str
    max_tokens: int
    roster: Roster
    direct: str | None = None
    certificate: Certificate | None = None


def read_offer(file: Path) -> Offer:
    """Read a join file.

    Raises
    ------
    NotFound
        If there is none.
    ConfigError
        If it is none of this version; the message names the key.
    """
    if not file.is_file():
        raise NotFound(f"no join file {file}", hint="the operator makes it with 'fedllm owner join-file'")
    try:
        table: Any = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise _wrong(file, "not JSON") from None
    if not isinstance(table, dict) or "fedllm_join" not in table:
        raise _wrong(file, "no key 'fedllm_join'")
    if table["fedllm_join"] != VERSION:
        raise _wrong(file, f"version {table['fedllm_join']!r} found, {VERSION} read here")
    types = _TYPES | (_DIRECT_TYPES if table.get("transport") == "direct" else {})
    for key in sorted(set(table) ^ set(types)):
        raise _wrong(file, f"{'unknown' if key in table else 'missing'} key {key!r}")
    for key, kind in types.items():
        if not isinstance(table[key], kind) or isinstance(table[key], bool):
            raise _wrong(file, f"{key!r} is a {type(table[key]).__name__}, {kind.__name__} expected")
    return Offer(
        federation=check_name(table["federation"], what="federation"),
        coordinator_key=VerifyKey.parse(table["coordinator_key"]),
        superlink=table["superlink"],
        transport=table["transport"],
        base=table["base"],
        max_tokens=table["max_tokens"],
        roster=_roster(file, table["roster"]),
        direct=table.get("direct"),
        certificate=_certificate(file, table["certificate"]) if "certificate" in table else None,
    )


def _certificate(file: Path, pem: str) -> Certificate:
    from fedllm.relay.tls import parse_certificate

    return parse_certificate(pem.encode("utf-8", "replace"), SystemClock(), source=f"'certificate' of {file}")


def _roster(file: Path, table: dict[str, Any]) -> Roster:
    try:
        return Roster.of({OwnerId(check_name(o, what="owner")): VerifyKey.parse(str(k)) for o, k in table.items()})
    except ValueError as error:
        raise _wrong(file, str(error)) from None


def _wrong(file: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{file} is not a join file of version {VERSION}: {why}", hint="ask the operator for a fresh one"
    )

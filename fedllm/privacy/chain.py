"""Signed, hash-chained JSON lines: the form of the ledger's file.

A line is ``{"body":{"at","fields","kind","prev"},"signature"}`` with sorted keys and no spaces; `prev` is the SHA-256
of the whole line before, the signature is the owner's over the bytes of the body.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.errors import LedgerCorrupt, SignatureInvalid
from fedllm.identity import SigningIdentity, VerifyKey
from fedllm.ids import Digest, sha256
from fedllm.messages.mechanism import Mechanism

CONTEXT = "fedllm/1/ledger"
GENESIS = Digest("0" * 64)
"""`prev` of the first line."""
FIELDS: dict[str, frozenset[str]] = {
    "open": frozenset({"dataset", "unit", "relation", "delta", "limit"}),
    "dataset": frozenset({"dataset"}),
    "reserve": frozenset({"federation", "round", "plan", "mechanism"}),
    "settle": frozenset({"plan", "outcome"}),
    "realised": frozenset({"plan", "honest"}),
    "limit": frozenset({"limit", "reason"}),
    "torn": frozenset({"file", "sha256", "line"}),
}
"""The kinds of line and what each must hold."""
SALVAGED = "salvaged"
"""Field of a reservation that was read out of a line cut short; names the file that the line is kept in."""
_BODY = {"at", "fields", "kind", "prev"}
_START = '{"body":'
_NO_ENTRY = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading something else than an entry raises: the signature is checked after the form."""


@dataclass(frozen=True)
class Entry:
    """One line, read.

    Attributes
    ----------
    line : int
        From 1.
    kind : str
        A key of `FIELDS`.
    at : str
        Time in UTC, ``2026-01-31T12:00:00Z``.
    fields : dict
    prev, digest : Digest
        SHA-256 of the line before, and of this one.
    body, signature : bytes
        What is signed, and the signature.
    """

    line: int
    kind: str
    at: str
    fields: dict[str, Any]
    prev: Digest
    digest: Digest
    body: bytes
    signature: bytes


def write_line(identity: SigningIdentity, prev: Digest, at: str, kind: str, fields: dict[str, Any]) -> bytes:
    """Return one signed line with its newline."""
    body = {"at": at, "fields": fields, "kind": kind, "prev": prev}
    signature = identity.sign(CONTEXT, _canonical(body)).hex()
    return _canonical({"body": body, "signature": signature}) + b"\n"


def read_line(data: bytes, line: int) -> Entry:
    """Parse one line without its newline; raise `LedgerCorrupt` naming it. Signature and place are not checked."""
    try:
        whole = json.loads(data)
        body, signature = whole["body"], bytes.fromhex(whole["signature"])
        kind, fields = body["kind"], body["fields"]
        if set(whole) != {"body", "signature"} or set(body) != _BODY or _canonical(whole) != data:
            raise ValueError("another form")
        if not FIELDS[kind] <= set(fields):
            raise ValueError("fields missing")
        if kind == "reserve":
            Mechanism.from_fields(fields["mechanism"])
        if kind == "realised" and type(fields["honest"]) is not int:
            raise ValueError("no number of owners")
        return Entry(line, kind, body["at"], fields, Digest(body["prev"]), sha256(data), _canonical(body), signature)
    except _NO_ENTRY as error:
        raise LedgerCorrupt(
            f"ledger line {line} is not an entry ({type(error).__name__})",
            hint="the file was changed by something else than fedllm; restore it, do not begin a new one",
        ) from None


def verify(lines: Sequence[bytes], key: VerifyKey) -> tuple[Entry, ...]:
    """Return the entries if every line is the owner's and in its place; else raise `LedgerCorrupt`."""
    entries: list[Entry] = []
    prev = GENESIS
    for number, data in enumerate(lines, start=1):
        entry = read_line(data, number)
        if entry.prev != prev or (entry.kind == "open") != (number == 1):
            raise LedgerCorrupt(
                f"ledger line {number} does not follow line {number - 1}: a line was removed, added or moved"
            )
        try:
            key.verify(CONTEXT, entry.body, entry.signature)
        except SignatureInvalid:
            raise LedgerCorrupt(f"ledger line {number} is not signed by the owner's key {str(key)[:20]}…") from None
        entries.append(entry)
        prev = entry.digest
    return tuple(entries)


def split(data: bytes) -> tuple[list[bytes], bytes]:
    """Return the whole lines, and what follows the last newline (empty unless a write was cut short)."""
    *whole, rest = data.split(b"\n")
    return whole, rest


def salvage(torn: bytes) -> dict[str, Any] | None:
    """Return the fields of a reservation that a crash cut short, if all of them can be read.

    Its signature may be missing: charging what was perhaps never meant costs budget, the opposite costs privacy.
    """
    text = torn.decode("utf-8", errors="replace")
    start = text.find('"fields":', len(_START))
    if not text.startswith(_START) or start < 0:
        return None
    try:
        fields, _ = json.JSONDecoder().raw_decode(text, start + len('"fields":'))
        kept = {name: fields[name] for name in fields if name != SALVAGED}  # a repair may be cut short as well
        if set(kept) != FIELDS["reserve"]:
            return None
        Mechanism.from_fields(kept["mechanism"])
    except _NO_ENTRY:
        return None
    return kept


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()

"""The owner's ledger of record: what was promised about one owner's records, and what was spent.

A text file, one JSON object a line. Every line names the SHA-256 of the line before and is signed with the owner's
key, so that nothing in it can be changed, removed or reordered unnoticed; cutting whole lines off its end cannot be
seen from the file alone, which is why receipts carry the line number and hash that audit logs keep.

Rules. A round is *reserved* before training starts: the line is written and synced to disk, file and folder,
before `Ledger.reserve` returns. Nothing is ever refunded, neither for an aborted round nor for a crash. One plan
is charged once, whoever asks how often. A last line that a crash cut short is set aside in a file of its own and
reported in a line of the chain; if the reservation in it can still be read, it is charged.
"""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.clock import Clock, iso_utc
from fedllm.errors import BudgetExhausted, ConfigError, LedgerCorrupt, NotFound, PolicyRefused
from fedllm.identity import SigningIdentity, VerifyKey
from fedllm.ids import Digest, sha256
from fedllm.messages.mechanism import RELATION_ADD_REMOVE, UNIT_RECORD, Mechanism
from fedllm.privacy import chain
from fedllm.privacy.accountant import epsilon
from fedllm.privacy.chain import Entry
from fedllm.privacy.mechanism import describe

OUTCOMES = ("completed", "aborted")


@dataclass(frozen=True)
class Reservation:
    """One round that was charged."""

    federation: str
    round_number: int
    plan_digest: Digest
    mechanism: Mechanism
    line: int


@dataclass(frozen=True)
class Receipt:
    """Proof that a plan was charged.

    Attributes
    ----------
    plan_digest : Digest
    line : int
        Line of the ledger, from 1.
    entry : Digest
        SHA-256 of that line.
    spent : float
        Epsilon of everything charged so far, this plan included.
    limit : float
    delta : float
    unit, relation : str
    """

    plan_digest: Digest
    line: int
    entry: Digest
    spent: float
    limit: float
    delta: float
    unit: str
    relation: str

    def __str__(self) -> str:
        return f"{describe(self.spent, self.delta, self.unit, self.relation)} of {self.limit:g}, line {self.line}"


class Ledger:
    """Append-only, hash-chained, signed; use `open`, `resume` or `read`.

    Parameters
    ----------
    path : Path
    key : VerifyKey
        The owner's public key.
    identity, clock : optional
        Without them the ledger can be read only.
    """

    unit = UNIT_RECORD
    relation = RELATION_ADD_REMOVE

    def __init__(
        self, path: Path, key: VerifyKey, identity: SigningIdentity | None = None, clock: Clock | None = None
    ) -> None:
        self._path = path
        self._key = key
        self._identity = identity
        self._clock = clock
        self._entries: tuple[Entry, ...] = ()
        self._verified = b""

    @classmethod
    def open(
        cls,
        path: Path,
        identity: SigningIdentity,
        clock: Clock,
        *,
        dataset: Digest,
        limit_epsilon: float,
        delta: float,
    ) -> Ledger:
        """Open the ledger of a data set, or begin one.

        Another data set under the same ledger is recorded and changes nothing else: what was spent on the records
        both may share stays spent. A lower limit than the recorded one is recorded; a higher one is not, that takes
        `set_limit` with a reason.

        Raises
        ------
        LedgerCorrupt
            If a line does not verify.
        ConfigError
            If the ledger was begun with another delta, or a number is out of range.
        """
        ledger = cls(path, identity.public, identity, clock)
        _check_limit(limit_epsilon)
        if not 0 < delta < 1:
            raise ConfigError(f"ledger delta {delta}: between 0 and 1 needed")
        with ledger._locked(create=True) as descriptor:
            if not ledger._entries:
                ledger._append(descriptor, "open", {
                    "dataset": dataset, "unit": cls.unit, "relation": cls.relation, "delta": delta,
                    "limit": _number(limit_epsilon),
                })  # fmt: skip
                return ledger
            if ledger.delta != delta:
                raise ConfigError(
                    f"ledger {path} counts at delta {ledger.delta:g}, the policy says {delta:g}",
                    hint="one ledger has one delta: set the policy's delta back",
                )
            if ledger.dataset != dataset:
                ledger._append(descriptor, "dataset", {"dataset": dataset})
            if limit_epsilon < ledger.limit_epsilon:
                ledger._append(descriptor, "limit", {"limit": _number(limit_epsilon), "reason": "lowered by policy"})
        return ledger

    @classmethod
    def resume(cls, path: Path, identity: SigningIdentity, clock: Clock) -> Ledger:
        """Open an existing ledger for writing; raise `NotFound` or `LedgerCorrupt`."""
        ledger = cls(path, identity.public, identity, clock)
        with ledger._locked():
            return ledger

    @classmethod
    def read(cls, path: Path, key: VerifyKey) -> Ledger:
        """Open an existing ledger for reading; raise `NotFound` or `LedgerCorrupt`."""
        ledger = cls(path, key)
        ledger.verify()
        return ledger

    @property
    def delta(self) -> float:
        """The delta at which epsilon is counted."""
        return float(self._entries[0].fields["delta"])

    @property
    def limit_epsilon(self) -> float:
        """The limit in force; ``inf`` if the owner set none."""
        limits = [entry.fields["limit"] for entry in self._entries if "limit" in entry.fields]
        return _from_number(limits[-1])

    @property
    def dataset(self) -> Digest:
        """Digest of the data set last opened."""
        return Digest(next(e.fields["dataset"] for e in reversed(self._entries) if "dataset" in e.fields))

    def entries(self) -> tuple[Entry, ...]:
        """Return every line, oldest first."""
        return self._entries

    def reservations(self) -> tuple[Reservation, ...]:
        """Return every round charged, oldest first."""
        return tuple(_reservation(entry) for entry in self._entries if entry.kind == "reserve")

    def spent(self) -> float:
        """Return the epsilon of everything reserved; ``inf`` if a round ran without a mechanism."""
        return epsilon([r.mechanism for r in self.reservations()], self.delta)

    def projected(self, mechanism: Mechanism) -> float:
        """Return what `spent` would be after one more round of `mechanism`."""
        return epsilon([*(r.mechanism for r in self.reservations()), mechanism], self.delta)

    def reserve(self, *, federation: str, round_number: int, plan_digest: Digest, mechanism: Mechanism) -> Receipt:
        """Charge a plan, durably, before anything is trained for it.

        The same plan again returns its receipt and charges nothing.

        Raises
        ------
        BudgetExhausted
            If the plan does not fit under the limit; nothing is written then. Without a mechanism epsilon is
            infinite and only a ledger without limit takes it.
        """
        with self._locked() as descriptor:
            for known in self.reservations():
                if known.plan_digest == plan_digest:
                    if known.mechanism != mechanism:
                        raise PolicyRefused(f"plan {plan_digest[:12]} was charged with another mechanism before")
                    return self._receipt(known)
            needed = self.projected(mechanism)
            if needed > self.limit_epsilon:
                raise self._exhausted(needed)
            self._append(descriptor, "reserve", {
                "federation": federation, "round": round_number, "plan": plan_digest,
                "mechanism": {k: getattr(mechanism, k) for k in _MECHANISM_FIELDS},
            })  # fmt: skip
            return self._receipt(self.reservations()[-1])

    def settle(self, plan_digest: Digest, outcome: str) -> None:
        """Note how a charged round ended, ``completed`` or ``aborted``; refunds nothing, repeats nothing."""
        if outcome not in OUTCOMES:
            raise ValueError(f"outcome {outcome!r}: one of {OUTCOMES}")
        with self._locked() as descriptor:
            if all(r.plan_digest != plan_digest for r in self.reservations()):
                raise NotFound(f"plan {plan_digest[:12]} was never charged to this ledger")
            if all(e.fields["plan"] != plan_digest for e in self._entries if e.kind == "settle"):
                self._append(descriptor, "settle", {"plan": plan_digest, "outcome": outcome})

    def set_limit(self, epsilon: float, *, reason: str) -> None:
        """Raise or lower the limit, as a signed act with a reason."""
        _check_limit(epsilon)
        if not reason.strip():
            raise ConfigError("a changed limit needs a reason", hint="say who decided it and why")
        with self._locked() as descriptor:
            self._append(descriptor, "limit", {"limit": _number(epsilon), "reason": reason})

    def verify(self) -> None:
        """Read the file again and check every line; raise `LedgerCorrupt` naming the first that is wrong."""
        if not self._path.is_file():
            raise NotFound(f"no ledger at {self._path}", hint="the daemon begins it when it first starts")
        with self._path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            data = file.read()
        whole, torn = chain.split(data)
        self._entries = chain.verify(whole, self._key)
        self._verified = data[: len(data) - len(torn)]
        if torn:
            raise LedgerCorrupt(
                f"ledger line {len(whole) + 1} was cut short by a crash ({len(torn)} bytes)",
                hint="start the daemon: it sets the line aside, charges what can be read of it and says so",
            )

    def _receipt(self, reservation: Reservation) -> Receipt:
        line = reservation.line
        return Receipt(
            reservation.plan_digest, line, self._entries[line - 1].digest, self.spent(), self.limit_epsilon,
            self.delta, self.unit, self.relation,
        )  # fmt: skip

    def _exhausted(self, needed: float) -> BudgetExhausted:
        def say(value: float) -> str:
            return describe(value, self.delta, self.unit, self.relation)

        return BudgetExhausted(
            f"budget: this round would bring the total to {say(needed)}; spent {self.spent():.2f}"
            f" of the limit {self.limit_epsilon:g}",
            hint="ask for a plan with more noise or fewer steps, or raise the limit as a signed act of the owner",
        )

    @contextmanager
    def _locked(self, *, create: bool = False) -> Iterator[int]:
        """Hold the file alone, with what is in it now read and verified and a torn end repaired."""
        flags = os.O_RDWR | os.O_APPEND | (os.O_CREAT if create else 0)
        try:
            descriptor = os.open(self._path, flags, 0o600)
        except FileNotFoundError:
            raise NotFound(f"no ledger at {self._path}", hint="the daemon begins it when it first starts") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            data = self._path.read_bytes()
            if data != self._verified or not data:  # every line is verified, but the same bytes only once
                self._verified = b""
                whole, torn = chain.split(data)
                self._entries = chain.verify(whole, self._key)
                self._verified = data[: len(data) - len(torn)]
                if torn:
                    self._set_aside(descriptor, len(self._verified), torn)
            yield descriptor
        finally:
            os.close(descriptor)  # and with it the lock

    def _set_aside(self, descriptor: int, keep: int, torn: bytes) -> None:
        number = 1
        while (aside := self._path.with_name(f"{self._path.name}.torn-{number}")).exists():
            number += 1
        with aside.open("xb") as file:
            file.write(torn)
            file.flush()
            os.fsync(file.fileno())
        aside.chmod(0o600)
        os.ftruncate(descriptor, keep)
        if not self._entries:
            return  # the very first line never became durable: nothing was promised yet
        self._append(descriptor, "torn", {"file": aside.name, "sha256": sha256(torn), "line": len(self._entries) + 1})
        fields = chain.salvage(torn)
        if fields is not None and all(r.plan_digest != fields["plan"] for r in self.reservations()):
            self._append(descriptor, "reserve", {**fields, "salvaged": aside.name})

    def _append(self, descriptor: int, kind: str, fields: dict[str, Any]) -> None:
        if self._identity is None or self._clock is None:
            raise TypeError("this ledger was opened for reading")
        previous = self._entries[-1].digest if self._entries else chain.GENESIS
        line = chain.write_line(self._identity, previous, iso_utc(self._clock.now()), kind, fields)
        view = memoryview(line)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._entries = (*self._entries, chain.read_line(line.rstrip(b"\n"), len(self._entries) + 1))
        self._verified += line


_MECHANISM_FIELDS = (
    "kind", "unit", "relation", "noise_multiplier", "clip_norm", "sample_rate", "steps", "delta",
)  # fmt: skip


def _reservation(entry: Entry) -> Reservation:
    fields = entry.fields
    return Reservation(
        fields["federation"], fields["round"], Digest(fields["plan"]), _mechanism(fields["mechanism"]), entry.line
    )


def _mechanism(fields: Mapping[str, Any]) -> Mechanism:
    return Mechanism(**fields)


def _check_limit(value: float) -> None:
    if not value > 0:  # also refuses NaN
        raise ConfigError(f"limit epsilon {value}: positive needed (inf for no limit)")


def _number(value: float) -> float | str:
    return "inf" if math.isinf(value) else value


def _from_number(value: float | str) -> float:
    return float(value)

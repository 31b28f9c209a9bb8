"""The owner's ledger of record: what was promised about one owner's data, and what was spent.

A text file, one JSON object a line. Every line names the SHA-256 of the line before and is signed with the owner's
key, so that nothing in it can be changed, removed or reordered unnoticed; cutting whole lines off its end cannot be
seen from the file alone, which is why receipts carry the line number and hash that audit logs keep.

Rules. A ledger counts in one unit, fixed in its first line. A round is *reserved* before training starts: the line is
written and synced to disk, file and folder, before `Ledger.reserve` returns. Nothing is ever refunded, neither for an
aborted round nor for a crash; where the noise is made of shares, a sum that was opened with more of them than were
counted on is priced with the noise that was in it. One plan is charged once, whoever asks how often. A stream of
correlated noise is charged once, for no more steps than it was planned with. A last line that a crash cut short is
set aside in a file of its own and reported in a line of the chain; if the reservation in it can still be read, it is
charged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from fedllm.clock import Clock
from fedllm.errors import BudgetExhausted, ConfigError, NotFound, PolicyRefused
from fedllm.identity import SigningIdentity, VerifyKey
from fedllm.ids import Digest
from fedllm.messages.mechanism import UNIT_OWNER, UNIT_PERSON, UNIT_RECORD, Mechanism
from fedllm.privacy.accountant import epsilon
from fedllm.privacy.chain import Entry
from fedllm.privacy.chain_file import ChainFile
from fedllm.privacy.charges import RELATIONS, Reservation, check_stream, reservations
from fedllm.privacy.mechanism import describe

OUTCOMES = ("completed", "aborted")


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

    def __init__(
        self, path: Path, key: VerifyKey, identity: SigningIdentity | None = None, clock: Clock | None = None
    ) -> None:
        self._file = ChainFile(path, key, identity, clock)

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
        unit: str = UNIT_RECORD,
        column: str = "",
    ) -> Ledger:
        """Open the ledger of a data set, or begin one.

        Another data set under the same ledger is recorded and changes nothing else: what was spent on the records
        both may share stays spent. A lower limit than the recorded one is recorded; a higher one is not, that takes
        `set_limit` with a reason.

        Parameters
        ----------
        path, identity, clock
        dataset : Digest
        limit_epsilon : float
            ``inf`` for no limit.
        delta : float
        unit : str
            ``record``, ``person`` or ``owner``.
        column : str
            What an owner's records are grouped by where the unit is a person; empty otherwise.

        Raises
        ------
        LedgerCorrupt
            If a line does not verify.
        ConfigError
            If the ledger was begun with another delta, unit or column, or a value is out of range.
        """
        ledger = cls(path, identity.public, identity, clock)
        _check_limit(limit_epsilon)
        _check_unit(unit, column)
        if not 0 < delta < 1:
            raise ConfigError(f"ledger delta {delta}: between 0 and 1 needed")
        with ledger._file.locked(create=True) as descriptor:
            if not ledger.entries():
                grouped = {"column": column} if column else {}
                ledger._file.append(descriptor, ("open", {
                    "dataset": dataset, "unit": unit, "relation": RELATIONS[unit], "delta": delta,
                    "limit": _number(limit_epsilon), **grouped,
                }))  # fmt: skip
                return ledger
            ledger._check_same(delta, unit, column)
            if ledger.dataset != dataset:
                ledger._file.append(descriptor, ("dataset", {"dataset": dataset}))
            if limit_epsilon < ledger.limit_epsilon:
                lowered = {"limit": _number(limit_epsilon), "reason": "lowered by policy"}
                ledger._file.append(descriptor, ("limit", lowered))
        return ledger

    @classmethod
    def resume(cls, path: Path, identity: SigningIdentity, clock: Clock) -> Ledger:
        """Open an existing ledger for writing; raise `NotFound` or `LedgerCorrupt`."""
        ledger = cls(path, identity.public, identity, clock)
        with ledger._file.locked():
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
        return float(self.entries()[0].fields["delta"])

    @property
    def unit(self) -> str:
        """The unit that is counted in: ``record``, ``person`` or ``owner``."""
        return str(self.entries()[0].fields["unit"])

    @property
    def relation(self) -> str:
        """What neighbouring data sets differ in."""
        return str(self.entries()[0].fields["relation"])

    @property
    def column(self) -> str:
        """What records are grouped by to be a person's; empty for every other unit."""
        return str(self.entries()[0].fields.get("column", ""))

    @property
    def limit_epsilon(self) -> float:
        """The limit in force; ``inf`` if the owner set none."""
        limits = [entry.fields["limit"] for entry in self.entries() if "limit" in entry.fields]
        return _from_number(limits[-1])

    @property
    def dataset(self) -> Digest:
        """Digest of the data set last opened."""
        return Digest(next(e.fields["dataset"] for e in reversed(self.entries()) if "dataset" in e.fields))

    def entries(self) -> tuple[Entry, ...]:
        """Return every line, oldest first."""
        return self._file.entries

    def reservations(self) -> tuple[Reservation, ...]:
        """Return every round charged, oldest first."""
        return reservations(self.entries())

    def spent(self) -> float:
        """Return the epsilon of everything reserved; ``inf`` if a round ran without a mechanism."""
        return epsilon([r.effective for r in self.reservations()], self.delta, unit=self.unit)

    def projected(self, mechanism: Mechanism) -> float:
        """Return what `spent` would be after one more round of `mechanism`."""
        history = [*(r.effective for r in self.reservations()), mechanism]
        return epsilon(history, self.delta, unit=self.unit)

    def reserve(self, *, federation: str, round_number: int, plan_digest: Digest, mechanism: Mechanism) -> Receipt:
        """Charge a plan, durably, before anything is trained for it.

        The same plan again returns its receipt and charges nothing.

        Raises
        ------
        BudgetExhausted
            If the plan does not fit under the limit; nothing is written then. Without a mechanism epsilon is
            infinite and only a ledger without limit takes it.
        PolicyRefused
            If the mechanism bounds nothing for this ledger's unit, or does not go on with its stream as the stream
            was begun.
        """
        with self._file.locked() as descriptor:
            before = self.reservations()
            for known in before:
                if known.plan_digest == plan_digest:
                    if known.mechanism != mechanism:
                        raise PolicyRefused(f"plan {plan_digest[:12]} was charged with another mechanism before")
                    return self._receipt(known)
            if mechanism.covered and self.unit == UNIT_OWNER != mechanism.unit:
                raise PolicyRefused(
                    f"{mechanism.kind} protects a {mechanism.unit}, this ledger counts in unit {self.unit!r}:"
                    " nothing bounds what the round says about everything that one owner holds",
                    hint=f"ask for a plan whose unit is {UNIT_OWNER!r}, or begin another home with unit"
                    f" {mechanism.unit!r}",
                )
            check_stream(federation, mechanism, before)
            needed = self.projected(mechanism)
            if needed > self.limit_epsilon:
                raise self._exhausted(needed)
            self._file.append(descriptor, ("reserve", {
                "federation": federation, "round": round_number, "plan": plan_digest,
                "mechanism": mechanism.to_fields(),
            }))  # fmt: skip
            return self._receipt(self.reservations()[-1])

    def realised(self, plan_digest: Digest, honest: int) -> None:
        """Note how many honest shares of noise were in the sum that this plan opened; from now on it is priced so.

        Never more is charged than was reserved: a number below the one that the reservation counted on, or below
        one noted before, changes nothing.

        Parameters
        ----------
        plan_digest : Digest
        honest : int
            Owners whose signed word this owner has that their updates were in the sum, less those that may collude.

        Raises
        ------
        NotFound
            If the plan was never charged.
        ValueError
            If its noise is not made of shares.
        """
        with self._file.locked() as descriptor:
            found = self._charged(plan_digest)
            if found.effective.shares is None:
                raise ValueError(f"plan {plan_digest[:12]}: {found.mechanism.kind} has no noise shares")
            if honest > found.effective.shares.honest:
                self._file.append(descriptor, ("realised", {"plan": plan_digest, "honest": honest}))

    def settle(self, plan_digest: Digest, outcome: str) -> None:
        """Note how a charged round ended, ``completed`` or ``aborted``; refunds nothing, repeats nothing."""
        if outcome not in OUTCOMES:
            raise ValueError(f"outcome {outcome!r}: one of {OUTCOMES}")
        with self._file.locked() as descriptor:
            if self._charged(plan_digest).outcome is None:
                self._file.append(descriptor, ("settle", {"plan": plan_digest, "outcome": outcome}))

    def set_limit(self, epsilon: float, *, reason: str) -> None:
        """Raise or lower the limit, as a signed act with a reason."""
        _check_limit(epsilon)
        if not reason.strip():
            raise ConfigError("a changed limit needs a reason", hint="say who decided it and why")
        with self._file.locked() as descriptor:
            self._file.append(descriptor, ("limit", {"limit": _number(epsilon), "reason": reason}))

    def verify(self) -> None:
        """Read the file again and check every line; raise `LedgerCorrupt` naming the first that is wrong."""
        self._file.verify()

    def _charged(self, plan_digest: Digest) -> Reservation:
        for reservation in self.reservations():
            if reservation.plan_digest == plan_digest:
                return reservation
        raise NotFound(f"plan {plan_digest[:12]} was never charged to this ledger")

    def _check_same(self, delta: float, unit: str, column: str) -> None:
        path = self._file.path
        if self.delta != delta:
            raise ConfigError(
                f"ledger {path} counts at delta {self.delta:g}, the policy says {delta:g}",
                hint="one ledger has one delta: set the policy's delta back",
            )
        if (self.unit, self.column) != (unit, column):
            raise ConfigError(
                f"ledger {path} counts per {_say_unit(self.unit, self.column)}, the policy says"
                f" {_say_unit(unit, column)}",
                hint=f"one ledger has one unit, and what was spent per {self.unit} says nothing about another: set the"
                " policy back, or begin another home",
            )

    def _receipt(self, reservation: Reservation) -> Receipt:
        line = reservation.line
        return Receipt(
            reservation.plan_digest, line, self.entries()[line - 1].digest, self.spent(), self.limit_epsilon,
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


def _check_unit(unit: str, column: str) -> None:
    if unit not in RELATIONS:
        raise ConfigError(f"ledger unit {unit!r}: {', '.join(RELATIONS)} allowed")
    if bool(column) != (unit == UNIT_PERSON):
        raise ConfigError(
            f"ledger unit {unit!r} with column {column!r}: a column is needed for unit {UNIT_PERSON!r}, and only there"
        )


def _say_unit(unit: str, column: str) -> str:
    return f"{unit}, grouped by column {column!r}" if column else unit


def _check_limit(value: float) -> None:
    if not value > 0:  # also refuses NaN
        raise ConfigError(f"limit epsilon {value}: positive needed (inf for no limit)")


def _number(value: float) -> float | str:
    return "inf" if math.isinf(value) else value


def _from_number(value: float | str) -> float:
    return float(value)

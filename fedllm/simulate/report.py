"""What a simulation found, as plain numbers; equal for equal seeds but for seconds and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fedllm.server.journal import RoundRecord
from fedllm.server.ports import RoundState
from fedllm.simulate.fates import Fates


@dataclass(frozen=True)
class SimulatedRound:
    """How one round went.

    Attributes
    ----------
    state : str
        ``JUDGED`` or ``ABORTED``.
    survivors : int
        Owners whose vectors are in the opened sum; 0 if none was opened.
    attempts : int
        Tries at the sum.
    code, reason : str or None
        Of an abort.
    exact : bool or None
        Whether the opened sum is, entry by entry, the plain sum of the survivors' vectors; None if none was opened.
    faults : dict[str, list[str]]
        Error code to the owners that were named with it.
    lost, late : int
        Owners drawn to drop out, and to be late.
    misdeeds : dict[str, list[str]]
        What owners were drawn to do, and who.
    seconds : float
        Wall time.
    """

    round: int
    state: str
    survivors: int
    attempts: int
    code: str | None
    reason: str | None
    exact: bool | None
    faults: dict[str, list[str]]
    lost: int
    late: int
    misdeeds: dict[str, list[str]]
    seconds: float

    @classmethod
    def of(cls, record: RoundRecord, fates: Fates, *, exact: bool | None, seconds: float) -> SimulatedRound:
        """Return a finished round of the journal."""
        measures = record.measures
        failed = record.state is RoundState.ABORTED
        return cls(
            round=record.number,
            state=record.state.value,
            survivors=0 if exact is None else int(measures.get("survivors", 0)),
            attempts=record.plan.attempt,
            code=record.code if failed else None,
            reason=record.reason if failed else None,
            exact=exact,
            faults=_by((fault["code"], fault["owner"]) for fault in measures.get("faults", ())),
            lost=len(fates.lost),
            late=len(fates.late),
            misdeeds=_by((kind.value, owner) for owner, kind in fates.misdeeds.items()),
            seconds=seconds,
        )


@dataclass(frozen=True)
class SimulationReport:
    """A whole simulation.

    Attributes
    ----------
    dim : int
        Entries of the adapter update that is summed.
    complete : bool
        Whether everybody shares its secrets with everybody.
    neighbours, threshold : int
        Peers that an owner deals shares to, and how many of them open a secret, in the first attempt with everybody.
    ring_bits, value_bits : int
    exact : bool
        Whether a sum was opened at all, and every one that was is exact.
    privacy : dict
        Epsilon that each owner's ledger has charged (None: no guarantee), with unit, relation and delta.
    upload_bytes, download_bytes : int
        The most that one owner sent, and was sent, in one round.
    peak_gib : float
        Largest resident memory of the process so far, plus the files of journal, registry and owners.
    """

    owners: int
    dim: int
    seed: int
    complete: bool
    neighbours: int
    threshold: int
    ring_bits: int
    value_bits: int
    privacy: dict[str, Any]
    upload_bytes: int
    download_bytes: int
    seconds: float
    peak_gib: float
    rounds: list[SimulatedRound] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether a sum was opened, and every opened one is exact."""
        opened = [each.exact for each in self.rounds if each.exact is not None]
        return bool(opened) and all(opened)

    @property
    def aborted(self) -> list[SimulatedRound]:
        """Rounds without an opened sum that counted."""
        return [each for each in self.rounds if each.state == RoundState.ABORTED.value]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON holds it."""
        fields = dataclasses.asdict(self)
        rounds = fields.pop("rounds")
        return {**fields, "exact": self.exact, "rounds": rounds}


def _by(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for key, owner in pairs:
        found.setdefault(key, set()).add(owner)
    return {key: sorted(owners) for key, owners in sorted(found.items())}

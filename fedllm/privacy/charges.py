"""The lines of a ledger read as charges: which rounds were charged, with what mechanism, how they ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.errors import PolicyRefused
from fedllm.ids import Digest
from fedllm.messages.mechanism import (
    RELATION_ADD_REMOVE,
    RELATION_ZERO_OUT,
    UNIT_OWNER,
    UNIT_PERSON,
    UNIT_RECORD,
    Mechanism,
    Stream,
)
from fedllm.privacy.chain import Entry

RELATIONS = {UNIT_RECORD: RELATION_ADD_REMOVE, UNIT_PERSON: RELATION_ADD_REMOVE, UNIT_OWNER: RELATION_ZERO_OUT}
"""The units a ledger can count in, and what neighbouring data sets differ in."""


@dataclass(frozen=True)
class Reservation:
    """One round that was charged.

    Attributes
    ----------
    federation : str
    round_number : int
    plan_digest : Digest
    mechanism : Mechanism
        As it was planned: what a plan is recognised by.
    effective : Mechanism
        What is priced: the same, or with the noise that was really in the sum.
    outcome : str or None
        How the round ended, None if nothing was noted.
    line : int
    """

    federation: str
    round_number: int
    plan_digest: Digest
    mechanism: Mechanism
    effective: Mechanism
    outcome: str | None
    line: int


def reservations(entries: Sequence[Entry]) -> tuple[Reservation, ...]:
    """Return every round that the lines of a ledger charge, oldest first."""
    honest: dict[str, int] = {}
    outcomes: dict[str, str] = {}
    for entry in entries:
        if entry.kind == "realised":
            plan = entry.fields["plan"]
            honest[plan] = max(honest.get(plan, 0), entry.fields["honest"])
        elif entry.kind == "settle":
            outcomes.setdefault(entry.fields["plan"], entry.fields["outcome"])
    return tuple(
        _reservation(entry, honest.get(entry.fields["plan"]), outcomes.get(entry.fields["plan"]))
        for entry in entries
        if entry.kind == "reserve"
    )


def _reservation(entry: Entry, honest: int | None, outcome: str | None) -> Reservation:
    fields: dict[str, Any] = entry.fields
    planned = Mechanism.from_fields(fields["mechanism"])
    effective = planned if honest is None or planned.shares is None else planned.realised(honest)
    return Reservation(
        fields["federation"], fields["round"], Digest(fields["plan"]), planned, effective, outcome, entry.line
    )


def check_stream(federation: str, mechanism: Mechanism, before: Sequence[Reservation]) -> None:
    """Return if a round goes on with its stream as the stream was begun; else raise `PolicyRefused`.

    The sensitivity of a stream is that of all its steps together: it holds for one matrix, one clip norm and one
    noise, and for no more steps than were planned.
    """
    stream = mechanism.stream
    if stream is None:
        return
    now, used = _numbers(mechanism, stream), 0
    for known in before:
        begun = known.mechanism.stream
        if begun is None or begun.name != stream.name:
            continue
        if known.federation != federation:
            raise PolicyRefused(
                f"stream {stream.name!r} belongs to federation {known.federation!r}, not {federation!r}",
                hint="a stream is charged once: plan another stream name",
            )
        for name, value in _numbers(known.mechanism, begun).items():
            if now[name] != value:
                raise PolicyRefused(
                    f"stream {stream.name!r} was begun with {name} {value:g}, the plan says {now[name]:g}",
                    hint="go on with the numbers that it was charged with, or plan another stream name",
                )
        used += known.mechanism.steps
    if used + mechanism.steps > stream.steps:
        raise PolicyRefused(
            f"stream {stream.name!r} is over: {used} of its {stream.steps} steps are charged, the plan takes"
            f" {mechanism.steps} more",
            hint="plan another stream name: it is charged anew",
        )


def _numbers(mechanism: Mechanism, stream: Stream) -> dict[str, float]:
    return {
        "noise multiplier": mechanism.noise_multiplier, "clip norm": mechanism.clip_norm, "steps": stream.steps,
        "band": stream.band, "separation": stream.separation,
    }  # fmt: skip

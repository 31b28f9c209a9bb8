"""The round journal: every transition and every received input, durable before anything is done about it.

A restarted coordinator runs the phases of an unfinished round again from the top; a phase that is closed here
answers from here, so both sums' machines are rebuilt from the bytes that the owners really sent. Masked inputs
are deleted when the round ends: they are of no further use, and less kept is less to lose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from fedllm import wire
from fedllm.errors import IntegrityError, NotFound
from fedllm.ids import Digest, OwnerId
from fedllm.messages.plan import RoundPlan, SignedPlan
from fedllm.registry.metadata import open_sqlite, writing
from fedllm.server.ports import STATE_ORDER, RoundState, Verdict

_metadata = sa.MetaData()
_rounds = sa.Table(
    "rounds",
    _metadata,
    sa.Column("federation", sa.String, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("plan", sa.LargeBinary, nullable=False),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("code", sa.String),
    sa.Column("reason", sa.String),
    sa.Column("verdict", sa.String),
    sa.Column("version", sa.String(64)),
    sa.Column("measures", sa.String, nullable=False, default="{}"),
    sa.Column("started", sa.Float, nullable=False),
    sa.Column("ended", sa.Float),
)
_steps = sa.Table(
    "steps",
    _metadata,
    sa.Column("federation", sa.String, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("step", sa.String, primary_key=True),
    sa.Column("opened", sa.Float, nullable=False),
    sa.Column("closed", sa.Float),
)
_inputs = sa.Table(
    "inputs",
    _metadata,
    sa.Column("federation", sa.String, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("step", sa.String, primary_key=True),
    sa.Column("owner", sa.String, primary_key=True),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
)
_parts = sa.Table(
    "parts",
    _metadata,
    sa.Column("federation", sa.String, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("step", sa.String, primary_key=True),
    sa.Column("owner", sa.String, primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("data", sa.LargeBinary, nullable=False),
)
_wanted = sa.Table(
    "wanted",
    _metadata,
    sa.Column("federation", sa.String, primary_key=True),
    sa.Column("rounds", sa.Integer, nullable=False),
)


@dataclass(frozen=True)
class RoundRecord:
    """One round as the journal knows it. `ended` is set once nothing is left to do for it."""

    federation: str
    number: int
    signed: SignedPlan
    state: RoundState
    code: str | None
    reason: str | None
    verdict: Verdict | None
    version: Digest | None
    measures: dict[str, Any]
    started: float
    ended: float | None

    @property
    def plan(self) -> RoundPlan:
        """The plan; it was signed by this coordinator before it was journalled."""
        return wire.decode(RoundPlan, self.signed.plan)


@dataclass(frozen=True)
class StepRecord:
    """One phase: when it was opened and closed, and the inputs received in it, ``owner -> (kind, body)``."""

    opened: float
    closed: float | None
    inputs: Mapping[OwnerId, tuple[str, bytes]] = field(default_factory=dict)


class Journal:
    """Rounds of all federations of one coordinator.

    Parameters
    ----------
    path : Path
        SQLite file (WAL, ``synchronous=FULL``: a commit survives power loss).
    """

    def __init__(self, path: Path) -> None:
        self._engine = open_sqlite(path, synchronous="FULL")
        _metadata.create_all(self._engine)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def next_number(self, federation: str) -> int:
        """Return the next round's number; aborted rounds keep theirs."""
        query = sa.select(sa.func.max(_rounds.c.number)).where(_rounds.c.federation == federation)
        with self._engine.connect() as connection:
            return int(connection.execute(query).scalar() or 0) + 1

    def open_round(self, plan: RoundPlan, signed: SignedPlan, *, started: float) -> None:
        """Write down a signed plan (PLANNED) before anybody sees it; it uses up one wanted round."""
        row = {
            "federation": plan.federation,
            "number": int(plan.round),
            "plan": wire.encode(signed),
            "state": RoundState.PLANNED.value,
            "measures": "{}",
            "started": started,
        }
        with writing(self._engine) as connection:
            connection.execute(_rounds.insert().values(**row))
            connection.execute(
                _wanted.update()
                .where(_wanted.c.federation == plan.federation, _wanted.c.rounds > 0)
                .values(rounds=_wanted.c.rounds - 1)
            )

    def advance(self, federation: str, number: int, state: RoundState, measures: Mapping[str, Any]) -> bool:
        """Move a round on to a later state; return False, changing nothing, if it is there or past it.

        `measures` so far are kept with it, so that a restart does not forget seconds and bytes.

        Raises
        ------
        IntegrityError
            If the round was aborted: an aborted round never goes on.
        """
        with writing(self._engine) as connection:
            found = RoundState(self._row(connection, federation, number).state)
            if found is RoundState.ABORTED:
                raise IntegrityError(f"round {number} of {federation} was aborted and cannot become {state}")
            if STATE_ORDER.index(found) >= STATE_ORDER.index(state):
                return False
            values = {"state": state.value, "measures": json.dumps(dict(measures))}
            connection.execute(_rounds.update().where(*_is(federation, number)).values(**values))
            return True

    def abort(self, federation: str, number: int, *, code: str, reason: str) -> None:
        """End a round without a verdict. A judged round stays judged."""
        with writing(self._engine) as connection:
            if RoundState(self._row(connection, federation, number).state).final:
                return
            values = {"state": RoundState.ABORTED.value, "code": code, "reason": reason}
            connection.execute(_rounds.update().where(*_is(federation, number)).values(**values))

    def note(self, federation: str, number: int, *, code: str, reason: str) -> None:
        """Say why a judged round's candidate was not published although the gate let it pass."""
        with writing(self._engine) as connection:
            values = {"code": code, "reason": reason}
            connection.execute(_rounds.update().where(*_is(federation, number)).values(**values))

    def judge(self, federation: str, number: int, verdict: Verdict) -> None:
        """Write down the verdict (JUDGED) before the alias moves; a second one changes nothing."""
        text = json.dumps({"promote": verdict.promote, "reason": verdict.reason, "numbers": verdict.numbers})
        with writing(self._engine) as connection:
            if RoundState(self._row(connection, federation, number).state).final:
                return
            values = {"state": RoundState.JUDGED.value, "verdict": text}
            connection.execute(_rounds.update().where(*_is(federation, number)).values(**values))

    def add_version(self, federation: str, number: int, version: Digest) -> None:
        """Name the version that the round made."""
        with writing(self._engine) as connection:
            connection.execute(_rounds.update().where(*_is(federation, number)).values(version=version))

    def end(self, federation: str, number: int, *, ended: float) -> None:
        """Mark that nothing is left to do, and delete the round's inputs."""
        with writing(self._engine) as connection:
            connection.execute(_rounds.update().where(*_is(federation, number)).values(ended=ended))
            for table in (_inputs, _parts):
                connection.execute(table.delete().where(table.c.federation == federation, table.c.number == number))

    def retry(self, plan: RoundPlan, signed: SignedPlan, measures: Mapping[str, Any]) -> None:
        """Replace a round's plan by that of its next attempt, before anybody sees it.

        The vectors of the attempt before are deleted: they are under masks that nobody will open.

        Raises
        ------
        IntegrityError
            If the round is over.
        """
        with writing(self._engine) as connection:
            found = RoundState(self._row(connection, plan.federation, plan.round).state)
            if found.final:
                raise IntegrityError(f"round {plan.round} of {plan.federation} is {found}, it cannot be tried again")
            values = {"plan": wire.encode(signed), "state": RoundState.TRAINING.value, "measures": json.dumps(measures)}
            here = _is(plan.federation, plan.round)
            connection.execute(_rounds.update().where(*here).values(**values))
            connection.execute(
                _parts.delete().where(_parts.c.federation == plan.federation, _parts.c.number == int(plan.round))
            )

    def measure(self, federation: str, number: int, measures: Mapping[str, Any]) -> None:
        """Replace the round's measures (seconds, bytes); numbers only, no owner's data."""
        with writing(self._engine) as connection:
            text = json.dumps(dict(measures))
            connection.execute(_rounds.update().where(*_is(federation, number)).values(measures=text))

    def open_step(self, federation: str, number: int, step: str, *, now: float) -> StepRecord:
        """Return a phase, opening it at `now` if it is new; its deadline counts from the first opening."""
        with writing(self._engine) as connection:
            key = {"federation": federation, "number": number, "step": step}
            row = connection.execute(sa.select(_steps).filter_by(**key)).first()
            if row is None:
                connection.execute(_steps.insert().values(**key, opened=now))
                return StepRecord(now, None)
            inputs = {
                OwnerId(found.owner): (str(found.kind), bytes(found.body))
                for found in connection.execute(sa.select(_inputs).filter_by(**key))
            }
            return StepRecord(row.opened, row.closed, inputs)

    def record(
        self,
        federation: str,
        number: int,
        step: str,
        inputs: Mapping[OwnerId, tuple[str, bytes]],
        parts: Mapping[OwnerId, Sequence[bytes]] | None = None,
    ) -> None:
        """Write down inputs of an open phase, with the parts that came with them; the first of an owner counts."""
        key = {"federation": federation, "number": number, "step": step}
        if not inputs:
            return
        with writing(self._engine) as connection:
            _insert(connection, key, inputs)
            for owner, chunks in (parts or {}).items():
                for position, data in enumerate(chunks):  # one at a time: a vector is not copied whole
                    row = {**key, "owner": owner, "position": position, "data": data}
                    connection.execute(_parts.insert().prefix_with("OR IGNORE"), row)

    def parts(self, federation: str, number: int, step: str, owner: OwnerId) -> tuple[bytes, ...]:
        """Return the parts that came with an owner's input of a phase, in order."""
        query = (
            sa.select(_parts.c.data)
            .filter_by(federation=federation, number=number, step=step, owner=owner)
            .order_by(_parts.c.position)
        )
        with self._engine.connect() as connection:
            return tuple(bytes(row.data) for row in connection.execute(query))

    def close_step(
        self,
        federation: str,
        number: int,
        step: str,
        *,
        now: float,
        inputs: Mapping[OwnerId, tuple[str, bytes]] | None = None,
    ) -> None:
        """Fix the set of inputs of a phase: what is recorded now, `inputs` included, is all there will ever be."""
        with writing(self._engine) as connection:
            _insert(connection, {"federation": federation, "number": number, "step": step}, inputs or {})
            connection.execute(
                _steps.update()
                .where(_steps.c.federation == federation, _steps.c.number == number, _steps.c.step == step)
                .values(closed=now)
            )

    def round(self, federation: str, number: int) -> RoundRecord:
        """Return one round, or raise `NotFound`."""
        with self._engine.connect() as connection:
            return _record(self._row(connection, federation, number))

    def rounds(self, federation: str) -> list[RoundRecord]:
        """Return the rounds of a federation, oldest first."""
        query = sa.select(_rounds).where(_rounds.c.federation == federation).order_by(_rounds.c.number)
        with self._engine.connect() as connection:
            return [_record(row) for row in connection.execute(query)]

    def unfinished(self, federation: str) -> RoundRecord | None:
        """Return the round that was going on when the coordinator stopped, if there is one."""
        left = [record for record in self.rounds(federation) if record.ended is None]
        return left[0] if left else None

    def wanted(self, federation: str) -> int:
        """Return how many more rounds were asked for."""
        query = sa.select(_wanted.c.rounds).where(_wanted.c.federation == federation)
        with self._engine.connect() as connection:
            return int(connection.execute(query).scalar() or 0)

    def set_wanted(self, federation: str, rounds: int) -> None:
        """Remember how many more rounds were asked for, so that a restart goes on with them."""
        with writing(self._engine) as connection:
            connection.execute(_wanted.insert().prefix_with("OR REPLACE").values(federation=federation, rounds=rounds))

    def _row(self, connection: sa.Connection, federation: str, number: int) -> Any:
        row = connection.execute(sa.select(_rounds).where(*_is(federation, number))).first()
        if row is None:
            raise NotFound(f"federation {federation!r} has no round {number}", hint="'fedllm round list'")
        return row


def _insert(connection: sa.Connection, key: Mapping[str, Any], inputs: Mapping[OwnerId, tuple[str, bytes]]) -> None:
    rows = [{**key, "owner": owner, "kind": kind, "body": body} for owner, (kind, body) in inputs.items()]
    if rows:
        connection.execute(_inputs.insert().prefix_with("OR IGNORE"), rows)


def _is(federation: str, number: int) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return _rounds.c.federation == federation, _rounds.c.number == number


def _record(row: Any) -> RoundRecord:
    verdict = None if row.verdict is None else Verdict(**json.loads(row.verdict))
    return RoundRecord(
        federation=row.federation,
        number=row.number,
        signed=wire.decode(SignedPlan, row.plan),
        state=RoundState(row.state),
        code=row.code,
        reason=row.reason,
        verdict=verdict,
        version=None if row.version is None else Digest(row.version),
        measures=json.loads(row.measures),
        started=row.started,
        ended=row.ended,
    )

"""Versions, aliases, their history and what endpoints report, in SQLite (WAL): what is not content in a registry.

An alias moves only by compare-and-swap, and each move is a line of history whose number is the epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from fedllm.errors import AliasConflict, NotFound
from fedllm.ids import AliasName, Digest
from fedllm.registry.model import AliasMove, AliasTable, SignedManifest
from fedllm.registry.observed import COUNTS, Observation, Report

_metadata = sa.MetaData()
_versions = sa.Table(
    "versions",
    _metadata,
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("federation", sa.String, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("manifest", sa.LargeBinary, nullable=False),
    sa.Column("signature", sa.LargeBinary, nullable=False),
    sa.UniqueConstraint("federation", "number"),
    sa.UniqueConstraint("federation", "round"),
)
_aliases = sa.Table(
    "aliases",
    _metadata,
    sa.Column("alias", sa.String, primary_key=True),
    sa.Column("digest", sa.ForeignKey("versions.digest"), nullable=False),
)
_history = sa.Table(
    "alias_history",
    _metadata,
    sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("alias", sa.String, nullable=False, index=True),
    sa.Column("previous", sa.String(64)),
    sa.Column("new", sa.String(64), nullable=False),
    sa.Column("actor", sa.String, nullable=False),
    sa.Column("reason", sa.String, nullable=False),
    sa.Column("moved", sa.Float, nullable=False),
)
_lines = sa.Table(
    "lines",
    _metadata,
    sa.Column("federation", sa.String, primary_key=True),
    sa.Column("alias", sa.String, nullable=False),
)
"""Where versions that no federation trained are published to, by the name that they count under."""
_reports = sa.Table(
    "reports",
    _metadata,
    sa.Column("endpoint", sa.String, primary_key=True),
    sa.Column("run", sa.String, primary_key=True),
    sa.Column("sequence", sa.Integer, nullable=False),
)
"""The last report of each endpoint's process: what is not newer was taken in before."""
_observations = sa.Table(
    "observations",
    _metadata,
    sa.Column("version", sa.ForeignKey("versions.digest"), primary_key=True),
    sa.Column("alias", sa.String, primary_key=True),
    sa.Column("endpoint", sa.String, primary_key=True),
    sa.Column("start", sa.Float, nullable=False),
    sa.Column("end", sa.Float, nullable=False),
    *(sa.Column(name, sa.BigInteger, nullable=False) for name in COUNTS),
    sa.Column("ttft", sa.JSON, nullable=False),
)
"""Sums since a version was first seen, so that they grow with versions and endpoints and not with time."""


def open_sqlite(path: Path, *, synchronous: str = "FULL") -> sa.Engine:
    """Return an engine on an SQLite file: WAL, foreign keys on, explicit transactions.

    The driver's own transaction handling is switched off, because it begins late: a compare-and-swap needs
    its write lock before its read (``BEGIN IMMEDIATE``, see `writing`).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(sa.URL.create("sqlite", database=str(path)), connect_args={"timeout": 30.0})

    @sa.event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", f"synchronous={synchronous}", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _on_begin(connection: sa.Connection) -> None:
        write = connection.get_execution_options().get("fedllm_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


@contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a transaction that holds the write lock from its beginning; commit at the end, roll back on error."""
    with engine.connect().execution_options(fedllm_write=True) as connection, connection.begin():
        yield connection


class Metadata:
    """The tables of one registry.

    Parameters
    ----------
    path : Path
        SQLite file; created when missing.
    """

    def __init__(self, path: Path) -> None:
        self._engine = open_sqlite(path)
        _metadata.create_all(self._engine)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def add_version(
        self, *, digest: Digest, federation: str, number: int, round_number: int, signed: SignedManifest
    ) -> None:
        """Insert a version; the tables refuse a second one of the same digest, number or round."""
        row = {
            "digest": digest,
            "federation": federation,
            "number": number,
            "round": round_number,
            "manifest": signed.manifest,
            "signature": signed.signature,
        }
        with writing(self._engine) as connection:
            connection.execute(_versions.insert().values(**row))

    def import_version(
        self, federation: str, alias: AliasName | None, sign: Callable[[int], tuple[Digest, SignedManifest]]
    ) -> None:
        """Insert a version that no round made, under the next number, and remember where its line is published to.

        Parameters
        ----------
        federation : str
            Name of the line.
        alias : AliasName or None
            Where it is published to; None: as before.
        sign : Callable
            From the number to the version's digest and signed manifest; called with the write lock held, so that
            no two versions get one number.

        Raises
        ------
        NotFound
            If no alias is given and none is known.
        AliasConflict
            If the line is published to another alias.
        """
        with writing(self._engine) as connection:
            known = connection.execute(sa.select(_lines.c.alias).where(_lines.c.federation == federation)).scalar()
            if known is None and alias is None:
                raise NotFound(f"no alias is known that {federation!r} is published to", hint="name one with --alias")
            if known is not None and alias not in (None, known):
                raise AliasConflict(
                    f"{federation!r} is published to {known!r}, not to {alias!r}",
                    hint="leave --alias out, or give these versions another --federation name",
                )
            if known is None:
                connection.execute(_lines.insert().values(federation=federation, alias=alias))
            query = sa.select(sa.func.max(_versions.c.number)).where(_versions.c.federation == federation)
            number = int(connection.execute(query).scalar() or 0) + 1
            digest, signed = sign(number)
            # rounds count from 1; the column must not repeat, and no round is below zero
            row = {"digest": digest, "federation": federation, "number": number, "round": -number}
            row |= {"manifest": signed.manifest, "signature": signed.signature}
            connection.execute(_versions.insert().values(**row))

    def lines(self) -> dict[str, AliasName]:
        """Return where each line of imported versions is published to."""
        with self._engine.connect() as connection:
            return {row.federation: AliasName(row.alias) for row in connection.execute(sa.select(_lines))}

    def next_number(self, federation: str) -> int:
        """Return the number that the federation's next version gets; they count from 1."""
        query = sa.select(sa.func.max(_versions.c.number)).where(_versions.c.federation == federation)
        with self._engine.connect() as connection:
            return int(connection.execute(query).scalar() or 0) + 1

    def find(self, digest: str) -> SignedManifest | None:
        """Return the version of this digest, or None."""
        return self._one(_versions.c.digest == digest)

    def find_round(self, federation: str, round_number: int) -> SignedManifest | None:
        """Return the version that a round made, or None."""
        return self._one(_versions.c.federation == federation, _versions.c.round == round_number)

    def find_number(self, federation: str, number: int) -> SignedManifest | None:
        """Return ``federation@v<number>``, or None."""
        return self._one(_versions.c.federation == federation, _versions.c.number == number)

    def find_prefix(self, federation: str, prefix: str) -> SignedManifest | None:
        """Return the one version of a federation whose digest begins so; None if there is none, or several."""
        wanted = sa.and_(_versions.c.digest >= prefix, _versions.c.digest < prefix + "g")  # past every hex digit
        query = sa.select(_versions.c.manifest, _versions.c.signature)
        with self._engine.connect() as connection:
            rows = connection.execute(query.where(_versions.c.federation == federation, wanted).limit(2)).all()
        return SignedManifest(rows[0].manifest, rows[0].signature) if len(rows) == 1 else None

    def _one(self, *conditions: sa.ColumnElement[bool]) -> SignedManifest | None:
        query = sa.select(_versions.c.manifest, _versions.c.signature).where(*conditions)
        with self._engine.connect() as connection:
            row = connection.execute(query).first()
        return None if row is None else SignedManifest(row.manifest, row.signature)

    def versions(self) -> list[SignedManifest]:
        """Return all versions in the order they were added."""
        query = sa.select(_versions.c.manifest, _versions.c.signature).order_by(sa.text("rowid"))
        with self._engine.connect() as connection:
            return [SignedManifest(row.manifest, row.signature) for row in connection.execute(query)]

    def aliases(self) -> AliasTable:
        """Return the table of aliases and its epoch, read in one transaction."""
        with self._engine.connect() as connection:
            epoch = int(connection.execute(sa.select(sa.func.max(_history.c.epoch))).scalar() or 0)
            rows = connection.execute(sa.select(_aliases.c.alias, _aliases.c.digest)).all()
        return AliasTable(epoch, {AliasName(row.alias): Digest(row.digest) for row in rows})

    def move_alias(
        self, alias: AliasName, new: Digest, *, expected: Digest | None, actor: str, reason: str, moved: float
    ) -> int:
        """Point an alias at another version if it still points at `expected`; return the new epoch.

        Raises
        ------
        NotFound
            If there is no version `new`.
        AliasConflict
            If the alias points elsewhere; the message names both digests.
        """
        with writing(self._engine) as connection:
            known = sa.select(_versions.c.digest).where(_versions.c.digest == new)
            if connection.execute(known).first() is None:
                raise NotFound(f"no version {new[:16]}… for alias {alias!r} to point at")
            found = connection.execute(sa.select(_aliases.c.digest).where(_aliases.c.alias == alias)).scalar()
            if found != expected:
                raise AliasConflict(
                    f"alias {alias!r} points at {_short(found)}, not at {_short(expected)} as expected",
                    hint="read the alias again, decide again, and move it from where it is now",
                )
            if found is None:
                connection.execute(_aliases.insert().values(alias=alias, digest=new))
            else:
                connection.execute(_aliases.update().where(_aliases.c.alias == alias).values(digest=new))
            line = {"alias": alias, "previous": found, "new": new, "actor": actor, "reason": reason}
            result = connection.execute(_history.insert().values(**line, moved=moved))
            return int(result.inserted_primary_key[0])  # type: ignore[index]

    def history(self, alias: AliasName) -> list[AliasMove]:
        """Return every move of an alias, oldest first."""
        query = sa.select(_history).where(_history.c.alias == alias).order_by(_history.c.epoch)
        with self._engine.connect() as connection:
            return [AliasMove(**row) for row in connection.execute(query).mappings()]

    def observe(self, report: Report) -> bool:
        """Add a report to the sums; return False, changing nothing, if it was taken in before.

        Raises
        ------
        NotFound
            If it speaks of a version that is not here; nothing of it is taken in.
        """
        digests = {seen.version for seen in report.observations}
        run = sa.and_(_reports.c.endpoint == report.endpoint, _reports.c.run == report.run)
        mine = sa.and_(_observations.c.endpoint == report.endpoint, _observations.c.version.in_(digests))
        with writing(self._engine) as connection:
            last = connection.execute(sa.select(_reports.c.sequence).where(run)).scalar()
            if last is not None and report.sequence <= last:
                return False
            known = set(
                connection.execute(sa.select(_versions.c.digest).where(_versions.c.digest.in_(digests))).scalars()
            )
            if missing := sorted(digests - known):
                raise NotFound(f"no version {missing[0][:16]}… ({len(missing)} such in the report)")
            sums = {(row["version"], row["alias"]): _observation(row)
                    for row in connection.execute(sa.select(_observations).where(mine)).mappings()}  # fmt: skip
            rows = []
            for seen in report.observations:
                before = sums.get((seen.version, seen.alias))
                rows.append({**vars(seen if before is None else before.plus(seen)), "endpoint": report.endpoint})
            connection.execute(_observations.insert().prefix_with("OR REPLACE"), rows)
            line = {"endpoint": report.endpoint, "run": report.run, "sequence": report.sequence}
            connection.execute(_reports.insert().prefix_with("OR REPLACE").values(**line))
        return True

    def observed(self, version: Digest | None = None) -> list[tuple[str, Observation]]:
        """Return endpoint and sums, for each endpoint, alias and version; of one version, or of all."""
        query = sa.select(_observations).order_by(_observations.c.endpoint, _observations.c.alias)
        if version is not None:
            query = query.where(_observations.c.version == version)
        with self._engine.connect() as connection:
            return [(row["endpoint"], _observation(row)) for row in connection.execute(query).mappings()]


def _observation(row: Mapping[Any, Any]) -> Observation:
    return Observation(**{**{k: v for k, v in row.items() if k != "endpoint"}, "ttft": tuple(row["ttft"])})


def _short(digest: str | None) -> str:
    return "nothing" if digest is None else f"{digest[:16]}…"

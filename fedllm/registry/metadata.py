"""Versions, aliases and their history in SQLite (WAL): the part of a registry that is not content.

An alias moves only by compare-and-swap, and each move is a line of history whose number is the epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from fedllm.errors import AliasConflict, NotFound
from fedllm.ids import AliasName, Digest
from fedllm.registry.model import AliasMove, AliasTable, SignedManifest

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


def open_sqlite(path: Path, *, synchronous: str = "FULL") -> sa.Engine:
    """Return an engine on an SQLite file: WAL, foreign keys on, explicit transactions.

    The driver's own transaction handling is switched off, because it begins late: a compare-and-swap needs
    its write lock before its read (``BEGIN IMMEDIATE``, see `writing`).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30.0})

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


def _short(digest: str | None) -> str:
    return "nothing" if digest is None else f"{digest[:16]}…"

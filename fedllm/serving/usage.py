"""What every ended request used, in SQL: metering, the budget of a month, and what an operator exports.

A record is queued on the event loop and inserted by one thread, in batches, `FLUSH_S` after it came: a process that is
killed loses at most the last second, as long as the database takes writes. What a database refuses for now waits in a
bounded queue; when that is full the oldest records are lost, counted and logged. Requests of nobody are not kept, and
none that a limit refused at the door: who may not ask (more) could otherwise fill the disk. Metrics count both.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

import sqlalchemy as sa

from fedllm.clock import Clock
from fedllm.errors import ConfigError, NotFound, NotReady
from fedllm.registry.metadata import open_sqlite, writing
from fedllm.serving.records import RequestRecord
from fedllm.serving.usage_rows import (
    COUNTS,
    FIELDS,
    GROUPS,
    UsageRow,
    UsageTotal,
    account,
    csv_lines,
    day_of,
    month_of,
    month_start,
    row_of,
    shown,
    tokens,
)
from fedllm.telemetry import event

SCHEMA = 1
FLUSH_S = 0.25
_LOG = logging.getLogger("fedllm.serving.usage")
_BATCH = 500
_PAGE = 1000
_QUEUE = 100_000
_CATCH_UP_S = 5.0
_REFUSED = 429

_metadata = sa.MetaData()
_schema = sa.Table("usage_schema", _metadata, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))
_usage = sa.Table(
    "usage",
    _metadata,
    sa.Column("serial", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    *(sa.Column(n, sa.String(255), nullable=False) for n in ("id", "tenant", "key", "route", "alias", "replica")),
    sa.Column("version", sa.String(64)),
    sa.Column("trace", sa.String(32), nullable=False),
    *(sa.Column(n, sa.BigInteger, nullable=False) for n in ("status", *COUNTS, "retries")),
    sa.Column("started", sa.Double, nullable=False, index=True),
    sa.Column("ttft_s", sa.Double),
    sa.Column("seconds", sa.Double, nullable=False),
    # Databases disagree on dates made of seconds; a day counted here is the same day everywhere.
    sa.Column("day", sa.Integer, nullable=False),
    sa.Index("usage_tenant_started", "tenant", "started"),
    sqlite_autoincrement=True,
)


class UsageStore:
    """Observes requests and answers what was used; made by `open_usage`.

    Parameters
    ----------
    engine : sqlalchemy.Engine
        With the tables of this schema.
    clock : Clock
        Says which month it is.
    flush_s : float
        Seconds for which records are gathered before they are inserted.
    queue : int
        Records that wait at most.
    writer : bool
        Whether records will be observed.

    Attributes
    ----------
    lost : int
        Records that will never be stored. They stay in `spent` until a restart.
    """

    def __init__(
        self, engine: sa.Engine, clock: Clock, *, flush_s: float = FLUSH_S, queue: int = _QUEUE, writer: bool = True
    ) -> None:
        self.lost = 0
        self._engine = engine
        self._clock = clock
        self._flush_s = flush_s
        self._limit = queue
        self._lock = threading.Lock()
        self._queue: deque[RequestRecord] = deque()
        self._batch: list[RequestRecord] = []
        self._failing = self._full = self._ending = False
        self._arrived, self._hurry = threading.Event(), threading.Event()
        # (month, tenant) -> tokens: in the tables up to row `_seen`; observed and not among those; stored, not yet seen
        self._stored: Counter[tuple[int, str]] = Counter()
        self._pending: Counter[tuple[int, str]] = Counter()
        self._written: Counter[tuple[int, str]] = Counter()
        self._seen = self._month = 0
        self._thread: threading.Thread | None = None
        if writer:
            self._catch_up()
            self._thread = threading.Thread(target=self._write, name="fedllm-usage", daemon=True)
            self._thread.start()

    def observe(self, record: RequestRecord) -> None:
        """Take one record in; returns at once and never raises."""
        if not record.tenant or (record.status == _REFUSED and not record.id and record.version is None):
            return
        with self._lock:
            self._pending[account(record)] += tokens(record)
            if self._ending or self._thread is None:
                self.lost += 1
                return
            first = False
            if len(self._queue) >= self._limit:
                self._queue.popleft()
                self.lost += 1
                first, self._full = not self._full, True
            self._queue.append(record)
        self._arrived.set()
        if first:
            event(_LOG, "usage queue full, oldest records lost", level=logging.ERROR, limit=self._limit)

    def spent(self, tenant: str) -> int:
        """Return the prompt and completion tokens of a tenant's requests that began in this calendar month, UTC.

        Answers from memory: what the tables hold, rows of other processes included some seconds late, and what waits.
        """
        this = month_of(day_of(self._clock.now())), tenant
        with self._lock:
            return self._stored[this] + self._pending[this]

    def rows(
        self,
        since: float | None = None,
        until: float | None = None,
        tenant: str | None = None,
        *,
        limit: int = _PAGE,
        after: int = 0,
    ) -> list[UsageRow]:
        """Return stored records in the order of storing; waits for the database.

        Parameters
        ----------
        since, until : float, optional
            Seconds since the epoch: requests that began at or after `since` and before `until`.
        tenant : str, optional
            Only this tenant's.
        limit : int
            Most rows to return.
        after : int
            Serial of the last row of the page before.
        """
        query = sa.select(_usage).where(*_within(since, until, tenant), _usage.c.serial > after)
        with self._reading() as connection:
            found = connection.execute(query.order_by(_usage.c.serial).limit(limit)).mappings().all()
        return [UsageRow(row["serial"], RequestRecord(**{name: row[name] for name in FIELDS})) for row in found]

    def totals(
        self,
        since: float | None = None,
        until: float | None = None,
        by: Sequence[str] = ("tenant",),
        *,
        tenant: str | None = None,
    ) -> list[UsageTotal]:
        """Return exact sums by some of `GROUPS`, in their order; bounds as in `rows`.

        Raises
        ------
        ConfigError
            If `by` has an unknown name, the same one twice, or none.
        """
        if not by or len(set(by)) != len(by) or not set(by) <= set(GROUPS):
            raise ConfigError(f"by is {','.join(by)!r}: some of {', '.join(GROUPS)} allowed, each once")
        columns = [_usage.c[name] for name in by]
        sums = [sa.func.sum(_usage.c[name]).label(name) for name in COUNTS]
        query = sa.select(*columns, sa.func.count().label("requests"), *sums)
        query = query.where(*_within(since, until, tenant)).group_by(*columns).order_by(*columns)
        with self._reading() as connection:
            found = connection.execute(query).mappings().all()
        return [
            UsageTotal({name: shown(name, row[name]) for name in by}, *(int(row[n]) for n in ("requests", *COUNTS)))
            for row in found
        ]

    def every(
        self, since: float | None = None, until: float | None = None, tenant: str | None = None
    ) -> Iterator[UsageRow]:
        """Yield all rows that are stored now, page by page: no transaction stays open for a slow reader."""
        with self._reading() as connection:
            last = _last_serial(connection)
        after = 0
        while page := self.rows(since, until, tenant, after=after):
            for row in page:
                if row.serial > last:
                    return
                yield row
            after = page[-1].serial

    def export_csv(
        self, stream: TextIO, since: float | None = None, until: float | None = None, tenant: str | None = None
    ) -> None:
        """Write the rows of `every` as a CSV table; see `usage_rows.csv_lines`."""
        stream.writelines(csv_lines(self.every(since, until, tenant)))

    async def close(self) -> None:
        """Store what waits, then end; records that cannot be stored now are lost, counted and logged."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._ending = True
        self._arrived.set()
        self._hurry.set()
        if self._thread is not None:
            self._thread.join()
        if left := len(self._batch) + len(self._queue):
            self.lost += left
            self._batch, self._queue = [], deque()
            event(_LOG, "usage records lost at the end", level=logging.ERROR, records=left)
        self._engine.dispose()

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except sa.exc.SQLAlchemyError as error:
            raise NotReady(f"the usage store cannot be read now ({type(error).__name__})", hint="try again") from None

    # What follows runs on the writer's thread.

    def _write(self) -> None:
        while True:
            self._arrived.wait(self._flush_s if self._failing else _CATCH_UP_S)
            self._hurry.wait(self._flush_s)
            self._arrived.clear()
            ending = self._ending
            try:
                self._store()
                self._catch_up()
                if self._failing or self._full:
                    event(_LOG, "usage is stored again", lost=self.lost)
                self._failing = self._full = False
            except Exception as error:  # noqa: BLE001 - whatever a database does, requests are served and counted on
                if not self._failing:
                    event(_LOG, "usage cannot be stored now", level=logging.ERROR, kind=type(error).__name__)
                self._failing = True
            if ending:
                return

    def _store(self) -> None:
        while True:
            if not self._batch:
                with self._lock:
                    self._batch = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
            if not self._batch:
                return
            try:
                self._insert(self._batch)
            except Exception as error:
                refused = isinstance(error, sa.exc.DataError | sa.exc.IntegrityError)
                if isinstance(error, sa.exc.DatabaseError) and not refused:
                    raise  # a full disk, a lock, a lost connection: the same batch may pass later
                self._insert_singly(self._batch)  # one record that no table takes must not hold up those behind it
            self._batch = []

    def _insert(self, records: Sequence[RequestRecord]) -> None:
        with writing(self._engine) as connection:
            connection.execute(_usage.insert(), [row_of(record) for record in records])
        for record in records:
            self._written[account(record)] += tokens(record)

    def _insert_singly(self, records: Iterable[RequestRecord]) -> None:
        for record in records:
            try:
                self._insert([record])
            except Exception as error:  # noqa: BLE001 - see `_store`
                with self._lock:
                    self.lost += 1
                event(_LOG, "usage record refused and lost", level=logging.ERROR, kind=type(error).__name__)

    def _catch_up(self) -> None:
        """Count in memory what is new in the tables, whoever wrote it."""
        today = day_of(self._clock.now())
        # In another month everything is counted anew: the clock may have been set back into one that was over.
        turned = month_of(today) != self._month
        seen = 0 if turned else self._seen
        sums = sa.func.sum(_usage.c.prompt_tokens + _usage.c.completion_tokens).label("tokens")
        query = sa.select(_usage.c.tenant, _usage.c.day, sums).where(_usage.c.started >= month_start(today))
        with self._engine.connect() as connection:
            last = _last_serial(connection)
            new = query.where(_usage.c.serial > seen, _usage.c.serial <= last)
            found = connection.execute(new.group_by(_usage.c.tenant, _usage.c.day)).all() if last > seen else []
        with self._lock:
            if turned:
                self._stored.clear()
            for row in found:
                self._stored[month_of(row.day), row.tenant] += int(row.tokens)
            self._pending.subtract(self._written)
            for stored in [a for a, count in self._pending.items() if not count]:
                del self._pending[stored]
        self._written.clear()
        self._seen, self._month = last, month_of(today)


def open_usage(url_or_path: str, clock: Clock, *, reading: bool = False) -> UsageStore:
    """Open a usage store; the tables are made when there are none.

    Parameters
    ----------
    url_or_path : str
        An SQLite file (WAL, mode 0600), or a SQLAlchemy URL, whose driver must be installed.
    clock : Clock
        Says which month it is.
    reading : bool
        Change nothing: the tables must exist.

    Raises
    ------
    ConfigError
        If it is no database, cannot be opened, or has tables of another schema version. A password is never named.
    NotFound
        If nothing is there to be read.
    """
    where = url_or_path
    try:
        url = sa.make_url(url_or_path) if "://" in url_or_path else sa.URL.create("sqlite", database=url_or_path)
        where = url.render_as_string(hide_password=True) if "://" in url_or_path else url_or_path
        engine = _open_file(url, reading=reading) if url.get_backend_name() == "sqlite" else sa.create_engine(url)
        _prepare(engine, where, reading=reading)
        return UsageStore(engine, clock, writer=not reading)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"usage store {where}: its driver {error.name!r} is not installed", hint=f"pip install {error.name}"
        ) from None
    except sa.exc.ArgumentError:  # its text, and an address that is not understood, may hold a password
        raise ConfigError("the usage store's address is neither a file nor a SQLAlchemy URL") from None
    except (sa.exc.SQLAlchemyError, OSError) as error:
        kind = type(getattr(error, "orig", None) or error).__name__
        raise ConfigError(f"usage store {where} cannot be opened ({kind})", hint="an SQLite file or a URL") from None


def _open_file(url: sa.URL, *, reading: bool) -> sa.Engine:
    if not url.database or url.database == ":memory:" or url.query or "?" in url.database:
        raise ConfigError("a usage store in SQLite is a file, without options and '?'", hint='usage = "usage.db"')
    path = Path(url.database).expanduser()
    if reading:
        if not path.is_file():
            raise NotFound(f"there is no usage store {path}", hint="'usage' in serve.toml or route.toml names one")
        # A file that is not a usage store must not become one, nor change its mode of journalling.
        read_only = {"mode": "ro", "uri": "true"}
        return sa.create_engine(sa.URL.create("sqlite", database=f"file:{quote(str(path))}", query=read_only))
    path.parent.mkdir(parents=True, exist_ok=True)
    # SQLite gives its WAL the mode of the file; as long as there is none, nobody else may open it.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    path.chmod(0o600)
    return open_sqlite(path)


def _prepare(engine: sa.Engine, where: str, *, reading: bool) -> None:
    with engine.connect() if reading else writing(engine) as connection:
        known = sa.inspect(connection).has_table(_schema.name)
        found = list(connection.execute(sa.select(_schema.c.version)).scalars()) if known else []
        if reading and not known:
            raise NotFound(f"{where} has no usage tables", hint="'usage' in serve.toml or route.toml names the store")
        if found and found != [SCHEMA]:
            raise ConfigError(
                f"usage store {where} has schema {', '.join(map(str, found))}: {SCHEMA} is known here",
                hint="read it with the fedllm that wrote it, or name another store",
            )
        if not found:
            _metadata.create_all(connection)
            connection.execute(_schema.insert().values(version=SCHEMA))


def _within(since: float | None, until: float | None, tenant: str | None) -> list[sa.ColumnElement[bool]]:
    bounds = [] if since is None else [_usage.c.started >= since]
    bounds += [] if until is None else [_usage.c.started < until]
    return bounds + ([] if tenant is None else [_usage.c.tenant == tenant])


def _last_serial(connection: sa.Connection) -> int:
    return int(connection.execute(sa.select(sa.func.max(_usage.c.serial))).scalar() or 0)

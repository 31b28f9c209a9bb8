"""Usage in SQL: sums are exact, a month ends when it ends, a kill loses a second, and nothing is lost silently."""

from __future__ import annotations

import asyncio
import csv
import io
import logging
import os
import sqlite3
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.serving.usage_scene import DECEMBER, NOVEMBER, NOW, opened, record, stored, wait_until

from fedllm.clock import FakeClock, SystemClock
from fedllm.errors import ConfigError
from fedllm.ids import sha256
from fedllm.serving import usage as usage_module
from fedllm.serving.records import RequestRecord
from fedllm.serving.usage import FLUSH_S, UsageStore
from fedllm.serving.usage_rows import FIELDS, GROUPS


def test_a_record_comes_back_as_it_went_in(tmp_path: Path) -> None:
    """Every field, None and the empty string included, in the order of observing."""
    records = [
        record(),
        record(id="", version=None, ttft_s=None, alias="", replica="", retries=0, trace="", status=499),
    ]
    with opened(tmp_path / "usage.db") as store:
        for one in records:
            store.observe(one)
    with opened(tmp_path / "usage.db") as store:
        rows = store.rows()
        assert [row.record for row in rows] == records
        assert [row.serial for row in rows] == [1, 2]


def test_the_files_are_their_owners_alone(tmp_path: Path) -> None:
    """Mode 0600 for the database, its WAL and its index, whatever the mask; a file that was open to all is closed."""
    path = tmp_path / "usage.db"
    path.touch(mode=0o666)
    path.chmod(0o666)
    before = os.umask(0)
    try:
        with opened(path) as store:
            store.observe(record())
            wait_until(lambda: len(store.rows()) == 1)
            found = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert found == {"usage.db": 0o600, "usage.db-wal": 0o600, "usage.db-shm": 0o600}


def test_requests_of_nobody_are_not_kept(tmp_path: Path) -> None:
    """A stranger's refused requests fill no disk and push no tenant's record out of the queue."""
    with opened(tmp_path / "usage.db") as store:
        store.observe(record(tenant="", status=401))
        store.observe(record())
    with opened(tmp_path / "usage.db") as store:
        assert [row.record.tenant for row in store.rows()] == ["acme"]


MOMENTS = st.one_of(
    st.floats(NOVEMBER - 1e6, DECEMBER + 1e6),
    st.sampled_from([m + d for m in (NOVEMBER, DECEMBER) for d in (-1.0, -2.5e-7, 0.0, 2.5e-7, 1.0)]),
)
RECORDS = st.builds(
    record,
    tenant=st.sampled_from(["acme", "rival", "third"]),
    version=st.sampled_from([None, sha256(b"one"), sha256(b"two")]),
    status=st.sampled_from([200, 429, 499]),
    prompt_tokens=st.integers(0, 2**40),
    completion_tokens=st.integers(0, 2**40),
    cached_tokens=st.integers(0, 2**40),
    started=MOMENTS,
)


@settings(max_examples=40)
@given(st.lists(RECORDS, max_size=12), MOMENTS, MOMENTS, st.sets(st.sampled_from(GROUPS), min_size=1, max_size=3))
def test_totals_and_spent_are_naive_sums(
    tmp_path_factory: pytest.TempPathFactory, records: list[RequestRecord], since: float, until: float, by: set[str]
) -> None:
    """Sums over any bounds and groups, and a month's budget, equal a loop over the records, also after a restart."""
    path, groups = tmp_path_factory.mktemp("usage") / "usage.db", tuple(sorted(by))

    def group(one: RequestRecord) -> tuple[object, ...]:
        day = datetime.fromtimestamp(int(one.started // 1), tz=UTC).date().isoformat()
        return tuple(day if name == "day" else getattr(one, name) for name in groups)

    def used(tenant: str) -> int:
        mine = (r for r in records if r.tenant == tenant and NOVEMBER <= r.started < DECEMBER)
        return sum(r.prompt_tokens + r.completion_tokens for r in mine)

    with opened(path) as store:
        for one in records:
            store.observe(one)
        for tenant in ("acme", "rival", "third"):
            assert store.spent(tenant) == used(tenant)
    with opened(path) as store:
        for tenant in ("acme", "rival", "third"):
            assert store.spent(tenant) == used(tenant)
        naive: dict[tuple[object, ...], list[int]] = {}
        for one in records:
            if since <= one.started < until:
                sums = naive.setdefault(group(one), [0, 0, 0, 0])
                counts = (1, one.prompt_tokens, one.completion_tokens, one.cached_tokens)
                sums[:] = [a + b for a, b in zip(sums, counts, strict=True)]
        found = {
            tuple(t.group[name] for name in groups):
                [t.requests, t.prompt_tokens, t.completion_tokens, t.cached_tokens]
            for t in store.totals(since, until, groups)
        }  # fmt: skip
        assert found == naive


def test_a_budget_begins_again_with_the_month(tmp_path: Path) -> None:
    """The last instant of November is November's, the first of December December's; a restart changes neither."""
    clock, path = FakeClock(DECEMBER - 2.5e-7), tmp_path / "usage.db"
    assert clock.now() < DECEMBER
    with opened(path, clock) as store:
        store.observe(record(started=clock.now(), prompt_tokens=100, completion_tokens=0))
        assert store.spent("acme") == 100
        clock.advance(1)
        assert store.spent("acme") == 0
        store.observe(record(started=DECEMBER, prompt_tokens=7, completion_tokens=0))
        assert store.spent("acme") == 7
    with opened(path, clock) as store:
        assert store.spent("acme") == 7
    with opened(path, FakeClock(DECEMBER - 1)) as store:
        assert store.spent("acme") == 100


def test_spent_moves_from_queue_to_table_without_a_gap(tmp_path: Path) -> None:
    """Whoever asks while records are written sees each of them exactly once."""
    with opened(tmp_path / "usage.db") as store:
        for number in range(1, 301):
            store.observe(record(prompt_tokens=1, completion_tokens=0))
            assert store.spent("acme") == number
            if number % 100 == 0:
                wait_until(lambda n=number: len(store.rows()) == n)
        wait_until(lambda: not +store._pending)
        assert store.spent("acme") == 300


def test_two_processes_share_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process stores in the same database is counted here soon."""
    monkeypatch.setattr(usage_module, "_CATCH_UP_S", 0.05)
    with opened(tmp_path / "usage.db") as one, opened(tmp_path / "usage.db") as other:
        one.observe(record())
        other.observe(record())
        wait_until(lambda: one.spent("acme") == other.spent("acme") == 30)


def test_pages_have_every_row_once(tmp_path: Path) -> None:
    """Following the cursor gives all rows, also those that come while one reads; bounds and tenant hold."""
    with opened(tmp_path / "usage.db") as store:
        for number in range(10):
            store.observe(record(id=str(number), tenant="rival" if number % 3 == 0 else "acme", started=NOW + number))
        wait_until(lambda: len(store.rows()) == 10)
        seen, after = [], 0
        while page := store.rows(limit=4, after=after):
            seen += [row.record.id for row in page]
            after = page[-1].serial
            if len(seen) == 4:
                store.observe(record(id="late", started=NOW - 1))
                wait_until(lambda: len(store.rows()) == 11)
        assert seen == [*map(str, range(10)), "late"]
        assert [r.record.id for r in store.rows(NOW + 2, NOW + 7, "rival")] == ["3", "6"]
        assert sum(1 for _ in store.every(tenant="acme")) == 7


def test_every_ends_where_the_store_ended_when_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy store does not make an export endless."""
    monkeypatch.setattr(usage_module, "_PAGE", 2)
    with opened(tmp_path / "usage.db") as store:
        for _ in range(3):
            store.observe(record())
        wait_until(lambda: len(store.rows()) == 3)
        rows = store.every()
        assert next(rows).serial == 1
        store.observe(record())
        wait_until(lambda: len(store.rows()) == 4)
        assert [row.serial for row in rows] == [2, 3]


def test_an_unknown_group_is_refused(tmp_path: Path) -> None:
    """Named, with what there is; so is none at all and one given twice."""
    with opened(tmp_path / "usage.db") as store:
        for by in ((), ("tenant", "tenant"), ("prompt",)):
            with pytest.raises(ConfigError, match="tenant, key, route"):
                store.totals(by=by)


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\t=", "\r=", "\n=", "  =", "\uff1d"])
def test_csv_holds_no_formula(tmp_path: Path, begin: str) -> None:
    """A field that a spreadsheet would compute begins with an apostrophe; quotes and commas come back as they were."""
    evil = begin + 'HYPERLINK("http://x","y"),1'
    with opened(tmp_path / "usage.db") as store:
        store.observe(record(key=evil, replica='plain "r", 1'))
    with opened(tmp_path / "usage.db") as store:
        stream = io.StringIO(newline="")
        store.export_csv(stream)
    head, row = csv.reader(io.StringIO(stream.getvalue(), newline=""))
    assert head == ["serial", *FIELDS]
    named = dict(zip(head, row, strict=True))
    assert (named["key"], named["replica"]) == ("'" + evil, 'plain "r", 1')
    assert (named["started"], named["status"], named["ttft_s"]) == ("2026-11-21T12:00:00.000Z", "200", "0.5")


def test_a_full_queue_loses_the_oldest_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While the database is locked the queue fills; what is lost is counted, logged once, and the rest is stored."""
    path = tmp_path / "usage.db"
    with opened(path):
        pass
    engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 0.01})
    store = UsageStore(engine, FakeClock(NOW), flush_s=0.01, queue=3)
    locker = sqlite3.connect(path, isolation_level=None)
    locker.execute("BEGIN EXCLUSIVE")
    with caplog.at_level(logging.INFO, "fedllm.serving.usage"):
        store.observe(record(id="0", prompt_tokens=1, completion_tokens=0))
        wait_until(lambda: store._failing)
        for number in range(1, 6):
            store.observe(record(id=str(number), prompt_tokens=1, completion_tokens=0))
        assert store.lost == 2
        assert store.spent("acme") == 6
        locker.execute("ROLLBACK")
        wait_until(lambda: not store._failing and not store._queue)
    asyncio.run(store.close())
    locker.close()
    said = [r.getMessage() for r in caplog.records]
    assert said.count("usage queue full, oldest records lost") == 1
    assert said[-1] == "usage is stored again"
    with opened(path) as again:
        assert [row.record.id for row in again.rows()] == ["0", "3", "4", "5"]


def test_a_record_that_no_table_takes_holds_up_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A lone surrogate or a number that is too large is lost, counted and logged; its neighbours are stored."""
    with opened(tmp_path / "usage.db") as store:
        for one in (record(id="a"), record(id="\ud800"), record(prompt_tokens=2**70), record(id="b")):
            store.observe(one)
    assert store.lost == 2
    assert [r.getMessage() for r in caplog.records] == ["usage record refused and lost"] * 2
    with opened(tmp_path / "usage.db") as store:
        assert [row.record.id for row in store.rows()] == ["a", "b"]


def test_close_stores_what_waits_and_later_records_count_as_lost(tmp_path: Path) -> None:
    """Nothing observed before is lost; what comes after is not dropped silently. A second close does nothing."""
    with opened(tmp_path / "usage.db") as store:
        for _ in range(1200):
            store.observe(record())
    assert store.lost == 0
    store.observe(record())
    assert store.lost == 1
    asyncio.run(store.close())
    with opened(tmp_path / "usage.db") as store:
        assert store.totals()[0].requests == 1200


CHILD = """
import sys, time
from fedllm.clock import SystemClock
from fedllm.serving.records import RequestRecord
from fedllm.serving.usage import open_usage

store, clock = open_usage(sys.argv[1], SystemClock()), SystemClock()
number = 0
while True:
    store.observe(RequestRecord(str(number), "acme", "k", "r", "a", None, 200, 1, 1, 0, clock.now(), None, 0.1))
    number += 1
    time.sleep(0.001)
"""


def test_kill_9_loses_only_the_end(tmp_path: Path) -> None:
    """Killed in mid-work, a process leaves a sound database with every record up to one, and nothing else."""
    path = tmp_path / "usage.db"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)])
    try:
        # Nobody flushes and nobody closes: what is read here was stored by the timer alone.
        wait_until(lambda: path.exists() and stored(path) >= 300)
    finally:
        child.kill()
        child.wait()
    with opened(path, SystemClock()) as store:
        rows = store.rows(limit=10**9)
        assert [row.record.id for row in rows] == [str(n) for n in range(len(rows))]
        assert len(rows) >= 300
        assert store.spent("acme") == 2 * len(rows)
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    assert FLUSH_S <= 0.5, "a record waits this long, and as long as one commit: together within the second"


def test_a_clock_set_back_over_the_months_end_does_not_renew_the_budget(tmp_path: Path) -> None:
    """A machine that believed in December for a while knows in November again what November has used."""
    clock = FakeClock(NOW)
    with opened(tmp_path / "usage.db", clock) as store:
        store.observe(record())
        wait_until(lambda: not +store._pending)
        clock.advance(DECEMBER - NOW)
        store.observe(record(started=DECEMBER, prompt_tokens=7, completion_tokens=0))
        wait_until(lambda: not +store._pending)
        assert store.spent("acme") == 7
        clock.advance(NOW - DECEMBER)
        store.observe(record())
        wait_until(lambda: store.spent("acme") == 30)
        clock.advance(DECEMBER - NOW)
        wait_until(lambda: store.spent("acme") == 7)


def test_who_has_used_up_a_limit_fills_no_disk(tmp_path: Path) -> None:
    """What was refused at the door used nothing and is no row; what was refused later, or computed, is one."""
    with opened(tmp_path / "usage.db") as store:
        store.observe(record(id="", version=None, status=429, prompt_tokens=0, completion_tokens=0))
        store.observe(record(id="late", status=429))
        store.observe(record(id="", version=None, status=400))
    with opened(tmp_path / "usage.db") as store:
        assert [(row.record.id, row.record.status) for row in store.rows()] == [("late", 429), ("", 400)]

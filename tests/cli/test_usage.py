"""``fedllm usage``: what was stored, as a table, CSV or JSON; wrong input is named; nothing is changed."""

from __future__ import annotations

import asyncio
import csv
import io
from pathlib import Path

import pytest
from cli.command_line import fedllm, files

from fedllm.clock import FakeClock
from fedllm.ids import sha256
from fedllm.serving.records import RequestRecord
from fedllm.serving.usage import open_usage
from fedllm.serving.usage_rows import FIELDS

NOON = 1_795_262_400.0  # 2026-11-21T12:00:00Z
DAY_S = 86_400


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return a store with three requests of two tenants on two days."""
    path = tmp_path / "usage.db"
    usage = open_usage(str(path), FakeClock(NOON))
    for n, (tenant, version) in enumerate([("acme", sha256(b"v")), ("acme", sha256(b"v")), ("rival", None)]):
        started = NOON + (n > 0) * DAY_S
        usage.observe(
            RequestRecord(f"id-{n}", tenant, "key-1", "/v1/x", "@alias", version, 200, 10, 5, 1, started, 0.1, 1.0)
        )
    asyncio.run(usage.close())
    return path


def test_export_is_csv_unless_told_otherwise(store: Path) -> None:
    """One row a request; what looks like a formula is text; --csv says the same."""
    said = fedllm("usage", "export", "--store", store)
    assert (said.exit_code, said.err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(said.out, newline="")))
    assert list(rows[0]) == ["serial", *FIELDS]
    assert [row["id"] for row in rows] == ["id-0", "id-1", "id-2"]
    assert rows[0]["alias"] == "'@alias"
    assert fedllm("usage", "export", "--store", store, "--csv").out == said.out


def test_export_json_is_one_document(store: Path, tmp_path: Path) -> None:
    """A list of objects with numbers as numbers; an empty one where nothing was asked."""
    rows = fedllm("usage", "export", "--store", store, "--json").json()
    assert [(r["id"], r["prompt_tokens"], r["version"]) for r in rows] == [
        ("id-0", 10, sha256(b"v")), ("id-1", 10, sha256(b"v")), ("id-2", 10, None),
    ]  # fmt: skip
    assert fedllm("usage", "export", "--store", store, "--json", "--tenant", "nobody").json() == []


def test_bounds_and_tenant(store: Path) -> None:
    """From a day's first moment on, up to another's; one tenant's only."""
    by_day = fedllm("usage", "export", "--store", store, "--json", "--since", "2026-11-22").json()
    assert [r["id"] for r in by_day] == ["id-1", "id-2"]
    assert [r["id"] for r in fedllm("usage", "export", "--store", store, "--json", "--until", "2026-11-22").json()] == [
        "id-0"
    ]
    only = fedllm("usage", "export", "--store", store, "--json", "--tenant", "rival").json()
    assert [r["id"] for r in only] == ["id-2"]


def test_show_sums_by_tenant_version_and_day(store: Path) -> None:
    """A table for people with short digests, JSON with whole ones; other groups by --by."""
    said = fedllm("usage", "show", "--store", store)
    assert (said.exit_code, said.err) == (0, "")
    assert sha256(b"v")[:12] in said.out
    assert sha256(b"v") not in said.out
    assert "2026-11-21" in said.out
    found = fedllm("usage", "show", "--store", store, "--json", "--since", "2026-11-22").json()
    sums = {"requests": 1, "prompt_tokens": 10, "completion_tokens": 5, "cached_tokens": 1}
    assert found == [
        {"tenant": "acme", "version": sha256(b"v"), "day": "2026-11-22", **sums},
        {"tenant": "rival", "version": None, "day": "2026-11-22", **sums},
    ]
    whole = fedllm("usage", "show", "--store", store, "--json", "--by", "tenant").json()
    assert [(t["tenant"], t["requests"]) for t in whole] == [("acme", 2), ("rival", 1)]


def test_bad_input_changes_nothing(store: Path, tmp_path: Path) -> None:
    """No store, a file of something else, no time, no group, two formats: an error each, and every file as it was."""
    text = tmp_path / "text"
    text.write_text("not a database" * 100)
    before = files(tmp_path)
    fedllm("usage", "show", "--store", tmp_path / "none.db").fails(5, "not-found", "none.db")
    fedllm("usage", "show", "--store", text).fails(2, "config", "cannot be opened")
    fedllm("usage", "export", "--store", store, "--since", "soon").fails(2, "config", "--since is 'soon'")
    fedllm("usage", "show", "--store", store, "--by", "day,cost").fails(2, "config", "day,cost", "tenant, key")
    fedllm("usage", "export", "--store", store, "--csv", "--json").fails(2, "config", "--json and --csv")
    assert {name: data for name, data in files(tmp_path).items() if not name.endswith(("-shm", "-wal"))} == before

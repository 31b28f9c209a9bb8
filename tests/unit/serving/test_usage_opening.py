"""Opening a usage store: what is none is said, nothing is made by reading, and no password is named."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from unit.serving.usage_scene import NOVEMBER, NOW, opened, record, wait_until

from fedllm.clock import FakeClock
from fedllm.errors import ConfigError, NotFound
from fedllm.serving import usage as usage_module
from fedllm.serving.usage import open_usage
from fedllm.serving.usage_rows import utc_seconds


def test_reading_makes_nothing(tmp_path: Path) -> None:
    """There is no store, or a database of something else: it is said, and the folder is as it was."""
    with pytest.raises(NotFound, match="there is no usage store"):
        open_usage(str(tmp_path / "none.db"), FakeClock(NOW), reading=True)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE things (name TEXT)")
    connection.close()
    before = other.read_bytes()
    with pytest.raises(NotFound, match="no usage tables"):
        open_usage(str(other), FakeClock(NOW), reading=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"other.db": before}


def test_another_schema_is_refused(tmp_path: Path) -> None:
    """A store of a later release is named with both versions, and not touched."""
    path = tmp_path / "usage.db"
    with opened(path):
        pass
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE usage_schema SET version = 7")
    connection.close()
    for reading in (False, True):
        with pytest.raises(ConfigError, match="has schema 7: 1 is known here"):
            open_usage(str(path), FakeClock(NOW), reading=reading)


@pytest.mark.parametrize(
    "address",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///x.db?mode=ro",
        "nosuch://u:geheim@h/db",
        "what://[",
        "{tmp}",
        "{tmp}/text",
    ],
)
def test_what_is_no_store_is_a_clear_error(tmp_path: Path, address: str) -> None:
    """Memory, options, an unknown database, a folder, a text file: a configuration error without a password."""
    (tmp_path / "text").write_text("not a database " * 100)
    with pytest.raises(ConfigError) as caught:
        open_usage(address.format(tmp=tmp_path), FakeClock(NOW))
    assert "geheim" not in f"{caught.value.message} {caught.value.hint}"


def test_a_url_of_a_file_is_that_file(tmp_path: Path) -> None:
    """A SQLAlchemy URL works as the path does, WAL included."""
    with opened(f"sqlite:///{tmp_path / 'usage.db'}") as store:
        store.observe(record())
        wait_until(lambda: len(store.rows()) == 1)
        assert (tmp_path / "usage.db-wal").exists()


def test_the_tables_compile_for_other_databases() -> None:
    """Names that are reserved elsewhere are quoted, and the row's number is a large one that counts up."""
    from sqlalchemy.dialects import mysql, postgresql

    made = str(sa.schema.CreateTable(usage_module._usage).compile(dialect=postgresql.dialect()))
    assert "serial BIGSERIAL NOT NULL" in made
    assert "started DOUBLE PRECISION" in made
    assert "`key` VARCHAR(255)" in str(sa.schema.CreateTable(usage_module._usage).compile(dialect=mysql.dialect()))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2026-11-01", NOVEMBER), ("2026-11-01T00:00:00Z", NOVEMBER), ("2026-11-01T02:00:00+02:00", NOVEMBER)],
)
def test_moments_are_utc_unless_they_say_otherwise(text: str, seconds: float) -> None:
    """The machine's own zone plays no part."""
    assert utc_seconds(text, what="since") == seconds


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "1", "9999999999"])
def test_a_moment_that_is_none_is_named(text: str) -> None:
    """The error names what was given and how it should look."""
    with pytest.raises(ConfigError, match="since is"):
        utc_seconds(text, what="since")

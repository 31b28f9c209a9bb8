"""Rows and sums of usage as plain data, their days and months in UTC, and their CSV. No SQL."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime
from typing import Any

from fedllm.errors import ConfigError
from fedllm.serving.records import RequestRecord

GROUPS = ("tenant", "key", "route", "alias", "version", "status", "replica", "day")
"""What totals can be made by."""
FIELDS = tuple(field.name for field in fields(RequestRecord))
COUNTS = ("prompt_tokens", "completion_tokens", "cached_tokens")
_DAY_S = 86_400
_EPOCH = date(1970, 1, 1).toordinal()
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20", "\t", "\r", "\n")
"""What a spreadsheet may read as the beginning of a formula; the full-width forms are for East Asian locales."""
_PIECE = 1 << 16


@dataclass(frozen=True)
class UsageRow:
    """One stored record. `serial` counts up in the order of storing; it is the cursor of a page."""

    serial: int
    record: RequestRecord

    def as_dict(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return {"serial": self.serial} | {name: getattr(self.record, name) for name in FIELDS}


@dataclass(frozen=True)
class UsageTotal:
    """Sums over one group; `group` has the names of `GROUPS` that were asked for, a day as ``2026-11-01``."""

    group: dict[str, Any]
    requests: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Return the sums as plain data."""
        return {**self.group, "requests": self.requests} | {name: getattr(self, name) for name in COUNTS}


def tokens(record: RequestRecord) -> int:
    """Return what a request counts for in its tenant's month."""
    return record.prompt_tokens + record.completion_tokens


def account(record: RequestRecord) -> tuple[int, str]:
    """Return the month in which a request began, and its tenant."""
    return month_of(day_of(record.started)), record.tenant


def day_of(seconds: float) -> int:
    """Return days since the epoch, UTC, rounded down exactly: `datetime` would round to a microsecond first."""
    return int(seconds // _DAY_S)


def month_of(day: int) -> int:
    """Return the number of a day's month; they count up without a gap."""
    found = date.fromordinal(_EPOCH + day)
    return found.year * 12 + found.month - 1


def month_start(day: int) -> int:
    """Return the first second of a day's month, since the epoch."""
    return (date.fromordinal(_EPOCH + day).replace(day=1).toordinal() - _EPOCH) * _DAY_S


def shown(name: str, value: Any) -> Any:
    """Return a group's value as people read it."""
    return date.fromordinal(_EPOCH + value).isoformat() if name == "day" else value


def utc_seconds(text: str, *, what: str) -> float:
    """Return ``2026-11-01`` or ``2026-11-01T12:00:00Z`` as seconds since the epoch; UTC unless it says otherwise.

    Raises
    ------
    ConfigError
        Naming `what`, if it is neither.
    """
    try:
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ConfigError(
            f"{what} is {text[:40]!r}, which is no time", hint="a day like 2026-11-01, a time like 2026-11-01T12:00:00Z"
        ) from None


def csv_lines(rows: Iterable[UsageRow]) -> Iterator[str]:
    """Yield a CSV table (RFC 4180) piece by piece, the header first; safe to open in a spreadsheet.

    A field that begins like a formula gets an apostrophe before it (OWASP, CSV injection).
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(("serial", *FIELDS))
    for row in rows:
        writer.writerow([_cell(name, value) for name, value in row.as_dict().items()])
        if buffer.tell() > _PIECE:
            yield buffer.getvalue()
            buffer.seek(0)
            buffer.truncate()
    yield buffer.getvalue()


def _cell(name: str, value: Any) -> Any:
    if name == "started":
        return datetime.fromtimestamp(value, tz=UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, str) and value.lstrip(" ").startswith(_FORMULA):
        return f"'{value}"
    return value


def row_of(record: RequestRecord) -> dict[str, Any]:
    """Return a record's columns, by name."""
    return {name: getattr(record, name) for name in FIELDS} | {"day": day_of(record.started)}

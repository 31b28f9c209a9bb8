"""The tenants file as tables: read, and written whole under a lock, so that no command loses another's change."""

from __future__ import annotations

import fcntl
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedllm.clock import iso_utc
from fedllm.errors import ConfigError, NotFound

Table = dict[str, Any]


def read_tables(path: Path) -> Table:
    """Return the file's tables.

    Raises
    ------
    NotFound
        If there is no file.
    ConfigError
        If it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"there is no tenants file {path}", hint="fedllm tenant add NAME --allow ALIAS") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML ({error})") from None


def write_tables(path: Path, tables: Mapping[str, Any]) -> None:
    """Replace the file, readable by its owner only, who stays; comments and order of the old one are lost.

    Parameters
    ----------
    path : Path
    tables : mapping
        Tables of tables, lists of text, text, numbers, flags and datetimes.
    """
    draft = path.with_name(path.name + ".new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, 0o600)
            _keep_owner(path, descriptor)
            file.write("\n".join(_lines(tables, ())).lstrip("\n") + "\n")
            file.flush()
            os.fsync(descriptor)
        draft.replace(path)
        _sync_folder(path.parent)  # a power cut must not bring a revoked key back
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the file for one change, against every other command that changes it.

    The lock is on a file beside it that stays: the file itself is replaced by every change.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def stamp(seconds: float) -> datetime:
    """Return seconds since the Unix epoch as TOML has a time, to the second; raise `ConfigError` if it has none."""
    try:
        return datetime.fromtimestamp(int(seconds), tz=UTC)
    except (ValueError, OverflowError, OSError):
        raise ConfigError(f"{seconds:g} s since 1970 is no time until the year 9999", hint="say fewer days") from None


def _keep_owner(path: Path, descriptor: int) -> None:
    """Give a draft the file's owner: an administrator's change must not take the file from who serves it."""
    with suppress(FileNotFoundError, PermissionError):
        old = path.stat()
        os.fchown(descriptor, old.st_uid, old.st_gid)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    values = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    if values or (path and not table):
        yield "\n[" + ".".join(map(_key, path)) + "]"
    for key, value in values.items():
        yield f"{key} = {_value(value)}"
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _lines(value, (*path, key))


def _key(name: str) -> str:
    return json.dumps(name) if "/" in name else name


def _value(value: object) -> str:
    # Names, hashes and aliases are plain ASCII, whose JSON form is also TOML.
    return iso_utc(value.timestamp()) if isinstance(value, datetime) else json.dumps(value)

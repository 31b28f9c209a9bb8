"""What the daemon writes down for its own people: what left, how rounds went, which round was the last."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from fedllm.clock import Clock, iso_utc
from fedllm.errors import DiskFull, FedllmError, IntegrityError
from fedllm.ids import sha256
from fedllm.relay.carrier import Reply

AUDIT_FILE = "audit.jsonl"
ROUNDS_FILE = "rounds.jsonl"
ACCEPTED_FILE = "accepted.json"


def append(path: Path, entry: dict[str, Any], *, durable: bool = False) -> None:
    """Add one line of JSON to a file of mode 0600, fsynced if it must outlive the machine.

    Raises
    ------
    DiskFull, IntegrityError
        If that is impossible.
    """
    line = json.dumps(entry, sort_keys=True) + "\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "ab") as file:
            file.write(line.encode())
            if durable:
                file.flush()
                os.fsync(file.fileno())
                _fsync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from None


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unwritable(path: Path, error: OSError) -> FedllmError:
    """Return the error for a file that must be written before anything may leave, and cannot be."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DiskFull(f"no room to write {path}", hint="free some space; nothing left this machine meanwhile")
    return IntegrityError(f"cannot write {path}: {error.strerror}")


class AuditLog:
    """One line for every message that left this machine, written before it leaves.

    Parameters
    ----------
    path : Path
    clock : Clock
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock

    def sent(self, kind: str, round_number: int, reply: Reply) -> None:
        """Record a message; raise `DiskFull` or `IntegrityError` if that is impossible: then nothing may leave.

        The digest is of the sealed envelope, which names the digest of each part.
        """
        entry = {"time": iso_utc(self._clock.now()), "kind": kind, "round": round_number, "bytes": reply.size}
        parts = {"parts": len(reply.parts)} if reply.parts else {}
        append(self._path, {**entry, **parts, "sha256": sha256(reply.head)})


class RoundsLog:
    """One line for every round that ended, with this owner's own losses; private, never sent.

    Parameters
    ----------
    path : Path
    clock : Clock
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock

    def ended(self, entry: dict[str, Any]) -> None:
        """Record a round."""
        append(self._path, {"time": iso_utc(self._clock.now()), **entry})


class LastAccepted:
    """The last round accepted of each federation; survives restarts, so that no round is run twice.

    Parameters
    ----------
    path : Path

    Raises
    ------
    IntegrityError
        If the file is there and is not what this class wrote.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rounds: dict[str, int] = {}
        if path.exists():
            try:
                self._rounds = {str(k): int(v) for k, v in json.loads(path.read_text(encoding="utf-8")).items()}
            except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
                raise IntegrityError(
                    f"{path} is damaged", hint="restore it; without it an old round could be replayed to this owner"
                ) from None

    def of(self, federation: str) -> int:
        """Return the last round accepted, 0 for none."""
        return self._rounds.get(federation, 0)

    def accept(self, federation: str, round_number: int) -> None:
        """Record a round, on disk before this returns."""
        self._rounds[federation] = round_number
        draft = self._path.with_suffix(".tmp")
        try:
            with draft.open("w", encoding="utf-8") as file:
                json.dump(self._rounds, file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._path)
            _fsync_folder(self._path.parent)  # else a power cut could undo the rename, and the round be accepted twice
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise unwritable(self._path, error) from None

"""What the daemon says of itself to its own people, and how it is read again."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedllm.errors import IntegrityError, NotFound

STATUS_FILE = "status.json"


@dataclass(frozen=True)
class Status:
    """One state of a daemon.

    Attributes
    ----------
    state : str
        ``loading``, ``ready`` or ``stopped``.
    pid : int
    owner, federation, transport : str
    since : str
        UTC time of this state.
    isolation, isolation_why : str
        What keeps the relay's processes from data, keys and ledger.
    records : int or None
        Usable training records; None before they are read.
    """

    state: str
    pid: int
    owner: str
    federation: str
    transport: str
    since: str
    isolation: str
    isolation_why: str
    records: int | None = None


def write_status(home: Path, status: Status) -> None:
    """Replace the status file, whole or not at all."""
    draft = home / (STATUS_FILE + ".tmp")
    draft.write_text(json.dumps(asdict(status), indent=2) + "\n", encoding="utf-8")
    draft.replace(home / STATUS_FILE)


def read_status(home: Path) -> dict[str, Any]:
    """Return the daemon's state, its last round and what its ledger says.

    A daemon that is gone without having said so is reported as ``dead``.

    Raises
    ------
    NotFound
        If no daemon ever ran here.
    IntegrityError
        If the file is damaged.
    """
    path = home / STATUS_FILE
    if not path.is_file():
        raise NotFound(f"no status at {path}: the daemon never ran here", hint="fedllm client start")
    try:
        report: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
        pid = int(report["pid"])
    except (ValueError, KeyError, TypeError):
        raise IntegrityError(f"{path} is damaged", hint="it is written again at the next start") from None
    if report.get("state") != "stopped" and not _runs(pid):
        report["state"] = "dead"
    return report | _last_round(home)


def _last_round(home: Path) -> dict[str, Any]:
    path = home / "rounds.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    last = json.loads(lines[-1]) if lines else {}
    return {f"last_round_{key}" if key != "round" else "last_round": last[key] for key in sorted(last)}


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""Runs one command on a leash: when whoever started it goes away, so does everything the command started.

Executed as a script by `fedllm.relay.processes`, on the standard library alone, so that it starts in a few
milliseconds. The starter holds the other end of stdin; its end of file means that the starter is gone, even
by SIGKILL. SIGTERM means: end it all now. A command's descendants that put themselves into another session
(Flower's SuperLink does that to its executor) are still found, because this process is their subreaper.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LINUX = sys.platform.startswith("linux")
_POLL_S = 0.1


def _prctl(option: int, value: int) -> None:
    if _LINUX:
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _in_child() -> None:
    # if this leash itself is killed by SIGKILL, the command goes at once
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def descendants(root: int) -> list[int]:
    """Return the live processes below `root`, parents first; empty where there is no ``/proc``."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            # the command name may hold spaces and brackets: fields are counted from its last ')'
            fields = entry.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found: list[int] = []
    waiting = [root]
    while waiting:
        below = children.get(waiting.pop(0), [])
        found += below
        waiting += below
    return found


def _signal_all(number: int, child: int) -> bool:
    targets = set(descendants(os.getpid())) | ({child} if not _LINUX else set())
    for pid in targets:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
    return bool(targets)


def _reap(child: int) -> int | None:
    """Collect whatever ended; return the command's exit status if it is among it."""
    status: int | None = None
    while True:
        try:
            pid, raw = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == child:
            code = os.waitstatus_to_exitcode(raw)
            status = code if code >= 0 else 128 - code


def main(arguments: list[str]) -> int:
    """Run ``<grace seconds> <command> ...`` and return its exit code."""
    grace_s, command = float(arguments[0]), arguments[1:]
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, _frame: asked.append(got))
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    # one thread and no locks here, so code between fork and exec is safe
    # kept for as long as this runs: a Popen that is collected reaps its child, whose exit status is then lost
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_in_child)  # noqa: PLW1509
    child = process.pid
    code: int | None = None
    while code is None and not asked:
        readable, _, _ = select.select([0], [], [], _POLL_S)
        if readable and not os.read(0, 1):
            break
        code = _reap(child)
    give_up = time.monotonic() + grace_s
    _signal_all(signal.SIGTERM, child)
    while True:
        status = _reap(child)
        code = status if code is None else code
        late = time.monotonic() >= give_up
        if not (_signal_all(signal.SIGKILL, child) if late else descendants(os.getpid())):
            break
        time.sleep(0.02)
    _reap(child)
    return 128 + signal.SIGKILL if code is None else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

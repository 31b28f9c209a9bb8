"""Children that are watched: they end when they are told to, start again when they fall, and never outlive us."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from patience import PATIENCE_S

from fedllm.clock import SystemClock
from fedllm.errors import ProcessDied
from fedllm.relay.processes import Supervised

SLEEPS = "import time; time.sleep(600)"
# a child in a session of its own, as Flower's SuperLink starts its executor
ESCAPES = (
    "import subprocess, sys, time, pathlib\n"
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
    "pathlib.Path(sys.argv[1]).write_text(str(p.pid)); time.sleep(600)"
)
STUBBORN = (
    "import pathlib, signal, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); pathlib.Path(sys.argv[1]).write_text('1'); time.sleep(600)"
)


def _child(tmp_path: Path, code: str, *arguments: str | Path, grace_s: float = 1.0) -> Supervised:
    argv = [sys.executable, "-c", code, *map(str, arguments)]
    return Supervised("child", argv, env=dict(os.environ), log=tmp_path / "child.log", grace_s=grace_s)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _comes(condition: Callable[[], bool]) -> bool:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.02)
    return True


def _wait_for(path: Path) -> str:
    assert _comes(lambda: path.exists() and bool(path.read_text())), f"{path} never appeared"
    return path.read_text()


def _wait_gone(pid: int) -> bool:
    return _comes(lambda: not _runs(pid))


def test_exit_code_and_output_are_the_commands_own(tmp_path: Path) -> None:
    """The leash in between is not seen."""
    child = _child(tmp_path, "import sys; print('hello'); sys.exit(7)")
    child.start()
    assert _comes(lambda: not child.alive())
    assert child.returncode == 7
    assert (tmp_path / "child.log").read_text() == "hello\n"


def test_terminate_ends_grandchildren_in_other_sessions(tmp_path: Path) -> None:
    """A process group would miss them."""
    child = _child(tmp_path, ESCAPES, tmp_path / "pid")
    child.start()
    grandchild = int(_wait_for(tmp_path / "pid"))
    assert _runs(grandchild)
    child.terminate()
    assert not child.alive()
    assert _wait_gone(grandchild)


def test_terminate_kills_what_ignores_sigterm(tmp_path: Path) -> None:
    """After the grace period nothing is asked any more."""
    child = _child(tmp_path, STUBBORN, tmp_path / "up", grace_s=0.2)
    child.start()
    _wait_for(tmp_path / "up")
    child.terminate()
    assert child.returncode == 128 + signal.SIGKILL
    with pytest.raises(ProcessDied):
        child.start()


def test_nothing_outlives_a_parent_that_was_killed(tmp_path: Path) -> None:
    """SIGKILL cannot be caught, so the leash watches for it: child and escaped grandchild go."""
    parent = (
        "import os, pathlib, sys, time\n"
        "from fedllm.relay.processes import Supervised\n"
        "c = Supervised('c', [sys.executable, '-c', sys.argv[1], sys.argv[2]], env=dict(os.environ),\n"
        "               log=pathlib.Path(sys.argv[3]), grace_s=0.5)\n"
        "c.start(); print(c.pid, flush=True); time.sleep(600)"
    )
    argv = [sys.executable, "-c", parent, ESCAPES, str(tmp_path / "pid"), str(tmp_path / "log")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        leash = int(running.stdout.readline())
        grandchild = int(_wait_for(tmp_path / "pid"))
        running.kill()
    assert _wait_gone(leash)
    assert _wait_gone(grandchild)


def test_a_killed_leash_takes_its_command_with_it(tmp_path: Path) -> None:
    """Killing the pid that is reported is killing the program."""
    code = "import os, pathlib, sys, time\npathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)"
    child = _child(tmp_path, code, tmp_path / "pid")
    child.start()
    command = int(_wait_for(tmp_path / "pid"))
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    assert _wait_gone(command)
    child.terminate()
    assert not child.alive()


def test_what_a_crashed_command_started_is_ended_too(tmp_path: Path) -> None:
    """A new SuperLink must not meet the executor of the old one."""
    child = _child(tmp_path, ESCAPES, tmp_path / "pid")
    child.start()
    grandchild = int(_wait_for(tmp_path / "pid"))
    child.kill()
    assert child.returncode == 128 + signal.SIGKILL
    assert _wait_gone(grandchild)


def test_a_fallen_child_is_started_again(tmp_path: Path) -> None:
    """`keep` restarts it until it is terminated."""

    async def scenario() -> int:
        child = _child(tmp_path, SLEEPS)
        keeping = asyncio.create_task(child.keep(SystemClock()))
        while not child.alive():  # noqa: ASYNC110 - a process has no event
            await asyncio.sleep(0.02)
        first = child.pid
        child.kill()
        while not child.alive() or child.pid == first:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await asyncio.to_thread(child.terminate)
        await asyncio.wait_for(keeping, PATIENCE_S)
        return int(first != child.pid)

    assert asyncio.run(asyncio.wait_for(scenario(), 2 * PATIENCE_S)) == 1


def test_a_program_that_is_not_there_says_so_in_its_log(tmp_path: Path) -> None:
    """The leash starts, the program does not; the exit code is not 0."""
    child = Supervised("gone", ["/no/such/program"], env=dict(os.environ), log=tmp_path / "log")
    child.start()
    assert _comes(lambda: not child.alive())
    assert child.returncode not in (0, None)
    assert "No such file" in (tmp_path / "log").read_text()


def test_a_command_that_ends_at_once_is_seen_to_end(tmp_path: Path) -> None:
    """Its exit status is not lost, however soon it ends after it was started."""
    quick = [
        Supervised(f"quick {i}", ["sh", "-c", "exit 3"], env=dict(os.environ), log=tmp_path / "log") for i in range(4)
    ]
    for process in quick:
        process.start()
    assert _comes(lambda: not any(process.alive() for process in quick))
    assert [process.returncode for process in quick] == [3] * 4

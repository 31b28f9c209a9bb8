"""Child processes that are started, watched, started again, and never outlive their parent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedllm import telemetry
from fedllm.clock import Clock
from fedllm.errors import ProcessDied
from fedllm.relay.tether import descendants

_LOG = logging.getLogger(__name__)
_TETHER = Path(__file__).with_name("tether.py")
FIRST_BACKOFF_S = 0.5
LAST_BACKOFF_S = 15.0
HEALTHY_AFTER_S = 60.0
"""A child that lived this long is taken for healthy: its next restart is quick again."""


class Supervised:
    """One child process and everything it starts.

    The child runs under a small leash process (`fedllm.relay.tether`): when this process ends, by SIGKILL
    too, the child and all its descendants are ended.

    Parameters
    ----------
    name : str
        For logs and errors.
    argv : Sequence[str]
        The command; no shell is involved.
    env : Mapping[str, str]
        Its whole environment.
    log : Path
        File that its stdout and stderr are appended to.
    cwd : Path, optional
    grace_s : float
        Seconds between SIGTERM and SIGKILL.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        log: Path,
        cwd: Path | None = None,
        grace_s: float = 5.0,
    ) -> None:
        self.name = name
        self._argv = list(argv)
        self._env = dict(env)
        self._log = log
        self._cwd = cwd
        self._grace_s = grace_s
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False

    def __repr__(self) -> str:
        return f"Supervised({self.name!r}, pid={self.pid})"

    @property
    def pid(self) -> int | None:
        """Process id of the leash; signals to it reach the child. None before the start."""
        return None if self._process is None else self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code of the command (128 + signal when a signal ended it), None while it runs."""
        process = self._process
        if process is None:
            return None
        code = process.poll()
        if code is not None and process.stdin is not None:
            process.stdin.close()
        return code

    def start(self) -> None:
        """Start the command.

        Raises
        ------
        ProcessDied
            If it could not be started at all, or was terminated before.
        """
        if self._ended:
            raise ProcessDied(f"{self.name} was terminated and is not started again")
        self._log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        leash = [sys.executable, "-I", "-S", str(_TETHER), str(self._grace_s)]
        with self._log.open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    [*leash, *self._argv], stdin=subprocess.PIPE, stdout=log, stderr=log, env=self._env,
                    cwd=self._cwd, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise ProcessDied(f"{self.name} could not be started: {error.strerror}") from None

    def alive(self) -> bool:
        """Whether the command runs at this moment."""
        return self._process is not None and self.returncode is None

    def kill(self) -> None:
        """Send SIGKILL to the command, as a crash or the kernel would; what it started is then ended too."""
        if self._process is not None and self.alive():
            for pid in descendants(self._process.pid)[:1] or [self._process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()
            self.alive()

    def terminate(self) -> None:
        """End the command and everything it started: SIGTERM, then SIGKILL after the grace period."""
        self._ended = True
        process = self._process
        if process is None:
            return
        if self.alive():
            process.terminate()
            try:
                process.wait(timeout=self._grace_s + 5)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.alive()

    async def keep(self, clock: Clock) -> None:
        """Start the command again, with a growing pause, whenever it ends; returns after `terminate`.

        Parameters
        ----------
        clock : Clock
            Measures how long a child lived and makes the pauses.
        """
        backoff_s = FIRST_BACKOFF_S
        while not self._ended:
            began_s = clock.monotonic()
            if not self.alive():
                self.start()
            while self.alive():  # noqa: ASYNC110 - a process has no event to wait for
                await asyncio.sleep(0.2)
            if self._ended:
                return
            lived_s = clock.monotonic() - began_s
            backoff_s = FIRST_BACKOFF_S if lived_s > HEALTHY_AFTER_S else min(2 * backoff_s, LAST_BACKOFF_S)
            telemetry.event(
                _LOG, "process ended, starting it again", level=logging.WARNING, process=self.name,
                code=self.returncode, lived_s=round(lived_s, 1), pause_s=backoff_s, log=str(self._log),
            )  # fmt: skip
            await clock.sleep(backoff_s)

"""Rounds asked for, one queue for each federation: one round at a time, several federations side by side."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress

from fedllm import telemetry
from fedllm.clock import Clock
from fedllm.errors import ConfigError, FedllmError, NotFound, NotReady, PeerUnavailable
from fedllm.ids import OwnerId
from fedllm.server.journal import Journal
from fedllm.server.ports import RoundEvent, RoundState
from fedllm.server.rounds.runner import RoundRunner

_LOG = logging.getLogger(__name__)
MAX_ROUNDS = 1000
_HELLO_S = 20.0
_IDLE_S = 2.0
_STOPPING_CODES = frozenset({"policy-refused", "budget-exhausted", "base-mismatch", "operator-abort"})
"""Ends of a round after which the next one would end the same way: the queue is emptied."""


class Schedule:
    """Keeps every federation's queue moving until it is stopped.

    Parameters
    ----------
    runners : Mapping[str, RoundRunner]
        Federation to its runner.
    journal : Journal
        Remembers how many rounds are wanted, over restarts.
    clock : Clock
    """

    def __init__(self, runners: Mapping[str, RoundRunner], journal: Journal, clock: Clock) -> None:
        self._runners = dict(runners)
        self._journal = journal
        self._clock = clock
        self._wake = {name: asyncio.Event() for name in runners}
        self._last: dict[str, RoundEvent] = {}
        self._waiting: dict[str, str] = {}

    def runner(self, federation: str) -> RoundRunner:
        """Return a federation's runner, or raise `NotFound`."""
        if federation not in self._runners:
            known = ", ".join(sorted(self._runners))
            raise NotFound(f"federation {federation!r} is not configured (known: {known})")
        return self._runners[federation]

    @property
    def federations(self) -> tuple[str, ...]:
        """Names, sorted."""
        return tuple(sorted(self._runners))

    def progress(self, event: RoundEvent) -> None:
        """Take an event of a round in progress; the last one of a federation is what status shows."""
        self._last[event.federation] = event
        if event.owner is None and event.done == 0:
            telemetry.event(_LOG, "round", federation=event.federation, round=event.round, state=event.state.value)

    def last_event(self, federation: str) -> RoundEvent | None:
        """Return the latest progress of a federation's round."""
        return self._last.get(federation)

    def waiting(self, federation: str) -> str | None:
        """Return why a wanted round has not begun, if so."""
        return self._waiting.get(federation)

    def present(self, federation: str) -> tuple[OwnerId, ...]:
        """Return the owners that are connected."""
        return self.runner(federation).roll.present

    def request(self, federation: str, rounds: int) -> int:
        """Ask for more rounds; return how many are wanted now.

        Raises
        ------
        NotFound, ConfigError
        PolicyRefused
            If the federation's settings allow no round at all.
        """
        self.runner(federation).check()
        if not 1 <= rounds <= MAX_ROUNDS:
            raise ConfigError(f"{rounds} rounds asked for: 1 to {MAX_ROUNDS} allowed")
        wanted = self._journal.wanted(federation) + rounds
        self._journal.set_wanted(federation, wanted)
        self._wake[federation].set()
        return wanted

    def abort(self, federation: str, number: int, reason: str) -> None:
        """End the round in progress; the rounds still wanted are dropped. Raise `NotReady` if it is not running."""
        self.runner(federation).abort(number, reason)

    async def run(self) -> None:
        """Resume what was left, then serve the queues; ends by cancellation or a programming error."""
        async with asyncio.TaskGroup() as group:
            for name in self._runners:
                group.create_task(self._serve(name), name=f"rounds-{name}")

    async def _serve(self, name: str) -> None:
        runner = self._runners[name]
        left = await runner.resume()
        if left is not None:
            self._after(name, left.code, left.state)
        while True:
            if self._journal.wanted(name) == 0:
                await self._idle(name)
                continue
            try:
                record = await runner.run_one()
                self._waiting.pop(name, None)
                self._after(name, record.code, record.state)
            except (NotReady, PeerUnavailable) as error:
                self._waiting[name] = error.message
                await self._clock.sleep(_IDLE_S)
            except FedllmError as error:  # planning said no for good: keep serving, show why, drop the queue
                self._waiting[name] = error.message
                telemetry.event(_LOG, "no round", level=logging.ERROR, federation=name, code=error.code)
                self._journal.set_wanted(name, 0)

    def _after(self, name: str, code: str | None, state: RoundState) -> None:
        telemetry.event(_LOG, "round ended", federation=name, state=state.value, code=code)
        if state is RoundState.ABORTED and code in _STOPPING_CODES:
            self._journal.set_wanted(name, 0)

    async def _idle(self, name: str) -> None:
        """Say hello to owners that came since, so that status is true and a round can begin at once."""
        with suppress(PeerUnavailable):
            await self._runners[name].roll.call(deadline_s=_HELLO_S)
        self._wake[name].clear()
        if self._journal.wanted(name):
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(self._wake[name].wait(), _IDLE_S)

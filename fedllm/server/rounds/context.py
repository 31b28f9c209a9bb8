"""What the phases of one round share, and `gather`: ask owners, verify, journal, close."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fedllm import wire
from fedllm.aggregation.secagg.coordinator import SecAggCoordinator
from fedllm.clock import Clock
from fedllm.errors import FedllmError, PeerUnavailable, RoundAborted
from fedllm.identity import SigningIdentity
from fedllm.ids import OwnerId, sha256
from fedllm.messages.envelope import COORDINATOR, ENVELOPE_VERSION, Envelope, request_id
from fedllm.messages.plan import RoundPlan, SignedPlan
from fedllm.messages.round import Body, Pending, Refused, decode_body
from fedllm.registry.store import Registry
from fedllm.server.federation import Federation, Head
from fedllm.server.journal import Journal
from fedllm.server.ports import Progress, RoundEvent, RoundState
from fedllm.server.roster import Fault, Roll

T = TypeVar("T", bound=Body)

_TRIES = 2
"""Silences in a row, over at least the carrier's patience, after which an owner is out of a phase: one lost message
is forgiven, nodes may reconnect after a restart, and a dead daemon is not waited for until the deadline."""
_PAUSE_S = 0.5
_LONGEST_POLL_S = 30.0
_HELLO_S = 15.0
_RETRY_CODES = frozenset({"not-ready", "overloaded"})


def _again(reply: Body) -> bool:
    return isinstance(reply, Pending) or (isinstance(reply, Refused) and reply.code in _RETRY_CODES)


def _accept(_owner: OwnerId, _body: Body) -> None:
    return None


@dataclass
class RoundContext:
    """One round in progress: its frozen inputs, its ports, and both sums' machines.

    Attributes
    ----------
    update, evaluation : SecAggCoordinator
        The coordinator's side of the two sums; rebuilt from the journal after a restart.
    refusals : dict[OwnerId, Refused]
        What owners said no with, for the reason of an abort.
    phase_s : dict[str, float]
        Wall seconds by state.
    started : float
        When the round was planned, seconds since the epoch.
    train_s : float
        Wall seconds of the slowest owner's training, as the owners report it.
    """

    federation: Federation
    identity: SigningIdentity
    plan: RoundPlan
    signed: SignedPlan
    head: Head
    roll: Roll
    journal: Journal
    registry: Registry
    clock: Clock
    progress: Progress
    update: SecAggCoordinator
    evaluation: SecAggCoordinator
    refusals: dict[OwnerId, Refused] = field(default_factory=dict)
    phase_s: dict[str, float] = field(default_factory=dict)
    state: RoundState = RoundState.PLANNED
    entered: float | None = None
    started: float = 0.0
    train_s: float = 0.0
    survivors: int = 0
    published: bool = False

    @property
    def name(self) -> str:
        """The federation's name."""
        return self.plan.federation

    @property
    def number(self) -> int:
        """The round's number."""
        return int(self.plan.round)

    @property
    def quorum(self) -> int:
        """Owners that every phase up to unmasking needs."""
        return max(self.plan.threshold, self.plan.min_survivors)

    def enter(self, state: RoundState) -> None:
        """Journal a transition, then act on it."""
        self.stop_watch()
        self.state = state
        self.journal.advance(self.name, self.number, state, self.measures())
        self.progress(RoundEvent(self.name, self.number, state))

    def stop_watch(self) -> None:
        """Add the time since the last transition to the state that ends."""
        now = self.clock.monotonic()
        if self.entered is not None:
            self.phase_s[self.state] = self.phase_s.get(self.state, 0.0) + now - self.entered
        self.entered = now

    def save_measures(self) -> None:
        """Journal what was measured so far."""
        self.journal.measure(self.name, self.number, self.measures())

    def measures(self) -> dict[str, Any]:
        """Return what was measured so far: seconds by phase, bytes by owner, faults by code; no content."""
        wall_s = self.clock.now() - self.started
        found = {**self.update.faults, **self.evaluation.faults}
        faults = [*self.roll.faults, *(Fault(owner, "protocol", why) for owner, why in sorted(found.items()))]
        return {
            "timings": self.phase_s,
            "bytes_up": self.roll.traffic.up,
            "bytes_down": self.roll.traffic.down,
            "wall_s": wall_s,
            "train_s": self.train_s,
            "overhead_s": wall_s - self.train_s,
            "published": self.published,
            "survivors": self.survivors,
            "faults": [{"owner": f.owner, "code": f.code, "message": f.message} for f in faults],
            "refusals": {o: {"code": r.code, "message": r.message} for o, r in self.refusals.items()},
        }

    async def gather(
        self,
        step: str,
        requests: Mapping[OwnerId, Body],
        expected: type[T],
        *,
        check: Callable[[OwnerId, T], None] = _accept,
        quorum: int | None = None,
        deadline_s: float | None = None,
    ) -> dict[OwnerId, T]:
        """Ask owners, and return the answers of those that gave a good one in time.

        Every good answer is journalled before it counts. When the phase ends its set of answers is closed in
        the journal, before any later message can depend on it; a phase that is closed there asks nobody.

        Parameters
        ----------
        step : str
            The phase's name in the journal.
        requests : Mapping[OwnerId, Body]
            What each owner is asked. The request id is a hash of it, so asking again is the same request.
        expected : type
            The answer wanted; `Pending` means ask again later, `Refused` that the owner is out.
        check : Callable
            Takes an answer into the sum's machine; raises what is wrong with it. Called once for each answer,
            in order of owners, on journalled answers too.
        quorum : int, optional
            Fewer answers abort the round; the protocol's quorum by default.
        deadline_s : float, optional
            From the first opening of the phase; the plan's phase deadline by default.

        Raises
        ------
        RoundAborted
            With the reason in words.
        """
        allowed_s = self.plan.phase_deadline_s if deadline_s is None else deadline_s
        record = self.journal.open_step(self.name, self.number, step, now=self.clock.now())
        answers: dict[OwnerId, T] = {}
        for owner, (kind, body) in sorted(record.inputs.items()):
            self._take(owner, decode_body(kind, body), expected, check, answers)
        if record.closed is None:
            waiting = {o: self._envelope(o, r) for o, r in sorted(requests.items()) if o not in answers}
            await self._ask(step, waiting, expected, check, answers, end=record.opened + allowed_s)
            self.journal.close_step(self.name, self.number, step, now=self.clock.now())
        needed = self.quorum if quorum is None else quorum
        if len(answers) < needed:
            raise RoundAborted(self._shortfall(step, len(answers), len(requests), needed))
        return answers

    async def _ask(
        self,
        step: str,
        waiting: dict[OwnerId, Envelope],
        expected: type[T],
        check: Callable[[OwnerId, T], None],
        answers: dict[OwnerId, T],
        *,
        end: float,
    ) -> None:
        silences = dict.fromkeys(waiting, 0)
        heard = dict.fromkeys(waiting, self.clock.monotonic())
        total = len(waiting) + len(answers)
        while waiting and (left := end - self.clock.now()) > 0:
            try:
                if set(waiting) - set(self.roll.present):
                    await self.roll.call(deadline_s=min(left / 2, _HELLO_S))
                first = any(silences[owner] == 0 for owner in waiting)
                within = min(left / 2 if first else left, self.plan.phase_deadline_s)
                replies = await self.roll.ask(waiting, deadline_s=within)
            except PeerUnavailable:  # the carrier itself is lost and is being restarted: nobody's fault
                await self.clock.sleep(min(_PAUSE_S, left))
                continue
            good: dict[OwnerId, tuple[str, bytes]] = {}
            pauses = [0.0]
            for owner in sorted(waiting):
                reply = replies.get(owner)
                if reply is not None and not _again(reply):
                    del waiting[owner]
                    if self._take(owner, reply, expected, check, answers):
                        good[owner] = (type(reply).__name__, wire.encode(reply))
                        self._report(None, len(answers), total)
                    continue
                silences[owner] = silences[owner] + 1 if reply is None else 0
                if reply is not None:
                    heard[owner] = self.clock.monotonic()
                pauses.append(self._later(owner, reply))
                silent_s = self.clock.monotonic() - heard[owner]
                if silences[owner] >= _TRIES and silent_s >= self.roll.patience_s:
                    del waiting[owner]
            self.journal.record(self.name, self.number, step, good)
            if waiting and max(pauses) > 0:
                await self.clock.sleep(min(max(pauses), max(0.0, end - self.clock.now())))

    def _later(self, owner: OwnerId, reply: Body | None) -> float:
        """Return the seconds after which an owner without an answer is asked again."""
        if reply is None:
            self.roll.forget(owner)
        elif isinstance(reply, Pending):
            self._report(owner, reply.done, reply.total)
            return max(_PAUSE_S, min(reply.retry_after_s, _LONGEST_POLL_S))
        return _PAUSE_S

    def _take(
        self,
        owner: OwnerId,
        reply: Body,
        expected: type[T],
        check: Callable[[OwnerId, T], None],
        answers: dict[OwnerId, T],
    ) -> bool:
        if isinstance(reply, Refused):
            self.refusals[owner] = reply
            return False
        if not isinstance(reply, expected):
            self._fault(owner, "step-mismatch", f"{type(reply).__name__} found, {expected.__name__} expected")
            return False
        try:
            check(owner, reply)
        except FedllmError as error:  # one owner's bad message drops that owner, not the round
            self._fault(owner, error.code, error.message)
            return False
        answers[owner] = reply
        return True

    def _fault(self, owner: OwnerId, code: str, message: str) -> None:
        self.roll.faults.append(Fault(owner, code, message))

    def _report(self, owner: OwnerId | None, done: int, total: int) -> None:
        self.progress(RoundEvent(self.name, self.number, self.state, owner, done, total))

    def _envelope(self, owner: OwnerId, body: Body) -> Envelope:
        kind, data = type(body).__name__, wire.encode(body)
        request = request_id(self.plan.digest, kind, owner, sha256(data))
        return Envelope(ENVELOPE_VERSION, kind, self.name, self.number, COORDINATOR, owner, request, data)

    def _shortfall(self, step: str, got: int, asked: int, needed: int) -> str:
        refusals = [f"{o} refused ({r.code}): {r.message}" for o, r in sorted(self.refusals.items())]
        faults = [
            f"{f.owner} sent something unusable ({f.code})" for f in self.roll.faults if f.owner in self.plan.cohort
        ]
        details = "".join(f"; {text}" for text in dict.fromkeys(refusals + faults))
        return f"{step}: {got} of {asked} owners answered in time, {needed} needed{details}"

"""`gather`: one phase of a round. Ask owners, verify, journal, close."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Generic, TypeVar

from fedllm import wire
from fedllm.errors import FedllmError, PeerUnavailable, RoundAborted
from fedllm.ids import Digest, OwnerId, sha256
from fedllm.messages.envelope import COORDINATOR, ENVELOPE_VERSION, Envelope, request_id
from fedllm.messages.round import Body, Pending, Refused, decode_body
from fedllm.server.journal import StepRecord
from fedllm.server.ports import RoundEvent
from fedllm.server.roster import Fault
from fedllm.server.rounds.context import RoundContext

T = TypeVar("T", bound=Body)
Parts = Sequence[bytes]
Check = Callable[[OwnerId, T, Parts], None]
"""Takes an answer and the parts that came with it into the sum's machine; raises what is wrong with it."""

_TRIES = 2
"""Silences in a row, over at least the carrier's patience, after which an owner is out of a phase: one lost message
is forgiven, nodes may reconnect after a restart, and a dead daemon is not waited for until the deadline."""
_PAUSE_S = 0.5
_LONGEST_POLL_S = 30.0
_HELLO_S = 15.0
_RETRY_CODES = frozenset({"not-ready", "overloaded"})


def _accept(_owner: OwnerId, _body: Body, _parts: Parts) -> None:
    return None


async def gather(
    context: RoundContext,
    step: str,
    requests: Mapping[OwnerId, Body],
    *expected: type[T],
    check: Check[T] = _accept,
    quorum: int | None = None,
    deadline_s: float | None = None,
) -> dict[OwnerId, T]:
    """Ask owners, and return the answers of those that gave a good one in time.

    Every good answer is journalled before it counts, one with parts as soon as it comes: the next owner's vector
    is read when this one was added. When the phase ends its set of answers is closed in the journal, before any
    later message can depend on it; a phase that is closed there asks nobody.

    Parameters
    ----------
    context : RoundContext
    step : str
        The phase's name in the journal; attempts after the first have phases of their own.
    requests : Mapping[OwnerId, Body]
        What each owner is asked. The request id is a hash of it, so asking again is the same request.
    expected : type
        The answers wanted; `Pending` means ask again later, `Refused` that the owner is out.
    check : Check
        Called once for each answer, on journalled answers too, in any order.
    quorum : int, optional
        Fewer answers abort the round; the protocol's quorum by default.
    deadline_s : float, optional
        From the first opening of the phase; the plan's phase deadline by default.

    Raises
    ------
    RoundAborted
        With the reason in words.
    """
    plan = context.plan
    name = step if plan.attempt == 1 else f"{plan.attempt}/{step}"
    record = context.journal.open_step(context.name, context.number, name, now=context.clock.now())
    phase = Phase(context, name, expected, check)
    phase.replay(record)
    if record.closed is None:
        allowed_s = plan.phase_deadline_s if deadline_s is None else deadline_s
        await phase.ask(requests, end=record.opened + allowed_s)
        context.journal.close_step(
            context.name, context.number, name, now=context.clock.now(), inputs=phase.unwritten
        )  # what came last is written down in the same breath
    context.alive = set(phase.answers)
    needed = context.quorum if quorum is None else quorum
    if len(phase.answers) < needed:
        raise RoundAborted(_shortfall(context, step, len(phase.answers), len(requests), needed))
    return phase.answers


class Phase(Generic[T]):
    """The owners still waited for in one phase, and the answers so far.

    Parameters
    ----------
    context : RoundContext
    step : str
        Name in the journal.
    expected : tuple[type, ...]
    check : Check
    """

    def __init__(self, context: RoundContext, step: str, expected: tuple[type[T], ...], check: Check[T]) -> None:
        self._context = context
        self._step = step
        self._expected = expected
        self._check = check
        self._waiting: dict[OwnerId, Envelope] = {}
        self._silences: dict[OwnerId, int] = {}
        self._heard: dict[OwnerId, float] = {}
        self.unwritten: dict[OwnerId, tuple[str, bytes]] = {}
        self.answers: dict[OwnerId, T] = {}

    def replay(self, record: StepRecord) -> None:
        """Take the answers that the journal holds, as if they came now."""
        c = self._context
        for owner, (kind, body) in sorted(record.inputs.items()):
            self._take(owner, decode_body(kind, body), c.journal.parts(c.name, c.number, self._step, owner))

    async def ask(self, requests: Mapping[OwnerId, Body], *, end: float) -> None:
        """Ask the owners without an answer, again and again, until all have one, are out, or time is over."""
        c = self._context
        encoded: dict[int, tuple[bytes, Digest]] = {}  # most phases ask everybody the very same: it is encoded once
        for body in requests.values():
            if id(body) not in encoded:
                data = wire.encode(body)
                encoded[id(body)] = (data, sha256(data))
        self._waiting = {
            owner: self._envelope(owner, type(body).__name__, *encoded[id(body)])
            for owner, body in sorted(requests.items())
            if owner not in self.answers
        }
        self._silences = dict.fromkeys(self._waiting, 0)
        self._heard = dict.fromkeys(self._waiting, c.clock.monotonic())
        while self._waiting and (left := end - c.clock.now()) > 0:
            try:
                not_yet = await self._exchange(left)
            except PeerUnavailable:  # the carrier itself is lost and is being restarted: nobody's fault
                await c.clock.sleep(min(_PAUSE_S, left))
                continue
            finally:
                if self._waiting:
                    self._flush()
            pause_s = self._judge(not_yet)
            if self._waiting and pause_s > 0:
                await c.clock.sleep(min(pause_s, max(0.0, end - c.clock.now())))

    async def _exchange(self, left_s: float) -> dict[OwnerId, Body]:
        """Ask everybody once; return who answered that it is not done yet."""
        c = self._context
        if set(self._waiting) - set(c.roll.present):
            await c.roll.call(deadline_s=min(left_s / 2, _HELLO_S))
        first = any(self._silences[owner] == 0 for owner in self._waiting)
        within_s = min(left_s / 2 if first else left_s, c.plan.phase_deadline_s)
        not_yet: dict[OwnerId, Body] = {}
        async with aclosing(c.roll.ask(dict(self._waiting), deadline_s=within_s)) as arriving:
            async for owner, reply, parts in arriving:
                if _again(reply):
                    not_yet[owner] = reply
                elif owner in self._waiting:
                    del self._waiting[owner]
                    if self._take(owner, reply, parts):
                        self._record(owner, reply, parts)
                        self._report(None, len(self.answers), len(self.answers) + len(self._waiting))
        return not_yet

    def _judge(self, not_yet: Mapping[OwnerId, Body]) -> float:
        """Give up on owners that are silent for too long; return the seconds after which to ask the others again."""
        c = self._context
        pause_s = 0.0
        for owner in sorted(self._waiting):
            reply = not_yet.get(owner)
            if reply is None:
                self._silences[owner] += 1
                c.roll.forget(owner)
            else:
                self._silences[owner] = 0
                self._heard[owner] = c.clock.monotonic()
            pause_s = max(pause_s, self._pause_s(owner, reply))
            silent_s = c.clock.monotonic() - self._heard[owner]
            if self._silences[owner] >= _TRIES and silent_s >= c.roll.patience_s:
                del self._waiting[owner]
        return pause_s

    def _pause_s(self, owner: OwnerId, reply: Body | None) -> float:
        if isinstance(reply, Pending):
            self._report(owner, reply.done, reply.total)
            return max(_PAUSE_S, min(reply.retry_after_s, _LONGEST_POLL_S))
        return _PAUSE_S

    def _take(self, owner: OwnerId, reply: Body, parts: Parts) -> bool:
        c = self._context
        if isinstance(reply, Refused):
            c.refusals[owner] = reply
            return False
        if not isinstance(reply, self._expected):
            wanted = " or ".join(each.__name__ for each in self._expected)
            c.roll.faults.append(Fault(owner, "step-mismatch", f"{type(reply).__name__} found, {wanted} expected"))
            return False
        try:
            self._check(owner, reply, parts)
        except FedllmError as error:  # one owner's bad message drops that owner, not the round
            c.roll.faults.append(Fault(owner, error.code, error.message))
            return False
        self.answers[owner] = reply
        return True

    def _record(self, owner: OwnerId, reply: Body, parts: Parts) -> None:
        """Journal a good answer: a vector at once, small answers together when the exchange is over."""
        self.unwritten[owner] = (type(reply).__name__, wire.encode(reply))
        if parts:
            self._flush({owner: parts})

    def _flush(self, parts: Mapping[OwnerId, Parts] | None = None) -> None:
        c = self._context
        c.journal.record(c.name, c.number, self._step, self.unwritten, parts)
        self.unwritten.clear()

    def _report(self, owner: OwnerId | None, done: int, total: int) -> None:
        c = self._context
        c.progress(RoundEvent(c.name, c.number, c.state, owner, done, total))

    def _envelope(self, owner: OwnerId, kind: str, data: bytes, digest: Digest) -> Envelope:
        c = self._context
        request = request_id(c.plan.digest, kind, owner, digest)
        return Envelope(ENVELOPE_VERSION, kind, c.name, c.number, COORDINATOR, owner, request, data)


def _again(reply: Body) -> bool:
    return isinstance(reply, Pending) or (isinstance(reply, Refused) and reply.code in _RETRY_CODES)


def _shortfall(context: RoundContext, step: str, got: int, asked: int, needed: int) -> str:
    refusals = [f"{o} refused ({r.code}): {r.message}" for o, r in sorted(context.refusals.items())]
    faults = [
        f"{f.owner} sent something unusable ({f.code})" for f in context.roll.faults if f.owner in context.plan.cohort
    ]
    details = "".join(f"; {text}" for text in dict.fromkeys(refusals + faults))
    return f"{step}: {got} of {asked} owners answered in time, {needed} needed{details}"

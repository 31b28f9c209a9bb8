"""The owner's daemon at its line to the outside: sealed bytes in, sealed bytes out, everything else refused.

The carrier and the coordinator behind it are taken for hostile. A request counts only if the pinned
coordinator signed it for this owner; a round runs only if its plan keeps within this owner's policy and its
budget was reserved first; the same request again gets the same answer and does no work.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from fedllm import telemetry
from fedllm.client.kept import ANSWERS_FILE, UPDATE_FILE, Answers, Kept, UpdateStore
from fedllm.client.outbox import Outbox
from fedllm.client.pipeline import Observer, OwnerSums
from fedllm.client.policy import OwnerPolicy, check_plan, check_retry, open_head
from fedllm.client.records import ACCEPTED_FILE, AUDIT_FILE, ROUNDS_FILE, AuditLog, LastAccepted, RoundsLog
from fedllm.client.round import Answer, OwnerRound, ScoreBook
from fedllm.client.trainer import Trainer
from fedllm.clock import Clock
from fedllm.errors import (
    AlreadyUnmasked,
    AuthenticationError,
    FedllmError,
    PolicyRefused,
    StepMismatch,
)
from fedllm.identity import Roster, SigningIdentity, VerifyKey
from fedllm.ids import FederationName, OwnerId
from fedllm.messages.envelope import COORDINATOR, Envelope, unseal
from fedllm.messages.plan import RoundPlan, SignedPlan
from fedllm.messages.round import (
    Begin,
    Body,
    Close,
    Closed,
    FetchAdvertise,
    Hello,
    HelloReply,
    Retry,
    Started,
    Unmask,
    decode_body,
)
from fedllm.messages.secagg import PURPOSE_UPDATE
from fedllm.privacy.ledger import Ledger
from fedllm.relay.carrier import Reply
from fedllm.rng import Rng

_LOG = logging.getLogger(__name__)
_ANYBODY = ""
"""Receiver of a ``Hello``, which asks a node who is there."""
_NOT_COMPLETED = frozenset({"aborted", "replaced", "stopped"})


def check_own_key(roster: Roster, owner: OwnerId, identity: SigningIdentity) -> None:
    """Raise `AuthenticationError` unless the roster pins the key held here for `owner`."""
    if roster.key(owner) != identity.public:
        raise AuthenticationError(
            f"the key held here is not the one that the roster pins for {owner!r}",
            hint="approve a roster that names this owner's key, or restore the key",
        )


class Daemon:
    """Answers the coordinator's requests for one owner in one federation.

    Parameters
    ----------
    owner : OwnerId
    federation : FederationName
    home : Path
        Folder of the audit log, the rounds log, the last round accepted, and what is kept of the round under way.
    identity : SigningIdentity
        This owner's own key.
    roster : Roster
        This owner's own approved copy.
    coordinator : VerifyKey
        The pinned key of the coordinator.
    policy : OwnerPolicy
    ledger : Ledger
        Reserved and fsynced before a round trains.
    trainer : Trainer
        Holds base model and data.
    clock, rng
    release : str
        Named in the reply to ``Hello``.
    worker : Executor, optional
        Runs training and scoring; one thread of its own by default.
    hold_s : float
        A request that starts work, or asks for it, waits up to so long for its end before it is told to ask
        again: where an exchange costs seconds, that saves one.
    observer : Observer, optional
        For simulations, see `fedllm.client.pipeline.Observer`.
    """

    def __init__(
        self,
        *,
        owner: OwnerId,
        federation: FederationName,
        home: Path,
        identity: SigningIdentity,
        roster: Roster,
        coordinator: VerifyKey,
        policy: OwnerPolicy,
        ledger: Ledger,
        trainer: Trainer,
        clock: Clock,
        rng: Rng,
        release: str = "",
        worker: Executor | None = None,
        hold_s: float = 0.0,
        observer: Observer | None = None,
    ) -> None:
        check_own_key(roster, owner, identity)
        self._owner = owner
        self._federation = federation
        self._identity = identity
        self._roster = roster
        self._coordinator = coordinator
        self._policy = policy
        self._ledger = ledger
        self._trainer = trainer
        self._clock = clock
        self._rng = rng
        self._release = release
        self._worker = worker or ThreadPoolExecutor(1, thread_name_prefix="trainer")
        self._hold_s = hold_s
        self._out = Outbox(owner, identity, AuditLog(home / AUDIT_FILE, clock))
        self._rounds = RoundsLog(home / ROUNDS_FILE, clock)
        self._accepted = LastAccepted(home / ACCEPTED_FILE)
        self._store = UpdateStore(home / UPDATE_FILE)
        self._answers = Answers(home / ANSWERS_FILE)
        self._observer = observer
        self._scores = ScoreBook(trainer)
        self._last_train_s = 0.0
        self._lock = asyncio.Lock()
        self._round: OwnerRound | None = self._restored()

    def __repr__(self) -> str:
        return f"Daemon({self._owner!r}, {self._federation!r}, {self._round!r})"

    @property
    def round_number(self) -> int | None:
        """The round under way, None between rounds."""
        return None if self._round is None else self._round.plan.round

    async def handle(self, data: bytes) -> Reply:
        """Return the sealed reply to one sealed request; never raises for anything the sender can cause.

        Raises
        ------
        DiskFull, IntegrityError
            If the audit log cannot be written: then nothing leaves.
        """
        try:
            envelope = self._unseal(data)
        except FedllmError as error:
            return self._out.unopened(self._federation, error, len(data))
        try:
            body = decode_body(envelope.kind, envelope.body)
            async with self._lock:
                recorded = self._out.again(envelope)
                if recorded is not None:
                    return recorded
                answer = await self._answer(envelope, body)
                work = self._round.working(answer.body) if self._round is not None else None
            if work is not None and self._hold_s > 0:
                await _ended(work, self._hold_s)
            async with self._lock:
                # the same request may have come twice, and have been answered while this one was held
                return self._out.again(envelope) or self._out.leave(envelope, self._with_result(envelope, answer))
        except FedllmError as error:
            return self._out.refuse(envelope, error)
        except Exception as error:  # noqa: BLE001 - the boundary: the sender never sees what broke
            return self._out.fail(envelope, error)

    async def close(self) -> None:
        """Overwrite the secrets of the round under way and stop the worker."""
        async with self._lock:
            if self._round is not None and self._round.train_s is not None:
                self._round.close()  # what it trained stays on disk: after a restart it may be in the next attempt
                self._round = None
            await self._end_round("stopped", "the daemon was stopped")
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _unseal(self, data: bytes) -> Envelope:
        try:
            return unseal(data, self._coordinator, sender=COORDINATOR, receiver=self._owner)
        except StepMismatch:
            envelope = unseal(data, self._coordinator, sender=COORDINATOR, receiver=_ANYBODY)
            if envelope.kind != Hello.__name__:
                raise
            return envelope

    async def _answer(self, envelope: Envelope, body: Body) -> Answer:
        if envelope.federation != self._federation:
            raise PolicyRefused(f"this owner takes no part in a federation {envelope.federation[:64]!r}")
        special = self._SPECIAL.get(type(body))
        if special is not None:
            return Answer(await special(self, envelope, body))
        going = self._active(envelope)
        answer = going.answer(body)
        if isinstance(body, Unmask) and body.request.purpose == PURPOSE_UPDATE:
            self._store.forget()  # it is never masked again
            await self._realised(going.plan, len(body.request.survivors))
        return answer

    async def _realised(self, plan: RoundPlan, survivors: int) -> None:
        """Note how much noise is in a sum that this owner helped to open: t survivors signed who is in it."""
        shares = plan.mechanism.shares
        if shares is not None:
            honest = survivors - (plan.min_survivors - shares.honest)
            try:
                await asyncio.to_thread(self._ledger.realised, plan.digest, honest)
            except (OSError, FedllmError) as error:  # without the line more stays charged, and the answer is not lost
                telemetry.event(
                    _LOG, "survivors not noted", level=logging.WARNING, round=plan.round, error=type(error).__name__
                )

    def _with_result(self, envelope: Envelope, answer: Answer) -> Answer:
        """Return what the work that `answer` announces came to, if it has ended by now."""
        step = self._round.finished(answer.body) if self._round is not None else None
        return answer if step is None else self._active(envelope).answer(step)

    def _active(self, envelope: Envelope) -> OwnerRound:
        if self._round is None:
            raise StepMismatch(
                f"{envelope.kind} for round {envelope.round}, no round is under way here",
                hint="an owner that restarts in mid-round is out of that round",
            )
        if envelope.round != self._round.plan.round:
            raise StepMismatch(
                f"{envelope.kind} for round {envelope.round}, round {self._round.plan.round} is under way"
            )
        return self._round

    async def _hello(self, _envelope: Envelope, body: Hello) -> Body:
        return HelloReply(self._owner, body.challenge, self._release)

    async def _begin(self, envelope: Envelope, body: Begin) -> Body:
        plan = self._opened(envelope, body.plan)
        if self._round is not None and self._round.begun == plan.digest:
            return Started(self._last_train_s)
        before = body.previous
        if before is not None and self._round is not None and self._round.plan.round == before.round:
            await self._end_round(before.outcome[:64], before.reason[:500] if before.reason else None)
        check_plan(
            plan, self._policy, roster=self._roster, base=self._trainer.base, owner=self._owner,
            last_round=max(self._accepted.of(plan.federation), self._charged(plan.federation)),
        )  # fmt: skip
        head = open_head(plan, body.head)
        sums = self._sums(plan)
        await asyncio.to_thread(self._reserve, plan)
        await self._end_round("replaced", f"round {plan.round} began")
        self._accepted.accept(plan.federation, plan.round)
        self._answers.clear()
        self._round = OwnerRound(
            plan, head, self._owner, sums=sums, trainer=self._trainer, scores=self._scores, worker=self._worker,
            clock=self._clock, rng=self._rng, keep=lambda local: self._store.save(Kept(body.plan, body.head, local)),
            charged=self._charged_steps(plan),
        )  # fmt: skip
        telemetry.event(_LOG, "round accepted", federation=plan.federation, round=plan.round, plan=plan.digest[:16])
        return Started(self._last_train_s)

    async def _retry(self, envelope: Envelope, body: Retry) -> Body:
        plan = self._opened(envelope, body.plan)
        if plan.round == self._accepted.of(plan.federation) and self._answers.unmasked:
            raise AlreadyUnmasked(
                f"attempt {plan.attempt} at round {plan.round}: this owner has opened a sum of that round",
                hint="who helped to open a sum of a round helps with no other of it; plan a new round",
            )
        going = self._active(envelope)
        if going.plan.digest != plan.digest:
            check_retry(plan, going.plan, self._policy, roster=self._roster, owner=self._owner)
            sums = self._sums(plan)
            if plan.mechanism.shares is not None:
                # the others may have opened the sum before, with this owner's update in it: this is another release
                await asyncio.to_thread(self._reserve, plan)
            going.retry(plan, sums)
            self._out.retire()
            telemetry.event(_LOG, "attempt accepted", round=plan.round, attempt=plan.attempt, plan=plan.digest[:16])
        return going.answer(FetchAdvertise()).body

    def _opened(self, envelope: Envelope, signed: SignedPlan) -> RoundPlan:
        plan = signed.open(self._coordinator)
        if (plan.federation, plan.round) != (envelope.federation, envelope.round):
            raise StepMismatch(f"the plan is for round {plan.round} of {plan.federation!r}, its envelope is not")
        return plan

    def _reserve(self, plan: RoundPlan) -> None:
        self._ledger.reserve(
            federation=plan.federation, round_number=plan.round, plan_digest=plan.digest, mechanism=plan.mechanism
        )

    def _sums(self, plan: RoundPlan) -> OwnerSums:
        return OwnerSums(
            plan, self._owner, identity=self._identity, roster=self._roster, rng=self._rng, answers=self._answers,
            observer=self._observer,
        )  # fmt: skip

    def _restored(self) -> OwnerRound | None:
        """Return the round whose update an earlier process of this daemon trained, if it may still be asked for."""
        kept = self._store.load()
        if kept is None:
            return None
        try:
            plan = kept.plan.open(self._coordinator)
            head = open_head(plan, kept.head)
            if plan.round != self._accepted.of(plan.federation) or self._answers.unmasked:
                raise StepMismatch(f"round {plan.round} is over here")
            sums = self._sums(plan)
        except FedllmError as error:  # another coordinator, roster or release than before: nothing to go on with
            telemetry.event(_LOG, "kept update is of no use", level=logging.WARNING, code=error.code)
            self._store.forget()
            return None
        telemetry.event(_LOG, "update kept from before the restart", round=plan.round, plan=plan.digest[:16])
        return OwnerRound(
            plan, head, self._owner, sums=sums, trainer=self._trainer, scores=self._scores, worker=self._worker,
            clock=self._clock, rng=self._rng, keep=lambda _local: None, local=kept.local,
        )  # fmt: skip

    def _charged(self, federation: str) -> int:
        """Return the last round the ledger was charged for: a charged round is never trained a second time."""
        mine = (r.round_number for r in self._ledger.reservations() if r.federation == federation)
        return max(mine, default=0)

    def _charged_steps(self, plan: RoundPlan) -> int:
        """Return how many steps of a plan's stream other plans were charged for: their noise is never drawn again."""
        stream = plan.mechanism.stream
        if stream is None:
            return 0
        others = [r.mechanism for r in self._ledger.reservations() if r.plan_digest != plan.digest]
        return sum(m.steps for m in others if m.stream is not None and m.stream.name == stream.name)

    async def _close(self, envelope: Envelope, body: Close) -> Body:
        if self._round is not None and self._round.plan.round == envelope.round:
            await self._end_round(body.outcome[:64], body.reason[:500] if body.reason else None)
        elif envelope.round > self._accepted.of(self._federation):
            raise StepMismatch(f"round {envelope.round} was never accepted here")
        return Closed()

    async def _end_round(self, outcome: str, reason: str | None) -> None:
        over, self._round = self._round, None
        self._out.forget()
        if over is None:
            return
        over.close()
        self._store.forget()
        self._last_train_s = over.train_s or self._last_train_s
        settled = "aborted" if outcome in _NOT_COMPLETED else "completed"
        for plan in dict.fromkeys((over.begun, *over.charged)):
            await asyncio.to_thread(self._ledger.settle, plan, settled)
        spent = await asyncio.to_thread(self._ledger.spent)
        budget = {"epsilon": spent if math.isfinite(spent) else None, "delta": self._ledger.delta}
        self._rounds.ended({**over.result(), "outcome": outcome, "reason": reason, **budget})
        telemetry.event(_LOG, "round ended", round=over.plan.round, outcome=outcome)

    _SPECIAL: ClassVar[dict[type, Callable[[Daemon, Envelope, Any], Awaitable[Body]]]] = {
        Hello: _hello,
        Begin: _begin,
        Retry: _retry,
        Close: _close,
    }


async def _ended(work: Future[Any], within_s: float) -> None:
    """Return when the work has ended, well or badly, or the time is over."""
    waiting = asyncio.wrap_future(work)
    await asyncio.wait({waiting}, timeout=within_s)
    if waiting.done() and not waiting.cancelled():
        waiting.exception()  # retrieved here; whoever asks for the result gets it again

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
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from fedllm import telemetry, wire
from fedllm.client.pipeline import OwnerSums
from fedllm.client.policy import OwnerPolicy, check_plan, open_head
from fedllm.client.records import ACCEPTED_FILE, AUDIT_FILE, ROUNDS_FILE, AuditLog, LastAccepted, RoundsLog
from fedllm.client.round import OwnerRound, ScoreBook
from fedllm.client.trainer import Trainer
from fedllm.clock import Clock
from fedllm.errors import (
    AuthenticationError,
    BudgetExhausted,
    DigestMismatch,
    FedllmError,
    PolicyRefused,
    ProtocolError,
    StepMismatch,
    VersionUnsupported,
)
from fedllm.identity import Roster, SigningIdentity, VerifyKey
from fedllm.ids import Digest, FederationName, OwnerId, sha256
from fedllm.messages.envelope import COORDINATOR, ENVELOPE_VERSION, REQUEST_ID_BYTES, Envelope, seal, unseal
from fedllm.messages.round import (
    Begin,
    Body,
    Close,
    Closed,
    Hello,
    HelloReply,
    Pending,
    Refused,
    Started,
    decode_body,
)
from fedllm.privacy.ledger import Ledger
from fedllm.rng import Rng

_LOG = logging.getLogger(__name__)
_ANYBODY = ""
"""Receiver of a ``Hello``, which asks a node who is there."""
_TELLABLE = (PolicyRefused, AuthenticationError, ProtocolError, DigestMismatch)
"""Errors whose message speaks of plans, keys and steps only; of all others the coordinator learns the code."""
_NOT_RECORDED = (Hello, HelloReply, Pending, Refused)
_HOLD_STEP_S = 0.05
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
        Folder of the audit log, the rounds log and the last round accepted.
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
        A request for unfinished work waits up to so long for it before it is told ``Pending``: where an
        exchange costs seconds, that saves one.
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
        self._audit = AuditLog(home / AUDIT_FILE, clock)
        self._rounds = RoundsLog(home / ROUNDS_FILE, clock)
        self._accepted = LastAccepted(home / ACCEPTED_FILE)
        self._scores = ScoreBook(trainer)
        self._round: OwnerRound | None = None
        self._answered: dict[bytes, tuple[Digest, bytes]] = {}
        self._last_train_s = 0.0
        self._lock = asyncio.Lock()

    def __repr__(self) -> str:
        return f"Daemon({self._owner!r}, {self._federation!r}, {self._round!r})"

    @property
    def round_number(self) -> int | None:
        """The round under way, None between rounds."""
        return None if self._round is None else self._round.plan.round

    async def handle(self, data: bytes) -> bytes:
        """Return the sealed reply to one sealed request; never raises for anything the sender can cause.

        Raises
        ------
        DiskFull, IntegrityError
            If the audit log cannot be written: then nothing leaves.
        """
        try:
            envelope = self._unseal(data)
        except FedllmError as error:
            telemetry.event(_LOG, "refused unopened", level=logging.WARNING, code=error.code, bytes=len(data))
            return self._leave(self._stranger(), self._unopened(error))
        try:
            body = decode_body(envelope.kind, envelope.body)
            await self._hold(body)
            async with self._lock:
                recorded = self._recorded(envelope)
                if recorded is not None:
                    self._audit.sent("again", envelope.round, recorded)
                    return recorded
                return self._leave(envelope, await self._answer(envelope, body))
        except FedllmError as error:
            return self._leave(envelope, self._refusal(envelope, error))
        except Exception as error:  # noqa: BLE001 - the boundary: what went wrong inside is nobody's business outside
            telemetry.event(
                _LOG, "request failed", level=logging.ERROR, kind=envelope.kind, error=type(error).__name__,
            )  # fmt: skip
            _LOG.debug("request failed", exc_info=error)
            return self._leave(envelope, Refused("failed", type(error).__name__, None))

    async def close(self) -> None:
        """Forget the round under way and stop the worker."""
        async with self._lock:
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

    def _recorded(self, envelope: Envelope) -> bytes | None:
        """Return the reply that this very request got before."""
        found = self._answered.get(envelope.request)
        if found is None:
            return None
        asked, reply = found
        if asked != sha256(envelope.body):
            raise StepMismatch("a request came again under its old id with another content")
        return reply

    async def _hold(self, body: Body) -> None:
        left_s = self._hold_s
        while left_s > 0 and self._round is not None and self._round.working(body) is not None:
            await asyncio.sleep(_HOLD_STEP_S)
            left_s -= _HOLD_STEP_S

    async def _answer(self, envelope: Envelope, body: Body) -> Body:
        if envelope.federation != self._federation:
            raise PolicyRefused(f"this owner takes no part in a federation {envelope.federation[:64]!r}")
        special = self._SPECIAL.get(type(body))
        if special is not None:
            return await special(self, envelope, body)
        return self._active(envelope).answer(body)

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
        plan = body.plan.open(self._coordinator)
        if (plan.federation, plan.round) != (envelope.federation, envelope.round):
            raise StepMismatch(f"the plan is for round {plan.round} of {plan.federation!r}, its envelope is not")
        if self._round is not None and self._round.plan.digest == plan.digest:
            return Started(self._last_train_s)
        check_plan(
            plan, self._policy, roster=self._roster, base=self._trainer.base, owner=self._owner,
            last_round=max(self._accepted.of(plan.federation), self._charged(plan.federation)),
        )  # fmt: skip
        head = open_head(plan, body.head)
        sums = OwnerSums(plan, self._owner, identity=self._identity, roster=self._roster, rng=self._rng)
        await asyncio.to_thread(
            self._ledger.reserve, federation=plan.federation, round_number=plan.round, plan_digest=plan.digest,
            mechanism=plan.mechanism,
        )  # fmt: skip
        await self._end_round("replaced", f"round {plan.round} began")
        self._accepted.accept(plan.federation, plan.round)
        self._round = OwnerRound(
            plan, head, self._owner, sums=sums, trainer=self._trainer, scores=self._scores, worker=self._worker,
            clock=self._clock, rng=self._rng,
        )  # fmt: skip
        telemetry.event(_LOG, "round accepted", federation=plan.federation, round=plan.round, plan=plan.digest[:16])
        return Started(self._last_train_s)

    def _charged(self, federation: str) -> int:
        """Return the last round the ledger was charged for: a charged round is never trained a second time."""
        mine = (r.round_number for r in self._ledger.reservations() if r.federation == federation)
        return max(mine, default=0)

    async def _close(self, envelope: Envelope, body: Close) -> Body:
        if self._round is not None and self._round.plan.round == envelope.round:
            await self._end_round(body.outcome[:64], body.reason[:500] if body.reason else None)
        elif envelope.round > self._accepted.of(self._federation):
            raise StepMismatch(f"round {envelope.round} was never accepted here")
        return Closed()

    async def _end_round(self, outcome: str, reason: str | None) -> None:
        over, self._round = self._round, None
        self._answered.clear()
        if over is None:
            return
        over.close()
        self._last_train_s = over.train_s or self._last_train_s
        settled = "aborted" if outcome in _NOT_COMPLETED else "completed"
        await asyncio.to_thread(self._ledger.settle, over.plan.digest, settled)
        spent = await asyncio.to_thread(self._ledger.spent)
        budget = {"epsilon": spent if math.isfinite(spent) else None, "delta": self._ledger.delta}
        self._rounds.ended({**over.result(), "outcome": outcome, "reason": reason, **budget})
        telemetry.event(_LOG, "round ended", round=over.plan.round, outcome=outcome)

    def _refusal(self, envelope: Envelope, error: FedllmError) -> Refused:
        telemetry.event(
            _LOG, "refused", level=logging.WARNING, kind=envelope.kind, round=envelope.round, code=error.code,
            why=error.message,
        )  # fmt: skip
        if isinstance(error, BudgetExhausted):
            return Refused(error.code, "this owner's privacy budget does not cover the round", None)
        if isinstance(error, _TELLABLE):
            return Refused(error.code, error.message, error.hint)
        return Refused(error.code, "this owner could not do it; its own log says why", None)

    @staticmethod
    def _unopened(error: FedllmError) -> Refused:
        # one answer to every kind of wrong bytes, so that they cannot be used to ask questions
        if isinstance(error, VersionUnsupported):
            return Refused(error.code, error.message, error.hint)
        return Refused(AuthenticationError.code, "not a request of the pinned coordinator to this owner", None)

    def _stranger(self) -> Envelope:
        return Envelope(
            ENVELOPE_VERSION, "", self._federation, 0, COORDINATOR, self._owner, bytes(REQUEST_ID_BYTES), b""
        )

    def _leave(self, request: Envelope, reply: Body) -> bytes:
        """Seal a reply, write it down and remember it: nothing leaves by another way."""
        kind = type(reply).__name__
        envelope = Envelope(
            ENVELOPE_VERSION, kind, request.federation, request.round, self._owner, COORDINATOR, request.request,
            wire.encode(reply),
        )  # fmt: skip
        sealed = seal(envelope, self._identity)
        self._audit.sent(kind, request.round, sealed)
        if not isinstance(reply, _NOT_RECORDED):
            self._answered[request.request] = (sha256(request.body), sealed)
        return sealed

    _SPECIAL: ClassVar[dict[type, Callable[[Daemon, Envelope, Any], Awaitable[Body]]]] = {
        Hello: _hello,
        Begin: _begin,
        Close: _close,
    }

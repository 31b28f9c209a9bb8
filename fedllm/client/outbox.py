"""The one way out of an owner's daemon: every reply is sealed, written down and remembered, then it leaves."""

from __future__ import annotations

import logging

from fedllm import telemetry, wire
from fedllm.client.records import AuditLog
from fedllm.client.round import Answer
from fedllm.errors import (
    AuthenticationError,
    BudgetExhausted,
    DigestMismatch,
    FedllmError,
    PolicyRefused,
    ProtocolError,
    RequestReused,
    VersionUnsupported,
)
from fedllm.identity import SigningIdentity
from fedllm.ids import Digest, OwnerId, sha256
from fedllm.messages.envelope import COORDINATOR, ENVELOPE_VERSION, Envelope, seal
from fedllm.messages.round import HelloReply, Pending, Refused
from fedllm.relay.carrier import Reply

_LOG = logging.getLogger(__name__)
_TELLABLE = (PolicyRefused, AuthenticationError, ProtocolError, DigestMismatch)
"""Errors whose message speaks of plans, keys and steps only; of all others the coordinator learns the code."""
_NOT_RECORDED = (HelloReply, Pending, Refused)


class Outbox:
    """Seals replies, logs them for the owner's people, and gives the same answer to the same request.

    Parameters
    ----------
    owner : OwnerId
    identity : SigningIdentity
    audit : AuditLog
    """

    def __init__(self, owner: OwnerId, identity: SigningIdentity, audit: AuditLog) -> None:
        self._owner = owner
        self._identity = identity
        self._audit = audit
        self._answered: dict[bytes, tuple[Digest, Reply]] = {}
        self._stale: set[bytes] = set()

    def leave(self, request: Envelope, answer: Answer) -> Reply:
        """Seal a reply, write it down and remember it.

        Raises
        ------
        DiskFull, IntegrityError
            If the audit log cannot be written: then nothing leaves.
        """
        kind = type(answer.body).__name__
        envelope = Envelope(
            ENVELOPE_VERSION, kind, request.federation, request.round, self._owner, COORDINATOR, request.request,
            wire.encode(answer.body),
        )  # fmt: skip
        reply = Reply(seal(envelope, self._identity), answer.parts)
        if not isinstance(answer.body, _NOT_RECORDED):
            # before the log: if that cannot be written the answer stays here, the secrets behind it may be gone
            self._answered[request.request] = (sha256(request.body), reply)
        self._audit.sent(kind, request.round, reply)
        return reply

    def again(self, request: Envelope) -> Reply | None:
        """Return the reply that this very request got before, if any, noting that it leaves again.

        Raises
        ------
        RequestReused
            If its id was used for another request before, or in an attempt that is over.
        """
        if request.request in self._stale:
            raise RequestReused("a request of an attempt that is over came again")
        found = self._answered.get(request.request)
        if found is None:
            return None
        asked, reply = found
        if asked != sha256(request.body):
            raise RequestReused("a request came again under its old id with another content")
        self._audit.sent("again", request.round, reply)
        return reply

    def retire(self) -> None:
        """Forget the answers of an attempt that is over, but not that they were given.

        Who kept a copy of a request of it could else have it answered as one of the next.
        """
        self._stale |= set(self._answered)
        self._answered.clear()

    def forget(self) -> None:
        """Forget what was answered: the round is over, and its number is refused."""
        self._stale.clear()
        self._answered.clear()

    def refuse(self, request: Envelope, error: FedllmError) -> Reply:
        """Say no to a request of the coordinator, and in the log say why."""
        telemetry.event(
            _LOG, "refused", level=logging.WARNING, kind=request.kind, round=request.round, code=error.code,
            why=error.message,
        )  # fmt: skip
        if isinstance(error, BudgetExhausted):
            said = Refused(error.code, "this owner's privacy budget does not cover the round", None)
        elif isinstance(error, _TELLABLE):
            said = Refused(error.code, error.message, error.hint)
        else:
            said = Refused(error.code, "this owner could not do it; its own log says why", None)
        return self.leave(request, Answer(said))

    def fail(self, request: Envelope, error: Exception) -> Reply:
        """Answer a request that broke something here: what went wrong inside is nobody's business outside."""
        telemetry.event(
            _LOG, "request failed", level=logging.ERROR, kind=request.kind, error=type(error).__name__,
        )  # fmt: skip
        _LOG.debug("request failed", exc_info=error)
        return self.leave(request, Answer(Refused("failed", "this owner could not do it; its own log says why", None)))

    def unopened(self, federation: str, error: FedllmError, size: int) -> Reply:
        """Answer bytes that are no request of the pinned coordinator's.

        One answer to every kind of wrong bytes, so that they cannot be used to ask questions.
        """
        telemetry.event(_LOG, "refused unopened", level=logging.WARNING, code=error.code, bytes=size)
        said = Refused(AuthenticationError.code, "not a request of the pinned coordinator to this owner", None)
        if isinstance(error, VersionUnsupported):
            said = Refused(error.code, error.message, error.hint)
        nobody = Envelope(ENVELOPE_VERSION, "", federation, 0, COORDINATOR, self._owner, bytes(16), b"")
        return self.leave(nobody, Answer(said))

"""Forwarding: one request, one version, as many replicas as it takes, until the first byte has been passed on.

As long as the client has had nothing, a replica that fails is replaced by another, and nobody hears of it but the log
and the record. After that an answer cannot begin again: a stream whose replica is lost ends with an error event.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import httpx

from fedllm.clock import Clock
from fedllm.errors import NotReady, Overloaded
from fedllm.serving.router.account import Account
from fedllm.serving.router.job import Job
from fedllm.serving.router.placement import placement_key
from fedllm.serving.router.stream import MIXED, Stream, blame, gateway_body
from fedllm.serving.router.upstream import (
    ANSWER_BYTES,
    Blame,
    ReplicaFailed,
    check_version,
    read_bounded,
    read_object,
    send,
)
from fedllm.serving.router.waiting import NoneLeft, Place, WaitingLine, Want

T = TypeVar("T")


class BadGateway(Exception):
    """An answer had to be refused.

    Parameters
    ----------
    code : str
        ``replica-mixed``.
    """

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.body = gateway_body(code)


class Dispatcher:
    """Forwards requests.

    Parameters
    ----------
    line : WaitingLine
        Grants places at replicas.
    clock : Clock
    """

    def __init__(self, line: WaitingLine, clock: Clock) -> None:
        self.line = line
        self.clock = clock

    async def stream(self, job: Job) -> Stream:
        """Return a stream that has its first event; it must be closed.

        Raises
        ------
        Overloaded, NotReady
            If no replica takes the request, or none could answer it.
        Declined
            If a replica refuses what it asks for.
        BadGateway
            If all that answered did so by another version.
        """
        return await self._on_some_replica(job, self._open)

    async def whole(self, job: Job) -> tuple[dict[str, Any], Place]:
        """Return a whole answer's body, and where it came from; raise as `stream` does."""
        return await self._on_some_replica(job, self._read)

    async def _on_some_replica(self, job: Job, attempt: Callable[[Job, Place], Awaitable[T]]) -> T:
        ticket, body = job.ticket, job.asked
        want = Want(
            tenant=ticket.caller.tenant.name,
            weight=ticket.weight,
            key=placement_key(job.bound.digest or "", body),
            digest=job.bound.digest,
            prompt_tokens=job.size.prompt,
            tokens=job.size.placed,
            until_s=self.clock.monotonic() + self.line.wait_s,
        )
        last = ReplicaFailed("none")
        while True:
            try:
                place = await self.line.take(want)
            except NoneLeft:
                raise _final(last, len(want.tried)) from None
            try:
                Account(self.line, job).answered(place.replica.name, "", job.bound.digest, prompt_tokens=0)
                return await attempt(job, place)
            except ReplicaFailed as failure:
                last = failure
                want.tried.add(place.replica.name)
                blame(place, failure, self.clock.monotonic())
                place.release()
            except BaseException:
                place.release()
                raise

    async def _open(self, job: Job, place: Place) -> Stream:
        stream = Stream(Account(self.line, job), job, place, await send(job, place), self.clock)
        try:
            await stream.begin()
        except BaseException:
            await stream.response.aclose()
            raise
        return stream

    async def _read(self, job: Job, place: Place) -> tuple[dict[str, Any], Place]:
        response = await send(job, place)
        try:
            body = read_object(await read_bounded(response, ANSWER_BYTES))
        except httpx.HTTPError as error:
            raise ReplicaFailed(type(error).__name__) from None
        finally:
            await response.aclose()
        digest = check_version(job.bound.digest, place, response.headers, body)
        place.replica.breaker.success()
        account, name = Account(self.line, job), place.replica.name
        account.answered(name, str(body.get("id")), digest, prompt_tokens=job.size.prompt)
        account.usage(name, digest, body)
        place.release()
        return {**body, "model": job.asked["model"], "system_fingerprint": digest}, place


def _final(last: ReplicaFailed, tried: int) -> Exception:
    if last.blame is Blame.MIXED:
        return BadGateway(MIXED)
    if last.blame is Blame.FULL:
        return Overloaded(f"all {tried} replicas are full", hint="retry later")
    return NotReady(f"no replica could answer, {tried} tried", hint="retry later")

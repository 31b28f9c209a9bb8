"""One streamed answer of one replica: checked event by event, counted, and never ended silently."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import Any

import httpx

from fedllm.clock import Clock
from fedllm.ids import Digest
from fedllm.serving.answers import http_error_body
from fedllm.serving.intake import GONE
from fedllm.serving.router.account import Account
from fedllm.serving.router.events import DONE, EventTooLong, read_events, texts_in, tokens_in, write_event
from fedllm.serving.router.job import Job
from fedllm.serving.router.upstream import Blame, ReplicaFailed, check_version, read_object
from fedllm.serving.router.waiting import Place
from fedllm.telemetry import event

MIXED, LOST = "replica-mixed", "replica-lost"
BAD_GATEWAY = 502
_LOG = logging.getLogger("fedllm.serving.router")
_MESSAGES = {
    MIXED: "the replica answered with another version than the one bound to this request; ask again",
    LOST: "the replica that answered was lost in the middle of the answer; ask again",
}


class Stream:
    """One streamed answer of one replica. Made by `Dispatcher.stream`.

    Parameters
    ----------
    account : Account
    job : Job
    place : Place
    response : httpx.Response
        Open, with status 200.
    clock : Clock

    Attributes
    ----------
    digest : Digest
        The version that answers; known once the stream has begun.
    id : str
        The answer's id; known with the version.
    outcome : int
        HTTP status for the record: 499 until the answer has ended one way or the other.
    """

    digest: Digest
    id: str

    def __init__(self, account: Account, job: Job, place: Place, response: httpx.Response, clock: Clock) -> None:
        self.job = job
        self.place = place
        self.response = response
        self.outcome = GONE
        self._account = account
        self._clock = clock
        self._data = read_events(response.aiter_bytes())
        self._first: bytes | None = None
        self._kept: dict[int, list[str]] | None = {} if job.keep_text else None

    @property
    def answers(self) -> list[str]:
        """The text so far of each continuation, if the job keeps it."""
        return ["".join(parts) for _, parts in sorted((self._kept or {}).items())]

    async def begin(self) -> None:
        """Wait for the first event; raise `ReplicaFailed` if it does not come or must not be passed on."""
        place = self.place
        try:
            data = await anext(self._data)
        except (httpx.HTTPError, EventTooLong, StopAsyncIteration) as error:
            raise ReplicaFailed(type(error).__name__) from None
        body = read_object(data)
        if "error" in body:
            raise ReplicaFailed("an error for a first event")
        self.digest = check_version(self.job.bound.digest, place, self.response.headers, body)
        if place.trial:
            place.replica.breaker.success()
        self.id = str(body.get("id"))
        now_s = self._clock.monotonic()
        place.replica.limit.observe(now_s - place.began_s, began_s=place.began_s, now_s=now_s)
        self._account.answered(place.replica.name, self.id, self.digest, prompt_tokens=self.job.size.prompt)
        first = self._take(body)
        self._first = None if first is None else write_event(first)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield encoded events; the last one is ``[DONE]`` or an error."""
        if self._first is not None:
            yield self._first
        failure = ReplicaFailed("ended without [DONE]")
        try:
            async for data in self._data:
                if data == DONE:
                    # All is generated: a client that leaves on reading the last line has had its answer.
                    self.outcome = 200
                    self.place.replica.breaker.success()
                    yield write_event(DONE)
                    return
                body = read_object(data)
                if "error" in body:
                    failure = ReplicaFailed("an error event")
                    break
                check_version(self.digest, self.place, None, body)
                if (passed := self._take(body)) is not None:
                    yield write_event(passed)
        except (httpx.HTTPError, EventTooLong) as error:
            failure = ReplicaFailed(type(error).__name__)
        except ReplicaFailed as error:
            failure = error
        self.outcome = BAD_GATEWAY
        blame(self.place, failure, self._clock.monotonic())
        yield write_event(gateway_body(MIXED if failure.blame is Blame.MIXED else LOST))

    async def aclose(self) -> None:
        """Close the replica's response, which ends the generation there, and give the place back."""
        try:
            await self.response.aclose()
        finally:
            self.place.release()

    def _take(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """Count what an event carries; return it as the client is to see it, None if it is not to."""
        job = self.job
        self._account.tokens(tokens_in(body))
        self._account.usage(self.place.replica.name, self.digest, body)
        if self._kept is not None:
            for index, text in texts_in(body):
                self._kept.setdefault(index, []).append(text)
        if not job.usage_wanted and body.pop("usage", None) is not None and not body.get("choices"):
            return None
        return {**body, "model": job.asked["model"], "system_fingerprint": self.digest}


def gateway_body(code: str) -> dict[str, Any]:
    """Return OpenAI's error object of ``replica-mixed`` or ``replica-lost``."""
    return http_error_body(BAD_GATEWAY, _MESSAGES[code], code)


def blame(place: Place, failure: ReplicaFailed, now_s: float) -> None:
    """Let the replica's circuit and limit hear of a failed try."""
    replica = place.replica
    if failure.blame is Blame.FAILURE:
        replica.breaker.failure()
    elif failure.blame is Blame.MIXED:
        replica.breaker.trip()
    elif failure.blame is Blame.FULL:
        replica.limit.refused(began_s=place.began_s, now_s=now_s)
    event(
        _LOG,
        "replica failed a request",
        level=logging.WARNING,
        replica=replica.name,
        reason=failure.reason,
        breaker=replica.breaker.state,
    )

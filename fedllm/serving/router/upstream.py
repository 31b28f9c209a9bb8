"""One try at one replica: send, check which version answers, and say what went wrong in terms of what to do next."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

import httpx

from fedllm.errors import DecodeError
from fedllm.ids import Digest, check_digest
from fedllm.serving.router.fleet import CONNECT_S, STALL_S
from fedllm.serving.router.job import Job
from fedllm.serving.router.waiting import Place

_REFUSAL_BYTES = 64 * 1024
WHOLE_S = 600.0
"""Seconds without a byte after which a replica has lost a whole answer, of which nothing comes before its end."""
ANSWER_BYTES = 64 * 1024 * 1024
"""Most bytes of a whole answer: far above what a context can hold, with log probabilities."""


class Blame(Enum):
    """What a failed try says of the replica."""

    NONE = "none"
    FULL = "full"
    FAILURE = "failure"
    MIXED = "mixed"


class ReplicaFailed(Exception):
    """A replica did not answer as it must; another one may.

    Parameters
    ----------
    reason : str
        For the log: a status, or the name of an exception. Never a text that came over the wire.
    blame : Blame
    """

    def __init__(self, reason: str, blame: Blame = Blame.FAILURE) -> None:
        super().__init__(reason)
        self.reason = reason
        self.blame = blame


class Declined(Exception):
    """A replica refused the request for what it says: every other one would, too.

    Parameters
    ----------
    status : int
        From 400 to 499.
    body : dict
        OpenAI's error object.
    """

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(str(status))
        self.status = status
        self.body = body


async def send(job: Job, place: Place) -> httpx.Response:
    """Send a request to the place's replica; return the open response once its status says that it is answered.

    Raises
    ------
    ReplicaFailed
        If nothing answers, or the status is the replica's fault.
    Declined
        If it is the request's.
    """
    replica, bound = place.replica, job.bound
    model = {"stream_options": {**(job.asked.get("stream_options") or {}), "include_usage": True}} if job.stream else {}
    scope = job.ticket.scope(bound.alias)
    body = replica.kind.body({**job.asked, **model}, bound.version, bound.alias, scope)
    request = replica.client.build_request(
        "POST",
        job.route,
        content=json.dumps(body).encode(),
        headers={"content-type": "application/json", **replica.kind.headers(job.ticket, bound.alias)},
        timeout=httpx.Timeout(STALL_S if job.stream else WHOLE_S, connect=CONNECT_S, pool=None),
    )
    try:
        response = await replica.client.send(request, stream=True)
        if response.status_code == httpx.codes.OK:
            return response
        try:
            refusal = await read_bounded(response, _REFUSAL_BYTES)
        finally:
            await response.aclose()
    except httpx.HTTPError as error:
        raise ReplicaFailed(type(error).__name__) from None
    raise _refusal(response.status_code, refusal, job, str(body["model"]))


def check_version(
    expected: Digest | None, place: Place, headers: Mapping[str, str] | None, body: Mapping[str, Any]
) -> Digest:
    """Return the one version that an answer was made by; None is expected where the base may be any.

    Raises
    ------
    ReplicaFailed
        If it was made by another one than was bound, or does not say; the blame is `Blame.MIXED`.
    """
    said = set(place.replica.kind.answered(headers, body))
    try:
        (digest,) = said
        found = check_digest(digest, what="version")
    except (ValueError, DecodeError):
        raise ReplicaFailed("no one version", Blame.MIXED) from None
    if expected not in (None, found):
        raise ReplicaFailed("another version", Blame.MIXED)
    return found


async def read_bounded(response: httpx.Response, most: int) -> bytes:
    """Return a response's body, or raise `ReplicaFailed` if it is longer than `most` bytes."""
    parts, size = [], 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > most:
            raise ReplicaFailed(f"more than {most} bytes")
        parts.append(part)
    return b"".join(parts)


def read_object(data: bytes) -> dict[str, Any]:
    """Return a replica's JSON object, or raise `ReplicaFailed`."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise ReplicaFailed("no JSON") from None
    if not isinstance(body, dict):
        raise ReplicaFailed("no JSON object")
    return body


def _refusal(status: int, data: bytes, job: Job, sent: str) -> Exception:
    """Return what a refusal stands for; a message that names the model as it was `sent` names it as it was asked."""
    if status in (401, 403):
        return ReplicaFailed(f"status {status}: does the router's key hold there?")
    if status == 404 and job.bound.version is not None:
        # The router has bound the version, so it exists; this replica has not heard of its alias yet.
        return ReplicaFailed("status 404", Blame.NONE)
    if status == 429:
        return ReplicaFailed("status 429", Blame.FULL)
    if status == 503:
        # It says that it cannot do this now; whether it can do anything is what health checks find out.
        return ReplicaFailed("status 503", Blame.NONE)
    if not 400 <= status < 500:
        return ReplicaFailed(f"status {status}")
    try:
        body = read_object(data)
        error = body["error"]
        error["message"] = str(error["message"]).replace(sent, str(job.asked["model"]))
    except (ReplicaFailed, KeyError, TypeError):
        return ReplicaFailed(f"status {status} without an error object")
    return Declined(status, {"error": error})

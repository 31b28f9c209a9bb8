"""One request from its ticket to its answer: bind, reserve, forward, count. No web framework."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

from fedllm.clock import Clock
from fedllm.rng import Rng
from fedllm.serving.access import Access, Ticket
from fedllm.serving.delivery import STALL_S, Receive, Send, send_events
from fedllm.serving.endpoint import VERSION_HEADER, PromptNotes
from fedllm.serving.feedback import Feedbacks
from fedllm.serving.intake import BODY_S, unless_gone
from fedllm.serving.router.aliases import AliasFollower
from fedllm.serving.router.dispatch import Dispatcher
from fedllm.serving.router.events import texts_in
from fedllm.serving.router.fleet import Fleet
from fedllm.serving.router.job import Bound, Job, asked_text, model_of, size_of
from fedllm.serving.router.models import Models
from fedllm.serving.router.predictions import Key, Predictions, key_of
from fedllm.serving.router.stream import Stream

REPLICA_HEADER = "x-fedllm-replica"
"""Sent to operators only: how many replicas there are, and which one a prompt is cached at, is nobody else's."""
PREDICTION_HEADER = "x-fedllm-prediction"
Gone = Callable[[], Awaitable[bool]]


@dataclass(frozen=True)
class Router:
    """Everything the routes need; made by the composition root.

    Parameters
    ----------
    predictions : Predictions, optional
        No answer is kept without one.
    prompt_log : PromptNotes, optional
        Nothing that is asked or answered is logged without one.
    feedbacks : Feedbacks
        Remembers who was answered by what, and takes ratings of it.
    stall_s : float
        Seconds after which a client that does not read its stream is cut off.
    body_s : float
        Seconds that a request's body may take to arrive.
    """

    access: Access
    models: Models
    follower: AliasFollower
    fleet: Fleet
    dispatcher: Dispatcher
    clock: Clock
    rng: Rng
    predictions: Predictions | None = None
    prompt_log: PromptNotes | None = None
    feedbacks: Feedbacks = field(default_factory=Feedbacks)
    stall_s: float = STALL_S
    body_s: float = BODY_S


@dataclass(frozen=True)
class Whole:
    """An answer that is not streamed."""

    body: dict[str, Any]
    headers: dict[str, str]


class Streamed:
    """An answer that is streamed; sending it closes it, whatever becomes of the client."""

    def __init__(self, router: Router, stream: Stream, held: ExitStack) -> None:
        self._router = router
        self._stream = stream
        self._held = held

    async def send(self, receive: Receive, send: Send) -> None:
        """Send the events, and end the ticket."""
        stream = self._stream
        ticket = stream.job.ticket
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            **_headers(ticket, stream.digest, stream.place.replica.name),
        }
        try:
            async with aclosing(stream.events()) as events:
                await send_events(receive, send, events, headers, stall_s=self._router.stall_s)
        finally:
            with self._held:
                try:
                    await stream.aclose()
                finally:
                    ticket.end(stream.outcome)
            _note(self._router, stream.job, stream.id, stream.answers)


async def answer(router: Router, ticket: Ticket, route: str, body: object, gone: Gone) -> Whole | Streamed:
    """Answer one completion.

    Parameters
    ----------
    ticket : Ticket
        Not ended here, but for a stream.
    route : str
        Path of the request.
    body : object
        Its JSON.
    gone : callable
        Whether the client has left.

    Raises
    ------
    RequestInvalid, NotFound, QuotaExceeded
        The request's own faults.
    Overloaded, NotReady, PeerUnavailable, Declined, BadGateway
        See `fedllm.serving.router.dispatch.Dispatcher`.
    ClientGone
        If nobody waits for it any more.
    """
    asked, model = model_of(body)
    tenant = ticket.caller.tenant
    bound = await router.models.bind(model, tenant)
    with ExitStack() as held:
        held.enter_context(router.models.flights.hold(bound.digest))
        if bound.version is not None:
            # Known to the record from here on, whatever becomes of the request.
            ticket.bound("", bound.alias, bound.version.digest, prompt_tokens=0)
            if router.models.served.get(bound.alias) is not bound.version:
                router.follower.ensure(bound.alias, bound.version)
        size = size_of(asked)
        ticket.reserve(size.reserved)
        key = key_of(tenant.name, bound.digest, route, asked) if router.predictions is not None else None
        if key is not None and (known := _known(router, ticket, bound, key)) is not None:
            return known
        keep = router.prompt_log is not None and tenant.log_prompts
        job = Job(route, asked, ticket, bound, size, keep_text=keep)
        if job.stream:
            stream = await _begin(router.dispatcher, job, gone)
            return Streamed(router, stream, held.pop_all())
        made, place = await unless_gone(gone, router.dispatcher.whole(job))
        if key is not None and router.predictions is not None:
            router.predictions.keep(key, tenant.name, made)
        _note(router, job, str(made.get("id")), [text for _, text in texts_in(made)] if keep else [])
        return Whole(made, _headers(ticket, made["system_fingerprint"], place.replica.name))


async def _begin(dispatcher: Dispatcher, job: Job, gone: Gone) -> Stream:
    """Begin a stream, but not for a client that leaves while it waits for the first token."""
    task = asyncio.ensure_future(dispatcher.stream(job))
    try:
        return await unless_gone(gone, asyncio.shield(task))
    except BaseException:
        task.cancel()
        (late,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(late, Stream):
            await late.aclose()
        raise


def _known(router: Router, ticket: Ticket, bound: Bound, key: Key) -> Whole | None:
    """Return an answer that this tenant has had before, as a new answer of its own."""
    if router.predictions is None or bound.digest is None:
        return None
    body = router.predictions.find(key, ticket.caller.tenant.name)
    if body is None:
        return None
    prefix = str(body.get("id")).partition("-")[0]
    made = {**body, "id": f"{prefix}-{router.rng.token(12).hex()}", "created": int(router.clock.now())}
    usage = made.get("usage") or {}
    ticket.bound(made["id"], bound.alias, bound.digest, prompt_tokens=int(usage.get("prompt_tokens", 0)))
    ticket.cached(int(usage.get("prompt_tokens", 0)))
    ticket.token(int(usage.get("completion_tokens", 0)))
    return Whole(made, {**_headers(ticket, bound.digest, ""), PREDICTION_HEADER: "hit"})


def _headers(ticket: Ticket, digest: str, replica: str) -> dict[str, str]:
    shown = {REPLICA_HEADER: replica} if replica and ticket.caller.tenant.operator else {}
    return {VERSION_HEADER: digest, **shown, **ticket.headers()}


def _note(router: Router, job: Job, id: str, answers: list[str]) -> None:  # noqa: A002 - the record's name
    if router.prompt_log is None or not answers:
        return
    asked = asked_text(job.asked)
    for text in answers:
        router.prompt_log.note(job.ticket.caller.tenant, id, asked, text)

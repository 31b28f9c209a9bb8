"""One completion or score from its ticket to its answer: reserve, lease, generate, count. No web framework."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from fedllm.errors import FedllmError, Overloaded, RequestInvalid
from fedllm.serving.access import Ticket
from fedllm.serving.answers import chunk_body, error_body, error_status, full_body, usage_body
from fedllm.serving.delivery import Receive, Send, send_events
from fedllm.serving.endpoint import VERSION_HEADER, Endpoint
from fedllm.serving.engine import Lease
from fedllm.serving.generation import Generation, fit
from fedllm.serving.intake import GONE, unless_gone
from fedllm.serving.openai import CompletionRequest, ScoreRequest
from fedllm.serving.structured import Grammars
from fedllm.serving.tenants import BASE_ACCESS
from fedllm.serving.text import TextCodec

Gone = Callable[[], Awaitable[bool]]
"""Whether a request's client has left."""


class Completion:
    """An admitted completion, answered by `body` or by `stream`: either closes it, whatever becomes of the client.

    Parameters
    ----------
    endpoint : Endpoint
    ticket : Ticket
    generation : Generation
        Opened.
    chat : bool
        Whether it was asked for as a chat.
    """

    def __init__(self, endpoint: Endpoint, ticket: Ticket, generation: Generation, *, chat: bool) -> None:
        self._endpoint = endpoint
        self._ticket = ticket
        self._generation = generation
        self._chat = chat
        self._outcome = GONE

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer: the version, and what is left of the rates."""
        return {VERSION_HEADER: self._generation.version, **self._ticket.headers()}

    async def body(self, gone: Gone) -> dict[str, Any]:
        """Return the whole answer; raise `ClientGone` if nobody waits for it any more."""
        try:
            return await unless_gone(gone, full_body(self._generation, chat=self._chat))
        finally:
            await self._close()

    async def stream(self, receive: Receive, send: Send) -> None:
        """Send the answer as server-sent events, and end the ticket."""
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", **self.headers}
        try:
            async with aclosing(self._events()) as events:
                await send_events(receive, send, events, headers, stall_s=self._endpoint.stall_s)
        finally:
            try:
                await self._close()
            finally:
                self._ticket.end(self._outcome)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        generation, chat = self._generation, self._chat
        try:
            async with aclosing(generation.chunks()) as chunks:
                async for chunk in chunks:
                    yield _event(chunk_body(generation, chunk, chat=chat))
        except FedllmError as error:
            # The status line is out already: the error becomes an event, which OpenAI's client raises.
            self._outcome = error_status(error)
            yield _event(error_body(error))
            return
        except Exception:
            self._outcome = 500
            raise
        # All is generated: a client that leaves on reading the last line has had its answer.
        self._outcome = 200
        if generation.request.include_usage:
            yield _event(usage_body(generation, chat=chat))
        yield b"data: [DONE]\n\n"

    async def _close(self) -> None:
        await self._generation.aclose()
        log, generation = self._endpoint.prompt_log, self._generation
        if log is None or not generation.answers:
            return
        asked = _asked_text(generation.request, self._endpoint.codec)
        for answer in generation.answers:
            log.note(self._ticket.caller.tenant, generation.id, asked, answer)


async def complete(
    endpoint: Endpoint,
    grammars: Grammars,
    ticket: Ticket,
    asked: CompletionRequest,
    prompt: tuple[int, ...],
    gone: Gone,
    *,
    chat: bool,
) -> Completion:
    """Admit a completion, or raise and hold nothing.

    Parameters
    ----------
    prompt : tuple of int
        The tokens of what was asked.
    gone : callable
        Whether the client has left: it is not waited for then.
    """
    asked = fit(asked, prompt, limit=endpoint.engine.max_model_tokens)
    ticket.reserve(len(prompt) + asked.n * asked.params.max_tokens)
    grammar = await unless_gone(gone, grammars.compile(asked.shapes)) if asked.shapes else None
    lease = await _lease(endpoint, ticket, asked.model, gone)
    try:
        id_, alias = ("chatcmpl-" if chat else "cmpl-") + endpoint.rng.token(12).hex(), _alias(endpoint, asked.model)
        ticket.bound(id_, alias, lease.digest, prompt_tokens=0)
        keep = endpoint.prompt_log is not None and ticket.caller.tenant.log_prompts
        created = int(endpoint.clock.now())
        generation = Generation(id_, created, asked, prompt, lease, endpoint.codec, ticket, keep_text=keep)
        await generation.open(endpoint.engine, grammar, scope=ticket.scope(alias))
        ticket.bound(id_, alias, lease.digest, prompt_tokens=len(prompt))
    except BaseException:
        with lease:
            raise
    return Completion(endpoint, ticket, generation, chat=chat)


async def score(endpoint: Endpoint, ticket: Ticket, asked: ScoreRequest, gone: Gone) -> dict[str, Any]:
    """Return the body that values given tokens as a continuation."""
    total = len(asked.prompt) + len(asked.tokens)
    ticket.reserve(total)
    with await _lease(endpoint, ticket, asked.model, gone) as lease:
        alias = _alias(endpoint, asked.model)
        ticket.bound("", alias, lease.digest, prompt_tokens=total)
        try:
            scores = await unless_gone(gone, endpoint.engine.score(lease, asked.prompt, asked.tokens))
        except (RequestInvalid, Overloaded):
            ticket.bound("", alias, lease.digest, prompt_tokens=0)  # refused before anything was computed
            raise
        return {
            "object": "score",
            "model": asked.model,
            "system_fingerprint": lease.digest,
            "regrets": [s.regret for s in scores],
            "logprobs": [s.logprob for s in scores],
        }


def _asked_text(asked: CompletionRequest, codec: TextCodec) -> str:
    if asked.messages:
        return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in asked.messages)
    return asked.prompt if isinstance(asked.prompt, str) else codec.decoder().feed(asked.prompt or ())


def _alias(endpoint: Endpoint, model: str) -> str:
    return BASE_ACCESS if model == endpoint.versions.base_name else model.partition("@")[0]


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _lease(endpoint: Endpoint, ticket: Ticket, model: str, gone: Gone) -> Lease:
    """Lease a version, but not for a client that leaves while it waits for one."""
    task = asyncio.ensure_future(endpoint.watcher.lease(model, ticket.caller.tenant))
    try:
        return await unless_gone(gone, asyncio.shield(task))
    except BaseException:
        task.cancel()
        task.add_done_callback(_release)
        raise


def _release(task: asyncio.Future[Lease]) -> None:
    """Give a lease back that came too late."""
    if not task.cancelled() and task.exception() is None:
        with task.result():
            pass

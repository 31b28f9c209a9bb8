"""One admitted request: a lease, its continuations and their text, closed together whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Self

from fedllm.errors import FedllmError, RequestInvalid
from fedllm.ids import Digest
from fedllm.serving.access import Ticket
from fedllm.serving.engine import Chunk, Engine, GenerationRequest, Grammar, Lease, TokenStream
from fedllm.serving.openai import CompletionRequest
from fedllm.serving.text import StopFilter, TextCodec
from fedllm.serving.tools import Call, CallReader


@dataclass(frozen=True)
class TokenReport:
    """A generated token: its id and, where logprobs were asked for, what it spells and how likely it was."""

    id: int = field(repr=False)
    spelled: bytes = field(default=b"", repr=False)
    logprob: float = 0.0
    top: tuple[tuple[bytes, float], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class TextChunk:
    """A piece of one continuation.

    Parameters
    ----------
    index : int
        Which continuation.
    text : str
        New content.
    tokens : tuple of TokenReport
        The tokens it came with; the text of some may come later, or never if they were part of a stop string.
    finish_reason : str or None
        ``stop``, ``length`` or ``tool_calls`` in the last piece.
    calls : tuple of Call
        Function calls, whole; in the last piece only.
    first : bool
        Whether it is the continuation's first piece.
    offset : int
        Characters of all tokens before.
    """

    index: int
    text: str = field(repr=False)
    tokens: tuple[TokenReport, ...]
    finish_reason: str | None
    calls: tuple[Call, ...] = ()
    first: bool = False
    offset: int = 0


class Generation:
    """A running request; `open` admits it.

    Parameters
    ----------
    id, created
        For the answer.
    request : CompletionRequest
        What was asked.
    prompt : tuple of int
        Its token ids.
    lease : Lease
        Released by `aclose`.
    codec : TextCodec
        Turns tokens into text.
    ticket : Ticket
        Told of every token that was computed, read or not.
    keep_text : bool
        Whether `answers` has the text that was delivered.
    """

    def __init__(
        self,
        id: str,  # noqa: A002 - OpenAI's name
        created: int,
        request: CompletionRequest,
        prompt: tuple[int, ...],
        lease: Lease,
        codec: TextCodec,
        ticket: Ticket,
        *,
        keep_text: bool = False,
    ) -> None:
        self.id = id
        self.created = created
        self.request = request
        self.prompt = prompt
        self.completion_tokens = 0
        self._lease = lease
        self._codec = codec
        self._ticket = ticket
        self._texts: list[list[str]] | None = [[] for _ in range(request.n)] if keep_text else None
        self._streams: list[TokenStream] = []

    async def open(self, engine: Engine, grammar: Grammar | None, *, scope: str) -> Self:
        """Admit every continuation, or none; the lease stays the caller's if that fails.

        `scope` is whose prefix cache it uses: the tenant's.
        """
        params = replace(self.request.params, grammar=grammar)
        try:
            for number in range(self.request.n):
                asked = GenerationRequest(
                    self.prompt,
                    replace(params, continuation=number),
                    scope,
                    client=self._ticket.caller.tenant.name,
                    weight=self._ticket.weight,
                )
                self._streams.append(engine.generate(self._lease, asked))
        except BaseException:
            await self._close_streams()
            raise
        return self

    @property
    def version(self) -> Digest:
        """Digest of the version that answers, from the first token to the last."""
        return self._lease.digest

    @property
    def cached_tokens(self) -> int:
        """How much of the prompt the prefix cache had; 0 before the first token."""
        return self._streams[0].cached_tokens if self._streams else 0

    @property
    def answers(self) -> list[str]:
        """Text of every continuation as far as it was delivered; none if it is not kept."""
        return ["".join(texts) for texts in self._texts or ()]

    async def chunks(self) -> AsyncGenerator[TextChunk, None]:
        """Yield pieces as they come, of all continuations; an error of one ends all."""
        sources = [self._continuation(index, stream) for index, stream in enumerate(self._streams)]
        if len(sources) == 1:
            async with aclosing(sources[0]) as source:
                async for chunk in source:
                    yield chunk
            return
        waiting = {asyncio.ensure_future(anext(source)): source for source in sources}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    source = waiting.pop(task)
                    try:
                        chunk = task.result()
                    except StopAsyncIteration:
                        continue
                    yield chunk
                    waiting[asyncio.ensure_future(anext(source))] = source
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def aclose(self) -> None:
        """Cancel what is left and let go of the version; what was computed and never read is counted."""
        with self._lease:
            for stream in self._streams:
                await self._count_unread(stream)
            self._ticket.cached(self.cached_tokens)
            await self._close_streams()

    async def _close_streams(self) -> None:
        for stream in self._streams:
            await stream.aclose()

    async def _count_unread(self, stream: TokenStream) -> None:
        # What is there comes without waiting; the first wait ends it. An error was nobody's to read either.
        with suppress(TimeoutError, FedllmError):
            async with asyncio.timeout(0):
                async for chunk in stream:
                    self._count(chunk)

    def _count(self, chunk: Chunk) -> None:
        self.completion_tokens += len(chunk.token_ids)
        self._ticket.token(len(chunk.token_ids))

    async def _continuation(self, index: int, stream: TokenStream) -> AsyncGenerator[TextChunk, None]:
        decoder, stops, calls = self._codec.decoder(), StopFilter(self.request.stop), CallReader(self.request.tools)
        first, offset = True, 0
        async for chunk in stream:
            self._count(chunk)
            tokens = self._report(chunk)
            text = stops.feed(decoder.feed(chunk.token_ids))
            reason: str | None = "stop" if stops.hit else chunk.finish_reason
            found: tuple[Call, ...] = ()
            if reason is None:
                text = calls.feed(text)
            else:
                text = calls.feed(text + stops.flush())
                rest, found = calls.finish()
                text += rest
                reason = "tool_calls" if found else reason
            if self._texts is not None:
                self._texts[index].append(text)
            yield TextChunk(index, text, tokens, reason, found, first, offset)
            if reason is not None:
                await stream.aclose()
                return
            first = False
            offset += sum(len(token.spelled.decode(errors="replace")) for token in tokens)

    def _report(self, chunk: Chunk) -> tuple[TokenReport, ...]:
        if not chunk.logprobs:
            return tuple(TokenReport(token) for token in chunk.token_ids)
        spell = self._codec.token_bytes
        return tuple(
            TokenReport(token, spell(token), scored.logprob, tuple((spell(t), logprob) for t, logprob in scored.top))
            for token, scored in zip(chunk.token_ids, chunk.logprobs, strict=True)
        )


def tokenize(request: CompletionRequest, codec: TextCodec, *, limit: int) -> tuple[int, ...]:
    """Return the prompt's tokens; raise `RequestInvalid` if they fill the limit, or other ids are unknown."""
    if request.messages:
        tokens = tuple(codec.encode_chat(request.messages, request.tools.offered))
    elif isinstance(request.prompt, str):
        tokens = tuple(codec.encode(request.prompt))
    else:
        tokens = request.prompt or ()
    if len(tokens) >= limit:
        raise RequestInvalid(f"the prompt has {len(tokens)} tokens, prompt and answer have {limit} at most")
    if request.params.logit_bias and max(token for token, _ in request.params.logit_bias) >= codec.vocabulary:
        raise RequestInvalid(f"the keys of logit_bias must be token ids, 0 to {codec.vocabulary - 1}")
    return tokens


def fit(request: CompletionRequest, prompt: Sequence[int], *, limit: int) -> CompletionRequest:
    """Cap `max_tokens` at what the limit leaves after the prompt."""
    left = limit - len(prompt)
    return replace(request, params=replace(request.params, max_tokens=min(request.params.max_tokens, left)))

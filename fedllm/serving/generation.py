"""One admitted request: a lease, a token stream and its text, closed together whatever happens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedllm.errors import RequestInvalid
from fedllm.ids import Digest
from fedllm.serving.engine import Engine, FinishReason, GenerationRequest, Lease
from fedllm.serving.openai import CompletionRequest
from fedllm.serving.text import StopFilter, TextCodec, TokenDecoder


@dataclass(frozen=True)
class TextChunk:
    """New text, the tokens it came with, and the end if it is the end."""

    text: str = field(repr=False)
    token_ids: tuple[int, ...] = field(repr=False)
    finish_reason: FinishReason | None


class Generation:
    """A running completion.

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
    engine : Engine
        Where it runs.
    decoder : TokenDecoder
        Fresh.
    """

    def __init__(
        self,
        id: str,  # noqa: A002 - OpenAI's name
        created: int,
        request: CompletionRequest,
        prompt: tuple[int, ...],
        lease: Lease,
        engine: Engine,
        decoder: TokenDecoder,
    ) -> None:
        self.id = id
        self.created = created
        self.request = request
        self.prompt = prompt
        self.completion_tokens = 0
        self._lease = lease
        self._decoder = decoder
        self._stops = StopFilter(request.stop)
        self._stream = engine.generate(lease, GenerationRequest(prompt, request.params))

    @property
    def version(self) -> Digest:
        """Digest of the version that answers, from the first token to the last."""
        return self._lease.digest

    async def chunks(self) -> AsyncIterator[TextChunk]:
        """Yield text as it comes; a stop string ends it early."""
        async for chunk in self._stream:
            self.completion_tokens += len(chunk.token_ids)
            text = self._stops.feed(self._decoder.feed(chunk.token_ids))
            if self._stops.hit:
                yield TextChunk(text, chunk.token_ids, "stop")
                return
            if chunk.finish_reason is not None:
                text += self._stops.flush()
            yield TextChunk(text, chunk.token_ids, chunk.finish_reason)

    async def aclose(self) -> None:
        """Cancel what is left and let go of the version."""
        with self._lease:
            await self._stream.aclose()

    def usage(self) -> dict[str, int]:
        """Return OpenAI's usage object."""
        prompt, completion = len(self.prompt), self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def tokenize(request: CompletionRequest, codec: TextCodec, *, limit: int) -> tuple[int, ...]:
    """Return the prompt's tokens; raise `RequestInvalid` if they fill the limit."""
    if request.messages:
        tokens = tuple(codec.encode_chat(request.messages))
    elif isinstance(request.prompt, str):
        tokens = tuple(codec.encode(request.prompt))
    else:
        tokens = request.prompt or ()
    if len(tokens) >= limit:
        raise RequestInvalid(f"the prompt has {len(tokens)} tokens, prompt and answer have {limit} at most")
    return tokens


def fit(request: CompletionRequest, prompt: Sequence[int], *, limit: int) -> CompletionRequest:
    """Cap `max_tokens` at what the limit leaves after the prompt."""
    left = limit - len(prompt)
    return replace(request, params=replace(request.params, max_tokens=min(request.params.max_tokens, left)))


def chunk_body(generation: Generation, chunk: TextChunk, *, chat: bool, first: bool) -> dict[str, Any]:
    """Return one streamed event's body."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": chunk.finish_reason, "logprobs": None}
    if chat:
        choice["delta"] = {"role": "assistant", "content": chunk.text} if first else {"content": chunk.text}
    else:
        choice["text"] = chunk.text
    body = _head(generation, "chat.completion.chunk" if chat else "text_completion") | {"choices": [choice]}
    if generation.request.return_token_ids:
        choice["token_ids"] = list(chunk.token_ids)
        if first:
            body["prompt_token_ids"] = list(generation.prompt)
    return body


def usage_body(generation: Generation, *, chat: bool) -> dict[str, Any]:
    """Return the last event's body when usage was asked for."""
    kind = "chat.completion.chunk" if chat else "text_completion"
    return _head(generation, kind) | {"choices": [], "usage": generation.usage()}


async def full_body(generation: Generation, *, chat: bool) -> dict[str, Any]:
    """Run to the end and return the whole answer's body."""
    text, tokens, reason = "", list[int](), None
    async for chunk in generation.chunks():
        text += chunk.text
        tokens += chunk.token_ids
        reason = chunk.finish_reason
    choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
    choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    head = _head(generation, "chat.completion" if chat else "text_completion")
    body = head | {"choices": [choice], "usage": generation.usage()}
    if generation.request.return_token_ids:
        choice["token_ids"] = tokens
        body["prompt_token_ids"] = list(generation.prompt)
    return body


def _head(generation: Generation, kind: str) -> dict[str, Any]:
    return {
        "id": generation.id,
        "object": kind,
        "created": generation.created,
        "model": generation.request.model,
        "system_fingerprint": generation.version,
    }

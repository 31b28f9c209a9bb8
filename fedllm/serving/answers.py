"""OpenAI's answers and errors as plain data, built from a generation. No web framework."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedllm.errors import (
    AuthenticationError,
    FedllmError,
    MissingExtra,
    NotFound,
    NotReady,
    Overloaded,
    PeerUnavailable,
    QuotaExceeded,
    RequestInvalid,
)
from fedllm.serving.generation import Generation, TextChunk, TokenReport
from fedllm.serving.tools import Call

_PATIENCE_S = 60.0
"""OpenAI's client takes no notice of a Retry-After above this, and asks again much too early."""


def error_status(error: FedllmError) -> int:
    """Return the HTTP status that an error answers with."""
    statuses: list[tuple[type[FedllmError], int]] = [
        (RequestInvalid, 400),
        (AuthenticationError, 401),
        (NotFound, 404),
        (Overloaded, 429),
        (NotReady, 503),
        (PeerUnavailable, 503),
        (MissingExtra, 501),
    ]
    return next((status for kind, status in statuses if isinstance(error, kind)), 500)


def error_body(error: FedllmError) -> dict[str, Any]:
    """Return OpenAI's error object."""
    status = error_status(error)
    message = error.message if error.hint is None else f"{error.message} ({error.hint})"
    code = "model_not_found" if type(error) is NotFound else error.code
    if isinstance(error, QuotaExceeded):
        code = "rate_limit_exceeded"
    return http_error_body(status, message, code)


def http_error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """Return OpenAI's error object for an HTTP status."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def refusal_headers(error: FedllmError) -> dict[str, str]:
    """Return the headers that tell a client whether and when to ask again, as OpenAI's client reads them."""
    headers: dict[str, str] = {}
    if isinstance(error, NotReady | MissingExtra):
        headers["x-should-retry"] = "true" if isinstance(error, NotReady) else "false"
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        if error.retry_after_s > _PATIENCE_S:
            headers["x-should-retry"] = "false"
    return headers


def chunk_body(generation: Generation, chunk: TextChunk, *, chat: bool) -> dict[str, Any]:
    """Return one streamed event's body."""
    choice = _choice(chunk.index, chunk.finish_reason, chunk.tokens, generation, chat=chat, offset=chunk.offset)
    if chat:
        delta: dict[str, Any] = {"role": "assistant"} if chunk.first else {}
        if chunk.calls:
            delta["tool_calls"] = [
                {"index": i, **call} for i, call in enumerate(_calls(generation, chunk.index, chunk.calls))
            ]
        if chunk.text or not chunk.calls:
            delta["content"] = chunk.text
        choice["delta"] = delta
    else:
        choice["text"] = chunk.text
    body = _head(generation, "chat.completion.chunk" if chat else "text_completion") | {"choices": [choice]}
    if generation.request.include_usage:
        body["usage"] = None
    if generation.request.return_token_ids:
        choice["token_ids"] = [token.id for token in chunk.tokens]
        if chunk.first:
            body["prompt_token_ids"] = list(generation.prompt)
    return body


def usage_body(generation: Generation, *, chat: bool) -> dict[str, Any]:
    """Return the last event's body when usage was asked for."""
    kind = "chat.completion.chunk" if chat else "text_completion"
    return _head(generation, kind) | {"choices": [], "usage": usage(generation)}


async def full_body(generation: Generation, *, chat: bool) -> dict[str, Any]:
    """Run to the end and return the whole answer's body."""
    parts: list[list[TextChunk]] = [[] for _ in range(generation.request.n)]
    async for chunk in generation.chunks():
        parts[chunk.index].append(chunk)
    choices = []
    for index, chunks in enumerate(parts):
        tokens = [token for chunk in chunks for token in chunk.tokens]
        text = "".join(chunk.text for chunk in chunks)
        choice = _choice(index, chunks[-1].finish_reason, tokens, generation, chat=chat, offset=0)
        if chat:
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if calls := chunks[-1].calls:
                message |= {"content": text or None, "tool_calls": _calls(generation, index, calls)}
            choice["message"] = message
        else:
            choice["text"] = text
        if generation.request.return_token_ids:
            choice["token_ids"] = [token.id for token in tokens]
        choices.append(choice)
    head = _head(generation, "chat.completion" if chat else "text_completion")
    body = head | {"choices": choices, "usage": usage(generation)}
    if generation.request.return_token_ids:
        body["prompt_token_ids"] = list(generation.prompt)
    return body


def usage(generation: Generation) -> dict[str, Any]:
    """Return OpenAI's usage object; the prompt counts once, however many continuations it has."""
    prompt, completion = len(generation.prompt), generation.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }


def _choice(
    index: int, reason: str | None, tokens: Sequence[TokenReport], generation: Generation, *, chat: bool, offset: int
) -> dict[str, Any]:
    logprobs: dict[str, Any] | None = None
    if generation.request.params.logprobs is not None:
        logprobs = _chat_logprobs(tokens) if chat else _text_logprobs(tokens, offset)
    return {"index": index, "finish_reason": reason, "logprobs": logprobs}


def _chat_logprobs(tokens: Sequence[TokenReport]) -> dict[str, Any]:
    def entry(spelled: bytes, logprob: float) -> dict[str, Any]:
        return {"token": spelled.decode(errors="replace"), "logprob": logprob, "bytes": list(spelled)}

    content = [
        {**entry(token.spelled, token.logprob), "top_logprobs": [entry(*likely) for likely in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(tokens: Sequence[TokenReport], offset: int) -> dict[str, Any]:
    texts = [token.spelled.decode(errors="replace") for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{s.decode(errors="replace"): logprob for s, logprob in token.top} for token in tokens],
        "text_offset": offsets,
    }


def _calls(generation: Generation, index: int, calls: Sequence[Call]) -> list[dict[str, Any]]:
    serial = generation.id.rpartition("-")[2]
    return [
        {
            "id": f"call_{serial}_{index}_{i}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for i, call in enumerate(calls)
    ]


def _head(generation: Generation, kind: str) -> dict[str, Any]:
    return {
        "id": generation.id,
        "object": kind,
        "created": generation.created,
        "model": generation.request.model,
        "system_fingerprint": generation.version,
    }

"""OpenAI's wire format as plain data: requests read strictly, answers and errors built. No web framework.

Fields that change what is generated and are not supported are refused, not ignored; unknown others are ignored,
as OpenAI-compatible servers do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fedllm.errors import (
    AuthenticationError,
    FedllmError,
    NotFound,
    NotReady,
    Overloaded,
    PeerUnavailable,
    RequestInvalid,
)
from fedllm.serving.engine import SamplingParams

DEFAULT_MAX_TOKENS = 256
_MAX_STOPS = 4
_UNSUPPORTED = ("tools", "functions", "logit_bias", "logprobs", "top_logprobs", "response_format")

T = TypeVar("T")


@dataclass(frozen=True)
class CompletionRequest:
    """A chat or text completion as asked for; `messages` or `prompt` is set.

    Parameters
    ----------
    model : str
        Model id.
    messages, prompt
        What to continue; never printed.
    params : SamplingParams
        Without stop tokens, which are the base's.
    stop : tuple of str
        Stop strings.
    stream, include_usage : bool
        Server-sent events, and a last one with the usage.
    return_token_ids : bool
        Extension: ``prompt_token_ids`` and ``token_ids`` in the answer.
    """

    model: str
    params: SamplingParams
    messages: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    prompt: str | tuple[int, ...] | None = field(default=None, repr=False)
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False


@dataclass(frozen=True)
class ScoreRequest:
    """The extension ``POST /v1/score``: value given tokens as a continuation of a prompt."""

    model: str
    prompt: tuple[int, ...] = field(repr=False)
    tokens: tuple[int, ...] = field(repr=False)


def read_chat(body: object, *, stop_token_ids: frozenset[int]) -> CompletionRequest:
    """Read the body of ``POST /v1/chat/completions``; raise `RequestInvalid` naming the field."""
    fields = _fields(body)
    messages = _get(fields, "messages", list)
    if not messages or not all(_is_message(message) for message in messages):
        raise RequestInvalid("messages must be a non-empty list of {role, content}, content being text")
    return _read(fields, stop_token_ids, messages=tuple(_plain_message(message) for message in messages))


def read_completion(body: object, *, stop_token_ids: frozenset[int]) -> CompletionRequest:
    """Read the body of ``POST /v1/completions``; raise `RequestInvalid` naming the field."""
    fields = _fields(body)
    prompt = fields.get("prompt")
    if isinstance(prompt, list):
        prompt = _token_ids(fields, "prompt")
    elif not isinstance(prompt, str):
        raise RequestInvalid("prompt must be one text or one list of token ids")
    return _read(fields, stop_token_ids, prompt=prompt)


def read_score(body: object) -> ScoreRequest:
    """Read the body of ``POST /v1/score``; raise `RequestInvalid` naming the field."""
    fields = _fields(body)
    prompt, tokens = _token_ids(fields, "prompt_token_ids"), _token_ids(fields, "token_ids")
    return ScoreRequest(_get(fields, "model", str), prompt, tokens)


def error_status(error: FedllmError) -> int:
    """Return the HTTP status that an error answers with."""
    statuses: list[tuple[type[FedllmError], int]] = [
        (RequestInvalid, 400),
        (AuthenticationError, 401),
        (NotFound, 404),
        (Overloaded, 429),
        (NotReady, 503),
        (PeerUnavailable, 503),
    ]
    return next((status for kind, status in statuses if isinstance(error, kind)), 500)


def error_body(error: FedllmError) -> dict[str, Any]:
    """Return OpenAI's error object."""
    status = error_status(error)
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    code = {404: "model_not_found"}.get(status, error.code)
    message = error.message if error.hint is None else f"{error.message} ({error.hint})"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _read(fields: Mapping[str, Any], stop_token_ids: frozenset[int], **content: Any) -> CompletionRequest:
    for name in _UNSUPPORTED:
        if fields.get(name):
            raise RequestInvalid(f"{name} is not supported here", hint=f"leave {name} out")
    if fields.get("n", 1) not in (1, None):
        raise RequestInvalid(f"n is {fields['n']!r}, 1 is supported")
    for name in ("presence_penalty", "frequency_penalty"):
        if fields.get(name):
            raise RequestInvalid(f"{name} is {fields[name]!r}, 0 is supported")
    stop = fields.get("stop") or []
    stops = tuple([stop] if isinstance(stop, str) else stop)
    if len(stops) > _MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise RequestInvalid(f"stop must be at most {_MAX_STOPS} non-empty texts")
    limit_name = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    seed = fields.get("seed")
    params = SamplingParams(
        max_tokens=int(_number(fields, limit_name, DEFAULT_MAX_TOKENS, 1, 2**31, whole=True)),
        temperature=_number(fields, "temperature", 1.0, 0.0, 2.0),
        top_p=_number(fields, "top_p", 1.0, 1e-6, 1.0),
        top_k=max(0, int(_number(fields, "top_k", 0, -1, 2**31, whole=True))),
        seed=None if seed is None else int(_number(fields, "seed", 0, 0, 2**63, whole=True)),
        stop_token_ids=frozenset() if fields.get("ignore_eos") else stop_token_ids,
    )
    options = fields.get("stream_options") or {}
    return CompletionRequest(
        model=_get(fields, "model", str),
        params=params,
        stop=stops,
        stream=bool(fields.get("stream")),
        include_usage=isinstance(options, dict) and bool(options.get("include_usage")),
        return_token_ids=bool(fields.get("return_token_ids")),
        **content,
    )


def _fields(body: object) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise RequestInvalid("the body must be a JSON object")
    return body


def _get(fields: Mapping[str, Any], name: str, kind: type[T]) -> T:
    value = fields.get(name)
    if not isinstance(value, kind):
        raise RequestInvalid(f"{name} must be a {kind.__name__}, {type(value).__name__} found")
    return value


def _number(
    fields: Mapping[str, Any], name: str, default: float, low: float, high: float, *, whole: bool = False
) -> float:
    value = fields.get(name)
    if value is None:
        return default
    right = isinstance(value, int) if whole else isinstance(value, int | float)
    if isinstance(value, bool) or not right or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise RequestInvalid(f"{name} must be {kind} from {low:g} to {high:g}")
    return value  # type: ignore[no-any-return]


def _token_ids(fields: Mapping[str, Any], name: str) -> tuple[int, ...]:
    values = _get(fields, name, list)
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise RequestInvalid(f"{name} must be a list of token ids")
    return tuple(values)


def _is_message(message: object) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    return isinstance(content, str) or (
        bool(parts)
        and all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts)
    )


def _plain_message(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return {"role": message["role"], "content": text}

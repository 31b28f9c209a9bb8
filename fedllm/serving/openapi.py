"""The endpoint's OpenAPI 3.1 document, as plain data: what is read, with its limits."""

from __future__ import annotations

from typing import Any

from fedllm.serving.openai import (
    DEFAULT_MAX_TOKENS,
    MAX_BIASES,
    MAX_CONTINUATIONS,
    MAX_STOP_CHARS,
    MAX_STOP_TOKENS,
    MAX_STOPS,
    MAX_TOP_LOGPROBS,
)
from fedllm.serving.tools import MAX_TOOLS

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": ["boolean", "null"]}
_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_STOP: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}


def _number(kind: str, low: float, high: float, default: float | None = None) -> Schema:
    bounds: Schema = {"type": [kind, "null"], "minimum": low, "maximum": high}
    return bounds if default is None else bounds | {"default": default}


_SAMPLING: Schema = {
    "model": _TEXT,
    "max_tokens": _number("integer", 1, 2**31, DEFAULT_MAX_TOKENS),
    "max_completion_tokens": _number("integer", 1, 2**31),
    "temperature": _number("number", 0, 2, 1),
    "top_p": _number("number", 1e-6, 1, 1),
    "top_k": _number("integer", -1, 2**31, 0),
    "min_p": _number("number", 0, 1, 0),
    "presence_penalty": _number("number", -2, 2, 0),
    "frequency_penalty": _number("number", -2, 2, 0),
    "repetition_penalty": _number("number", 0.1, 10, 1),
    "logit_bias": {
        "type": ["object", "null"],
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": MAX_BIASES,
    },
    "seed": _number("integer", -(2**63), 2**63),
    "n": _number("integer", 1, MAX_CONTINUATIONS, 1),
    "stop": {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}, {"type": "null"}]},
    "stop_token_ids": {**_IDS, "type": ["array", "null"], "maxItems": MAX_STOP_TOKENS},
    "ignore_eos": _FLAG,
    "stream": _FLAG,
    "stream_options": {"type": ["object", "null"], "properties": {"include_usage": _FLAG}},
    "return_token_ids": _FLAG,
    "response_format": {
        "anyOf": [
            {"type": "null"},
            {"type": "object", "properties": {"type": {"enum": ["text", "json_object"]}}, "required": ["type"]},
            {
                "type": "object",
                "properties": {
                    "type": {"const": "json_schema"},
                    "json_schema": {
                        "type": "object",
                        "properties": {"name": _TEXT, "strict": _FLAG, "schema": {"type": "object"}},
                        "required": ["schema"],
                    },
                },
                "required": ["type", "json_schema"],
            },
        ]
    },
}

_MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {
            "anyOf": [
                _TEXT,
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": _TEXT},
                        "required": ["type", "text"],
                    },
                },
            ]
        },
        "tool_call_id": _TEXT,
    },
    "required": ["role", "content"],
}

_NAME: Schema = {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"}
_TOOL: Schema = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": _NAME, "description": _TEXT, "parameters": {"type": "object"}},
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}

_CHAT: Schema = {
    "type": "object",
    "properties": {
        **_SAMPLING,
        "messages": {"type": "array", "minItems": 1, "items": _MESSAGE},
        "logprobs": _FLAG,
        "top_logprobs": _number("integer", 0, MAX_TOP_LOGPROBS),
        "tools": {"type": ["array", "null"], "items": _TOOL, "maxItems": MAX_TOOLS},
        "tool_choice": {
            "anyOf": [
                {"enum": ["none", "auto", "required", None]},
                {
                    "type": "object",
                    "properties": {
                        "type": {"const": "function"},
                        "function": {"type": "object", "properties": {"name": _NAME}, "required": ["name"]},
                    },
                    "required": ["type", "function"],
                },
            ]
        },
        "parallel_tool_calls": _FLAG,
    },
    "required": ["model", "messages"],
}

_COMPLETION: Schema = {
    "type": "object",
    "properties": {
        **_SAMPLING,
        "prompt": {"anyOf": [_TEXT, _IDS]},
        "logprobs": _number("integer", 0, MAX_TOP_LOGPROBS),
    },
    "required": ["model", "prompt"],
}

_SCORE: Schema = {
    "type": "object",
    "properties": {"model": _TEXT, "prompt_token_ids": _IDS, "token_ids": _IDS},
    "required": ["model", "prompt_token_ids", "token_ids"],
}

_FEEDBACK: Schema = {
    "type": "object",
    "properties": {"id": {"type": "string", "minLength": 1, "maxLength": 128}, "score": {"enum": [1, -1]}},
    "required": ["id", "score"],
    "additionalProperties": False,
}

_ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": "null"},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_REFUSALS = {
    "400": "the request is malformed or beyond a limit, which the message names",
    "401": "the key is missing, unknown, revoked or expired, or may not speak for the tenant that a header names",
    "404": "the model does not exist, or this key may not use it",
    "429": "the queue is full, or a limit of the tenant's is reached, which the message names; see Retry-After",
    "503": "not ready yet",
}

_USAGE: Schema = {
    "type": ["object", "null"],
    "properties": {
        **{name: {"type": "integer", "minimum": 0} for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
        "prompt_tokens_details": {
            "type": "object",
            "properties": {"cached_tokens": {"type": "integer", "minimum": 0}},
            "required": ["cached_tokens"],
        },
    },
    "required": ["prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"],
}
_ANSWER: Schema = {"type": "object", "properties": {"usage": _USAGE}, "required": ["id", "model", "choices", "usage"]}
_RATES: Schema = {
    f"x-ratelimit-{what}-{kind}": {"description": text, "schema": _TEXT}
    for what, text in {
        "limit": "what a minute brings, if it is limited",
        "remaining": "what is left of it",
        "reset": "seconds until nothing is used, as 1.500s",
    }.items()
    for kind in ("requests", "tokens")
}
_KEY = (
    "A tenant's key. With a router's key, x-fedllm-tenant, x-fedllm-weight and x-fedllm-scope say whom a request is "
    "for, its share of the engine and whose prefix cache it uses; with any other key they are refused."
)
_RETRY: Schema = {"retry-after": {"description": "seconds after which the same request passes", "schema": _TEXT}}


def openapi_document() -> dict[str, Any]:
    """Return the document; ``GET /openapi.json`` answers with it."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "fedllm endpoint", "version": "1"},
        "security": [{"key": []}],
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": _KEY}}},
        "paths": {
            "/v1/models": {"get": _operation("List the models that the key may use")},
            "/v1/chat/completions": {"post": _operation("Continue a conversation", _CHAT, _ANSWER)},
            "/v1/completions": {"post": _operation("Continue a text", _COMPLETION, _ANSWER)},
            "/v1/score": {"post": _operation("Value given tokens as a continuation", _SCORE)},
            "/v1/feedback": {"post": _operation("Say whether an answer was good", _FEEDBACK)},
            "/health": {"get": _health()},
            "/metrics": {"get": _operation("Counters in Prometheus' text format", media="text/plain")},
        },
    }


def _health() -> dict[str, Any]:
    made = _operation("Liveness; more with a key", refusals=False)
    made["responses"]["503"] = {
        **made["responses"]["200"],
        "description": "the engine has failed; restart the endpoint",
    }
    return {**made, "security": []}


def _operation(
    summary: str,
    body: Schema | None = None,
    streamed: Schema | None = None,
    *,
    media: str = "application/json",
    refusals: bool = True,
) -> dict[str, Any]:
    """Return an operation; `streamed` is the answer of one that may also be had as events."""
    schema = streamed or {"type": "string" if media == "text/plain" else "object"}
    answer: Schema = {media: {"schema": schema}}
    if streamed is not None:
        answer["text/event-stream"] = {"schema": _TEXT}
    responses: dict[str, Any] = {"200": {"description": "the answer", "content": answer}}
    if refusals:
        refused = {"application/json": {"schema": _ERROR}}
        responses |= {code: {"description": text, "content": refused} for code, text in _REFUSALS.items()}
        responses["429"]["headers"] = _RETRY | _RATES
        if media != "text/plain":
            responses["200"]["headers"] = _RATES
    made: dict[str, Any] = {"summary": summary, "responses": responses}
    if body is not None:
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return made

"""OpenAI's requests as plain data, read strictly. No web framework.

Fields that change what is generated and are not supported are refused, not ignored; unknown others are ignored,
as OpenAI-compatible servers do. Messages name fields and limits, never what a request says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fedllm.errors import RequestInvalid
from fedllm.serving.engine import SamplingParams
from fedllm.serving.schema import check_schema, check_sizes, check_together
from fedllm.serving.structured import Shape
from fedllm.serving.tools import NO_TOOLS, Tools, read_tools

DEFAULT_MAX_TOKENS = 256
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_CONTINUATIONS = 16
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
_UNSUPPORTED = (
    *("functions", "function_call", "audio", "web_search_options", "echo", "suffix", "min_tokens", "bad_words"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "allowed_token_ids"),
    *("truncate_prompt_tokens", "reasoning_effort", "prediction"),
)

T = TypeVar("T")


@dataclass(frozen=True)
class CompletionRequest:
    """A chat or text completion as asked for; `messages` or `prompt` is set.

    Parameters
    ----------
    model : str
        Model id.
    params : SamplingParams
        Without the grammar, which is compiled from `shapes` and `tools`.
    messages, prompt
        What to continue; never printed.
    stop : tuple of str
        Stop strings.
    n : int
        Continuations of the one prompt.
    shapes : tuple of Shape
        What the output is held to; empty if free.
    tools : Tools
        Functions it may or must call.
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
    n: int = 1
    shapes: tuple[Shape, ...] = ()
    tools: Tools = NO_TOOLS
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False


@dataclass(frozen=True)
class ScoreRequest:
    """The extension ``POST /v1/score``: value given tokens as a continuation of a prompt."""

    model: str
    prompt: tuple[int, ...] = field(repr=False)
    tokens: tuple[int, ...] = field(repr=False)


def read_json(data: bytes) -> object:
    """Return a body's JSON, in UTF-8; raise `RequestInvalid` if it is none, or holds text that is not Unicode."""
    try:
        body = json.loads(data.decode("utf-8"))
        if b"\\u" in data:
            _check_unicode(body)
    except UnicodeDecodeError:
        raise RequestInvalid("the body is not UTF-8") from None
    except UnicodeEncodeError:
        raise RequestInvalid("the body holds text that is not Unicode (half a surrogate pair)") from None
    except RecursionError:
        raise RequestInvalid("the body is nested too deeply") from None
    except ValueError:
        raise RequestInvalid("the body is not JSON") from None
    return body


def read_chat(body: object, *, stop_token_ids: frozenset[int]) -> CompletionRequest:
    """Read the body of ``POST /v1/chat/completions``; raise `RequestInvalid` naming the field."""
    fields = _fields(body)
    messages = _get(fields, "messages", list)
    if not messages:
        raise RequestInvalid("messages must be a non-empty list")
    if fields.get("tool_choice") not in (None, "none", "auto"):
        check_sizes(_parameters(fields))
    tools, shapes = read_tools(fields), _read_format(fields)
    check_together(shape.schema for shape in tools.shapes)
    if tools.shapes and shapes:
        raise RequestInvalid("response_format and a tool_choice that demands a call exclude each other")
    count = int(_number(fields, "top_logprobs", 0, 0, MAX_TOP_LOGPROBS, whole=True))
    asked = _flag(fields, "logprobs")
    if count and not asked:
        raise RequestInvalid("top_logprobs needs logprobs to be true")
    return _read(
        fields,
        stop_token_ids,
        count if asked else None,
        messages=tuple(_read_message(message) for message in messages),
        tools=tools,
        shapes=tools.shapes or shapes,
    )


def read_completion(body: object, *, stop_token_ids: frozenset[int]) -> CompletionRequest:
    """Read the body of ``POST /v1/completions``; raise `RequestInvalid` naming the field."""
    fields = _fields(body)
    for name in ("tools", "tool_choice"):
        if fields.get(name):
            raise RequestInvalid(f"{name} is not supported here", hint="use /v1/chat/completions")
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    elif isinstance(prompt, list):
        prompt = _token_ids(fields, "prompt")
    elif not isinstance(prompt, str):
        raise RequestInvalid("prompt must be one text or one list of token ids")
    count = fields.get("logprobs")
    if count is not None:
        count = int(_number(fields, "logprobs", 0, 0, MAX_TOP_LOGPROBS, whole=True))
    return _read(fields, stop_token_ids, count, prompt=prompt, shapes=_read_format(fields))


def read_score(body: object) -> ScoreRequest:
    """Read the body of ``POST /v1/score``; raise `RequestInvalid` naming the field."""
    fields = _fields(body)
    prompt, tokens = _token_ids(fields, "prompt_token_ids"), _token_ids(fields, "token_ids")
    return ScoreRequest(_get(fields, "model", str), prompt, tokens)


def _read(
    fields: Mapping[str, Any], stop_token_ids: frozenset[int], logprobs: int | None, **content: Any
) -> CompletionRequest:
    for name in _UNSUPPORTED:
        # An empty schema still asks for JSON.
        if fields.get(name) or fields.get(name) == {}:
            raise RequestInvalid(f"{name} is not supported here", hint=f"leave {name} out")
    if fields.get("modalities") not in (None, ["text"]):
        raise RequestInvalid('modalities must be ["text"]')
    n = int(_number(fields, "n", 1, 1, MAX_CONTINUATIONS, whole=True))
    if fields.get("best_of") not in (None, n):
        raise RequestInvalid("best_of must be equal to n, or be left out")
    stop = fields.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARS for s in stops)
    ):
        raise RequestInvalid(f"stop must be at most {MAX_STOPS} non-empty texts of at most {MAX_STOP_CHARS} characters")
    extra_stops = _token_ids(fields, "stop_token_ids") if fields.get("stop_token_ids") else ()
    if len(extra_stops) > MAX_STOP_TOKENS:
        raise RequestInvalid(f"stop_token_ids must be at most {MAX_STOP_TOKENS} token ids")
    limit_name = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    seed = fields.get("seed")
    # A grammar ends with the base's end token: there it cannot be ignored.
    ends = frozenset() if _flag(fields, "ignore_eos") and not content.get("shapes") else stop_token_ids
    params = SamplingParams(
        max_tokens=int(_number(fields, limit_name, DEFAULT_MAX_TOKENS, 1, 2**31, whole=True)),
        temperature=_number(fields, "temperature", 1.0, 0.0, 2.0),
        top_p=_number(fields, "top_p", 1.0, 1e-6, 1.0),
        top_k=max(0, int(_number(fields, "top_k", 0, -1, 2**31, whole=True))),
        min_p=_number(fields, "min_p", 0.0, 0.0, 1.0),
        presence_penalty=_number(fields, "presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=_number(fields, "frequency_penalty", 0.0, -2.0, 2.0),
        repetition_penalty=_number(fields, "repetition_penalty", 1.0, 0.1, 10.0),
        logit_bias=_read_bias(fields),
        # numpy's seeds are not negative; OpenAI's may be
        seed=None if seed is None else int(_number(fields, "seed", 0, -(2**63), 2**63, whole=True)) % 2**64,
        stop_token_ids=ends | frozenset(extra_stops),
        logprobs=logprobs,
    )
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict):
        raise RequestInvalid("stream_options must be an object")
    return CompletionRequest(
        model=_get(fields, "model", str),
        params=params,
        stop=tuple(stops),
        n=n,
        stream=_flag(fields, "stream"),
        include_usage=_flag(options, "include_usage"),
        return_token_ids=_flag(fields, "return_token_ids"),
        **content,
    )


def _read_format(fields: Mapping[str, Any]) -> tuple[Shape, ...]:
    given = fields.get("response_format")
    if given is None or given == {"type": "text"}:
        return ()
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "json_object":
        return (Shape(check_schema({"type": "object"})),)
    described = given.get("json_schema") if isinstance(given, dict) and kind == "json_schema" else None
    if not isinstance(described, dict) or "schema" not in described:
        raise RequestInvalid(
            'response_format must be {"type": "text"}, {"type": "json_object"} or '
            '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
        )
    check_sizes([described["schema"]])
    return (Shape(check_schema(described["schema"])),)


def _parameters(fields: Mapping[str, Any]) -> list[object]:
    """Return the schemas of a request's functions, before anything is known to be well formed."""
    given = fields.get("tools")
    tools = [tool.get("function") for tool in given if isinstance(tool, dict)] if isinstance(given, list) else []
    return [function.get("parameters") for function in tools if isinstance(function, dict)]


def _read_bias(fields: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    given = fields.get("logit_bias")
    if given is None:
        return ()
    if not isinstance(given, dict) or len(given) > MAX_BIASES:
        raise RequestInvalid(f"logit_bias must be an object of at most {MAX_BIASES} token ids")
    if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in given):
        raise RequestInvalid("the keys of logit_bias must be token ids")
    try:
        return tuple((int(key), _number(given, key, 0.0, -100.0, 100.0)) for key in given)
    except RequestInvalid:
        raise RequestInvalid("the values of logit_bias must be numbers from -100 to 100") from None


def _check_unicode(value: object) -> None:
    """Raise `UnicodeEncodeError` if a text has half a surrogate pair, which has no UTF-8."""
    json.dumps(value, ensure_ascii=False).encode()


def _fields(body: object) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise RequestInvalid("the body must be a JSON object")
    return body


def _get(fields: Mapping[str, Any], name: str, kind: type[T]) -> T:
    value = fields.get(name)
    if not isinstance(value, kind):
        raise RequestInvalid(f"{name} must be a {kind.__name__}, {type(value).__name__} found")
    return value


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestInvalid(f"{name} must be true or false")
    return bool(value)


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


def _read_message(message: object) -> dict[str, Any]:
    """Return a message as templates take it: text content, and the arguments of calls as objects."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestInvalid("each of messages must be an object with a role and content")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise RequestInvalid("tool_calls of a message must be a list")
    content = message.get("content")
    if content is None and calls:
        content = ""
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RequestInvalid("content of a message must be text, or a non-empty list of parts of type text")
    # Templates know no developer; it is the newer name of the same role.
    made: dict[str, Any] = {"role": "system" if message["role"] == "developer" else message["role"], "content": content}
    made |= {name: message[name] for name in ("name", "tool_call_id") if isinstance(message.get(name), str)}
    if calls:
        made["tool_calls"] = [_read_call(call) for call in calls]
    return made


def _read_call(call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    arguments: object = function.get("arguments") if isinstance(function, dict) else None
    try:
        loaded = json.loads(arguments) if isinstance(arguments, str) else None
        _check_unicode(loaded)
    except (ValueError, RecursionError):
        loaded = None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not isinstance(loaded, dict):
        raise RequestInvalid(
            "each of tool_calls must have a function with a name, and arguments as a JSON object's text"
        )
    return {"type": "function", "function": {"name": function["name"], "arguments": loaded}}


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)

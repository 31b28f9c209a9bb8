"""One request as the router carries it: what was asked for, the version bound to it, and an estimate of its size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedllm.errors import RequestInvalid
from fedllm.ids import Digest
from fedllm.registry.model import AdapterVersion
from fedllm.serving.access import Ticket
from fedllm.serving.openai import DEFAULT_MAX_TOKENS, MAX_CONTINUATIONS

_BYTES_PER_TOKEN = 4
_MOST_PLACED = 4096
"""Tokens of output that placement counts at most: a large ``max_tokens`` is a permission, not a plan."""


@dataclass(frozen=True)
class Bound:
    """What a model id means for one request, from admission to its last token.

    Parameters
    ----------
    alias : str
        ``tenant/name``, or ``base``.
    version : AdapterVersion or None
        None: the base.
    """

    alias: str
    version: AdapterVersion | None

    @property
    def digest(self) -> Digest | None:
        """The version's digest; None for the base."""
        return None if self.version is None else self.version.digest


@dataclass(frozen=True)
class Job:
    """A request on its way.

    Parameters
    ----------
    route : str
        Path of the request.
    asked : dict
        The body as the client sent it; never printed.
    ticket : Ticket
    bound : Bound
    size : Size
    keep_text : bool
        Whether the answer's text is wanted after its end, for a prompt log.
    """

    route: str
    asked: dict[str, Any] = field(repr=False)
    ticket: Ticket
    bound: Bound
    size: Size
    keep_text: bool = False

    @property
    def stream(self) -> bool:
        """Whether the client wants events."""
        return bool(self.asked.get("stream"))

    @property
    def usage_wanted(self) -> bool:
        """Whether the client wants a last event with the usage."""
        options = self.asked.get("stream_options")
        return isinstance(options, dict) and bool(options.get("include_usage"))


@dataclass(frozen=True)
class Size:
    """Tokens of a request, estimated without a tokenizer.

    Parameters
    ----------
    prompt : int
        A fourth of the text's bytes; exact for a prompt of token ids.
    output : int
        The most that may be generated.
    """

    prompt: int
    output: int

    @property
    def reserved(self) -> int:
        """What is held against a quota until the usage is known."""
        return self.prompt + self.output

    @property
    def placed(self) -> int:
        """What counts as load of a replica."""
        return self.prompt + min(self.output, _MOST_PLACED)


def model_of(body: object) -> tuple[dict[str, Any], str]:
    """Return a body as an object, and the model that it names.

    Fields that only a replica can judge are left to it: its refusal is passed on.

    Raises
    ------
    RequestInvalid
        If the router itself cannot read what it needs.
    """
    if not isinstance(body, dict):
        raise RequestInvalid("the body must be a JSON object")
    model = body.get("model")
    if not isinstance(model, str):
        raise RequestInvalid(f"model must be a str, {type(model).__name__} found")
    if body.get("stream") not in (None, True, False):
        raise RequestInvalid("stream must be true or false")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise RequestInvalid("stream_options must be an object")
    return body, model


def size_of(body: Mapping[str, Any]) -> Size:
    """Return the estimate; a number that is none is for the replica to refuse.

    Parameters
    ----------
    body : Mapping
        A chat or text completion as asked for.
    """
    prompt, messages = body.get("prompt"), body.get("messages")
    if isinstance(prompt, list) and prompt and all(isinstance(t, int) for t in prompt):
        size = len(prompt)
    else:
        texts = (
            [prompt, *(m.get("content") for m in messages if isinstance(m, dict))]
            if isinstance(messages, list)
            else [prompt]
        )
        size = sum(_bytes(text) for text in texts) // _BYTES_PER_TOKEN
    limit = body.get("max_completion_tokens")
    output = _whole(body.get("max_tokens") if limit is None else limit, DEFAULT_MAX_TOKENS, 2**31)
    return Size(max(1, size), output * _whole(body.get("n"), 1, MAX_CONTINUATIONS))


def asked_text(body: Mapping[str, Any]) -> str:
    """Return the prompt of a body as text for a prompt log; token ids are counted, for no tokenizer is here."""
    prompt, messages = body.get("prompt"), body.get("messages")
    if isinstance(messages, list):
        return "\n".join(f"{m.get('role')}: {m.get('content')}" for m in messages if isinstance(m, dict))
    if isinstance(prompt, list) and not any(isinstance(part, str) for part in prompt):
        return f"({len(prompt)} token ids)"
    return str(prompt)


def _bytes(text: object) -> int:
    if isinstance(text, list):
        return sum(_bytes(part.get("text") if isinstance(part, dict) else part) for part in text)
    return len(text.encode(errors="replace")) if isinstance(text, str) else 0


def _whole(value: object, default: int, most: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most:
        return value
    return default

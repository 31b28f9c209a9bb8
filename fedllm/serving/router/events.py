"""Server-sent events as a router reads and writes them. Plain bytes; no web framework."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

DONE = b"[DONE]"
MAX_EVENT_BYTES = 4 * 1024 * 1024


class EventTooLong(Exception):
    """A replica sends something that is no stream of tokens."""


async def read_events(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the data of each event as its last byte arrives; comments and other fields are left out.

    Only line feeds end a line, with or without a carriage return before them: text in an event may hold what Unicode
    calls a line separator.

    Parameters
    ----------
    parts : async iterator of bytes
        The body as it comes.

    Raises
    ------
    EventTooLong
        If an event does not end.
    """
    left, data = b"", []
    async for part in parts:
        *lines, left = (left + part).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")  # noqa: PLW2901 - the same line, as the standard reads it
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data)
                data = []
        if len(left) + sum(map(len, data)) > MAX_EVENT_BYTES:
            raise EventTooLong


def write_event(body: dict[str, Any] | bytes) -> bytes:
    """Return one event."""
    if isinstance(body, dict):
        body = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return b"data: " + body + b"\n\n"


def tokens_in(body: dict[str, Any]) -> int:
    """Return the tokens that a chunk is known to carry: its ids if it has any, else one for each text or call.

    A replica may put several tokens into one event, never one token into several: this is a lower bound.
    """
    count = 0
    for choice in _choices(body):
        delta, ids = _content(choice, "delta"), choice.get("token_ids")
        text = choice.get("text") or delta.get("content") or delta.get("tool_calls")
        count += len(ids) if isinstance(ids, list) else bool(text)
    return count


def texts_in(body: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Yield index and text of each choice of a chunk or a whole answer; calls are not text."""
    for position, choice in enumerate(_choices(body)):
        content = _content(choice, "delta") or _content(choice, "message")
        index = choice.get("index")
        yield index if isinstance(index, int) else position, str(choice.get("text") or content.get("content") or "")


def _choices(body: dict[str, Any]) -> list[dict[str, Any]]:
    found = body.get("choices")
    return [choice for choice in found if isinstance(choice, dict)] if isinstance(found, list) else []


def _content(choice: dict[str, Any], name: str) -> dict[str, Any]:
    found = choice.get(name)
    return found if isinstance(found, dict) else {}

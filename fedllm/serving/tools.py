"""Function tools: what a request offers and demands, and the calls found in what a model says.

A call is recognised in three forms, as the whole answer: a JSON object ``{"name": ..., "arguments": {...}}`` (or
``parameters``), or a list of such; the same between ``<tool_call>`` and ``</tool_call>``, several of them and with
text in front; and ``name(argument=<JSON>, ...)``. Anything else, and a call of an unknown function, is content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedllm.errors import RequestInvalid
from fedllm.serving.schema import check_schema
from fedllm.serving.structured import Shape
from fedllm.serving.text import StopFilter

MAX_TOOLS = 64

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TAG = "<tool_call>"
_TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>\s*", re.DOTALL)
_KEYWORD = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_.-]*)\s*=\s*")
_NEXT = re.compile(r"\s*([,)])")


@dataclass(frozen=True)
class Call:
    """A function's name and its arguments as JSON text."""

    name: str
    arguments: str = field(repr=False)


@dataclass(frozen=True)
class Tools:
    """The functions of a request.

    Parameters
    ----------
    offered : tuple of mapping
        As the template gets them; empty if the model shall not call.
    shapes : tuple of Shape
        What the answer is held to where a call is demanded; empty where it is the model's choice.
    several : bool
        Whether one answer may have several calls.
    """

    offered: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    shapes: tuple[Shape, ...] = field(default=(), repr=False)
    several: bool = True

    @property
    def names(self) -> frozenset[str]:
        """Names of the functions offered."""
        return frozenset(tool["function"]["name"] for tool in self.offered)


NO_TOOLS = Tools()


def read_tools(fields: Mapping[str, Any]) -> Tools:
    """Read ``tools``, ``tool_choice`` and ``parallel_tool_calls``; raise `RequestInvalid` naming the field."""
    given, choice = fields.get("tools"), fields.get("tool_choice")
    several = fields.get("parallel_tool_calls")
    if several is not None and not isinstance(several, bool):
        raise RequestInvalid("parallel_tool_calls must be true or false")
    if given is None or given == []:
        if choice not in (None, "none", "auto"):
            raise RequestInvalid("tool_choice demands a call, but there are no tools")
        return NO_TOOLS
    if not isinstance(given, list) or len(given) > MAX_TOOLS:
        raise RequestInvalid(f"tools must be a list of at most {MAX_TOOLS} functions")
    offered = tuple(_read_tool(tool) for tool in given)
    names = [tool["function"]["name"] for tool in offered]
    if len(set(names)) < len(names):
        raise RequestInvalid("tools must have different names")
    wanted = _wanted(choice, names)
    if wanted is None:
        return NO_TOOLS
    schemas = {tool["function"]["name"]: _parameters(tool) for tool in offered} if wanted else {}
    return Tools(offered, tuple(Shape(schemas[name], name) for name in wanted), several is not False)


def _read_tool(tool: object) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict):
        raise RequestInvalid('each of tools must be {"type": "function", "function": {...}}')
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestInvalid("a function's name must be 1 to 64 of the characters A-Z a-z 0-9 _ . -")
    if not isinstance(function.get("description", ""), str | None):
        raise RequestInvalid("a function's description must be text")
    if not isinstance(function.get("parameters", {}), dict | None):
        raise RequestInvalid("a function's parameters must be a schema")
    kept = {key: function[key] for key in ("name", "description", "parameters") if function.get(key) is not None}
    return {"type": "function", "function": kept}


def _wanted(choice: object, names: Sequence[str]) -> list[str] | None:
    """Return which functions must be called: None for no tools at all, none for the model's choice."""
    if choice == "none":
        return None
    if choice is None or choice == "auto":
        return []
    if choice == "required":
        return list(names)
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if isinstance(function, dict) and function.get("name") in names:
        return [function["name"]]
    raise RequestInvalid('tool_choice must be "none", "auto", "required" or the name of one of tools')


def _parameters(tool: Mapping[str, Any]) -> str:
    schema = tool["function"].get("parameters") or {}
    if schema.get("type", "object") != "object":
        raise RequestInvalid("a function's parameters must be a schema of type object")
    open_ended = schema if schema.keys() - {"type"} else {"properties": {}, "additionalProperties": False}
    return check_schema({"type": "object", **open_ended})


class CallReader:
    """Tells calls from content while text comes; what may still become a call is held back until it is clear.

    Parameters
    ----------
    tools : Tools
        Without functions, everything is content.
    """

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._held = ""
        self._content = StopFilter((_TAG,)) if tools.offered else None
        self._maybe = bool(tools.offered)

    def feed(self, text: str) -> str:
        """Return the text that is content for certain."""
        if self._content is None:
            return text
        if self._maybe:
            self._held += text
            if self._tools.shapes or _may_be_call(self._held.lstrip(), self._tools.names):
                return ""
            self._maybe = False
            text, self._held = self._held, ""
        if self._content.hit:
            self._held += text
            return ""
        ready = self._content.feed(text)
        if self._content.hit:
            self._held = _TAG + self._content.after
        return ready

    def finish(self) -> tuple[str, tuple[Call, ...]]:
        """Return what was held back: as content, or as calls."""
        rest = self._content.flush() if self._content is not None else ""
        calls = parse_calls(self._held, self._tools.names)
        if calls:
            return rest, calls if self._tools.several else calls[:1]
        return rest + self._held, ()


def parse_calls(text: str, names: frozenset[str]) -> tuple[Call, ...]:
    """Return the calls that a text is, or none if it is anything else."""
    text = text.strip()
    if text.startswith(_TAG):
        parts = [part.strip() for part in _TAGGED.findall(text)]
        if _TAGGED.sub("", text):
            return ()
    else:
        parts = [text]
    calls: list[Call] = []
    for part in parts:
        try:
            found = _json_calls(part, names) if part[:1] in ("{", "[") else _written_call(part, names)
        except (ValueError, RecursionError):
            found = []
        if not found:
            return ()
        calls += found
    return tuple(calls)


def _may_be_call(text: str, names: frozenset[str]) -> bool:
    """Whether a text, begun like this, can still turn out to be a call."""
    if text[:1] in ("", "{", "["):
        return True
    starts = (_TAG, *(name + "(" for name in names))
    return any(text.startswith(start) or start.startswith(text) for start in starts)


def _json_calls(text: str, names: frozenset[str]) -> list[Call]:
    loaded = json.loads(text)
    calls = []
    for entry in loaded if isinstance(loaded, list) else [loaded]:
        if not isinstance(entry, dict) or not entry.keys() <= {"name", "arguments", "parameters", "type", "id"}:
            return []
        name, arguments = entry.get("name"), entry.get("arguments", entry.get("parameters"))
        if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
            return []
        calls.append(Call(name, _json(arguments)))
    return calls


def _written_call(text: str, names: frozenset[str]) -> list[Call]:
    name, opened, rest = text.partition("(")
    if not opened or name not in names:
        return []
    decoder, arguments, at = json.JSONDecoder(), dict[str, Any](), 0
    if rest.strip() == ")":
        return [Call(name, "{}")]
    while found := _KEYWORD.match(rest, at):
        arguments[found[1]], at = decoder.raw_decode(rest, found.end())
        after = _NEXT.match(rest, at)
        if after is None:
            return []
        at = after.end()
        if after[1] == ")":
            return [] if rest[at:].strip() else [Call(name, _json(arguments))]
    return []


def _json(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    # A model can escape half a surrogate pair, which has no UTF-8; escaped it stays what it was.
    return text if text.isprintable() else json.dumps(value)

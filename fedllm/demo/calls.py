"""One function-calling record as a chat: compact signatures and a request in, one call out.

Answers are built from the reference calls that the benchmark publishes next to its questions: there each
argument has a list of allowed values, and the empty string among them means that it may be left out.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

MAX_SIGNATURES = 2


@dataclass(frozen=True)
class Record:
    """A question with its tools and its one reference call.

    Attributes
    ----------
    id : str
    request : str
        What the user asks.
    functions : tuple[dict, ...]
        Tool descriptions, JSON Schema in the benchmark's dialect.
    name : str
        The tool to call.
    arguments : dict[str, list]
        Argument to allowed values.
    bare_arrays : bool
        Whether some references of this family give an array argument as one bare list, not as a list of
        allowed lists.
    """

    id: str
    request: str
    functions: tuple[dict[str, Any], ...]
    name: str
    arguments: dict[str, Any]
    bare_arrays: bool = False


def prompt(record: Record) -> str:
    """Return the user's message: at most two signatures, the right one among them, then the request."""
    right = next(f for f in record.functions if f["name"] == record.name)
    others = sorted((f for f in record.functions if f["name"] != record.name), key=lambda f: _order(record, f))
    shown = sorted([right, *others[: MAX_SIGNATURES - 1]], key=lambda f: _order(record, f))
    return "\n".join(["Tools:", *(signature(f) for f in shown), f"Request: {record.request}"])


def signature(function: dict[str, Any]) -> str:
    """Return ``name(required: type, optional?)``: types of optional arguments would cost more than they tell."""
    schema = function["parameters"]
    required = set(schema.get("required", ()))
    arguments = (f"{n}: {p['type']}" if n in required else f"{n}?" for n, p in schema["properties"].items())
    return f"{function['name']}({', '.join(arguments)})"


def answer(record: Record) -> str | None:
    """Return the assistant's message ``name(arg=json, ...)``, or None where the reference is not usable.

    The first allowed value of each argument is taken; arguments that may be left out are left out. A reference
    is not usable if it lacks a required argument, names an unknown one, or allows no value for a required one.
    """
    schema = next(f for f in record.functions if f["name"] == record.name)["parameters"]
    required, properties = set(schema.get("required", ())), schema["properties"]
    parts = []
    for name, allowed in record.arguments.items():
        if name not in properties:
            return None
        if name not in required and (not allowed or "" in allowed):
            continue
        if record.bare_arrays and properties[name]["type"] == "array" and not _has_list(allowed):
            value: Any = allowed
        elif values := [v for v in allowed if v != ""]:
            value = _first(values[0])
        else:
            return None
        parts.append(f"{name}={json.dumps(value, ensure_ascii=False)}")
    if required - set(record.arguments):
        return None
    return f"{record.name}({', '.join(parts)})"


def chat(record: Record) -> dict[str, Any] | None:
    """Return one line of the JSONL that owners train on, or None where `answer` is."""
    said = answer(record)
    if said is None:
        return None
    return {"messages": [{"role": "user", "content": prompt(record)}, {"role": "assistant", "content": said}]}


def _first(value: Any) -> Any:
    # Inside an object each key again has a list of allowed values; inside an array values are plain.
    if isinstance(value, list):
        return [_first(item) for item in value]
    if not isinstance(value, dict):
        return value
    made = {}
    for key, allowed in value.items():
        if not isinstance(allowed, list):
            made[key] = _first(allowed)
        elif allowed and "" not in allowed:
            made[key] = _first(allowed[0])
    return made


def _has_list(allowed: list[Any]) -> bool:
    return any(isinstance(value, list) for value in allowed)


def _order(record: Record, function: dict[str, Any]) -> str:
    return hashlib.sha256(f"{record.id}\n{function['name']}".encode()).hexdigest()

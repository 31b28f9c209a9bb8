"""Canonical bytes for frozen dataclasses: deterministic CBOR (RFC 8949 §4.2), decoded strictly.

A value has exactly one encoding, so digests and signatures over bytes are digests and signatures over
meaning. Decoding checks types field by field against the annotations, refuses unknown and missing fields,
and re-encodes to refuse every non-canonical form (indefinite lengths, long integers, unsorted maps).
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from functools import cache
from typing import Any, TypeVar, get_args, get_origin

import cbor2

from fedllm.errors import DecodeError

T = TypeVar("T")
_UNREADABLE = (cbor2.CBORDecodeError, ArithmeticError, RecursionError, MemoryError, ValueError, TypeError)
"""What hostile bytes can make the CBOR library raise: decimal tags overflow, nesting exhausts the stack."""
MAX_BYTES = 1 << 31
"""No single message may be larger; vectors travel in chunks far below this."""


def encode(value: object) -> bytes:
    """Return the canonical bytes of a dataclass instance.

    Fields may be int, str, bytes, bool, finite float, None, tuples of those, ``dict[str, ...]`` of those,
    and nested dataclasses.

    Raises
    ------
    TypeError
        If a field holds anything else: such a value has no wire form by design.
    """
    return cbor2.dumps(_plain(value), canonical=True)


def decode(cls: type[T], data: bytes) -> T:
    """Return the `cls` that `data` canonically encodes.

    Raises
    ------
    DecodeError
        If the bytes are not the canonical encoding of a `cls`. The message names the field, never its value.
    """
    if len(data) > MAX_BYTES:
        raise DecodeError(f"{cls.__name__}: {len(data)} bytes, at most {MAX_BYTES} allowed")
    try:
        plain = cbor2.loads(data)
    except _UNREADABLE as error:
        raise DecodeError(f"{cls.__name__}: not CBOR ({type(error).__name__})") from None
    value = _typed(cls, plain, cls.__name__)
    if encode(value) != data:
        raise DecodeError(f"{cls.__name__}: not in canonical form")
    return typing.cast("T", value)


def _plain(value: object) -> object:
    if value is None or isinstance(value, bool | int | str | bytes):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError("only finite floats have a wire form")
        return value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {_map_key(key): _plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} has no wire form")


def _map_key(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"map keys must be str, not {type(key).__name__}")
    return key


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _typed(hint: Any, value: object, where: str) -> object:
    hint = _bare(hint)
    if dataclasses.is_dataclass(hint):
        return _record(typing.cast("type", hint), value, where)
    origin = get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return _union(get_args(hint), value, where)
    if origin is tuple:
        return _tuple(get_args(hint), value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise DecodeError(f"{where}: {type(value).__name__} found, map expected")
        item = get_args(hint)[1]
        return {_text_key(k, where): _typed(item, v, f"{where}[{k!r}]") for k, v in value.items()}
    if hint is float and isinstance(value, float) and math.isfinite(value):
        return value
    if hint is not float and isinstance(hint, type) and type(value) is hint:
        return value
    raise DecodeError(f"{where}: {type(value).__name__} found, {getattr(hint, '__name__', hint)} expected")


def _bare(hint: Any) -> Any:
    while hasattr(hint, "__supertype__"):  # a NewType travels as what it wraps
        hint = hint.__supertype__
    return hint


def _record(cls: type, value: object, where: str) -> object:
    if not isinstance(value, dict):
        raise DecodeError(f"{where}: {type(value).__name__} found, map expected")
    names = [f.name for f in dataclasses.fields(cls)]
    if set(value) != set(names):
        raise DecodeError(f"{where}: fields {sorted(map(str, value))} found, {sorted(names)} expected")
    hints = _hints(cls)
    try:
        return cls(**{name: _typed(hints[name], value[name], f"{where}.{name}") for name in names})
    except (ValueError, TypeError) as error:
        raise DecodeError(f"{where}: {error}") from None


def _union(options: tuple[Any, ...], value: object, where: str) -> object:
    if value is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    if len(rest) != 1:
        raise TypeError(f"{where}: a wire union is one type or None")
    return _typed(rest[0], value, where)


def _tuple(options: tuple[Any, ...], value: object, where: str) -> tuple[object, ...]:
    if not isinstance(value, list):
        raise DecodeError(f"{where}: {type(value).__name__} found, list expected")
    if len(options) == 2 and options[1] is Ellipsis:
        return tuple(_typed(options[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(options) != len(value):
        raise DecodeError(f"{where}: {len(value)} items found, {len(options)} expected")
    return tuple(_typed(o, item, f"{where}[{i}]") for i, (o, item) in enumerate(zip(options, value, strict=True)))


def _text_key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise DecodeError(f"{where}: map key of type {type(key).__name__} found, str expected")
    return key


def peek_int(data: bytes, field: str) -> int:
    """Return one integer field of an encoded record without checking the rest.

    Lets a receiver name an unsupported version before strict decoding fails on fields it does not know.
    """
    try:
        plain = cbor2.loads(data)
    except _UNREADABLE as error:
        raise DecodeError(f"not CBOR ({type(error).__name__})") from None
    value = plain.get(field) if isinstance(plain, dict) else None
    if type(value) is not int:
        raise DecodeError(f"no integer field {field!r}")
    return value

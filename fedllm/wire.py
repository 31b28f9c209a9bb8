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
from collections.abc import Callable
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
    try:
        value = _reader(typing.cast("Any", cls))(plain)
    except _WrongError as wrong:
        raise DecodeError(f"{cls.__name__}{wrong.path}: {wrong.why}") from None
    if encode(value) != data:
        raise DecodeError(f"{cls.__name__}: not in canonical form")
    return typing.cast("T", value)


_LEAVES = frozenset({type(None), bool, int, str, bytes})


def _plain(value: object) -> object:
    kind = type(value)
    if kind in _LEAVES:
        return value
    if kind is tuple:
        return [_plain(item) for item in typing.cast("tuple[object, ...]", value)]
    if kind is dict:
        return {_map_key(key): _plain(item) for key, item in typing.cast("dict[object, object]", value).items()}
    if isinstance(value, int | str | bytes):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError("only finite floats have a wire form")
        return value
    if dataclasses.is_dataclass(kind):
        return {name: _plain(getattr(value, name)) for name in _names(kind)}
    raise TypeError(f"{kind.__name__} has no wire form")


def _map_key(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"map keys must be str, not {type(key).__name__}")
    return key


@cache
def _names(cls: type) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(cls))


class _WrongError(Exception):
    """What is wrong, and where: the path grows as the error passes the values that it lies in."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why
        self.path = ""

    def within(self, step: str) -> _WrongError:
        self.path = step + self.path
        return self


_Reader = Callable[[object], object]
"""From what CBOR gave to the value of one type; a list of keys holds thousands, so it is made once for a type."""


@cache
def _reader(hint: Any) -> _Reader:
    while hasattr(hint, "__supertype__"):  # a NewType travels as what it wraps
        hint = hint.__supertype__
    if dataclasses.is_dataclass(hint):
        return _record_reader(typing.cast("type", hint))
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _optional_reader(arguments)
    if origin is tuple:
        return _tuple_reader(arguments)
    if origin is dict:
        return _map_reader(_reader(arguments[1]))
    if hint is float:
        return _float
    if hint in (bool, int, str, bytes):
        return _leaf_reader(hint)
    raise TypeError(f"{hint} has no wire form")


def _leaf_reader(kind: type) -> _Reader:
    def read(value: object) -> object:
        if type(value) is kind:
            return value
        raise _WrongError(f"{type(value).__name__} found, {kind.__name__} expected")

    return read


def _float(value: object) -> object:
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise _WrongError(f"{type(value).__name__} found, float expected")


def _record_reader(cls: type) -> _Reader:
    hints = typing.get_type_hints(cls)
    readers = [(name, _reader(hints[name])) for name in _names(cls)]
    names = set(_names(cls))

    def read(value: object) -> object:
        if not isinstance(value, dict):
            raise _WrongError(f"{type(value).__name__} found, map expected")
        if value.keys() != names:
            raise _WrongError(f"fields {sorted(map(str, value))} found, {sorted(names)} expected")
        fields: dict[str, object] = {}
        for name, reader in readers:
            try:
                fields[name] = reader(value[name])
            except _WrongError as wrong:
                raise wrong.within(f".{name}") from None
        try:
            return cls(**fields)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise _WrongError(str(error)) from None

    return read


def _optional_reader(options: tuple[Any, ...]) -> _Reader:
    rest = [option for option in options if option is not type(None)]
    if len(rest) != 1 or len(options) != 2:
        raise TypeError(f"a wire union is one type or None, not {options}")
    inner = _reader(rest[0])
    return lambda value: None if value is None else inner(value)


def _tuple_reader(options: tuple[Any, ...]) -> _Reader:
    many = len(options) == 2 and options[1] is Ellipsis
    readers = [_reader(option) for option in options if option is not Ellipsis]

    def read(value: object) -> object:
        if not isinstance(value, list):
            raise _WrongError(f"{type(value).__name__} found, list expected")
        if not many and len(value) != len(readers):
            raise _WrongError(f"{len(value)} items found, {len(readers)} expected")
        items: list[object] = []
        for at, item in enumerate(value):
            try:
                items.append(readers[0 if many else at](item))
            except _WrongError as wrong:
                raise wrong.within(f"[{at}]") from None
        return tuple(items)

    return read


def _map_reader(inner: _Reader) -> _Reader:
    def read(value: object) -> object:
        if not isinstance(value, dict):
            raise _WrongError(f"{type(value).__name__} found, map expected")
        items: dict[str, object] = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise _WrongError(f"map key of type {type(key).__name__} found, str expected")
            try:
                items[key] = inner(item)
            except _WrongError as wrong:
                raise wrong.within(f"[{key!r}]") from None
        return items

    return read


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

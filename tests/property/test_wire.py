"""Canonical bytes: one value, one encoding; anything else is refused."""

from __future__ import annotations

from dataclasses import dataclass

import cbor2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm import wire
from fedllm.adapter import AdapterSpec
from fedllm.errors import DecodeError
from fedllm.ids import sha256


@dataclass(frozen=True)
class Inner:
    """A nested record."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Outer:
    """One field of every wire type."""

    flag: bool
    count: int
    ratio: float
    maybe: str | None
    items: tuple[Inner, ...]
    table: dict[str, int]


outers = st.builds(
    Outer,
    flag=st.booleans(),
    count=st.integers(-(2**70), 2**70),
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    maybe=st.none() | st.text(max_size=8),
    items=st.lists(st.builds(Inner, st.text(max_size=8), st.binary(max_size=8)), max_size=3).map(tuple),
    table=st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=3),
)


@given(outers)
def test_decode_inverts_encode(value: Outer) -> None:
    """Every value comes back, and its bytes are its own."""
    assert wire.decode(Outer, wire.encode(value)) == value


@given(outers, st.data())
def test_every_truncation_and_extension_is_refused(value: Outer, data: st.DataObject) -> None:
    """No prefix and no suffixed form decodes."""
    encoded = wire.encode(value)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    for bad in (encoded[:cut], encoded + b"\0"):
        with pytest.raises(DecodeError):
            wire.decode(Outer, bad)


@given(st.binary(max_size=200))
def test_random_bytes_never_do_anything_but_raise_decode_error(data: bytes) -> None:
    """The decoder meets hostile bytes: it answers with one error type."""
    with pytest.raises(DecodeError):
        wire.decode(Outer, data)


@pytest.mark.parametrize(
    "data", ["c4821b7fffffffffffffff1b7fffffffffffffff", "c5821b7fffffffffffffff01", "c48201f97e00"]
)
def test_tags_that_make_the_library_overflow_are_decode_errors(data: str) -> None:
    """Decimal and bigfloat tags raise ArithmeticError inside a CBOR library: forty bytes must not end a process."""
    with pytest.raises(DecodeError):
        wire.decode(Outer, bytes.fromhex(data))
    with pytest.raises(DecodeError):
        wire.peek_int(bytes.fromhex(data), "version")


def test_non_canonical_forms_are_refused() -> None:
    """A long integer, an unsorted map and an indefinite array are other bytes for the same value: refused."""
    canonical = wire.encode(Inner("a", b"b"))
    unsorted = bytes([0xA2]) + canonical[1:][7:] + canonical[1:][:7]
    assert cbor2.loads(unsorted) == cbor2.loads(canonical)
    with pytest.raises(DecodeError, match="canonical"):
        wire.decode(Inner, unsorted)


@pytest.mark.parametrize(
    "plain", [{"name": "a"}, {"name": "a", "data": "text"}, {"name": "a", "data": b"", "more": 1}, ["a", b""], 5]
)
def test_wrong_fields_and_types_are_named_without_values(plain: object) -> None:
    """The error names the field and the types, never the content."""
    with pytest.raises(DecodeError) as caught:
        wire.decode(Inner, cbor2.dumps(plain, canonical=True))
    assert "text" not in caught.value.message


def test_bool_is_not_int_and_nan_has_no_form() -> None:
    """True is not 1; NaN cannot be encoded; arrays have no wire form at all."""
    good = Outer(True, 1, 0.5, None, (), {})
    swapped = cbor2.dumps({**cbor2.loads(wire.encode(good)), "count": True}, canonical=True)
    with pytest.raises(DecodeError, match="bool found"):
        wire.decode(Outer, swapped)
    with pytest.raises(TypeError):
        wire.encode(Outer(True, 1, float("nan"), None, (), {}))
    with pytest.raises(TypeError, match="no wire form"):
        wire.encode(np.zeros(3, np.float32))


@given(st.sets(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 8), st.randoms())
def test_unflatten_inverts_flatten(layers: set[int], rank: int, rnd: object) -> None:
    """`unflatten(flatten(x)) == x` for every spec, bit for bit."""
    spec = AdapterSpec(sha256(b"b"), rank, 8, {"q_proj": (12, 8), "down_proj": (8, 20)}, tuple(sorted(layers)))
    for factors in (("A",), ("B",), ("A", "B")):
        layout = spec.layout(factors)
        flat = np.frombuffer(sha256(str(rnd).encode()).encode() * layout.size, np.uint8)[: layout.size]
        flat = flat.astype(np.float32)
        assert (layout.flatten(layout.unflatten(flat)) == flat).all()

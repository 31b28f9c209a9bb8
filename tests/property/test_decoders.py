"""Every decoder of bytes from outside meets bytes that mean it harm: it decodes them, or says so with an error of ours.

What decodes is what it was: encoding it again gives the same bytes. Anything else, another exception above all, or
more than a few seconds, is a way to end a process from outside.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import cbor2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property.decoders import NAMES, Decoder, decoders

from fedllm.errors import FedllmError

FUZZ = settings(
    max_examples=30,
    deadline=timedelta(seconds=5),
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Decoder]:
    """Return the decoders, their seeds made once."""
    return decoders(tmp_path_factory.mktemp("seeds"))


def test_the_list_names_every_decoder(table: dict[str, Decoder]) -> None:
    """And every seed decodes."""
    assert list(table) == NAMES


@st.composite
def mutated(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """Return an encoding with bits flipped, cut, extended, spliced with another or with itself, or any bytes."""
    data = draw(st.sampled_from(seeds))
    how = draw(st.sampled_from(("any", "flip", "cut", "extend", "splice", "repeat", "overwrite")))
    at, other = draw(st.integers(0, len(data) - 1)), draw(st.integers(0, len(data)))
    if how == "any":
        return draw(st.binary(max_size=300))
    if how == "flip":
        changed = bytearray(data)
        for _ in range(draw(st.integers(1, 4))):
            changed[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    if how == "cut":
        return data[:at]
    if how == "extend":
        return data + draw(st.binary(min_size=1, max_size=40))
    if how == "splice":
        return data[:at] + draw(st.sampled_from(seeds))[other:]
    if how == "repeat":
        return data[:at] + data[at:other] * 3 + data[other:]
    return data[:at] + draw(st.binary(min_size=1, max_size=12)) + data[at + 8 :]


def survives(decoder: Decoder, data: bytes, folder: Path) -> None:
    """Check that bytes are refused with one of our errors, or are the encoding of what they decode to."""
    try:
        value = decoder.decode(data, folder)
    except FedllmError:
        return
    if decoder.encode is not None:
        assert decoder.encode(value) == data


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@FUZZ
def test_mutated_bytes_end_in_one_of_our_errors_or_in_a_value_that_is_theirs(
    name: str, table: dict[str, Decoder], tmp_path: Path, data: st.DataObject
) -> None:
    """Bit flips, truncation, extension, splices, and bytes that never were an encoding."""
    decoder = table[name]
    survives(decoder, data.draw(mutated(decoder.seeds)), tmp_path)


HOSTILE = st.sampled_from(
    [
        None, True, 0, -1, 1 << 62, -(1 << 63), 1 << 64, 1 << 3000, 0.0, -1.5, 1e308, float("nan"), float("inf"), "",
        "\0", "../../etc/passwd", "x" * 5000, b"", bytes(31), bytes(33), [], {}, [[]], {"": None},
        {"east": {"north": []}}, ["east"] * 1000,
    ]
)  # fmt: skip
"""Values that are wrong nearly everywhere; what a decoder is sent by somebody who has read it."""


@st.composite
def replaced(draw: st.DrawFn, value: Any, hostile: st.SearchStrategy[Any]) -> Any:
    """Return a plain value with one part, however deep, replaced, left out or added to."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 9)) == 0:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: draw(replaced(value[key], hostile))}
    if isinstance(value, list) and value and draw(st.integers(0, 9)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(replaced(value[at], hostile)), *value[at + 1 :]]
    return draw(hostile)


WIRE = [name for name in NAMES if name.startswith("body ")]
WIRE += ["RoundPlan", "SignedPlan", "Envelope", "Manifest", "Roster", "alias table"]


@pytest.mark.parametrize("name", WIRE)
@given(data=st.data())
@FUZZ
def test_well_formed_messages_of_hostile_values_are_refused_or_are_what_they_say(
    name: str, table: dict[str, Decoder], tmp_path: Path, data: st.DataObject
) -> None:
    """Canonical bytes with one field out of place: a type, a size, a range."""
    decoder = table[name]
    plain = data.draw(replaced(cbor2.loads(decoder.seeds[0]), HOSTILE))
    survives(decoder, cbor2.dumps(plain, canonical=True), tmp_path)


JSON = ["relay frame", "ledger line", "roster file", "join file", "answers", "last accepted"]


@pytest.mark.parametrize("name", JSON)
@given(data=st.data())
@FUZZ
def test_well_formed_json_of_hostile_values_is_refused(
    name: str, table: dict[str, Decoder], tmp_path: Path, data: st.DataObject
) -> None:
    """One key out of place, NaN and infinity included, which Python's JSON reads."""
    decoder = table[name]
    seed = decoder.seeds[0]
    framed = name == "relay frame"
    hostile = HOSTILE.filter(lambda value: not isinstance(value, bytes))
    plain = data.draw(replaced(json.loads(seed[4:-4] if framed else seed), hostile))
    text = json.dumps(plain).encode()
    survives(decoder, len(text).to_bytes(4, "big") + text + b"head" if framed else text, tmp_path)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000], ids=["lists", "maps", "digits"])
@pytest.mark.parametrize("name", JSON)
def test_json_that_exhausts_the_parser_is_refused(
    name: str, text: bytes, table: dict[str, Decoder], tmp_path: Path
) -> None:
    """Nesting beyond the stack, and numbers beyond what Python converts."""
    survives(table[name], len(text).to_bytes(4, "big") + text if name == "relay frame" else text, tmp_path)


def _steps_beyond_a_float(seed: bytes) -> bytes:
    plain = cbor2.loads(seed)
    return cbor2.dumps({**plain, "mechanism": {**plain["mechanism"], "steps": 1 << 3000}}, canonical=True)


def _zip_entry(at: int, value: int) -> Callable[[bytes], bytes]:
    """Return what changes a byte of the first entry in a zip file's directory."""

    def change(seed: bytes) -> bytes:
        place = seed.index(b"PK\x01\x02") + at
        return seed[:place] + bytes([value]) + seed[place + 1 :]

    return change


def _certificate(old: str, new: str) -> Callable[[bytes], bytes]:
    def change(seed: bytes) -> bytes:
        begin, *lines, end = seed.decode().strip().splitlines()
        der = base64.b64decode("".join(lines)).replace(bytes.fromhex(old), bytes.fromhex(new), 1)
        return "\n".join((begin, base64.encodebytes(der).decode().strip(), end, "")).encode()

    return change


ODD: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("RoundPlan", _steps_beyond_a_float, "a number of steps beyond a float"),
    ("kept update", _zip_entry(10, 99), "an unknown compression"),
    ("kept update", _zip_entry(8, 1), "an encrypted entry"),
    ("certificate", _certificate("2a8648ce3d0201", "2a8648ce3d0202"), "a key of an unknown kind"),
    ("certificate", _certificate("a003020102", "a003020103"), "an unknown version"),
    ("last accepted", lambda _seed: b'{"tools": Infinity}', "a round that is infinite"),
    ("join file", lambda _seed: b"9" * 5000, "a number of too many digits"),
    *(
        # a line of its own: the answers' last line, if it is cut off, is dropped
        (name, lambda _seed, text=text: text * 100_000 + b"\n", f"nesting without an end, {text.decode()}")  # type: ignore[misc]
        for name in ("ledger line", "roster file", "join file", "answers", "last accepted") for text in (b"[", b'{"a":')
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "what"), ODD, ids=[f"{name}: {what}" for name, _, what in ODD])
def test_what_libraries_have_odd_errors_for_is_refused_with_one_of_ours(
    name: str, change: Callable[[bytes], bytes], what: str, table: dict[str, Decoder], tmp_path: Path
) -> None:
    """Each makes the parser underneath raise something that few expect of it."""
    decoder = table[name]
    spoilt = change(decoder.seeds[0])
    assert spoilt != decoder.seeds[0], what
    if name == "kept update":  # who cannot read it sits the round out
        assert decoder.decode(spoilt, tmp_path) is None
        return
    with pytest.raises(FedllmError):
        decoder.decode(spoilt, tmp_path)

"""Every decoder of bytes from outside meets bytes that mean it harm: it decodes them, or says so with an error of ours.

What decodes is what it was: encoding it again gives the same bytes. Anything else, another exception above all, or
more than a few seconds, is a way to end a process from outside.
"""

from __future__ import annotations

import base64
import contextlib
import json
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509 import InvalidVersion
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.client.owner_fakes import HEAD, IDENTITIES, ROSTER, SPEC, begin, plan, sealed

from fedllm import wire
from fedllm.adapter import AdapterState
from fedllm.aggregation.secagg import keys
from fedllm.aggregation.secagg.masking import check_chunks
from fedllm.aggregation.secagg.shamir import share_from_bytes, share_to_bytes
from fedllm.cli.offer import read_offer
from fedllm.client.kept import Answers, Kept, LocalUpdate, UpdateStore
from fedllm.client.records import LastAccepted
from fedllm.clock import SystemClock
from fedllm.errors import FedllmError, ProtocolError
from fedllm.identity import Roster, SigningIdentity, VerifyKey
from fedllm.ids import AliasName, Digest, OwnerId
from fedllm.messages.envelope import COORDINATOR, Envelope, Sealed, peek_sender, unseal
from fedllm.messages.plan import RoundPlan, SignedPlan
from fedllm.messages.round import BODIES, decode_body
from fedllm.messages.secagg import MaskedVector
from fedllm.privacy import chain
from fedllm.registry import remote
from fedllm.registry.model import AliasTable, FileRecord, Manifest, PrivacyRecord, SignedManifest
from fedllm.relay.service import pack_frame, unpack_frame
from fedllm.relay.tls import TlsIdentity, parse_certificate
from fedllm.rng import SeededRng

FUZZ = settings(
    max_examples=30,
    deadline=timedelta(seconds=5),
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
COORDINATOR_KEY = IDENTITIES[COORDINATOR].public


def example(hint: Any) -> Any:
    """Return some value of a wire type."""
    while hasattr(hint, "__supertype__"):
        hint = hint.__supertype__
    for real in (plan(), MANIFEST, ROSTER):
        if hint is type(real):
            return real
    if is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return hint(**{field.name: example(hints[field.name]) for field in fields(hint)})
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return example(next(option for option in options if option is not type(None)))
    if origin is tuple:
        return (example(options[0]),) * 2 if options[1:] == (Ellipsis,) else tuple(map(example, options))
    if origin is dict:
        return {"east": example(options[1]), "north": example(options[1])}
    return {str: "east", int: 3, bytes: b"\x01" * 32, float: 0.5, bool: True}[hint]


MANIFEST = Manifest(
    version=1, federation="tools", number=1, parent=None, round=1, base=SPEC.base, spec=SPEC,
    files={"adapter_config.json": FileRecord(Digest("a" * 64), 10)}, state=HEAD.digest, method="ffa",
    recipe=plan().recipe, metrics={"train_s": 1.0}, privacy=PrivacyRecord("record", "add", 1.0, 1e-5, "all", "advisory"),
    cohort_size=4, survivors=4, plan=plan().digest, created=1.0,
)  # fmt: skip
ALIASES = remote.aliases_to_json(AliasTable(3, {AliasName("acme/tools"): Digest("b" * 64)}), IDENTITIES[COORDINATOR])
VECTOR = MaskedVector(OwnerId("east"), "update", 4, 3, (bytes(32),))
_TLS = (UnsupportedAlgorithm, InvalidVersion)
_CTX, _V1, _KEY = b"c" * 32, b"v" * 32, b"k" * 32
SHARES = keys.SharePair(bytearray(share_to_bytes(7)), bytearray(share_to_bytes(8)))
SEALED = keys.seal_shares(SHARES, _KEY, _CTX, _V1, OwnerId("east"), OwnerId("north"), SeededRng(1))
OFFER = {
    "fedllm_join": 1, "federation": "tools", "coordinator_key": str(COORDINATOR_KEY), "superlink": "127.0.0.1:9092",
    "transport": "flower", "base": "c" * 64, "max_tokens": 512,
    "roster": {member.owner: str(VerifyKey(member.key)) for member in ROSTER.members},
}  # fmt: skip
LEDGER_LINE = chain.write_line(
    IDENTITIES["east"], chain.GENESIS, "2026-01-31T12:00:00Z", "limit", {"limit": 3.0, "reason": "less"}
)[:-1]


def _of_file(read: Callable[[Path], Any]) -> Callable[[bytes, Path], Any]:
    def decode(data: bytes, folder: Path) -> Any:
        path = folder / "file"
        path.write_bytes(data)
        return read(path)

    return decode


def _wire(cls: type) -> Decoder:
    escapes = (OverflowError,) if cls is RoundPlan else ()
    return Decoder(lambda data, _: wire.decode(cls, data), (wire.encode(example(cls)),), wire.encode, escapes)


def _kept(folder: Path) -> bytes:
    path = folder / "seed.npz"
    signed = SignedPlan.sign(plan(), IDENTITIES[COORDINATOR])
    UpdateStore(path).save(Kept(signed, HEAD.to_bytes(), LocalUpdate(np.ones(4, np.float32), 4, None, 1.0)))
    return path.read_bytes()


def _manifest_json(data: bytes, _folder: Path) -> Any:
    body = json.loads(data) if _is_json(data) else {}
    return remote.manifest_from_json(body).open(COORDINATOR_KEY) if isinstance(body, dict) else None


def _is_json(data: bytes) -> bool:
    """Whether httpx would hand it on as JSON; that it may not be is refused before."""
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _chunks(data: bytes, _folder: Path) -> Any:
    """Take the first part for a head, and the rest for its chunk."""
    cut = len(wire.encode(VECTOR))
    head = wire.decode(MaskedVector, data[:cut])
    if (head.entries, head.entry_bytes) != (VECTOR.entries, VECTOR.entry_bytes):
        raise ProtocolError("another sum's vector")  # as the coordinator does first
    check_chunks(head, (data[cut:],))
    return None


@dataclass(frozen=True)
class Decoder:
    """One decoder.

    Attributes
    ----------
    decode : Callable[[bytes, Path], Any]
        In a folder that it may write.
    seeds : tuple[bytes, ...]
        Valid encodings, which are mutated.
    encode : Callable[[Any], bytes] or None
        Its inverse, where a value has one encoding only.
    escapes : tuple[type[Exception], ...]
        What still gets out of it that should not. `test_known_escapes_are_closed` has an example of each.
    """

    decode: Callable[[bytes, Path], Any]
    seeds: tuple[bytes, ...]
    encode: Callable[[Any], bytes] | None = None
    escapes: tuple[type[Exception], ...] = ()


def decoders(folder: Path) -> dict[str, Decoder]:
    """Return every decoder by name."""
    asked = sealed(begin(plan()), "north")
    manifest = SignedManifest.sign(MANIFEST, IDENTITIES[COORDINATOR])
    (folder / "tls").mkdir()
    certificate = TlsIdentity.create(folder / "tls", SystemClock()).certificate
    return {
        **{f"body {kind}": _wire(cls) for kind, cls in BODIES.items()},
        "any body": Decoder(
            lambda data, _: decode_body("Begin" if data[:1] > b"\x80" else "Confirm", data),
            (wire.encode(begin(plan())),), wire.encode,
        ),
        **{cls.__name__: _wire(cls) for cls in (RoundPlan, SignedPlan, Envelope, Sealed, Manifest, Roster)},
        "signed plan, opened": Decoder(
            lambda data, _: wire.decode(SignedPlan, data).open(COORDINATOR_KEY),
            (wire.encode(SignedPlan.sign(plan(), IDENTITIES[COORDINATOR])),),
        ),
        "unseal": Decoder(lambda data, _: unseal(data, COORDINATOR_KEY, sender=COORDINATOR, receiver="north"), (asked,)),
        "peek at a sender": Decoder(lambda data, _: peek_sender(data), (asked,)),
        "peek at a version": Decoder(lambda data, _: wire.peek_int(data, "version"), (plan().encoded,)),
        "share": Decoder(lambda data, _: share_from_bytes(data), (share_to_bytes(7),), share_to_bytes),
        "sealed shares": Decoder(
            lambda data, _: keys.open_shares(data, _KEY, _CTX, _V1, OwnerId("east"), OwnerId("north")), (SEALED,)
        ),
        "masked head": Decoder(lambda data, _: wire.decode(MaskedVector, data), (wire.encode(VECTOR),), wire.encode),
        "masked chunks": Decoder(_chunks, (wire.encode(VECTOR) + bytes(12),)),
        "adapter": Decoder(lambda data, _: AdapterState.from_bytes(SPEC, data), (HEAD.to_bytes(),), AdapterState.to_bytes),
        "relay frame": Decoder(
            lambda data, _: unpack_frame(data), (pack_frame({"op": "reply", "tag": "1", "parts": 2}, b"head", b""),)
        ),
        "ledger line": Decoder(lambda data, _: chain.read_line(data, 1), (LEDGER_LINE,), escapes=(RecursionError,)),
        "torn ledger line": Decoder(lambda data, _: chain.salvage(data), (LEDGER_LINE,)),
        "roster file": Decoder(
            _of_file(Roster.load), (json.dumps(OFFER["roster"]).encode(),), escapes=(RecursionError,)
        ),
        "join file": Decoder(
            _of_file(read_offer),
            (
                json.dumps(OFFER).encode(),
                json.dumps({**OFFER, "transport": "direct", "direct": "x:1", "certificate": certificate.pem.decode()}).encode(),
            ),
            escapes=(*_TLS, RecursionError, ValueError),
        ),
        "certificate": Decoder(
            lambda data, _: parse_certificate(data, SystemClock(), source="a test"), (certificate.pem,), escapes=_TLS
        ),
        "private key file": Decoder(_of_file(SigningIdentity.load), (b"-----BEGIN PRIVATE KEY-----\n",)),
        "signed manifest": Decoder(
            _manifest_json, (json.dumps({"manifest": remote._b64(manifest.manifest), "signature": remote._b64(manifest.signature)}).encode(),),
        ),
        "alias table": Decoder(lambda data, _: wire.decode(remote._Aliases, data), (wire.encode(example(remote._Aliases)),), wire.encode),
        "kept update": Decoder(_of_file(lambda path: UpdateStore(path).load()), (_kept(folder),), escapes=(RuntimeError,)),
        "answers": Decoder(_of_file(Answers), (b'{"asked":"a","purpose":"update","step":"unmask","sum":"b"}\n',), escapes=(RecursionError,)),
        "last accepted": Decoder(_of_file(LastAccepted), (b'{"tools": 3}',), escapes=(RecursionError, OverflowError)),
    }  # fmt: skip


NAMES = [
    *(f"body {kind}" for kind in BODIES), "any body", "RoundPlan", "SignedPlan", "Envelope", "Sealed", "Manifest", "Roster",
    "signed plan, opened", "unseal", "peek at a sender", "peek at a version", "share", "sealed shares", "masked head",
    "masked chunks", "adapter", "relay frame", "ledger line", "torn ledger line", "roster file", "join file",
    "certificate", "private key file", "signed manifest", "alias table", "kept update", "answers", "last accepted",
]  # fmt: skip


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
    except (FedllmError, *decoder.escapes):
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
        None, True, 0, -1, 1 << 62, -(1 << 63), 1 << 64, 1 << 3000, 0.0, -1.5, 1e308, float("nan"), float("inf"), "", "\0",
        "../../etc/passwd", "x" * 5000, b"", bytes(31), bytes(33), [], {}, [[]], {"": None}, {"east": {"north": []}},
        ["east"] * 1000,
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


WIRE = [n for n in NAMES if n.startswith("body ")] + ["RoundPlan", "SignedPlan", "Envelope", "Manifest", "Roster", "alias table"]


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
    plain = data.draw(replaced(json.loads(seed[4:-4] if framed else seed), HOSTILE.filter(lambda v: not isinstance(v, bytes))))
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


KNOWN: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("RoundPlan", _steps_beyond_a_float, "a number of steps beyond a float"),
    ("kept update", _zip_entry(10, 99), "an unknown compression"),
    ("kept update", _zip_entry(8, 1), "an encrypted entry"),
    ("certificate", _certificate("2a8648ce3d0201", "2a8648ce3d0202"), "a key of an unknown kind"),
    ("certificate", _certificate("a003020102", "a003020103"), "an unknown version"),
    ("last accepted", lambda _seed: b'{"tools": Infinity}', "a round that is infinite"),
    ("join file", lambda _seed: b"9" * 5000, "a number of too many digits"),
    *(
        (name, lambda _seed, text=text: text * 100_000, f"nesting without an end, {text.decode()}")  # type: ignore[misc]
        for name in ("ledger line", "roster file", "join file", "answers", "last accepted") for text in (b"[", b'{"a":')
    ),
]  # fmt: skip


@pytest.mark.xfail(strict=True, reason="gets out of the decoder; take it off `escapes` when it does not")
@pytest.mark.parametrize(("name", "change", "what"), KNOWN, ids=[f"{name}: {what}" for name, _, what in KNOWN])
def test_known_escapes_are_closed(
    name: str, change: Callable[[bytes], bytes], what: str, table: dict[str, Decoder], tmp_path: Path
) -> None:
    """What was found here and is not an error of ours yet."""
    decoder = table[name]
    with contextlib.suppress(FedllmError):
        decoder.decode(change(decoder.seeds[0]), tmp_path)

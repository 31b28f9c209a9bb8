"""Every decoder of bytes from outside, with valid encodings to spoil."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
from fedllm.errors import ProtocolError
from fedllm.identity import Roster, SigningIdentity, VerifyKey
from fedllm.ids import AliasName, Digest, OwnerId
from fedllm.messages.envelope import COORDINATOR, Envelope, Sealed, peek_sender, unseal
from fedllm.messages.plan import RoundPlan, SignedPlan
from fedllm.messages.round import BODIES, decode_body
from fedllm.messages.secagg import MaskedVector
from fedllm.privacy import chain
from fedllm.registry import remote
from fedllm.registry.model import AdapterVersion, AliasTable, FileRecord, Manifest, PrivacyRecord, SignedManifest
from fedllm.relay.service import pack_frame, unpack_frame
from fedllm.relay.tls import TlsIdentity, parse_certificate
from fedllm.rng import SeededRng

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
    recipe=plan().recipe, metrics={"train_s": 1.0},
    privacy=PrivacyRecord("record", "add", 1.0, 1e-5, "all", "advisory"),
    cohort_size=4, survivors=4, plan=plan().digest, created=1.0,
)  # fmt: skip
ALIASES = remote.aliases_to_json(AliasTable(3, {AliasName("acme/tools"): Digest("b" * 64)}), IDENTITIES[COORDINATOR])
VECTOR = MaskedVector(OwnerId("east"), "update", 4, 3, (bytes(32),))
_CTX, _V1, _KEY = b"c" * 32, b"v" * 32, b"k" * 32
SHARES = keys.SharePair(bytearray(share_to_bytes(7)), bytearray(share_to_bytes(8)))
SEALED = keys.seal_shares(SHARES, _KEY, _CTX, _V1, OwnerId("east"), OwnerId("north"), SeededRng(1))
OFFER = {
    "fedllm_join": 1, "federation": "tools", "coordinator_key": str(COORDINATOR_KEY), "superlink": "127.0.0.1:9092",
    "transport": "flower", "base": "c" * 64, "max_tokens": 512,
    "roster": {member.owner: str(VerifyKey(member.key)) for member in ROSTER.members},
}  # fmt: skip
_DIRECT = {"transport": "direct", "direct": "127.0.0.1:9093"}
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
    return Decoder(lambda data, _: wire.decode(cls, data), (wire.encode(example(cls)),), wire.encode)


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
    """

    decode: Callable[[bytes, Path], Any]
    seeds: tuple[bytes, ...]
    encode: Callable[[Any], bytes] | None = None


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
        "unseal": Decoder(
            lambda data, _: unseal(data, COORDINATOR_KEY, sender=COORDINATOR, receiver="north"), (asked,)
        ),
        "peek at a sender": Decoder(lambda data, _: peek_sender(data), (asked,)),
        "peek at a version": Decoder(lambda data, _: wire.peek_int(data, "version"), (plan().encoded,)),
        "share": Decoder(lambda data, _: share_from_bytes(data), (share_to_bytes(7),), share_to_bytes),
        "sealed shares": Decoder(
            lambda data, _: keys.open_shares(data, _KEY, _CTX, _V1, OwnerId("east"), OwnerId("north")), (SEALED,)
        ),
        "masked head": Decoder(lambda data, _: wire.decode(MaskedVector, data), (wire.encode(VECTOR),), wire.encode),
        "masked chunks": Decoder(_chunks, (wire.encode(VECTOR) + bytes(12),)),
        "adapter": Decoder(
            lambda data, _: AdapterState.from_bytes(SPEC, data), (HEAD.to_bytes(),), AdapterState.to_bytes
        ),
        "relay frame": Decoder(
            lambda data, _: unpack_frame(data), (pack_frame({"op": "reply", "tag": "1", "parts": 2}, b"head", b""),)
        ),
        "ledger line": Decoder(lambda data, _: chain.read_line(data, 1), (LEDGER_LINE,)),
        "torn ledger line": Decoder(lambda data, _: chain.salvage(data), (LEDGER_LINE,)),
        "roster file": Decoder(_of_file(Roster.load), (json.dumps(OFFER["roster"]).encode(),)),
        "join file": Decoder(
            _of_file(read_offer),
            (
                json.dumps(OFFER).encode(),
                json.dumps({**OFFER, **_DIRECT, "certificate": certificate.pem.decode()}).encode(),
            ),
        ),
        "certificate": Decoder(
            lambda data, _: parse_certificate(data, SystemClock(), source="a test"), (certificate.pem,)
        ),
        "private key file": Decoder(_of_file(SigningIdentity.load), (b"-----BEGIN PRIVATE KEY-----\n",)),
        "signed manifest": Decoder(
            _manifest_json, (json.dumps(remote.manifest_to_json(manifest, AdapterVersion.of(MANIFEST))).encode(),)
        ),
        "alias table": _wire(remote._Aliases),
        "kept update": Decoder(_of_file(lambda path: UpdateStore(path).load()), (_kept(folder),)),
        "answers": Decoder(_of_file(Answers), (b'{"asked":"a","purpose":"update","step":"unmask","sum":"b"}\n',)),
        "last accepted": Decoder(_of_file(LastAccepted), (b'{"tools": 3}',)),
    }  # fmt: skip


NAMES = [
    *(f"body {kind}" for kind in BODIES), "any body", "RoundPlan", "SignedPlan", "Envelope", "Sealed", "Manifest",
    "Roster",
    "signed plan, opened", "unseal", "peek at a sender", "peek at a version", "share", "sealed shares", "masked head",
    "masked chunks", "adapter", "relay frame", "ledger line", "torn ledger line", "roster file", "join file",
    "certificate", "private key file", "signed manifest", "alias table", "kept update", "answers", "last accepted",
]  # fmt: skip

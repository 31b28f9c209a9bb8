"""Signed envelopes: every request and reply names sender, receiver, federation and round, and is signed.

Carriers (Flower, a relay, a socket) see bytes and are trusted with nothing but delivery: a changed, replayed
or misdirected envelope is refused by the receiver.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedllm import wire
from fedllm.errors import DecodeError, ProtocolError, StepMismatch, VersionUnsupported
from fedllm.identity import SigningIdentity, VerifyKey
from fedllm.ids import sha256

ENVELOPE_VERSION = 1
COORDINATOR = "coordinator"
"""The name the coordinator signs with; no owner may have it."""
_CONTEXT = "fedllm/1/envelope"
REQUEST_ID_BYTES = 16


@dataclass(frozen=True)
class Envelope:
    """One message.

    Attributes
    ----------
    version : int
    kind : str
        Name of the body's type, see `fedllm.messages.round`.
    federation : str
    round : int
        0 outside a round (hello).
    sender, receiver : str
        An owner's name or `COORDINATOR`.
    request : bytes
        16 bytes chosen by the requester; a reply repeats it. The same id twice is the same request: the
        receiver answers from its record instead of doing the work again.
    body : bytes
        Canonical bytes of the body.
    """

    version: int
    kind: str
    federation: str
    round: int
    sender: str
    receiver: str
    request: bytes
    body: bytes


@dataclass(frozen=True)
class Sealed:
    """An envelope's bytes and the sender's signature over them."""

    envelope: bytes
    signature: bytes


def seal(envelope: Envelope, identity: SigningIdentity) -> bytes:
    """Return the signed bytes of an envelope."""
    data = wire.encode(envelope)
    return wire.encode(Sealed(data, identity.sign(_CONTEXT, data)))


def unseal(data: bytes, key: VerifyKey, *, sender: str, receiver: str) -> Envelope:
    """Return the envelope if `sender` signed it for `receiver`.

    Raises
    ------
    DecodeError, SignatureInvalid, VersionUnsupported, StepMismatch
    """
    sealed = wire.decode(Sealed, data)
    key.verify(_CONTEXT, sealed.envelope, sealed.signature)
    envelope = _decode(sealed.envelope)
    if (envelope.sender, envelope.receiver) != (sender, receiver):
        raise StepMismatch(
            f"envelope from {envelope.sender!r} to {envelope.receiver!r}, {sender!r} to {receiver!r} expected"
        )
    return envelope


def _decode(data: bytes) -> Envelope:
    try:
        envelope = wire.decode(Envelope, data)
        version = envelope.version
    except DecodeError:
        # perhaps of a release that has other fields: then its version says more than what field is wrong
        version = wire.peek_int(data, "version")
        if version == ENVELOPE_VERSION:
            raise
    if version != ENVELOPE_VERSION:
        raise VersionUnsupported(f"envelope version {version} found, {ENVELOPE_VERSION} spoken here")
    return envelope


def peek_sender(data: bytes) -> str:
    """Return the claimed sender of sealed bytes, unverified: only to choose the key to verify with."""
    return wire.decode(Envelope, wire.decode(Sealed, data).envelope).sender


def reply_to(request: Envelope, kind: str, body: bytes) -> Envelope:
    """Return the reply envelope: sender and receiver swapped, same request id."""
    return Envelope(
        ENVELOPE_VERSION, kind, request.federation, request.round, request.receiver, request.sender,
        request.request, body,
    )  # fmt: skip


def request_id(*parts: str | int | bytes) -> bytes:
    """Return the 16-byte id of a request that should be idempotent: the hash of what it asks for."""
    encoded = wire.encode(_RequestParts(tuple(p.hex() if isinstance(p, bytes) else str(p) for p in parts)))
    return bytes.fromhex(sha256(encoded))[:REQUEST_ID_BYTES]


@dataclass(frozen=True)
class _RequestParts:
    parts: tuple[str, ...]


def check_reply(reply: Envelope, request: Envelope) -> None:
    """Raise `ProtocolError` unless `reply` answers `request`."""
    if reply.request != request.request or reply.federation != request.federation or reply.round != request.round:
        raise ProtocolError(f"{reply.sender!r} answered another request than {request.kind!r}")

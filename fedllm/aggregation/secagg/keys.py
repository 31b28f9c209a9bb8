"""Keys of ``fedllm-secagg/1``: contexts, signed bundles, key derivation, sealed shares.

Everything that is signed, hashed or derived begins with ``context(plan, purpose)``, and everything after the
advertise step also with ``transcript(context, U1)``: owners who were shown different plans, global adapters,
rosters or key lists derive different keys, so that nothing they send can be combined.

``framed(a, b, …)`` is the concatenation of ``len(x) as 4 bytes, big endian || x``: no two lists share bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedllm.aggregation.secagg.shamir import SHARE_BYTES, share_from_bytes, share_to_bytes
from fedllm.errors import ProtocolError, SignatureInvalid
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import OwnerId
from fedllm.messages.plan import RoundPlan
from fedllm.messages.secagg import PROTOCOL, PURPOSE_EVALUATION, PURPOSE_UPDATE, KeyBundle
from fedllm.rng import Rng

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
SEALED_BYTES = NONCE_BYTES + 2 * SHARE_BYTES + TAG_BYTES
SIGNATURE_BYTES = 64
_ADVERTISE = f"{PROTOCOL}/advertise"
_SURVIVORS = f"{PROTOCOL}/survivors"


def framed(*parts: bytes | str) -> bytes:
    """Return the parts, each behind its length; injective."""
    raw = [part.encode() if isinstance(part, str) else part for part in parts]
    return b"".join(len(part).to_bytes(4, "big") + part for part in raw)


def context(plan: RoundPlan, purpose: str) -> bytes:
    """Return the 32 bytes that name this sum: protocol, H(plan), purpose.

    H(plan) covers federation, round, nonce, H(roster), H(global adapter), layout, threshold and cohort.
    """
    if purpose not in {PURPOSE_UPDATE, PURPOSE_EVALUATION}:
        raise ProtocolError(f"purpose {purpose!r}: {PURPOSE_UPDATE!r} or {PURPOSE_EVALUATION!r} allowed")
    return hashlib.sha256(framed(PROTOCOL, bytes.fromhex(plan.digest), purpose)).digest()


def transcript(ctx: bytes, bundles: Sequence[KeyBundle]) -> bytes:
    """Return V1, the hash of the advertised bundles in the order of their owners' names."""
    parts: list[bytes | str] = [ctx]
    for bundle in sorted(bundles, key=lambda b: b.owner):
        parts += [bundle.owner, bundle.cipher_key, bundle.mask_key, bundle.signature]
    return hashlib.sha256(framed(*parts)).digest()


@dataclass
class KeyPair:
    """An X25519 key pair (RFC 7748) whose private part can be overwritten.

    Attributes
    ----------
    public : bytes
        32 bytes.
    private : bytearray
        32 bytes, never shown by ``repr``.
    """

    public: bytes
    private: bytearray = field(repr=False)

    @classmethod
    def generate(cls, rng: Rng) -> KeyPair:
        """Return a fresh pair."""
        private = bytearray(rng.token(KEY_BYTES))
        return cls(public_of(bytes(private)), private)

    def exchange(self, peer: bytes) -> bytes:
        """Return the shared secret with a peer's public key; raise `ProtocolError` for a low-order key."""
        try:
            return X25519PrivateKey.from_private_bytes(bytes(self.private)).exchange(
                X25519PublicKey.from_public_bytes(peer)
            )
        except ValueError:
            raise ProtocolError("a peer's X25519 key is malformed or of low order") from None

    def wipe(self) -> None:
        """Overwrite the private part."""
        self.private[:] = bytes(len(self.private))


def public_of(private: bytes) -> bytes:
    """Return the X25519 public key of 32 private bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def sign_bundle(
    ctx: bytes, purpose: str, owner: OwnerId, cipher_key: bytes, mask_key: bytes, identity: SigningIdentity
) -> KeyBundle:
    """Return the signed advertisement of two public keys."""
    signature = identity.sign(_ADVERTISE, framed(ctx, owner, cipher_key, mask_key))
    return KeyBundle(owner, purpose, cipher_key, mask_key, signature)


def check_bundle(ctx: bytes, purpose: str, bundle: KeyBundle, cohort: Sequence[OwnerId], roster: Roster) -> None:
    """Return if a cohort member's pinned identity signed this bundle for this sum.

    Raises
    ------
    ProtocolError
        If purpose, membership or a key's size is wrong.
    SignatureInvalid
        If the pinned key did not sign it.
    """
    if bundle.owner not in cohort:
        raise ProtocolError(f"keys of {bundle.owner!r}, who is not in the plan's cohort")
    if bundle.purpose != purpose:
        raise ProtocolError(f"keys of {bundle.owner!r} are for the sum {bundle.purpose!r}, {purpose!r} expected")
    if len(bundle.cipher_key) != KEY_BYTES or len(bundle.mask_key) != KEY_BYTES:
        raise ProtocolError(f"keys of {bundle.owner!r} are not of {KEY_BYTES} bytes")
    message = framed(ctx, bundle.owner, bundle.cipher_key, bundle.mask_key)
    try:
        roster.key(bundle.owner).verify(_ADVERTISE, message, bundle.signature)
    except SignatureInvalid as error:
        raise SignatureInvalid(f"keys of {bundle.owner!r}: {error.message}", hint=error.hint) from None


def check_distinct(bundles: Sequence[KeyBundle]) -> None:
    """Raise `ProtocolError` unless owners are distinct and no key occurs twice."""
    owners = [bundle.owner for bundle in bundles]
    keys = [key for bundle in bundles for key in (bundle.cipher_key, bundle.mask_key)]
    if len(set(owners)) != len(owners):
        raise ProtocolError("an owner's keys are listed twice")
    if len(set(keys)) != len(keys):
        raise ProtocolError("the same public key is listed twice")


def survivors_message(
    ctx: bytes, v1: bytes, sharers: Sequence[OwnerId], survivors: Sequence[OwnerId], subject: bytes = b""
) -> tuple[str, bytes]:
    """Return context and bytes of the consistency signature: U3, and the U2 and V1 it was seen with.

    `subject`, where a sum has one, is what the vectors are about: t owners must have been shown the same.
    """
    seen = hashlib.sha256(framed(*sorted(sharers))).digest()
    parts = (ctx, v1, seen, hashlib.sha256(framed(*sorted(survivors))).digest())
    return _SURVIVORS, framed(*parts, subject) if subject else framed(*parts)


def _derive(secret: bytes, v1: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=v1, info=info).derive(secret)


def pair_mask_key(pair: KeyPair, peer: bytes, ctx: bytes, v1: bytes, one: OwnerId, other: OwnerId) -> bytes:
    """Return the AES-256 key of the mask that two owners share; the same from both sides."""
    return _derive(pair.exchange(peer), v1, framed("mask", ctx, min(one, other), max(one, other)))


def self_mask_key(seed: bytes, ctx: bytes, v1: bytes, owner: OwnerId) -> bytes:
    """Return the AES-256 key of an owner's own mask."""
    return _derive(seed, v1, framed("self", ctx, owner))


def commit_seed(seed: bytes) -> bytes:
    """Return SHA-256 of a self-mask seed: binding, and hiding because the seed is 32 uniform bytes."""
    return hashlib.sha256(seed).digest()


@dataclass(frozen=True)
class SharePair:
    """One owner's share of a peer's two secrets; never shown by ``repr``."""

    seed: int = field(repr=False)
    key: int = field(repr=False)


def seal_shares(
    shares: SharePair, pair: KeyPair, peer: bytes, ctx: bytes, v1: bytes, sender: OwnerId, receiver: OwnerId, rng: Rng
) -> bytes:
    """Return ``nonce || ChaCha20-Poly1305 ciphertext || tag`` (RFC 8439) for one peer, 94 bytes.

    The key belongs to one sum, one sender and one receiver, and seals one message.
    """
    key = _derive(pair.exchange(peer), v1, framed("share", ctx, sender, receiver))
    nonce = rng.token(NONCE_BYTES)
    plain = share_to_bytes(shares.seed) + share_to_bytes(shares.key)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, plain, framed(ctx, v1, sender, receiver))


def open_shares(
    sealed: bytes, pair: KeyPair, peer: bytes, ctx: bytes, v1: bytes, sender: OwnerId, receiver: OwnerId
) -> SharePair:
    """Return the shares that `sender` sealed for `receiver`.

    Raises
    ------
    ProtocolError
        If the ciphertext does not open: changed on the way, or sealed under another plan or key list.
    DecodeError
        If what it holds is not two field elements.
    """
    if len(sealed) != SEALED_BYTES:
        raise ProtocolError(f"sealed shares of {sender!r} have {len(sealed)} bytes, {SEALED_BYTES} expected")
    key = _derive(pair.exchange(peer), v1, framed("share", ctx, sender, receiver))
    try:
        plain = ChaCha20Poly1305(key).decrypt(
            sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], framed(ctx, v1, sender, receiver)
        )
    except InvalidTag:
        raise ProtocolError(
            f"the shares of {sender!r} for {receiver!r} do not open",
            hint="they were changed on the way, or the two were shown different plans or key lists",
        ) from None
    return SharePair(share_from_bytes(plain[:SHARE_BYTES]), share_from_bytes(plain[SHARE_BYTES:]))

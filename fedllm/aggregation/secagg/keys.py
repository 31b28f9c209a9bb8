"""Keys of ``fedllm-secagg/1``: contexts, signed bundles, key derivation, sealed shares.

Everything that is signed, hashed or derived begins with ``context(plan, purpose)``, and everything after the
advertise step also with ``transcript(context, U1)``: owners who were shown different plans, global adapters,
rosters or key lists derive different keys, so that nothing they send can be combined.

``framed(a, b, …)`` is the concatenation of ``len(x) as 4 bytes, big endian || x``: no two lists share bytes.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedllm.aggregation.secagg.shamir import SHARE_BYTES, share_from_bytes
from fedllm.errors import DecodeError, KeysInvalid, LowOrderKey, ProtocolError, SharesUnopenable, SignatureInvalid
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
_FIELD = 2**255 - 19
_LOW_ORDER = frozenset(
    {
        0,
        1,
        _FIELD - 1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    }
)
"""u-coordinates of Curve25519's points, and its twist's, whose order divides 8."""


def framed(*parts: bytes | str) -> bytes:
    """Return the parts, each behind its length; injective."""
    framed_parts: list[bytes] = []
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        framed_parts.append(len(raw).to_bytes(4, "big"))
        framed_parts.append(raw)
    return b"".join(framed_parts)


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


class KeyPair:
    """An X25519 key pair (RFC 7748) whose private part can be overwritten.

    Parameters
    ----------
    private : bytearray
        32 bytes; kept, and never shown by ``repr``.

    Attributes
    ----------
    public : bytes
        32 bytes.
    """

    def __init__(self, private: bytearray) -> None:
        self.private = private
        # Built once: OpenSSL computes the public key each time a private one is loaded.
        self._key: X25519PrivateKey | None = X25519PrivateKey.from_private_bytes(bytes(private))
        self.public = self._key.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"KeyPair({self.public.hex()[:16]}…, private part redacted)"

    @classmethod
    def generate(cls, rng: Rng) -> KeyPair:
        """Return a fresh pair."""
        return cls(bytearray(rng.token(KEY_BYTES)))

    def exchange(self, peer: bytes) -> bytes:
        """Return the shared secret with a peer's public key.

        Raises
        ------
        LowOrderKey
            If the key is malformed or of low order.
        ProtocolError
            If this pair was wiped.
        """
        if self._key is None:
            raise ProtocolError("this key pair was wiped")
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(peer))
        except ValueError:
            raise LowOrderKey("a peer's X25519 key is malformed or of low order") from None

    def wipe(self) -> None:
        """Overwrite the private part, and let go of OpenSSL's copy, which OpenSSL overwrites when it frees it."""
        self.private[:] = bytes(len(self.private))
        self._key = None


def public_of(private: bytes) -> bytes:
    """Return the X25519 public key of 32 private bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def sign_bundle(
    ctx: bytes, purpose: str, owner: OwnerId, cipher_key: bytes, mask_key: bytes, identity: SigningIdentity
) -> KeyBundle:
    """Return the signed advertisement of two public keys."""
    signature = identity.sign(_ADVERTISE, framed(ctx, owner, cipher_key, mask_key))
    return KeyBundle(owner, purpose, cipher_key, mask_key, signature)


def check_form(purpose: str, bundle: KeyBundle, cohort: Container[OwnerId]) -> None:
    """Return if a bundle is of a cohort member, for this sum, and of two usable keys; its signature is not checked.

    Raises
    ------
    KeysInvalid
        If purpose or membership is wrong, or a key is not of 32 bytes.
    LowOrderKey
        If a key is a point of low order.
    """
    if bundle.owner not in cohort:
        raise KeysInvalid(f"keys of {bundle.owner!r}, who is not in the plan's cohort")
    if bundle.purpose != purpose:
        raise KeysInvalid(f"keys of {bundle.owner!r} are for the sum {bundle.purpose!r}, {purpose!r} expected")
    if len(bundle.cipher_key) != KEY_BYTES or len(bundle.mask_key) != KEY_BYTES:
        raise KeysInvalid(f"keys of {bundle.owner!r} are not of {KEY_BYTES} bytes")
    if _low_order(bundle.cipher_key) or _low_order(bundle.mask_key):
        raise LowOrderKey(f"a key of {bundle.owner!r} is a point of low order: its secrets would be known to all")


def check_signature(ctx: bytes, bundle: KeyBundle, roster: Roster) -> None:
    """Return if the owner's pinned identity signed these keys for this sum; else raise `SignatureInvalid`."""
    message = framed(ctx, bundle.owner, bundle.cipher_key, bundle.mask_key)
    try:
        roster.key(bundle.owner).verify(_ADVERTISE, message, bundle.signature)
    except SignatureInvalid as error:
        raise SignatureInvalid(f"keys of {bundle.owner!r}: {error.message}", hint=error.hint) from None


def check_bundle(ctx: bytes, purpose: str, bundle: KeyBundle, cohort: Container[OwnerId], roster: Roster) -> None:
    """Check form, then signature; raises what `check_form` and `check_signature` raise."""
    check_form(purpose, bundle, cohort)
    check_signature(ctx, bundle, roster)


def check_distinct(bundles: Sequence[KeyBundle]) -> None:
    """Raise `KeysInvalid` unless owners are distinct and no key occurs twice."""
    owners = [bundle.owner for bundle in bundles]
    keys = [key for bundle in bundles for key in (bundle.cipher_key, bundle.mask_key)]
    if len(set(owners)) != len(owners):
        raise KeysInvalid("an owner's keys are listed twice")
    if len(set(keys)) != len(keys):
        raise KeysInvalid("the same public key is listed twice")


def with_another_owners_key(bundles: Iterable[KeyBundle]) -> list[OwnerId]:
    """Return the owners, sorted, who advertise a key that another owner advertises too."""
    owners: dict[bytes, set[OwnerId]] = {}
    for bundle in bundles:
        for key in (bundle.cipher_key, bundle.mask_key):
            owners.setdefault(key, set()).add(bundle.owner)
    return sorted({owner for sharing in owners.values() if len(sharing) > 1 for owner in sharing})


def _low_order(key: bytes) -> bool:
    """Whether X25519 with this key gives the same secret to everybody; the top bit is ignored (RFC 7748 section 5)."""
    return (int.from_bytes(key, "little") & ((1 << 255) - 1)) % _FIELD in _LOW_ORDER


def survivors_message(
    ctx: bytes, v1: bytes, sharers: Sequence[OwnerId], survivors: Sequence[OwnerId], subject: bytes = b""
) -> tuple[str, bytes]:
    """Return context and bytes of the consistency signature: U3, and the U2 and V1 it was seen with.

    `subject`, where a sum has one, is what the vectors are about: t owners must have been shown the same.
    """
    seen = hashlib.sha256(framed(*sorted(sharers))).digest()
    parts = (ctx, v1, seen, hashlib.sha256(framed(*sorted(survivors))).digest())
    return _SURVIVORS, framed(*parts, subject) if subject else framed(*parts)


def _derive(secret: bytes | bytearray, v1: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869) with salt `v1`, one block of output."""
    extracted = hmac.digest(v1, secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def pair_mask_key(pair: KeyPair, peer: bytes, ctx: bytes, v1: bytes, one: OwnerId, other: OwnerId) -> bytes:
    """Return the AES-256 key of the mask that two owners share; the same from both sides."""
    return _derive(pair.exchange(peer), v1, framed("mask", ctx, min(one, other), max(one, other)))


def self_mask_key(seed: bytes | bytearray, ctx: bytes, v1: bytes, owner: OwnerId) -> bytes:
    """Return the AES-256 key of an owner's own mask."""
    return _derive(seed, v1, framed("self", ctx, owner))


def commit_seed(seed: bytes | bytearray) -> bytes:
    """Return SHA-256 of a self-mask seed: binding, and hiding because the seed is 32 uniform bytes."""
    return hashlib.sha256(seed).digest()


@dataclass(frozen=True)
class SharePair:
    """One owner's shares of a peer's two secrets, 33 bytes each; never shown by ``repr``."""

    seed: bytearray = field(repr=False)
    key: bytearray = field(repr=False)

    def wipe(self) -> None:
        """Overwrite both."""
        for share in (self.seed, self.key):
            share[:] = bytes(len(share))


def sealing_key(secret: bytes, ctx: bytes, v1: bytes, sender: OwnerId, receiver: OwnerId) -> bytes:
    """Return the key that seals one message of one sum, from `sender` to `receiver`, of their X25519 secret."""
    return _derive(secret, v1, framed("share", ctx, sender, receiver))


def seal_shares(
    shares: SharePair, key: bytes, ctx: bytes, v1: bytes, sender: OwnerId, receiver: OwnerId, rng: Rng
) -> bytes:
    """Return ``nonce || ChaCha20-Poly1305 ciphertext || tag`` (RFC 8439) under a `sealing_key`, 94 bytes."""
    nonce = rng.token(NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, shares.seed + shares.key, framed(ctx, v1, sender, receiver))


def open_shares(
    sealed: bytes, key: bytes | bytearray, ctx: bytes, v1: bytes, sender: OwnerId, receiver: OwnerId
) -> SharePair:
    """Return the shares that `sender` sealed for `receiver`.

    Raises
    ------
    SharesUnopenable
        If the ciphertext does not open, or what it holds is not two field elements.
    """
    try:
        if len(sealed) != SEALED_BYTES:
            raise DecodeError(f"{len(sealed)} bytes, {SEALED_BYTES} expected")
        plain = ChaCha20Poly1305(key).decrypt(
            sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], framed(ctx, v1, sender, receiver)
        )
        share_from_bytes(plain[:SHARE_BYTES])
        share_from_bytes(plain[SHARE_BYTES:])
    except (InvalidTag, DecodeError):
        raise unopenable((sender,), receiver) from None
    return SharePair(bytearray(plain[:SHARE_BYTES]), bytearray(plain[SHARE_BYTES:]))


def unopenable(dealers: Sequence[OwnerId], receiver: OwnerId) -> SharesUnopenable:
    """Return the error that names who dealt shares that do not open."""
    names = ", ".join(repr(str(dealer)) for dealer in dealers)
    return SharesUnopenable(
        f"the shares of {names} for {receiver!r} do not open",
        dealers=tuple(dealers),
        hint="they were changed on the way, or the owners were shown different plans or key lists",
    )

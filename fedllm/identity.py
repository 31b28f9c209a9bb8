"""Ed25519 identities (RFC 8032): signing keys, pinned public keys, and the roster of a federation.

Every signature is over ``context || 0x00 || SHA-256(message)``, so that a signature made for one purpose
never verifies for another.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedllm import wire
from fedllm.errors import AuthenticationError, ConfigError, NotFound, SignatureInvalid
from fedllm.ids import Digest, OwnerId, check_name, sha256

PUBLIC_KEY_BYTES = 32
_PREFIX = "ed25519:"


def _to_sign(context: str, message: bytes) -> bytes:
    return context.encode() + b"\0" + hashlib.sha256(message).digest()


@dataclass(frozen=True)
class VerifyKey:
    """A pinned Ed25519 public key.

    Attributes
    ----------
    raw : bytes
        32 bytes (RFC 8032 §5.1.2).
    """

    raw: bytes

    def __post_init__(self) -> None:
        """Refuse a key of the wrong size."""
        if len(self.raw) != PUBLIC_KEY_BYTES:
            raise ValueError(f"public key has {len(self.raw)} bytes, {PUBLIC_KEY_BYTES} needed")

    @classmethod
    def parse(cls, text: str) -> VerifyKey:
        """Read the text form ``ed25519:<64 hex digits>``; raise `ConfigError` on any other."""
        body = text.strip().removeprefix(_PREFIX)
        try:
            return cls(bytes.fromhex(body))
        except ValueError:
            raise ConfigError(
                f"{text!r} is not a public key: ed25519: and 64 hex digits expected",
                hint="copy the line that 'fedllm init' or 'fedllm client key' printed",
            ) from None

    def __str__(self) -> str:
        return _PREFIX + self.raw.hex()

    def verify(self, context: str, message: bytes, signature: bytes) -> None:
        """Return if `signature` is this key's over `message` in `context`; else raise `SignatureInvalid`."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, _to_sign(context, message))
        except (InvalidSignature, ValueError):
            raise SignatureInvalid(
                f"{context}: the signature does not verify against {str(self)[:20]}…",
                hint="the sender holds another key than the one pinned here, or the bytes were changed",
            ) from None


class SigningIdentity:
    """An Ed25519 private key kept in a file that only its owner can read."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = VerifyKey(key.public_key().public_bytes_raw())

    def __repr__(self) -> str:
        return f"SigningIdentity({str(self.public)[:20]}…, private part redacted)"

    @classmethod
    def generate(cls) -> SigningIdentity:
        """Return a fresh identity from the OS CSPRNG."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> SigningIdentity:
        """Return the identity of a 32-byte RFC 8032 seed; for test vectors and simulation."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def create(cls, path: Path) -> SigningIdentity:
        """Write a fresh identity to `path` with mode 0600; never overwrite (`ConfigError`)."""
        identity = cls.generate()
        pem = identity._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise ConfigError(
                f"{path} exists and a key is never overwritten", hint="remove it yourself if it is not needed"
            ) from None
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        return identity

    @classmethod
    def load(cls, path: Path) -> SigningIdentity:
        """Read an identity; refuse a missing file, another key type, or one that others can read."""
        if not path.is_file():
            raise NotFound(f"no private key at {path}", hint="create it with 'fedllm init' or 'fedllm client key'")
        if path.stat().st_mode & 0o077:
            raise AuthenticationError(
                f"{path} can be read by others (mode {path.stat().st_mode & 0o777:o}, 600 needed)",
                hint=f"chmod 600 {path}",
            )
        try:
            key = load_pem_private_key(path.read_bytes(), password=None)
        except ValueError:
            raise ConfigError(f"{path} is not a PEM private key") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"{path} holds a {type(key).__name__}, an Ed25519 key is needed")
        return cls(key)

    def sign(self, context: str, message: bytes) -> bytes:
        """Return the 64-byte signature over `message` in `context`."""
        return self._key.sign(_to_sign(context, message))


@dataclass(frozen=True)
class Member:
    """One line of a roster."""

    owner: OwnerId
    key: bytes


@dataclass(frozen=True)
class Roster:
    """The owners of a federation and their pinned keys, sorted by name.

    Each owner holds its own copy, approved by its own people: a coordinator cannot add members to it, which
    is the defence against Sybil cohorts.
    """

    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        """Refuse duplicates and unsorted members: one roster has one digest."""
        owners = [m.owner for m in self.members]
        if owners != sorted(set(owners)) or len({m.key for m in self.members}) != len(owners):
            raise ValueError("roster members must be sorted by name, names and keys unique")

    @classmethod
    def of(cls, keys: Mapping[OwnerId, VerifyKey]) -> Roster:
        """Build a roster from names and keys."""
        return cls(tuple(Member(OwnerId(o), keys[o].raw) for o in sorted(keys)))

    @cached_property
    def digest(self) -> Digest:
        """SHA-256 of the canonical encoding."""
        return sha256(wire.encode(self))

    @cached_property
    def _keys(self) -> dict[OwnerId, VerifyKey]:
        return {member.owner: VerifyKey(member.key) for member in self.members}

    def key(self, owner: OwnerId) -> VerifyKey:
        """Return an owner's pinned key, or raise `NotFound`."""
        found = self._keys.get(owner)
        if found is not None:
            return found
        raise NotFound(f"owner {owner!r} is not in the roster ({', '.join(m.owner for m in self.members)})")

    def save(self, path: Path) -> None:
        """Write the roster as JSON, names to ``ed25519:`` keys."""
        text = json.dumps({m.owner: str(VerifyKey(m.key)) for m in self.members}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Roster:
        """Read a roster written by `save`; raise `NotFound` or `ConfigError`."""
        if not path.is_file():
            raise NotFound(f"no roster at {path}", hint="the operator of the federation sends it; approve it once")
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            return cls.of({OwnerId(check_name(o, what="owner")): VerifyKey.parse(k) for o, k in table.items()})
        except (ValueError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{path} is not a roster: {type(error).__name__}") from None

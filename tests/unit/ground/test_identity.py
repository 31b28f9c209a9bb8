"""Keys, signatures and rosters: what is pinned cannot be talked around."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedllm.errors import AuthenticationError, ConfigError, NotFound, SignatureInvalid
from fedllm.identity import Roster, SigningIdentity, VerifyKey
from fedllm.ids import OwnerId

# RFC 8032 §7.1, TEST 1: seed and public key.
SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"


def test_public_key_of_the_rfc_8032_seed() -> None:
    """The known answer of RFC 8032."""
    assert str(SigningIdentity.from_seed(SEED).public) == f"ed25519:{PUBLIC}"


def test_a_signature_holds_for_its_context_message_and_key_only() -> None:
    """Another context, message or key, or one flipped bit, is refused."""
    identity, other = SigningIdentity.generate(), SigningIdentity.generate()
    signature = identity.sign("plan", b"round 1")
    identity.public.verify("plan", b"round 1", signature)
    flipped = bytes([signature[0] ^ 1]) + signature[1:]
    for key, context, message, sig in [
        (identity.public, "envelope", b"round 1", signature),
        (identity.public, "plan", b"round 2", signature),
        (other.public, "plan", b"round 1", signature),
        (identity.public, "plan", b"round 1", flipped),
        (identity.public, "plan", b"round 1", b""),
    ]:
        with pytest.raises(SignatureInvalid):
            key.verify(context, message, sig)


def test_a_key_file_is_private_and_never_overwritten(tmp_path: Path) -> None:
    """Mode 0600; a second create refuses; a file others can read is refused."""
    path = tmp_path / "keys" / "owner.pem"
    made = SigningIdentity.create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert SigningIdentity.load(path).public == made.public
    with pytest.raises(ConfigError, match="never overwritten"):
        SigningIdentity.create(path)
    path.chmod(0o644)
    with pytest.raises(AuthenticationError, match="can be read by others"):
        SigningIdentity.load(path)


def test_a_private_key_never_prints() -> None:
    """Repr shows the public part only."""
    assert SEED.hex() not in repr(SigningIdentity.from_seed(SEED))
    assert "redacted" in repr(SigningIdentity.from_seed(SEED))


def test_missing_and_malformed_keys_are_named(tmp_path: Path) -> None:
    """Not found and not a key are different errors with different exit codes."""
    with pytest.raises(NotFound):
        SigningIdentity.load(tmp_path / "none.pem")
    bad = tmp_path / "bad.pem"
    bad.write_text("no key")
    bad.chmod(0o600)
    with pytest.raises(ConfigError, match="not a PEM"):
        SigningIdentity.load(bad)
    with pytest.raises(ConfigError, match="64 hex digits"):
        VerifyKey.parse("ed25519:abc")


def test_a_roster_has_one_digest_whatever_the_order(tmp_path: Path) -> None:
    """Sorted, unique, saved and read back; a changed member changes the digest."""
    keys = {OwnerId(n): SigningIdentity.generate().public for n in ("south", "north", "east")}
    roster = Roster.of(keys)
    assert [m.owner for m in roster.members] == ["east", "north", "south"]
    roster.save(tmp_path / "roster.json")
    assert Roster.load(tmp_path / "roster.json").digest == roster.digest
    keys[OwnerId("east")] = SigningIdentity.generate().public
    assert Roster.of(keys).digest != roster.digest
    with pytest.raises(NotFound, match="west"):
        roster.key(OwnerId("west"))


def test_one_key_under_two_names_is_refused() -> None:
    """A Sybil that enrols one key twice is no roster."""
    key = SigningIdentity.generate().public
    with pytest.raises(ValueError, match="unique"):
        Roster.of({OwnerId("a"): key, OwnerId("b"): key})

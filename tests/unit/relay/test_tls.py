"""Certificates that both ends pin: what is made, and everything that must not pass for one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fedllm.clock import FakeClock
from fedllm.errors import AuthenticationError, ConfigError, NotFound
from fedllm.relay.tls import (
    CERTIFICATE_FILE,
    KEY_FILE,
    MAX_PEM_BYTES,
    PinnedOwners,
    TlsIdentity,
    name_of,
    parse_certificate,
    read_certificate,
)

CLOCK = FakeClock()
TEN_YEARS_S = 10 * 365 * 86_400


def forged(
    key: Any = None,
    *,
    signer: Any = None,
    name: str | None = None,
    alternative: str | None = None,
    authority: bool = False,
    issuer: str | None = None,
) -> bytes:
    """Return a certificate made as fedllm does, but for what is named."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    public = key.public_key()
    own = name_of(public) if isinstance(public, ec.EllipticCurvePublicKey) else "fedllm-" + "0" * 32
    subject, signed_by = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (name or own, issuer or name or own)
    )
    now = datetime.fromtimestamp(CLOCK.now(), UTC)
    builder = (
        x509.CertificateBuilder(signed_by, subject, public, 7, now - timedelta(days=1), now + timedelta(days=9))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(alternative or name or own)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    algorithm = None if isinstance(signer or key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(signer or key, algorithm).public_bytes(Encoding.PEM)


def test_what_is_made_is_private_named_after_its_key_and_valid_for_ten_years(tmp_path: Path) -> None:
    """Two files of mode 0600; loading them gives the same; the key is in no repr."""
    made = TlsIdentity.create(tmp_path / "owner", CLOCK)
    loaded = TlsIdentity.load(tmp_path / "owner", CLOCK)
    assert (loaded.certificate, loaded.key_pem) == (made.certificate, made.key_pem)
    assert {(tmp_path / "owner" / f).stat().st_mode & 0o777 for f in (KEY_FILE, CERTIFICATE_FILE)} == {0o600}
    assert 0 <= made.certificate.until - CLOCK.now() - TEN_YEARS_S < 4 * 86_400
    found = x509.load_pem_x509_certificate(made.certificate.pem)
    public = found.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert made.certificate.name == name_of(public)
    assert made.certificate.fingerprint == found.fingerprint(hashes.SHA256()).hex()
    assert "PRIVATE" not in repr(made) + repr(made.certificate)
    assert TlsIdentity.create(tmp_path / "other", CLOCK).certificate.name != made.certificate.name


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """A second pair does not replace the first."""
    made = TlsIdentity.create(tmp_path, CLOCK)
    with pytest.raises(ConfigError, match="never overwritten"):
        TlsIdentity.create(tmp_path, CLOCK)
    assert TlsIdentity.load(tmp_path, CLOCK).certificate == made.certificate


def test_a_certificate_of_the_right_kind_passes() -> None:
    """What the other tests change one thing of is good itself; white space around it does not matter."""
    good = forged()
    assert parse_certificate(b"\n" + good + b"\n\n", CLOCK, source="f") == parse_certificate(good, CLOCK, source="f")


P384 = ec.generate_private_key(ec.SECP384R1())
KEY = ec.generate_private_key(ec.SECP256R1())
WRONG = {
    "no certificate": (b"hello", "0 certificates"),
    "two certificates": (forged() + forged(), "2 certificates"),
    "text before it": (b"my certificate:\n" + forged(), "more in it than one PEM block"),
    "cut in half": (forged()[:200] + b"\n-----END CERTIFICATE-----\n", "cannot be read"),
    "a private key": (forged() + b"-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n", "private key"),
    "too long": (forged() + b" " * MAX_PEM_BYTES, f"more than {MAX_PEM_BYTES} bytes"),
    "another curve": (forged(P384), "not a P-256 key"),
    "an RSA key": (forged(rsa.generate_private_key(65537, 2048)), "not a P-256 key"),
    "an Ed25519 key": (forged(ed25519.Ed25519PrivateKey.generate()), "not a P-256 key"),
    "another's name": (forged(name="fedllm-" + "a" * 32), "name of its own key"),
    "another's alternative name": (forged(alternative="fedllm-" + "a" * 32), "name of its own key"),
    "an authority": (forged(authority=True), "may issue"),
    "signed by another": (forged(KEY, signer=ec.generate_private_key(ec.SECP256R1())), "not signed by its own key"),
    "issued by another": (forged(issuer="fedllm-" + "a" * 32), "name of its own key"),
}


@pytest.mark.parametrize("case", WRONG)
def test_another_kind_is_refused_with_the_reason(case: str) -> None:
    """Every way in which a file can be something else is named, with the file."""
    data, why = WRONG[case]
    with pytest.raises(ConfigError, match=why) as refused:
        parse_certificate(data, CLOCK, source="sent.pem")
    assert refused.value.message.startswith("sent.pem is no TLS certificate of fedllm")
    assert refused.value.hint


def test_time_counts(tmp_path: Path) -> None:
    """Neither an expired certificate nor one of the future is taken; a clock a day late is no obstacle."""
    made = TlsIdentity.create(tmp_path, CLOCK).certificate.pem
    parse_certificate(made, FakeClock(CLOCK.now() - 80_000), source="f")
    parse_certificate(made, FakeClock(CLOCK.now() + TEN_YEARS_S), source="f")
    with pytest.raises(ConfigError, match="expired: valid from 2023-"):
        parse_certificate(made, FakeClock(CLOCK.now() + TEN_YEARS_S + 5 * 86_400), source="f")
    with pytest.raises(ConfigError, match="not valid yet"):
        parse_certificate(made, FakeClock(CLOCK.now() - 90_000), source="f")


def test_files_that_are_missing_readable_or_mixed_up_are_refused(tmp_path: Path) -> None:
    """The key must be there, private, and the certificate's own."""
    with pytest.raises(NotFound, match=r"tls\.pem"):
        TlsIdentity.load(tmp_path, CLOCK)
    for name in ("a", "b"):
        TlsIdentity.create(tmp_path / name, CLOCK)
    (tmp_path / "a" / KEY_FILE).chmod(0o640)
    with pytest.raises(AuthenticationError, match="mode 640"):
        TlsIdentity.load(tmp_path / "a", CLOCK)
    (tmp_path / "b" / KEY_FILE).replace(tmp_path / "a" / KEY_FILE)
    with pytest.raises(ConfigError, match=r"not the key of tls\.pem"):
        TlsIdentity.load(tmp_path / "a", CLOCK)
    with pytest.raises(NotFound, match=r"tls\.key"):
        TlsIdentity.load(tmp_path / "b", CLOCK)
    (tmp_path / "b" / KEY_FILE).touch(0o600)
    with pytest.raises(ConfigError, match="not a PEM private key"):
        TlsIdentity.load(tmp_path / "b", CLOCK)


def test_owners_that_come_and_go_are_seen_and_a_broken_file_hides_nobody(tmp_path: Path) -> None:
    """Read again when a file changes; what is not usable is left out, and nothing is raised."""
    folder = tmp_path / "tools"
    pinned = PinnedOwners([folder, tmp_path / "other"], CLOCK)
    assert pinned() == {}
    folder.mkdir()
    made = {name: TlsIdentity.create(tmp_path / name, CLOCK).certificate for name in ("east", "west")}
    (folder / "east.pem").write_bytes(made["east"].pem)
    (folder / "odd.pem").write_bytes(b"odd")
    assert set(pinned()) == {made["east"].fingerprint}
    (folder / "west.pem").write_bytes(made["west"].pem)
    assert pinned() == {each.fingerprint: each for each in made.values()}
    assert pinned() is pinned()  # read once
    (folder / "east.pem").unlink()
    assert set(pinned()) == {made["west"].fingerprint}
    assert read_certificate(folder / "west.pem", CLOCK) == made["west"]

"""Self-signed certificates that both ends of the direct transport pin: made, written, and read from strangers' files.

There is no authority: a certificate is accepted because the very same bytes were handed over with a join file or
an enrolment. Its name is derived from its key, so that no certificate can stand in another one's way in TLS's
store of trusted ones, which looks them up by name. P-256, because gRPC's TLS stack takes no Ed25519 (RFC 5280,
RFC 8446); trust in what is said over the connection comes from the Ed25519 signatures of the envelopes.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from fedllm import telemetry
from fedllm.clock import Clock, iso_utc
from fedllm.errors import AuthenticationError, ConfigError, FedllmError, NotFound
from fedllm.ids import Digest, sha256

_LOG = logging.getLogger(__name__)
CERTIFICATE_FILE = "tls.pem"
KEY_FILE = "tls.key"
MAX_PEM_BYTES = 8192
_VALID = timedelta(days=3653)
_SKEW = timedelta(days=1)
"""The two ends' clocks may differ by so much."""
_UNREADABLE = (
    ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion, x509.ExtensionNotFound, x509.DuplicateExtension,
)  # fmt: skip
"""What bytes that are not such a certificate can make the library raise."""
_ONE_BLOCK = re.compile(rb"\s*-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----\s*")
_USAGE = x509.KeyUsage(True, False, False, False, False, False, False, False, False)


@dataclass(frozen=True)
class Certificate:
    """One end's certificate.

    Attributes
    ----------
    pem : bytes
        As it was handed over, in one form.
    name : str
        Common name and only alternative name: ``fedllm-`` and 32 hex digits of the SHA-256 of its public key.
    fingerprint : Digest
        SHA-256 of the DER encoding.
    until : float
        Seconds since the epoch at which it expires.
    """

    pem: bytes = field(repr=False)
    name: str
    fingerprint: Digest
    until: float


class TlsIdentity:
    """A certificate and its private key, in files that only their owner can read."""

    def __init__(self, certificate: Certificate, key_pem: bytes) -> None:
        self.certificate = certificate
        self.key_pem = key_pem

    def __repr__(self) -> str:
        return f"TlsIdentity({self.certificate.name!r}, private part redacted)"

    @classmethod
    def create(cls, folder: Path, clock: Clock) -> TlsIdentity:
        """Write a fresh key and certificate into `folder`, mode 0600; never overwrite (`ConfigError`)."""
        key = generate_ec_key(SECP256R1())
        certificate = _self_signed(key, datetime.fromtimestamp(clock.now(), UTC))
        key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(folder / KEY_FILE, key_pem)
        write_private(folder / CERTIFICATE_FILE, certificate.public_bytes(Encoding.PEM))
        return cls.load(folder, clock)

    @classmethod
    def load(cls, folder: Path, clock: Clock) -> TlsIdentity:
        """Read key and certificate; refuse missing files, a readable key, and a key that is not the certificate's.

        Raises
        ------
        NotFound, AuthenticationError, ConfigError
        """
        certificate = read_certificate(folder / CERTIFICATE_FILE, clock)
        path = folder / KEY_FILE
        if not path.is_file():
            raise NotFound(f"no TLS key at {path}", hint=f"restore it, or remove {CERTIFICATE_FILE} beside it too")
        if path.stat().st_mode & 0o077:
            raise AuthenticationError(
                f"{path} can be read by others (mode {path.stat().st_mode & 0o777:o}, 600 needed)",
                hint=f"chmod 600 {path}",
            )
        try:
            key = load_pem_private_key(path.read_bytes(), password=None)
        except (ValueError, TypeError):
            raise ConfigError(f"{path} is not a PEM private key") from None
        if not isinstance(key, EllipticCurvePrivateKey) or name_of(key.public_key()) != certificate.name:
            raise ConfigError(f"{path} is not the key of {CERTIFICATE_FILE} beside it", hint="restore both")
        return cls(certificate, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def write_private(path: Path, data: bytes) -> None:
    """Write a file of mode 0600 that must not exist yet (`ConfigError`)."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(
            f"{path} exists and is never overwritten", hint="remove it yourself if it is not needed"
        ) from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _self_signed(key: EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    name = name_of(key.public_key())
    subject = _subject(name)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + _VALID)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_USAGE, critical=True)
        .sign(key, SHA256())
    )


def name_of(key: EllipticCurvePublicKey) -> str:
    """Return the name that a certificate of this key bears."""
    encoded = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return f"fedllm-{sha256(encoded)[:32]}"


def read_certificate(path: Path, clock: Clock) -> Certificate:
    """Read a file that somebody sent; see `parse_certificate`. `NotFound` if there is none."""
    if not path.is_file():
        raise NotFound(f"no TLS certificate at {path}", hint="made by 'fedllm client key' or 'fedllm owner join-file'")
    with path.open("rb") as file:
        return parse_certificate(file.read(MAX_PEM_BYTES + 1), clock, source=str(path))


def parse_certificate(data: bytes, clock: Clock, *, source: str) -> Certificate:
    """Return the one certificate in `data`, which must be of the kind that `TlsIdentity.create` makes.

    Parameters
    ----------
    data : bytes
        PEM.
    clock : Clock
        An expired certificate, or one that is not valid yet, is refused.
    source : str
        Where it came from, for the error.

    Raises
    ------
    ConfigError
        Naming what is wrong with it.
    """
    _check_text(data, source)
    try:
        found = x509.load_pem_x509_certificate(data)
        name = _name_in(found)
        found.verify_directly_issued_by(found)
    except InvalidSignature:
        raise _wrong(source, "it is not signed by its own key") from None
    except _UNREADABLE as error:
        why = str(error) if isinstance(error, _OddError) else f"it cannot be read ({type(error).__name__})"
        raise _wrong(source, why) from None
    begins, ends = found.not_valid_before_utc.timestamp(), found.not_valid_after_utc.timestamp()
    if not begins <= clock.now() < ends:
        word = "it has expired" if clock.now() >= ends else "it is not valid yet"
        hint = "check the clock, or have a new one made"
        raise _wrong(source, f"{word}: valid from {iso_utc(begins)} to {iso_utc(ends)}", hint)
    der = found.public_bytes(Encoding.DER)
    return Certificate(found.public_bytes(Encoding.PEM), name, sha256(der), ends)


def _wrong(source: str, why: str, hint: str = f"ask for the {CERTIFICATE_FILE} of that machine") -> ConfigError:
    return ConfigError(f"{source} is no TLS certificate of fedllm: {why}", hint=hint)


def _check_text(data: bytes, source: str) -> None:
    if len(data) > MAX_PEM_BYTES:
        raise _wrong(source, f"more than {MAX_PEM_BYTES} bytes")
    if b"PRIVATE KEY" in data:
        hint = f"a key is never sent: make a new pair, and send {CERTIFICATE_FILE} only"
        raise _wrong(source, "there is a private key in it", hint)
    if (count := data.count(b"-----BEGIN CERTIFICATE-----")) != 1:
        raise _wrong(source, f"{count} certificates in it, 1 expected")
    if not _ONE_BLOCK.fullmatch(data):
        raise _wrong(source, "there is more in it than one PEM block")


class _OddError(ValueError):
    """A certificate that another program made; the message says how it differs."""


def _name_in(found: x509.Certificate) -> str:
    """Return a certificate's name, which must be its key's, everywhere and alone."""
    key = found.public_key()
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
        raise _OddError("its key is not a P-256 key")
    name = name_of(key)
    alternatives = list(found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    if not found.subject == found.issuer == _subject(name) or alternatives != [x509.DNSName(name)]:
        raise _OddError("it does not bear the name of its own key, and that alone")
    if found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
        raise _OddError("it may issue other certificates")
    return name


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def pinned_folder(home: Path, federation: str) -> Path:
    """Return where a coordinator keeps ``<owner>.pem``: owners' names are a federation's own."""
    return home / "certificates" / federation


class PinnedOwners:
    """The certificates in some folders, read again when a file comes, goes or changes.

    Parameters
    ----------
    folders : Sequence[Path]
        One for each federation; need not exist.
    clock : Clock
    """

    def __init__(self, folders: Sequence[Path], clock: Clock) -> None:
        self._folders = tuple(folders)
        self._clock = clock
        self._seen: dict[Path, tuple[int, int]] | None = None
        self._found: Mapping[Digest, Certificate] = {}

    def __call__(self) -> Mapping[Digest, Certificate]:
        """Return the usable certificates by fingerprint; one that is not is logged and left out, never raised."""
        files = sorted(path for folder in self._folders for path in folder.glob("*.pem"))
        seen: dict[Path, tuple[int, int]] = {}
        for path in files:
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue  # removed in this moment
            seen[path] = (stat.st_mtime_ns, stat.st_size)
        if seen != self._seen:
            self._seen = seen
            self._found = dict(filter(None, map(self._read, seen)))
        return self._found

    def _read(self, path: Path) -> tuple[Digest, Certificate] | None:
        try:
            certificate = read_certificate(path, self._clock)
        except (FedllmError, OSError) as error:
            why = error.message if isinstance(error, FedllmError) else type(error).__name__
            telemetry.event(_LOG, "certificate not used", level=logging.WARNING, file=str(path), error=why)
            return None
        return certificate.fingerprint, certificate


Pinned = Callable[[], Mapping[Digest, Certificate]]
"""Returns the certificates of enrolled owners, by fingerprint, as they are now."""

"""What a registry holds: immutable adapter versions with signed manifests, and the aliases that point at them.

A version's digest is the digest of its PEFT files, so machines name content and people name ``federation@vN``.
Bytes never change; only an alias moves, and every move has an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fedllm import wire
from fedllm.adapter import AdapterSpec
from fedllm.errors import DigestMismatch, VersionUnsupported
from fedllm.identity import SigningIdentity, VerifyKey
from fedllm.ids import AliasName, Digest, sha256
from fedllm.messages.plan import Recipe

MANIFEST_VERSION = 1
_CONTEXT = "fedllm/1/manifest"


@dataclass(frozen=True)
class FileRecord:
    """One file of a version: SHA-256 of its bytes and their count."""

    sha256: Digest
    size: int


@dataclass(frozen=True)
class PrivacyRecord:
    """What the coordinator says about privacy; each owner's own ledger is the record that counts.

    Attributes
    ----------
    unit, relation : str
        Privacy unit and neighbouring relation.
    epsilon : float or None
        Over everything that `covers` names; None when nothing bounds it (no DP).
    delta : float
    covers : str
        Which releases the numbers cover, in words.
    source : str
        ``advisory``: computed from public plans, not from any owner's ledger.
    """

    unit: str
    relation: str
    epsilon: float | None
    delta: float
    covers: str
    source: str

    def __post_init__(self) -> None:
        """Refuse numbers that could be read as a guarantee."""
        if self.epsilon is not None and not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise ValueError("epsilon must be finite and not negative, or None")


@dataclass(frozen=True)
class Manifest:
    """Everything there is to know about a version, signed by the coordinator.

    Attributes
    ----------
    version : int
        Format of this record.
    federation, number, round
        Where it comes from; `number` counts versions, `round` counts rounds (aborted ones included).
    parent : Digest or None
        Version the round started from; None for the untrained start.
    base : Digest
        Content digest of the base model it was made for.
    spec : AdapterSpec
    files : dict[str, FileRecord]
        The PEFT files.
    state : Digest
        Digest of the `AdapterState`, which plans name as their head.
    method, recipe
        How it was trained.
    metrics : dict[str, float]
        Sums over owners only: mean losses, seconds, counts.
    privacy : PrivacyRecord
    cohort_size, survivors : int
        Owners asked, owners whose updates are in the sum. Names are in no manifest.
    plan : Digest
        H(plan) of the round.
    created : float
        Seconds since the Unix epoch.
    """

    version: int
    federation: str
    number: int
    parent: Digest | None
    round: int
    base: Digest
    spec: AdapterSpec
    files: dict[str, FileRecord]
    state: Digest
    method: str
    recipe: Recipe
    metrics: dict[str, float]
    privacy: PrivacyRecord
    cohort_size: int
    survivors: int
    plan: Digest
    created: float

    @property
    def digest(self) -> Digest:
        """The version's digest; see `content_digest`."""
        return content_digest({name: record.sha256 for name, record in self.files.items()})

    def check_files(self, files: Mapping[str, bytes]) -> None:
        """Return if `files` are exactly this version's, else raise `DigestMismatch` naming the file."""
        if set(files) != set(self.files):
            raise DigestMismatch(
                f"{self.federation}@v{self.number}: files {sorted(files)} found, {sorted(self.files)} expected"
            )
        for name, data in files.items():
            record = self.files[name]
            if len(data) != record.size or sha256(data) != record.sha256:
                raise DigestMismatch(
                    f"{self.federation}@v{self.number}: {name} is not the file that its manifest names",
                    hint="fetch it again; if it happens twice, the store or the way to it is corrupt",
                )


def content_digest(files: Mapping[str, str]) -> Digest:
    """Return the digest of a set of files: SHA-256 of the canonical map of name to SHA-256."""
    return sha256(wire.encode(dict(files)))


def version_name(federation: str, number: int) -> str:
    """Return the name people use, ``federation@vN``."""
    return f"{federation}@v{number}"


@dataclass(frozen=True)
class SignedManifest:
    """A manifest as it is stored and travels."""

    manifest: bytes
    signature: bytes

    @classmethod
    def sign(cls, manifest: Manifest, identity: SigningIdentity) -> SignedManifest:
        """Sign with the coordinator's identity."""
        data = wire.encode(manifest)
        return cls(data, identity.sign(_CONTEXT, data))

    def open(self, key: VerifyKey) -> Manifest:
        """Return the manifest if the pinned coordinator signed it.

        Raises
        ------
        SignatureInvalid, VersionUnsupported, DecodeError
        """
        key.verify(_CONTEXT, self.manifest, self.signature)
        version = wire.peek_int(self.manifest, "version")
        if version != MANIFEST_VERSION:
            raise VersionUnsupported(
                f"manifest version {version} found, {MANIFEST_VERSION} spoken here",
                hint="install the same fedllm release on coordinator and endpoint",
            )
        return wire.decode(Manifest, self.manifest)


@dataclass(frozen=True)
class AdapterVersion:
    """An immutable version: `digest` for machines, `name` (``federation@vN``) for people."""

    digest: Digest
    number: int
    name: str
    manifest: Manifest

    @classmethod
    def of(cls, manifest: Manifest) -> AdapterVersion:
        """Return the version that a (verified) manifest describes."""
        return cls(manifest.digest, manifest.number, version_name(manifest.federation, manifest.number), manifest)


@dataclass(frozen=True)
class AliasTable:
    """Where every alias points. `epoch` grows by one with each move, over all aliases of a registry."""

    epoch: int
    aliases: Mapping[AliasName, Digest]


@dataclass(frozen=True)
class AliasMove:
    """One line of an alias's history: who moved it, when, from where to where, and why."""

    epoch: int
    alias: AliasName
    previous: Digest | None
    new: Digest
    actor: str
    reason: str
    moved: float


@dataclass(frozen=True)
class FetchedVersion:
    """A version with its verified files, by name."""

    version: AdapterVersion
    files: Mapping[str, bytes]


class VersionSource(Protocol):
    """Where an endpoint learns of versions. What it returns is verified; what does not verify is raised."""

    async def aliases(self, since: int, wait_s: float) -> AliasTable:
        """Return the table once its epoch passes `since`, or as it stands after `wait_s` seconds."""

    async def fetch(self, digest: str) -> FetchedVersion:
        """Return a version and its files.

        Raises
        ------
        NotFound, PeerUnavailable, SignatureInvalid, DigestMismatch
        """

    async def versions(self) -> list[AdapterVersion]:
        """Return all versions, oldest first."""

"""The registry of one coordinator: content and metadata together, the only writer of both."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from fedllm.adapter import AdapterState, from_peft, to_peft
from fedllm.clock import Clock
from fedllm.errors import AdapterInvalid, NotFound
from fedllm.identity import SigningIdentity, VerifyKey
from fedllm.ids import AliasName, Digest, sha256
from fedllm.messages.plan import Recipe
from fedllm.registry.blobs import BlobStore
from fedllm.registry.metadata import Metadata
from fedllm.registry.model import (
    MANIFEST_VERSION,
    AdapterVersion,
    AliasMove,
    AliasTable,
    FetchedVersion,
    FileRecord,
    Manifest,
    PrivacyRecord,
    SignedManifest,
)
from fedllm.registry.observed import Observation, Report
from fedllm.registry.pins import DIGEST_PIN, NUMBER_PIN


@dataclass(frozen=True)
class VersionDraft:
    """What a round knows of the version it is about to add; see `Manifest` for the fields."""

    federation: str
    base_name: str
    parent: Digest | None
    round: int
    method: str
    recipe: Recipe
    metrics: dict[str, float]
    privacy: PrivacyRecord
    cohort_size: int
    survivors: int
    plan: Digest


class Registry:
    """Versions, their files and aliases in one folder.

    Parameters
    ----------
    folder : Path
        Holds ``blobs/`` and ``registry.sqlite``.
    key : VerifyKey
        Key that manifests must be signed with; a manifest that was changed on disk is raised, not served.
    clock : Clock
    blobs : BlobStore, optional
        Another store for the files.
    """

    def __init__(self, folder: Path, key: VerifyKey, clock: Clock, *, blobs: BlobStore | None = None) -> None:
        self.blobs = blobs or BlobStore(folder / "blobs")
        self._metadata = Metadata(folder / "registry.sqlite")
        self._key = key
        self._clock = clock
        self._waiting: set[asyncio.Event] = set()

    def close(self) -> None:
        """Close the database."""
        self._metadata.close()

    def add(self, state: AdapterState, draft: VersionDraft, identity: SigningIdentity) -> AdapterVersion:
        """Add the version of a round; adding it again returns the one that is there.

        A round whose result is byte for byte an existing version of its federation makes no second one.

        Raises
        ------
        DiskFull
            Before anything is written.
        AdapterInvalid
            If another federation already holds exactly these bytes.
        """
        there = self._metadata.find_round(draft.federation, draft.round)
        if there is not None:
            return AdapterVersion.of(there.open(self._key))
        files = to_peft(state, base_name=draft.base_name)
        manifest = self._manifest(state, draft, files, self._metadata.next_number(draft.federation))
        same = self._same(manifest.digest, draft.federation, f"round {draft.round} of {draft.federation}")
        if same is not None:
            return same
        for data in files.values():
            self.blobs.put(data)
        self._metadata.add_version(
            digest=manifest.digest,
            federation=draft.federation,
            number=manifest.number,
            round_number=draft.round,
            signed=SignedManifest.sign(manifest, identity),
        )
        return AdapterVersion.of(manifest)

    def import_state(
        self, state: AdapterState, draft: VersionDraft, identity: SigningIdentity, *, alias: AliasName | None
    ) -> AdapterVersion:
        """Add a version that no round made, under its line's next number; the same bytes again make no second one.

        Parameters
        ----------
        draft : VersionDraft
            Its `round` is 0.
        alias : AliasName or None
            Where the line is published to; None if it is known.

        Raises
        ------
        DiskFull, NotFound, AliasConflict
            Before any version is added; see `Metadata.import_version`.
        AdapterInvalid
            If another federation or line already holds exactly these bytes.
        """
        files = to_peft(state, base_name=draft.base_name)
        made: list[AdapterVersion] = []

        def sign(number: int) -> tuple[Digest, SignedManifest]:
            manifest = self._manifest(state, draft, files, number)
            made.append(AdapterVersion.of(manifest))
            return manifest.digest, SignedManifest.sign(manifest, identity)

        digest = self._manifest(state, draft, files, 1).digest
        same = self._same(digest, draft.federation, f"an import into {draft.federation}")
        if same is not None:
            return same
        for data in files.values():
            self.blobs.put(data)
        self._metadata.import_version(draft.federation, alias, sign)
        return made[0]

    def lines(self) -> dict[str, AliasName]:
        """Return where each line of imported versions is published to."""
        return self._metadata.lines()

    def _same(self, digest: Digest, federation: str, what: str) -> AdapterVersion | None:
        same = self._metadata.find(digest)
        if same is None:
            return None
        version = AdapterVersion.of(same.open(self._key))
        if version.manifest.federation != federation:
            raise AdapterInvalid(f"{what} made exactly {version.name}")
        return version

    def _manifest(self, state: AdapterState, draft: VersionDraft, files: dict[str, bytes], number: int) -> Manifest:
        return Manifest(
            version=MANIFEST_VERSION,
            federation=draft.federation,
            number=number,
            parent=draft.parent,
            round=draft.round,
            base=state.spec.base,
            spec=state.spec,
            files={name: FileRecord(sha256(data), len(data)) for name, data in files.items()},
            state=state.digest,
            method=draft.method,
            recipe=draft.recipe,
            metrics=draft.metrics,
            privacy=draft.privacy,
            cohort_size=draft.cohort_size,
            survivors=draft.survivors,
            plan=draft.plan,
            created=self._clock.now(),
        )

    def signed(self, digest: str) -> SignedManifest:
        """Return a version's manifest as it was signed, or raise `NotFound`."""
        found = self._metadata.find(digest)
        if found is None:
            raise NotFound(f"no version {digest[:16]}…", hint="'fedllm adapter list' shows what there is")
        return found

    def get(self, digest: str) -> AdapterVersion:
        """Return a version by digest, its signature verified, or raise `NotFound`."""
        return AdapterVersion.of(self.signed(digest).open(self._key))

    def by_number(self, federation: str, number: int) -> AdapterVersion:
        """Return ``federation@v<number>``, or raise `NotFound`."""
        found = self._metadata.find_number(federation, number)
        if found is None:
            raise NotFound(f"no version {federation}@v{number}", hint="'fedllm adapter list' shows what there is")
        return AdapterVersion.of(found.open(self._key))

    def of_round(self, federation: str, round_number: int) -> AdapterVersion | None:
        """Return the version that a round added, or None."""
        found = self._metadata.find_round(federation, round_number)
        return None if found is None else AdapterVersion.of(found.open(self._key))

    def find(self, federation: str, pin: str) -> AdapterVersion | None:
        """Return the version of a federation that a pin means (see `fedllm.registry.pins`), or None."""
        found = self.find_signed(federation, pin)
        return None if found is None else AdapterVersion.of(found.open(self._key))

    def find_signed(self, federation: str, pin: str) -> SignedManifest | None:
        """Return the manifest of `find` as it was signed."""
        if NUMBER_PIN.fullmatch(pin):
            return self._metadata.find_number(federation, int(pin[1:]))
        return self._metadata.find_prefix(federation, pin) if DIGEST_PIN.fullmatch(pin) else None

    def versions(self) -> list[AdapterVersion]:
        """Return all versions, oldest first."""
        return [AdapterVersion.of(signed.open(self._key)) for signed in self._metadata.versions()]

    def signed_versions(self) -> list[SignedManifest]:
        """Return all manifests as they were signed, oldest first; not verified here."""
        return self._metadata.versions()

    def fetch(self, digest: str) -> FetchedVersion:
        """Return a version with its files, everything verified."""
        version = self.get(digest)
        files = {name: self.blobs.get(record.sha256) for name, record in version.manifest.files.items()}
        version.manifest.check_files(files)
        return FetchedVersion(version, files)

    def state(self, digest: str) -> AdapterState:
        """Return a version's factors."""
        fetched = self.fetch(digest)
        return from_peft(fetched.files, base=fetched.version.manifest.base)

    def promote(self, alias: AliasName, new: Digest, *, expected: Digest | None, actor: str, reason: str) -> AliasTable:
        """Move an alias by compare-and-swap; raise `AliasConflict` or `NotFound`."""
        moved = self._clock.now()
        self._metadata.move_alias(alias, new, expected=expected, actor=actor, reason=reason, moved=moved)
        for event in self._waiting:
            event.set()
        return self.aliases()

    def rollback(self, alias: AliasName, *, actor: str, reason: str, to: Digest | None = None) -> AliasTable:
        """Move an alias back to `to`, by default to where it pointed before its last move.

        Rolling back refunds no privacy budget: a released version stays released.
        """
        moves = self.history(alias)
        target = to or (moves[-1].previous if moves else None)
        if target is None:
            raise NotFound(f"alias {alias!r} has no earlier version to go back to")
        return self.promote(alias, target, expected=moves[-1].new if moves else None, actor=actor, reason=reason)

    def history(self, alias: AliasName) -> list[AliasMove]:
        """Return every move of an alias, oldest first."""
        return self._metadata.history(alias)

    def aliases(self) -> AliasTable:
        """Return the alias table as it stands."""
        return self._metadata.aliases()

    def observe(self, report: Report) -> bool:
        """Add an endpoint's report to the sums; False if it was taken in before. Raise `NotFound` as a whole."""
        return self._metadata.observe(report)

    def observed(self, version: Digest | None = None) -> dict[Digest, dict[str, list[Observation]]]:
        """Return what endpoints reported: version to endpoint to its sums by alias."""
        found: dict[Digest, dict[str, list[Observation]]] = {}
        for endpoint, seen in self._metadata.observed(version):
            found.setdefault(seen.version, {}).setdefault(endpoint, []).append(seen)
        return found

    async def aliases_after(self, since: int, wait_s: float) -> AliasTable:
        """Return the alias table once its epoch passes `since`, or as it stands after `wait_s` seconds.

        Moves made by this process end the wait at once: the registry has one writer.
        """
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            table = self.aliases()
            if table.epoch > since or wait_s <= 0:
                return table
            try:
                await asyncio.wait_for(event.wait(), wait_s)
            except TimeoutError:
                return table
            return self.aliases()
        finally:
            self._waiting.discard(event)

"""A version source in memory, and signed-looking versions for it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from fedllm.adapter import AdapterState, to_peft
from fedllm.errors import FedllmError, NotFound
from fedllm.ids import AliasName, Digest, sha256
from fedllm.messages.plan import Recipe
from fedllm.registry.model import (
    MANIFEST_VERSION,
    AdapterVersion,
    AliasTable,
    FetchedVersion,
    FileRecord,
    Manifest,
    PrivacyRecord,
)


def make_version(state: AdapterState, number: int, federation: str = "tools") -> FetchedVersion:
    """Return an adapter as a fetched version with a complete manifest."""
    files = to_peft(state, base_name="tiny")
    manifest = Manifest(
        version=MANIFEST_VERSION,
        federation=federation,
        number=number,
        parent=None,
        round=number,
        base=state.spec.base,
        spec=state.spec,
        files={name: FileRecord(sha256(data), len(data)) for name, data in files.items()},
        state=state.digest,
        method="ffa",
        recipe=Recipe("sgd", 0.1, 1, 1, 1, 64),
        metrics={},
        privacy=PrivacyRecord("record", "add-or-remove-one", None, 1e-5, "nothing", "advisory"),
        cohort_size=3,
        survivors=3,
        plan=sha256(b"plan"),
        created=1_700_000_000.0 + number,
    )
    return FetchedVersion(AdapterVersion.of(manifest), files)


def with_manifest_of(version: FetchedVersion, other: FetchedVersion) -> FetchedVersion:
    """Return a version whose manifest names another version's state."""
    manifest = replace(version.version.manifest, state=other.version.manifest.state)
    return FetchedVersion(replace(version.version, manifest=manifest), version.files)


class FakeSource:
    """A `VersionSource` whose aliases the test moves and whose failures the test sets."""

    def __init__(self) -> None:
        self.table = AliasTable(0, {})
        self.stored: dict[str, FetchedVersion] = {}
        self.failure: FedllmError | None = None
        self.fetches = 0
        self._moved = asyncio.Event()

    def publish(self, alias: str, version: FetchedVersion) -> Digest:
        """Store a version and move the alias to it."""
        digest = version.version.digest
        self.stored[digest] = version
        self.table = AliasTable(self.table.epoch + 1, {**self.table.aliases, AliasName(alias): digest})
        self._moved.set()
        return digest

    def withdraw(self, alias: str) -> None:
        """Remove an alias."""
        left = {a: d for a, d in self.table.aliases.items() if a != alias}
        self.table = AliasTable(self.table.epoch + 1, left)
        self._moved.set()

    async def aliases(self, since: int, wait_s: float) -> AliasTable:
        """Return the table once it is newer than `since`, or after `wait_s`."""
        if self.failure is not None:
            raise self.failure
        if self.table.epoch <= since and wait_s > 0:
            self._moved.clear()
            try:
                await asyncio.wait_for(self._moved.wait(), wait_s)
            except TimeoutError:
                return self.table
        return self.table

    async def fetch(self, digest: str) -> FetchedVersion:
        """Return a stored version."""
        if self.failure is not None:
            raise self.failure
        if digest not in self.stored:
            raise NotFound(f"no version {digest[:8]}")
        self.fetches += 1
        return self.stored[digest]

    async def versions(self) -> list[AdapterVersion]:
        """Return all stored versions."""
        return [fetched.version for fetched in self.stored.values()]

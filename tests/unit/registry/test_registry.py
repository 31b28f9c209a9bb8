"""Versions are immutable, aliases move by compare-and-swap, and what was changed on disk is noticed."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import numpy as np
import pytest
from patience import NEVER_S, PATIENCE_S

from fedllm import wire
from fedllm.adapter import AdapterSpec, AdapterState, from_peft
from fedllm.clock import FakeClock
from fedllm.errors import (
    AliasConflict,
    DecodeError,
    DigestMismatch,
    DiskFull,
    NotFound,
    SignatureInvalid,
    VersionUnsupported,
)
from fedllm.identity import SigningIdentity
from fedllm.ids import AliasName, Digest, sha256
from fedllm.messages.plan import Recipe
from fedllm.registry.blobs import HEADROOM_BYTES, BlobStore
from fedllm.registry.model import AdapterVersion, Manifest, PrivacyRecord, SignedManifest, content_digest
from fedllm.registry.remote import LocalVersionSource
from fedllm.registry.store import Registry, VersionDraft
from fedllm.rng import SeededRng

ALIAS = AliasName("acme/tools")
SPEC = AdapterSpec(Digest("ab" * 32), 2, 4, {"q_proj": (6, 4)}, (0, 1))
KEY = SigningIdentity.from_seed(b"\x01" * 32)
OTHER = SigningIdentity.from_seed(b"\x02" * 32)


def draft(number: int, *, federation: str = "tools", epsilon: float | None = 1.5) -> VersionDraft:
    """Return what a round would say of its version."""
    return VersionDraft(
        federation=federation,
        base_name="base",
        parent=None,
        round=number,
        method="ffa",
        recipe=Recipe("sgd", 1.0, 2, 8, 8, 160),
        metrics={"candidate_loss": 1.25},
        privacy=PrivacyRecord("record", "add-or-remove-one", epsilon, 1e-5, "rounds 1 to 2", "advisory"),
        cohort_size=4,
        survivors=3,
        plan=Digest("cd" * 32),
    )


def state(seed: int) -> AdapterState:
    """Return some adapter."""
    return AdapterState.initial(SPEC, SeededRng(seed))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Return an empty registry."""
    return Registry(tmp_path / "registry", KEY.public, FakeClock())


def test_a_version_comes_back_bit_for_bit(registry: Registry) -> None:
    """Factors, digests and manifest survive the way through PEFT files, blobs and SQLite."""
    version = registry.add(state(1), draft(1), KEY)
    assert (version.name, version.number, version.manifest.parent) == ("tools@v1", 1, None)
    fetched = registry.fetch(version.digest)
    again = from_peft(fetched.files, base=version.manifest.base)
    assert again.digest == version.manifest.state == state(1).digest
    np.testing.assert_array_equal(registry.state(version.digest).flat, state(1).flat)
    assert registry.by_number("tools", 1) == registry.get(version.digest) == version


def test_adding_a_round_twice_is_adding_it_once(registry: Registry) -> None:
    """A coordinator that crashed after adding adds again: the same version, whatever state it brings."""
    first = registry.add(state(1), draft(1), KEY)
    assert registry.add(state(2), draft(1), KEY) == first
    assert registry.add(state(1), draft(2), KEY) == first, "a round that changed nothing makes no version"
    assert [v.number for v in registry.versions()] == [1]
    assert registry.add(state(2), draft(3), KEY).number == 2


def test_version_digest_is_the_digest_of_its_files() -> None:
    """Known answer: SHA-256 of the canonical map of names to SHA-256."""
    files = {"b": sha256(b"2"), "a": sha256(b"1")}
    expected = sha256(
        bytes([0xA2, 0x61, 0x61, 0x78, 64]) + files["a"].encode() + b"\x61b\x78\x40" + files["b"].encode()
    )
    assert content_digest(files) == expected


def test_manifest_verifies_against_the_pinned_key_only(registry: Registry) -> None:
    """The right key opens it; another key, a changed byte and a future version are each refused by name."""
    signed = registry.signed(registry.add(state(1), draft(1), KEY).digest)
    assert signed.open(KEY.public).round == 1
    with pytest.raises(SignatureInvalid):
        signed.open(OTHER.public)
    with pytest.raises(SignatureInvalid):
        SignedManifest(signed.manifest[:-1] + bytes([signed.manifest[-1] ^ 1]), signed.signature).open(KEY.public)
    future = wire.decode(Manifest, signed.manifest)
    future = Manifest(**{**vars(future), "version": 2})
    with pytest.raises(VersionUnsupported, match="version 2 found, 1 spoken"):
        SignedManifest.sign(future, KEY).open(KEY.public)


def test_infinite_epsilon_is_said_as_none(registry: Registry) -> None:
    """Without DP the manifest says that nothing bounds epsilon; a NaN or an infinity cannot be written."""
    assert registry.add(state(1), draft(1, epsilon=None), KEY).manifest.privacy.epsilon is None
    with pytest.raises(ValueError, match="finite"):
        draft(2, epsilon=float("inf"))


def test_a_changed_blob_is_never_served(registry: Registry) -> None:
    """One flipped bit in a file on disk raises when it is read."""
    version = registry.add(state(1), draft(1), KEY)
    path = registry.blobs.path(version.manifest.files["adapter_model.safetensors"].sha256)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DigestMismatch, match="does not hash to its name"):
        registry.fetch(version.digest)


def test_files_of_another_version_do_not_pass(registry: Registry) -> None:
    """Right files under the wrong manifest, and a missing file, are both named."""
    one, two = registry.add(state(1), draft(1), KEY), registry.add(state(2), draft(2), KEY)
    files = dict(registry.fetch(two.digest).files)
    with pytest.raises(DigestMismatch, match=r"tools@v1: adapter_model\.safetensors"):
        one.manifest.check_files(files)
    del files["adapter_config.json"]
    with pytest.raises(DigestMismatch, match="expected"):
        two.manifest.check_files(files)


def test_alias_moves_by_compare_and_swap(registry: Registry) -> None:
    """A move from where the alias is not fails, names both digests, and changes nothing."""
    one, two = registry.add(state(1), draft(1), KEY), registry.add(state(2), draft(2), KEY)
    table = registry.promote(ALIAS, one.digest, expected=None, actor="gate", reason="first")
    assert (table.epoch, table.aliases) == (1, {ALIAS: one.digest})
    with pytest.raises(AliasConflict) as caught:
        registry.promote(ALIAS, two.digest, expected=two.digest, actor="gate", reason="stale")
    assert one.digest[:16] in caught.value.message
    assert two.digest[:16] in caught.value.message
    with pytest.raises(AliasConflict, match="not at nothing"):
        registry.promote(ALIAS, two.digest, expected=None, actor="gate", reason="stale")
    with pytest.raises(NotFound):
        registry.promote(ALIAS, Digest("00" * 32), expected=one.digest, actor="gate", reason="no such")
    assert registry.aliases() == table


def test_rollback_is_another_move(registry: Registry) -> None:
    """History keeps who, from, to and why; the epoch only grows; rolling back twice goes forward again."""
    one, two = registry.add(state(1), draft(1), KEY), registry.add(state(2), draft(2), KEY)
    with pytest.raises(NotFound):
        registry.rollback(ALIAS, actor="operator", reason="nothing there")
    registry.promote(ALIAS, one.digest, expected=None, actor="gate", reason="first")
    with pytest.raises(NotFound):
        registry.rollback(ALIAS, actor="operator", reason="no earlier one")
    registry.promote(ALIAS, two.digest, expected=one.digest, actor="gate", reason="better")
    assert registry.rollback(ALIAS, actor="operator", reason="odd answers").aliases[ALIAS] == one.digest
    assert registry.rollback(ALIAS, actor="operator", reason="was fine").aliases[ALIAS] == two.digest
    moves = registry.history(ALIAS)
    assert [m.epoch for m in moves] == [1, 2, 3, 4]
    assert (moves[2].previous, moves[2].new, moves[2].actor) == (two.digest, one.digest, "operator")


def test_two_writers_cannot_both_win(tmp_path: Path) -> None:
    """Two processes' worth of registries on one folder, eight threads: exactly one compare-and-swap succeeds."""
    from concurrent.futures import ThreadPoolExecutor

    registries = [Registry(tmp_path / "r", KEY.public, FakeClock()) for _ in range(2)]
    version = registries[0].add(state(1), draft(1), KEY)

    def race(n: int) -> bool:
        try:
            registries[n % 2].promote(ALIAS, version.digest, expected=None, actor=str(n), reason="race")
        except AliasConflict:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(race, range(8))) == 1
    assert len(registries[0].history(ALIAS)) == 1


def test_waiting_for_an_epoch_ends_with_the_move(registry: Registry) -> None:
    """A waiter wakes on the move; one that waits in vain gets the table as it stands."""

    async def scenario() -> None:
        version = registry.add(state(1), draft(1), KEY)
        waiter = asyncio.create_task(registry.aliases_after(0, NEVER_S))
        await asyncio.sleep(0)
        registry.promote(ALIAS, version.digest, expected=None, actor="gate", reason="first")
        assert (await asyncio.wait_for(waiter, PATIENCE_S)).epoch == 1
        assert (await registry.aliases_after(1, 0.01)).epoch == 1
        assert (await asyncio.wait_for(registry.aliases_after(0, NEVER_S), PATIENCE_S)).epoch == 1

    asyncio.run(scenario())


def test_local_source_reads_what_the_coordinator_wrote(registry: Registry, tmp_path: Path) -> None:
    """A shared folder is a version source; with another pinned key it is nothing."""

    async def scenario() -> None:
        version = registry.add(state(1), draft(1), KEY)
        source = LocalVersionSource(tmp_path / "registry", KEY.public, FakeClock())
        assert (await source.aliases(0, 5.0)).epoch == 0
        registry.promote(ALIAS, version.digest, expected=None, actor="gate", reason="first")
        assert (await source.aliases(0, 5.0)).aliases == {ALIAS: version.digest}
        assert (await source.fetch(version.digest)).version == version
        assert await source.versions() == [version]
        with pytest.raises(SignatureInvalid):
            await LocalVersionSource(tmp_path / "registry", OTHER.public, FakeClock()).versions()

    asyncio.run(scenario())
    with pytest.raises(NotFound):
        LocalVersionSource(tmp_path / "nowhere", KEY.public)


def test_disk_full_is_said_before_writing(tmp_path: Path) -> None:
    """Too little room: nothing is written, and the error says how much is there and needed."""
    store = BlobStore(tmp_path / "blobs", free_bytes=lambda _path: HEADROOM_BYTES + 9)
    with pytest.raises(DiskFull, match="10 bytes to write"):
        store.put(b"0123456789")
    assert [p for p in (tmp_path / "blobs").rglob("*") if p.is_file()] == []
    assert store.get(store.put(b"012345678")) == b"012345678"


def test_disk_that_fills_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's own "no space" becomes the same error, and no half of a file stays."""
    store = BlobStore(tmp_path / "blobs")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull):
        store.put(b"data")
    assert [p for p in (tmp_path / "blobs").rglob("*") if p.is_file()] == []


def test_a_version_whose_blob_cannot_be_written_is_not_there(tmp_path: Path) -> None:
    """No room for the files: no version either, and no half of one."""
    full = BlobStore(tmp_path / "blobs", free_bytes=lambda _path: 0)
    registry = Registry(tmp_path / "registry", KEY.public, FakeClock(), blobs=full)
    with pytest.raises(DiskFull):
        registry.add(state(1), draft(1), KEY)
    assert registry.versions() == []


def test_blob_names_are_digests_and_nothing_else(tmp_path: Path) -> None:
    """A path that climbs out of the folder is not a name; an unknown digest is not found."""
    store = BlobStore(tmp_path / "blobs")
    with pytest.raises(DecodeError):
        store.get(Digest("../../etc/passwd"))
    with pytest.raises(NotFound):
        store.get(Digest("ef" * 32))


def test_number_and_digest_name_the_same_version(registry: Registry) -> None:
    """``federation@vN`` counts within its federation."""
    one = registry.add(state(1), draft(1), KEY)
    other = registry.add(state(2), draft(1, federation="legal"), KEY)
    assert (one.name, other.name) == ("tools@v1", "legal@v1")
    with pytest.raises(NotFound, match="tools@v2"):
        registry.by_number("tools", 2)
    assert registry.of_round("legal", 1) == other
    assert registry.of_round("legal", 2) is None
    assert AdapterVersion.of(other.manifest) == other

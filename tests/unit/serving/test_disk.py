"""The tier on disk: asked before the registry, verified when read back, bounded, and never a reason to fail."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from unit.serving.registry_fake import make_version
from unit.serving.test_tiers import small_adapter

from fedllm.errors import DigestMismatch, PeerUnavailable
from fedllm.identity import SigningIdentity
from fedllm.registry.model import FetchedVersion, SignedManifest
from fedllm.registry.remote import HttpVersionSource, manifest_to_json
from fedllm.serving.disk import CachingClient, DiskCache

COORDINATOR = SigningIdentity.generate()
STRANGER = SigningIdentity.generate()


class RegistryOnTheWire:
    """Answers like a coordinator's API, counts, and can be switched off."""

    def __init__(self, *versions: FetchedVersion) -> None:
        self.answers: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.up = True
        for fetched in versions:
            signed = SignedManifest.sign(fetched.version.manifest, COORDINATOR)
            body = manifest_to_json(signed, fetched.version)
            self.answers[f"/v1/versions/{fetched.version.digest}"] = json.dumps(body).encode()
            for name, record in fetched.version.manifest.files.items():
                self.answers[f"/v1/blobs/{record.sha256}"] = fetched.files[name]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer one request."""
        if not self.up:
            raise httpx.ConnectError("down")
        self.asked.append(request.url.path)
        data = self.answers.get(request.url.path)
        return httpx.Response(404) if data is None else httpx.Response(200, content=data)

    def source(self, folder: Path, max_bytes: int = 1 << 20) -> tuple[HttpVersionSource, DiskCache]:
        """Return a reader with a tier on disk."""
        cache = DiskCache(folder, COORDINATOR.public, max_bytes=max_bytes)
        client = CachingClient(cache, base_url="http://registry", transport=httpx.MockTransport(self))
        return HttpVersionSource("http://registry", COORDINATOR.public, client=client), cache


def test_disk_answers_when_the_registry_is_gone(tmp_path, drive) -> None:
    """A version is downloaded once, also over restarts of the endpoint."""
    version = make_version(small_adapter(1), 1)
    digest = version.version.digest

    async def body():
        wire = RegistryOnTheWire(version)
        assert await wire.source(tmp_path)[0].fetch(digest) == version
        assert len(wire.asked) == 3
        wire.up = False
        source, cache = wire.source(tmp_path)
        assert await source.fetch(digest) == version
        assert (cache.hits, cache.damaged) == ({"versions": 1, "blobs": 2}, 0)
        with pytest.raises(PeerUnavailable):
            await source.fetch("0" * 64)

    drive(body())


def test_what_is_damaged_on_disk_is_fetched_again(tmp_path, drive) -> None:
    """A changed byte, a cut file, another signature, another version's manifest: none is believed, each is mended."""
    version, other = make_version(small_adapter(1), 1), make_version(small_adapter(2), 2)
    digest = version.version.digest
    record = next(iter(version.version.manifest.files.values()))
    forged = SignedManifest.sign(version.version.manifest, STRANGER)
    blob, manifest = f"blobs/{record.sha256[:2]}/{record.sha256}", f"versions/{digest[:2]}/{digest}"

    async def body():
        wire = RegistryOnTheWire(version, other)
        source, cache = wire.source(tmp_path)
        await source.fetch(digest)
        whole = (tmp_path / manifest).read_bytes()
        damage = [
            (blob, bytes(record.size)),
            (blob, b""),
            (manifest, whole[:-9]),
            (manifest, b"[1]"),
            (manifest, json.dumps(manifest_to_json(forged, version.version)).encode()),
            (manifest, wire.answers[f"/v1/versions/{other.version.digest}"]),
        ]
        for number, (path, data) in enumerate(damage, 1):
            (tmp_path / path).write_bytes(data)
            asked = len(wire.asked)
            assert await source.fetch(digest) == version
            assert cache.damaged == number
            assert len(wire.asked) == asked + 1
        assert (tmp_path / manifest).read_bytes() == whole

    drive(body())


def test_what_does_not_verify_is_never_kept(tmp_path, drive) -> None:
    """A registry that answers wrong bytes is refused, and its answer is not there afterwards."""
    version = make_version(small_adapter(1), 1)

    async def body():
        wire = RegistryOnTheWire(version)
        record = next(iter(version.version.manifest.files.values()))
        wire.answers[f"/v1/blobs/{record.sha256}"] = b"something else"
        with pytest.raises(DigestMismatch):
            await wire.source(tmp_path)[0].fetch(version.version.digest)
        assert not list(tmp_path.glob(f"blobs/*/{record.sha256}"))

    drive(body())


def test_disk_keeps_to_its_bytes_and_a_broken_disk_only_costs_time(tmp_path, drive) -> None:
    """The least recently used files go; a folder that cannot be written keeps nothing and fails nobody."""
    versions = [make_version(small_adapter(i), i + 1) for i in range(6)]

    async def body():
        wire = RegistryOnTheWire(*versions)
        folder = tmp_path / "cache"
        source, _ = wire.source(folder, max_bytes=9000)
        for version in versions:
            await source.fetch(version.version.digest)
            assert sum(path.stat().st_size for path in folder.glob("*/*/*")) <= 9000
        asked = len(wire.asked)
        assert await source.fetch(versions[-1].version.digest) == versions[-1]
        assert len(wire.asked) == asked
        assert await source.fetch(versions[0].version.digest) == versions[0]
        assert len(wire.asked) > asked
        blocked = tmp_path / "blocked"
        blocked.write_text("a file where the folder should be")
        source, _ = wire.source(blocked)
        assert await source.fetch(versions[0].version.digest) == versions[0]

    drive(body())

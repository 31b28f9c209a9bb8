"""Versions on this machine's disk: one folder each, named by digest, whole or not there, and never changed.

A version's digest is the digest of its files, so a folder proves by itself that it holds what its name says; that the
coordinator made it is proved once, before the folder exists.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from fedllm.errors import BaseMismatch, DigestMismatch
from fedllm.ids import Digest, sha256
from fedllm.registry.model import VersionSource, content_digest

_PART = ".part-"


class VersionStore:
    """A folder of versions for one base.

    Parameters
    ----------
    folder : Path
        Made if need be. Below it versions lie under their base's digest: a machine that is given another base starts
        with an empty folder, and no adapter meets a base that it was not made for.
    base : Digest
        What the engine serves.
    """

    def __init__(self, folder: Path, base: Digest) -> None:
        self._folder = folder / base
        self._base = base
        self._turns: defaultdict[Digest, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def find(self, digest: Digest, source: VersionSource) -> Path:
        """Return a version's folder, fetched and verified if it was not there.

        Raises
        ------
        NotFound, PeerUnavailable, SignatureInvalid, DigestMismatch
            See `fedllm.registry.model.VersionSource.fetch`.
        DigestMismatch
            If what is there, or what was fetched, is not that version.
        BaseMismatch
            If it was made for another base.
        """
        place = self._folder / digest
        async with self._turns[digest]:
            if not place.is_dir():
                files = await self._fetch(digest, source)
                await asyncio.to_thread(self._keep, files, place)
            await asyncio.to_thread(_check, place, digest)
        return place

    async def _fetch(self, digest: Digest, source: VersionSource) -> Mapping[str, bytes]:
        fetched = await source.fetch(digest)
        manifest = fetched.version.manifest
        # A source verifies what it returns; whether that is what was asked for is checked here, whoever wrote it.
        if manifest.digest != digest:
            raise DigestMismatch(f"version {digest[:16]}… asked for, {manifest.digest[:16]}… answered")
        manifest.check_files(fetched.files)
        if manifest.base != self._base:
            raise BaseMismatch(
                f"{fetched.version.name} is for base {manifest.base[:16]}…, {self._base[:16]}… is served here"
            )
        return fetched.files

    def _keep(self, files: Mapping[str, bytes], place: Path) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=_PART, dir=self._folder))
        try:
            for name, data in files.items():
                _write(part / name, data)
            part.chmod(0o755)
            _sync(part)
            try:
                part.rename(place)
            except OSError:
                if not place.is_dir():
                    raise
                return  # another of this server's processes was first; what it wrote is checked as well
            _sync(self._folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _check(place: Path, digest: Digest) -> None:
    """Raise `DigestMismatch` if a folder's files are not the version that its name says."""
    found = content_digest({file.name: sha256(file.read_bytes()) for file in place.iterdir()})
    if found != digest:
        raise DigestMismatch(
            f"{place} holds {found[:16]}…, not the version of its name",
            hint="stop the server, remove that folder, start it again",
        )


def _write(file: Path, data: bytes) -> None:
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    file.chmod(0o444)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

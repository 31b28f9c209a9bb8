"""Files by content: an immutable folder ``blobs/<aa>/<digest>``, written atomically, verified on every read."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from fedllm.errors import DigestMismatch, DiskFull, NotFound
from fedllm.ids import Digest, check_digest, sha256

HEADROOM_BYTES = 16 << 20
"""Room left for databases and logs: a write that would eat into it is refused before it begins."""


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


class BlobStore:
    """Content-addressed files.

    Parameters
    ----------
    folder : Path
        Created when missing.
    free_bytes : Callable[[Path], int]
        Bytes free where `folder` is; replaced in tests.
    """

    def __init__(self, folder: Path, *, free_bytes: Callable[[Path], int] = _free_bytes) -> None:
        self._folder = folder
        self._free_bytes = free_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, digest: Digest) -> Path:
        """Return where a blob is, or would be; raise `DecodeError` if `digest` is not a digest."""
        check_digest(digest, what="blob name")
        return self._folder / digest[:2] / digest

    def put(self, data: bytes) -> Digest:
        """Store `data` and return its digest; storing the same bytes again changes nothing.

        Raises
        ------
        DiskFull
            Before anything is written if room is short; nothing half-written stays behind either way.
        """
        digest = sha256(data)
        target = self.path(digest)
        if target.is_file():
            return digest
        free = self._free_bytes(self._folder)
        if free < len(data) + HEADROOM_BYTES:
            raise _disk_full(self._folder, len(data), free)
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".incoming-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(target)
        except OSError as error:
            Path(name).unlink(missing_ok=True)
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise _disk_full(self._folder, len(data), self._free_bytes(self._folder)) from None
            raise
        _sync_folder(target.parent)
        return digest

    def get(self, digest: Digest) -> bytes:
        """Return a blob's bytes.

        Raises
        ------
        NotFound
            If there is none of this name.
        DigestMismatch
            If the bytes on disk do not hash to their name.
        """
        target = self.path(digest)
        if not target.is_file():
            raise NotFound(f"no blob {digest[:16]}…")
        data = target.read_bytes()
        if sha256(data) != digest:
            raise DigestMismatch(
                f"blob {digest[:16]}… does not hash to its name: {len(data)} bytes on disk were changed",
                hint="restore the registry folder from a copy; versions made of this blob cannot be served",
            )
        return data


def _disk_full(folder: Path, needed: int, free: int) -> DiskFull:
    return DiskFull(
        f"{folder}: {needed} bytes to write, {free} free, {HEADROOM_BYTES} of them kept for databases",
        hint="make room on this disk, or move the coordinator's home to a larger one",
    )


def _sync_folder(folder: Path) -> None:
    # a rename is durable only once its folder is
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The tier on disk: what a registry answers about a version never changes, so it is kept and not asked for again.

Nothing kept is believed. A manifest read back must carry the pinned signature and name the version asked for, a file
must hash to its name; what does not is removed and fetched again. So a write needs no fsync: a torn file is a
damaged one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from fedllm.errors import FedllmError
from fedllm.identity import VerifyKey
from fedllm.ids import sha256
from fedllm.registry.model import AdapterVersion
from fedllm.registry.remote import manifest_from_json
from fedllm.telemetry import event

_LOG = logging.getLogger("fedllm.serving.disk")
_IMMUTABLE = re.compile(r"/v1/(versions|blobs)/([0-9a-f]{64})$")
_DRAFT = ".incoming-"


class DiskCache:
    """Verified answers by kind and digest, least recently used removed first.

    Parameters
    ----------
    folder : Path
        Made when something is first kept; may be deleted at any time.
    key : VerifyKey
        Key that manifests must be signed with.
    max_bytes : int
        Bytes kept on disk.
    """

    def __init__(self, folder: Path, key: VerifyKey, *, max_bytes: int) -> None:
        self._folder = folder
        self._key = key
        self._max_bytes = max_bytes
        self._bytes: int | None = None
        self.hits: Counter[str] = Counter()
        self.damaged = 0

    def get(self, kind: str, digest: str) -> bytes | None:
        """Return a kept answer, verified, or None; a damaged one is removed."""
        path = self._path(kind, digest)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if not self._verifies(kind, digest, data):
            self.damaged += 1
            event(_LOG, "kept file is damaged", level=logging.WARNING, kind=kind, digest=digest)
            path.unlink(missing_ok=True)
            return None
        self.hits[kind] += 1
        with suppress(OSError):  # removed meanwhile: the bytes are good all the same
            os.utime(path)
        return data

    def put(self, kind: str, digest: str, data: bytes) -> None:
        """Keep an answer if it verifies; a full or missing disk is logged and keeps nothing."""
        if len(data) > self._max_bytes or not self._verifies(kind, digest, data):
            return
        path = self._path(kind, digest)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=_DRAFT)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                Path(draft).replace(path)
            finally:
                Path(draft).unlink(missing_ok=True)
            self._make_room(len(data))
        except OSError as error:
            event(_LOG, "nothing is kept on disk", level=logging.WARNING, reason=type(error).__name__)

    def _path(self, kind: str, digest: str) -> Path:
        return self._folder / kind / digest[:2] / digest

    def _verifies(self, kind: str, digest: str, data: bytes) -> bool:
        if kind == "blobs":
            return sha256(data) == digest
        try:
            signed = manifest_from_json(json.loads(data))
            return AdapterVersion.of(signed.open(self._key)).digest == digest
        except (ValueError, AttributeError, FedllmError):
            return False

    def _make_room(self, added: int) -> None:
        if self._bytes is not None and self._bytes + added <= self._max_bytes:
            self._bytes += added
            return
        found = [(path, path.stat()) for path in self._folder.glob("*/??/*") if not path.name.startswith(_DRAFT)]
        self._bytes = sum(stat.st_size for _, stat in found)
        for path, stat in sorted(found, key=lambda pair: pair[1].st_mtime_ns):
            if self._bytes <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            self._bytes -= stat.st_size


class CachingClient(httpx.AsyncClient):
    """A client of a registry that asks for a version's manifest and files once.

    Parameters
    ----------
    cache : DiskCache
        Where answers are kept.
    **options
        Those of `httpx.AsyncClient`.
    """

    def __init__(self, cache: DiskCache, **options: Any) -> None:
        super().__init__(**options)
        self.cache = cache

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Answer from disk what is immutable and kept; ask the registry for everything else."""
        named = _IMMUTABLE.search(request.url.path)
        if named is None or request.method != "GET":
            return await super().send(request, **options)
        kind, digest = named.groups()
        kept = await asyncio.to_thread(self.cache.get, kind, digest)
        if kept is not None:
            return httpx.Response(httpx.codes.OK, content=kept, request=request)
        response = await super().send(request, **options)
        if response.status_code == httpx.codes.OK:
            await asyncio.to_thread(self.cache.put, kind, digest, response.content)
        return response

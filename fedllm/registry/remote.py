"""Reading a registry from outside the coordinator: over HTTP with a pinned key, or from a shared folder.

Nothing that comes over the wire is believed: the manifest's signature, every file's digest and the version's
digest are checked, and the alias table is signed too, so that a proxy can neither swap nor roll back.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from fedllm import wire
from fedllm.clock import Clock, SystemClock
from fedllm.errors import DecodeError, DigestMismatch, IntegrityError, MissingExtra, NotFound, PeerUnavailable
from fedllm.identity import SigningIdentity, VerifyKey
from fedllm.ids import AliasName, Digest, check_digest, sha256
from fedllm.registry.model import AdapterVersion, AliasTable, FetchedVersion, SignedManifest
from fedllm.registry.pins import matches

_ALIASES_CONTEXT = "fedllm/1/aliases"
_POLL_S = 0.2
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class _Aliases:
    epoch: int
    aliases: dict[str, str]


def aliases_to_json(table: AliasTable, identity: SigningIdentity) -> dict[str, Any]:
    """Return the signed body of ``GET /v1/aliases``."""
    data = wire.encode(_Aliases(table.epoch, {str(a): str(d) for a, d in table.aliases.items()}))
    signature = identity.sign(_ALIASES_CONTEXT, data)
    return {"epoch": table.epoch, "aliases": dict(table.aliases), "table": _b64(data), "signature": _b64(signature)}


def manifest_to_json(signed: SignedManifest, version: AdapterVersion) -> dict[str, Any]:
    """Return the body of ``GET /v1/versions/{digest}``: readable fields, and the bytes that were signed."""
    manifest = version.manifest
    return {
        "digest": version.digest,
        "name": version.name,
        "number": version.number,
        "federation": manifest.federation,
        "round": manifest.round,
        "parent": manifest.parent,
        "method": manifest.method,
        "metrics": manifest.metrics,
        "privacy": {
            "unit": manifest.privacy.unit,
            "relation": manifest.privacy.relation,
            "epsilon": manifest.privacy.epsilon,
            "delta": manifest.privacy.delta,
            "covers": manifest.privacy.covers,
            "source": manifest.privacy.source,
        },
        "cohort_size": manifest.cohort_size,
        "survivors": manifest.survivors,
        "created": manifest.created,
        "files": {name: {"sha256": r.sha256, "size": r.size} for name, r in manifest.files.items()},
        "manifest": _b64(signed.manifest),
        "signature": _b64(signed.signature),
    }


def manifest_from_json(body: dict[str, Any]) -> SignedManifest:
    """Return the signed manifest of a version's body; the caller opens it with the pinned key."""
    return SignedManifest(_unb64(body, "manifest"), _unb64(body, "signature"))


class HttpVersionSource:
    """A coordinator's registry over HTTP.

    Parameters
    ----------
    url : str
        Address of the coordinator's API, e.g. ``http://127.0.0.1:7400``.
    key : VerifyKey
        The coordinator's pinned key.
    client : httpx.AsyncClient, optional
        For tests; by default one is made for `url`.
    """

    def __init__(self, url: str, key: VerifyKey, *, client: httpx.AsyncClient | None = None) -> None:
        self._client = client or httpx.AsyncClient(base_url=url)
        self._url = url
        self._key = key
        self._epoch = 0

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def aliases(self, since: int, wait_s: float) -> AliasTable:
        """Long-poll the alias table; see `VersionSource`. An older epoch than one seen before is refused."""
        parameters: dict[str, str | float] = {"since": since, "wait_s": wait_s}
        body = await self._json("/v1/aliases", parameters, timeout_s=wait_s + _TIMEOUT_S)
        data, signature = _unb64(body, "table"), _unb64(body, "signature")
        self._key.verify(_ALIASES_CONTEXT, data, signature)
        table = wire.decode(_Aliases, data)
        if table.epoch < self._epoch:
            raise IntegrityError(
                f"alias table of epoch {table.epoch} after one of epoch {self._epoch}",
                hint="something between here and the coordinator replays old answers, or its home was restored",
            )
        self._epoch = table.epoch
        return AliasTable(
            table.epoch,
            {AliasName(a): check_digest(d, what=f"alias {a!r}") for a, d in table.aliases.items()},
        )

    async def fetch(self, digest: str) -> FetchedVersion:
        """Download a version and verify signature, files and digest; see `VersionSource`."""
        version = self._verified(await self._json(f"/v1/versions/{check_digest(digest, what='version')}", {}))
        if version.digest != digest:
            raise DigestMismatch(f"version {digest[:16]}… asked for, {version.digest[:16]}… answered")
        files = {name: await self._blob(record.sha256) for name, record in version.manifest.files.items()}
        version.manifest.check_files(files)
        return FetchedVersion(version, files)

    async def versions(self) -> list[AdapterVersion]:
        """Return all versions, oldest first, each signature verified, off the event loop."""
        answer = await self._get("/v1/versions", {}, _TIMEOUT_S)
        return await asyncio.to_thread(lambda: [self._verified(row) for row in _rows(answer.content)])

    async def find(self, federation: str, pin: str) -> AdapterVersion | None:
        """Return the version that a pin means; see `fedllm.registry.pins.VersionFinder`.

        The registry picks it by its index. A registry that lists all versions all the same is read by what it says of
        them, and only the one that is meant is verified, off the event loop.
        """
        answer = await self._get("/v1/versions", {"federation": federation, "pin": pin}, _TIMEOUT_S)
        return await asyncio.to_thread(self._pick, answer.content, federation, pin)

    def _pick(self, data: bytes, federation: str, pin: str) -> AdapterVersion | None:
        said = (row for row in _rows(data) if row.get("federation") == federation and _says(row, pin))
        meant = list({row.get("digest"): row for row in said}.values())
        if len(meant) != 1:
            return None
        version = self._verified(meant[0])
        if version.manifest.federation != federation or not matches(version, pin):
            raise DigestMismatch(f"{federation}@{pin} asked for, {version.name} ({version.digest[:16]}…) answered")
        return version

    def _verified(self, body: dict[str, Any]) -> AdapterVersion:
        return AdapterVersion.of(manifest_from_json(body).open(self._key))

    async def _blob(self, digest: Digest) -> bytes:
        data = (await self._get(f"/v1/blobs/{digest}", {}, _TIMEOUT_S)).content
        if sha256(data) != digest:
            raise DigestMismatch(f"blob {digest[:16]}… does not hash to its name after download")
        return data

    async def _json(
        self, path: str, parameters: dict[str, str | float], *, timeout_s: float = _TIMEOUT_S
    ) -> dict[str, Any]:
        response = await self._get(path, parameters, timeout_s)
        try:
            body = response.json()
        except ValueError:
            raise DecodeError(f"registry answered {path} with something that is not JSON") from None
        if not isinstance(body, dict):
            raise DecodeError(f"registry answered {path} with a {type(body).__name__}, an object expected")
        return body

    async def _get(self, path: str, parameters: dict[str, str | float], timeout_s: float) -> httpx.Response:
        try:
            response = await self._client.get(path, params=parameters, timeout=timeout_s)
        except httpx.HTTPError as error:
            raise PeerUnavailable(
                f"registry {self._url} does not answer ({type(error).__name__})",
                hint="is the coordinator running? 'fedllm coordinator status'",
            ) from None
        if response.status_code == httpx.codes.NOT_FOUND:
            raise NotFound(f"registry {self._url} has no {path}")
        if response.status_code != httpx.codes.OK:
            raise PeerUnavailable(f"registry {self._url} answered {response.status_code} to {path}")
        return response


class LocalVersionSource:
    """A registry folder on this machine (or a shared disk), read without the coordinator.

    Parameters
    ----------
    folder : Path
        The coordinator's ``registry`` folder.
    key : VerifyKey
        The coordinator's pinned key: a folder that others can write proves nothing by itself.
    clock : Clock, optional
    """

    def __init__(self, folder: Path, key: VerifyKey, clock: Clock | None = None) -> None:
        if not (folder / "registry.sqlite").is_file():
            raise NotFound(f"no registry in {folder}", hint="name the 'registry' folder in the coordinator's home")
        try:
            from fedllm.registry.store import Registry
        except ModuleNotFoundError as error:  # an endpoint that reads over HTTP needs no database
            raise MissingExtra("coordinator", error.name or "sqlalchemy") from None
        self._clock = clock or SystemClock()
        self._registry = Registry(folder, key, self._clock)

    async def aliases(self, since: int, wait_s: float) -> AliasTable:
        """Poll the table; see `VersionSource`."""
        end = self._clock.monotonic() + wait_s
        while True:
            table = self._registry.aliases()
            left = end - self._clock.monotonic()
            if table.epoch > since or left <= 0:
                return table
            await self._clock.sleep(min(_POLL_S, left))

    async def fetch(self, digest: str) -> FetchedVersion:
        """Read and verify a version; see `VersionSource`."""
        return self._registry.fetch(digest)

    async def versions(self) -> list[AdapterVersion]:
        """Return all versions, oldest first."""
        return await asyncio.to_thread(self._registry.versions)

    async def find(self, federation: str, pin: str) -> AdapterVersion | None:
        """Return the version that a pin means, by the database's index; see `fedllm.registry.pins.VersionFinder`."""
        return await asyncio.to_thread(self._registry.find, federation, pin)


def _rows(data: bytes) -> list[dict[str, Any]]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise DecodeError("registry answered /v1/versions with something that is not JSON") from None
    rows = body.get("versions") if isinstance(body, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DecodeError("registry answered no list of versions")
    return rows


def _says(row: dict[str, Any], pin: str) -> bool:
    """Whether a row claims to be what a pin means; nothing is believed by it."""
    return f"v{row.get('number')}" == f"v{int(pin[1:])}" if pin[0] == "v" else str(row.get("digest")).startswith(pin)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _unb64(body: dict[str, Any], field: str) -> bytes:
    value = body.get(field)
    if not isinstance(value, str):
        raise DecodeError(f"registry answer has no text field {field!r}")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise DecodeError(f"registry answer: field {field!r} is not base64") from None

"""Pins: ``vN`` and the beginning of a digest, which name one version of a federation for ever."""

from __future__ import annotations

import asyncio
import re
from typing import Protocol, runtime_checkable

from fedllm.registry.model import AdapterVersion, VersionSource

NUMBER_PIN = re.compile(r"v[0-9]{1,9}")
DIGEST_PIN = re.compile(r"[0-9a-f]{8,64}")


@runtime_checkable
class VersionFinder(Protocol):
    """A source that finds a version without reading all of them."""

    async def find(self, federation: str, pin: str) -> AdapterVersion | None:
        """Return the one version of a federation that a pin means, verified; None if there is none, or several."""


def matches(version: AdapterVersion, pin: str) -> bool:
    """Whether a pin may mean a version."""
    if NUMBER_PIN.fullmatch(pin):
        return version.number == int(pin[1:])
    return DIGEST_PIN.fullmatch(pin) is not None and version.digest.startswith(pin)


async def find_version(source: VersionSource, federation: str, pin: str) -> AdapterVersion | None:
    """Return the version of a pin from any source; one that only lists is searched, off the event loop."""
    if not (NUMBER_PIN.fullmatch(pin) or DIGEST_PIN.fullmatch(pin)):
        return None
    if isinstance(source, VersionFinder):
        return await source.find(federation, pin)
    versions = await source.versions()
    found = await asyncio.to_thread(
        lambda: {v.digest: v for v in versions if v.manifest.federation == federation and matches(v, pin)}
    )
    return next(iter(found.values())) if len(found) == 1 else None

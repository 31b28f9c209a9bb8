"""What the plugin is told, by environment variables: vLLM passes its plugins nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedllm.clock import SystemClock
from fedllm.errors import ConfigError
from fedllm.identity import VerifyKey
from fedllm.ids import Digest, check_digest
from fedllm.registry.model import VersionSource
from fedllm.registry.remote import HttpVersionSource, LocalVersionSource

REGISTRY, KEY, ADAPTERS, BASE = "FEDLLM_REGISTRY", "FEDLLM_COORDINATOR_KEY", "FEDLLM_ADAPTERS", "FEDLLM_BASE"


@dataclass(frozen=True)
class ResolverSettings:
    """Where versions come from, whose signature they carry, and where they are kept.

    Parameters
    ----------
    registry : str
        URL of the coordinator, or a shared registry folder.
    key : VerifyKey
        The coordinator's pinned key.
    adapters : Path
        Folder of this machine's copies, one folder a version, named by digest. Nothing in it is ever changed.
    base : Digest or None
        Digest of the base that vLLM serves; None: it is computed from the served folder.
    """

    registry: str
    key: VerifyKey
    adapters: Path
    base: Digest | None

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> ResolverSettings | None:
        """Return the settings, None if none of the variables is set; raise `ConfigError` naming what is wrong."""
        given = {name: environ.get(name, "") for name in (REGISTRY, KEY, ADAPTERS)}
        if not any(given.values()):
            return None
        for name, value in given.items():
            if not value:
                raise ConfigError(f"{name} is not set", hint=f"set {', '.join(given)}, or none of them")
        base = environ.get(BASE, "")
        return cls(
            given[REGISTRY],
            VerifyKey.parse(given[KEY]),
            Path(given[ADAPTERS]).expanduser().absolute(),
            check_digest(base, what=BASE) if base else None,
        )

    def source(self) -> VersionSource:
        """Return a reader that verifies all that it returns; it belongs to the event loop that uses it first."""
        if self.registry.startswith(("http://", "https://")):
            return HttpVersionSource(self.registry, self.key)
        return LocalVersionSource(Path(self.registry).expanduser(), self.key, SystemClock())

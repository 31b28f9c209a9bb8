"""The resolver itself: a name in, a verified folder out, or nothing."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from fedllm.basemodel.inspect import open_base
from fedllm.errors import ConfigError, DecodeError, FedllmError
from fedllm.ids import Digest, check_digest
from fedllm.registry.model import VersionSource
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from fedllm_vllm_resolver.settings import BASE, ResolverSettings
from fedllm_vllm_resolver.store import VersionStore

_LOG = logging.getLogger("vllm.fedllm_resolver")
PREFIX = "fedllm-"
_ID_DIGITS = 15


class DigestResolver(LoRAResolver):  # type: ignore[misc] # vLLM is not there when types are checked
    """Finds ``fedllm-<digest>``. Every doubt is a refusal, which vLLM answers with 404.

    Parameters
    ----------
    settings : ResolverSettings
    source : VersionSource, optional
        For tests.
    """

    def __init__(self, settings: ResolverSettings, source: VersionSource | None = None) -> None:
        self._settings = settings
        self._source = source
        self._store: VersionStore | None = None
        self._opening = asyncio.Lock()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return where a version lies on this machine's disk, None if there is no such version or it is not proved."""
        if not lora_name.startswith(PREFIX):
            return None
        try:
            digest = check_digest(lora_name.removeprefix(PREFIX), what="adapter name")
        except DecodeError:
            _LOG.warning("adapter refused: its name is no %s<digest>", PREFIX)
            return None
        try:
            place = await (await self._opened(base_model_name)).find(digest, self._reader())
        except FedllmError as error:
            _LOG.warning("adapter %s refused: [%s] %s", lora_name, error.code, error.message)
            return None
        except Exception as error:  # noqa: BLE001 - whatever went wrong, nothing was proved
            _LOG.warning("adapter %s refused: %s", lora_name, type(error).__name__)
            return None
        _LOG.info("adapter %s verified, at %s", lora_name, place)
        return LoRARequest(lora_name=lora_name, lora_int_id=int_id(digest), lora_path=str(place))

    async def _opened(self, base_model_name: str) -> VersionStore:
        """Return the store for the base that vLLM serves; its digest is computed once, from all of its weights."""
        async with self._opening:
            if self._store is None:
                base = self._settings.base
                if base is None:
                    base = await asyncio.to_thread(_digest_of, Path(base_model_name))
                self._store = VersionStore(self._settings.adapters, base)
            return self._store

    def _reader(self) -> VersionSource:
        if self._source is None:
            self._source = self._settings.source()
        return self._source


def _digest_of(folder: Path) -> Digest:
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is no folder, so the digest of what is served is not known",
            hint=f"set {BASE}; 'fedllm model show' prints it",
        )
    return open_base(folder).digest


def int_id(digest: Digest) -> int:
    """Return the number that stands for a version in the engine: the same in every process and after every start.

    vLLM 0.32 puts a number of its own in its place; where it does not, two versions must not share one. 60 bits of the
    digest are as good as none shared.
    """
    return int(digest[:_ID_DIGITS], 16) + 1

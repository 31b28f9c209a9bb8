"""Hot load: follow the aliases and take every new version live without dropping a token.

fetch → validate → load into a spare slot → warm → flip the alias → drain the old version → free its slot. A
version that fails on the way is refused with its reason while the old one serves on; a source that cannot be
reached is asked again with growing pauses, and what is loaded serves on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from fedllm.clock import Clock
from fedllm.errors import FedllmError, NotReady, PeerUnavailable
from fedllm.ids import Digest
from fedllm.registry.model import AdapterVersion, AliasTable, VersionSource
from fedllm.serving.engine import Engine, GenerationRequest, SamplingParams
from fedllm.serving.metrics import Counters
from fedllm.serving.versions import Versions, open_version
from fedllm.telemetry import event

_LOG = logging.getLogger("fedllm.serving.watch")
_POLL_S = 20.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


@dataclass(frozen=True)
class Refusal:
    """A version that an alias points at and that is not served."""

    digest: Digest
    code: str
    reason: str


class AliasWatcher:
    """Keeps what is served equal to what the aliases say.

    Parameters
    ----------
    source : VersionSource
        Verified versions and aliases.
    engine : Engine
        Where they are loaded.
    versions : Versions
        Whose aliases are flipped.
    counters : Counters
        Flips, refusals, source errors.
    clock : Clock
        For the pauses.
    """

    def __init__(
        self, source: VersionSource, engine: Engine, versions: Versions, counters: Counters, clock: Clock
    ) -> None:
        self._source = source
        self._engine = engine
        self._versions = versions
        self._counters = counters
        self._clock = clock
        self._epoch = -1
        self._drains: set[asyncio.Task[None]] = set()
        self.refused: dict[str, Refusal] = {}
        self.source_error: str | None = None
        self.synced = asyncio.Event()

    async def run(self) -> None:
        """Follow until cancelled."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                await self.poll()
            except FedllmError as error:
                self.source_error = error.message
                self._counters.add("fedllm_source_errors_total")
                event(_LOG, "version source failed", level=logging.WARNING, code=error.code, pause_s=pause_s)
                await self._clock.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                pause_s = _FIRST_PAUSE_S

    async def poll(self) -> None:
        """Wait for one change of the table and apply it.

        Raises
        ------
        FedllmError
            If the source failed; everything that could be applied has been, the rest is tried again.
        """
        first = self._epoch < 0
        table = await self._source.aliases(0 if first else self._epoch, 0.0 if first else _POLL_S)
        if table.epoch == self._epoch:
            self.source_error = None
            return
        failure = await self._apply(table)
        if failure is not None:
            raise failure
        self._epoch = table.epoch
        self.source_error = None
        self.synced.set()

    async def drained(self) -> None:
        """Wait until all old versions are freed."""
        await asyncio.gather(*self._drains)

    async def _apply(self, table: AliasTable) -> FedllmError | None:
        retry: FedllmError | None = None
        for gone in set(self._versions.served.versions) - set(table.aliases):
            self._retire(self._versions.flip(gone, None))
        for alias, digest in table.aliases.items():
            live = self._versions.served.versions.get(alias)
            refused = self.refused.get(alias)
            if live is not None and live.digest == digest:
                self.refused.pop(alias, None)
            elif refused is None or refused.digest != digest:
                try:
                    await self._take_live(alias, digest)
                except (PeerUnavailable, NotReady) as error:
                    retry = error
                except FedllmError as error:
                    self._refuse(alias, digest, error)
        return retry

    async def _take_live(self, alias: str, digest: Digest) -> None:
        began_s = self._clock.monotonic()
        fetched = await self._source.fetch(digest)
        state = await asyncio.to_thread(open_version, fetched)
        await self._engine.load(digest, state)
        self._engine.pin(digest)
        try:
            await self._warm(digest)
        except BaseException:
            self._retire(fetched.version)
            raise
        self.refused.pop(alias, None)
        previous = self._versions.flip(alias, fetched.version)
        self._retire(previous)
        self._counters.add("fedllm_alias_flips_total", alias=alias)
        event(
            _LOG,
            "alias flipped",
            alias=alias,
            version=fetched.version.name,
            digest=digest,
            previous=previous.name if previous else None,
            seconds=round(self._clock.monotonic() - began_s, 3),
        )

    async def _warm(self, digest: Digest) -> None:
        """Generate one token: an adapter that computes nonsense is found before anyone is served by it."""
        with self._engine.lease(digest) as lease:
            stream = self._engine.generate(lease, GenerationRequest((0,), SamplingParams(max_tokens=1)))
            try:
                async for _ in stream:
                    pass
            finally:
                await stream.aclose()

    def _retire(self, version: AdapterVersion | None) -> None:
        if version is not None:
            self._engine.unpin(version.digest)
            self._background(self._engine.unload(version.digest))

    def _refuse(self, alias: str, digest: Digest, error: FedllmError) -> None:
        self.refused[alias] = Refusal(digest, error.code, error.message)
        self._counters.add("fedllm_versions_refused_total", alias=alias)
        event(
            _LOG,
            "version refused",
            level=logging.ERROR,
            alias=alias,
            digest=digest,
            code=error.code,
            reason=error.message,
        )

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._drains.add(task)
        task.add_done_callback(self._drains.discard)

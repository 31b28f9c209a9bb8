"""Hot load: follow the aliases and take every new version live without dropping a token.

fetch → validate → load into a slot → warm → flip the alias → drain the old version → free its slot. A version that
fails on the way is refused with its reason while the old one serves on. What cannot be used stays refused; what came
torn or unreadable is tried again with growing pauses, and so is a source that cannot be reached.

The first `pin_aliases` aliases keep a slot each. Those beyond are fetched and validated before they flip, and loaded
when asked for. Of the aliases found at the start, those beyond are taken on their signed manifest's word, and
validated when asked for: thousands of adapters are not downloaded before the first request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from fedllm.clock import Clock
from fedllm.errors import AdapterInvalid, BaseMismatch, FedllmError, NotReady, PeerUnavailable
from fedllm.ids import Digest
from fedllm.registry.model import AdapterVersion, AliasTable, VersionSource
from fedllm.serving.engine import Engine, Lease
from fedllm.serving.metrics import Counters
from fedllm.serving.tenants import Tenant
from fedllm.serving.versions import Versions
from fedllm.telemetry import event

_LOG = logging.getLogger("fedllm.serving.watch")
PIN_ALIASES = 6
_POLL_S = 20.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


@dataclass(frozen=True)
class Refusal:
    """A version that an alias points at and that is not served; unless it is final, it is tried again."""

    digest: Digest
    code: str
    reason: str
    final: bool = True


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
    pin_aliases : int
        Aliases whose version is loaded at once and keeps its slot; one slot at least is left to the others.
    """

    def __init__(
        self,
        source: VersionSource,
        engine: Engine,
        versions: Versions,
        counters: Counters,
        clock: Clock,
        *,
        pin_aliases: int = PIN_ALIASES,
    ) -> None:
        self._source = source
        self._engine = engine
        self._versions = versions
        self._counters = counters
        self._clock = clock
        self._epoch = -1
        self._retry_s = _FIRST_PAUSE_S
        self._pin_limit = max(0, min(pin_aliases, engine.stats().slots - 1))
        self._pinned: dict[str, Digest | None] = {}
        self._drains: set[asyncio.Task[None]] = set()
        self.refused: dict[str, Refusal] = {}
        self.source_error: str | None = None
        self.synced = asyncio.Event()
        versions.on_refused = self._withdraw

    async def run(self) -> None:
        """Follow until cancelled."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                await self.poll()
            except Exception as error:  # noqa: BLE001 - whatever the source raises, hot loading must not end
                self._source_failed(error, pause_s=pause_s)
                await self._clock.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                pause_s = _FIRST_PAUSE_S

    async def poll(self) -> None:
        """Wait for one change of the table, or until torn versions are due again, and apply the table.

        Raises
        ------
        Exception
            If the source failed; everything that could be applied has been, the rest is tried again.
        """
        first, torn = self._epoch < 0, self._torn()
        wait_s = 0.0 if first else min(self._retry_s, _POLL_S) if torn else _POLL_S
        table = await self._source.aliases(0 if first else self._epoch, wait_s)
        if table.epoch == self._epoch:
            self.source_error = None
            if not torn:
                return
            self._retry_s = min(2 * self._retry_s, _LONGEST_PAUSE_S)
        else:
            self._retry_s = _FIRST_PAUSE_S
        known = await self._manifests(table) if first else {}
        failure = await self._apply(table, known)
        if failure is not None:
            raise failure
        self._epoch = table.epoch
        self.source_error = None
        self.synced.set()

    async def lease(self, model: str, tenant: Tenant) -> Lease:
        """Lease as `Versions.lease` does; what nobody foresaw of source or engine is a `NotReady` without its text."""
        try:
            return await self._versions.lease(model, tenant)
        except FedllmError:
            raise
        except Exception as error:  # noqa: BLE001 - a broken source is not the tenant's, nor is its text
            self._source_failed(error)
            raise NotReady(f"{model[:128]} cannot be loaded now", hint="retry later") from None

    async def drained(self) -> None:
        """Wait until all old versions are freed."""
        await asyncio.gather(*self._drains)

    async def _manifests(self, table: AliasTable) -> Mapping[Digest, AdapterVersion]:
        """Return all versions by digest if there are more aliases than are loaded at once."""
        if len(table.aliases) <= self._pin_limit:
            return {}
        return {version.digest: version for version in await self._source.versions()}

    def _torn(self) -> bool:
        return any(not refusal.final for refusal in self.refused.values())

    def _source_failed(self, error: Exception, **fields: float) -> None:
        self.source_error = _kind(error)
        self._counters.add("fedllm_source_errors_total")
        reason = error.message if isinstance(error, FedllmError) else _where(error)
        event(_LOG, "version source failed", level=logging.WARNING, code=_kind(error), reason=reason, **fields)

    async def _apply(self, table: AliasTable, known: Mapping[Digest, AdapterVersion]) -> FedllmError | None:
        for gone in set(self.refused) - set(table.aliases):
            del self.refused[gone]
        for gone in set(self._versions.served.versions) - set(table.aliases):
            self._retire(gone, self._versions.flip(gone, None))
        changes = []
        for alias, digest in table.aliases.items():
            live = self._versions.served.versions.get(alias)
            refused = self.refused.get(alias)
            if live is not None and live.digest == digest:
                self.refused.pop(alias, None)
            elif refused is None or refused.digest != digest or not refused.final:
                # The place is taken before anything is awaited, so that changes in parallel stay within the limit.
                if len(self._pinned) < self._pin_limit:
                    self._pinned.setdefault(alias, None)
                changes.append(self._try(alias, digest, known.get(digest)))
        retries = await asyncio.gather(*changes)
        return next((error for error in retries if error is not None), None)

    async def _try(self, alias: str, digest: Digest, known: AdapterVersion | None) -> FedllmError | None:
        try:
            await self._take_live(alias, digest, known)
        except (PeerUnavailable, NotReady) as error:
            return error
        except Exception as error:  # noqa: BLE001 - one bad version must not keep the other aliases from theirs
            self._refuse(alias, digest, error)
        finally:
            if alias in self._pinned and self._pinned[alias] is None:
                del self._pinned[alias]
        return None

    async def _take_live(self, alias: str, digest: Digest, known: AdapterVersion | None) -> None:
        began_s = self._clock.monotonic()
        tiers = self._versions.tiers
        if alias in self._pinned:
            version = (await tiers.hold(digest)).version
            # The lease keeps the version in its slot until it is pinned.
            with await tiers.lease(digest, bounded=False):
                previous = self._versions.flip(alias, version)
                self._engine.pin(digest)
                self._retire(alias, previous)
                self._pinned[alias] = digest
        else:
            if known is None:
                known = (await tiers.hold(digest)).version
            tiers.check_spec(known.manifest.spec)
            version, previous = known, self._versions.flip(alias, known)
            self._retire(alias, previous)
        self.refused.pop(alias, None)
        self._counters.add("fedllm_alias_flips_total", alias=alias)
        event(
            _LOG,
            "alias flipped",
            alias=alias,
            version=version.name,
            digest=digest,
            previous=previous.name if previous else None,
            seconds=round(self._clock.monotonic() - began_s, 3),
        )

    def _retire(self, alias: str, version: AdapterVersion | None) -> None:
        """Let an alias's version go: its pin at once, its slot when its requests have ended."""
        if version is None:
            return
        if self._pinned.pop(alias, None) == version.digest:
            self._engine.unpin(version.digest)
        if all(live.digest != version.digest for live in self._versions.served.versions.values()):
            self._background(self._engine.unload(version.digest))

    def _withdraw(self, alias: str, digest: Digest, error: FedllmError) -> None:
        """Refuse what was taken on its manifest's word and turned out to be unusable."""
        live = self._versions.served.versions.get(alias)
        if live is not None and live.digest == digest:
            self._retire(alias, self._versions.flip(alias, None))
            self._refuse(alias, digest, error)

    def _refuse(self, alias: str, digest: Digest, error: Exception) -> None:
        # Only these two speak of the version itself; a bad download, a lost file or a dead engine may pass.
        final = isinstance(error, (AdapterInvalid, BaseMismatch))
        code = _kind(error)
        reason = error.message if isinstance(error, FedllmError) else "it could not be read"
        refusal = Refusal(digest, code, reason, final)
        again = self.refused.get(alias) == refusal
        self.refused[alias] = refusal
        if again:
            return
        self._counters.add("fedllm_versions_refused_total", alias=alias)
        event(
            _LOG,
            "version refused",
            level=logging.ERROR,
            alias=alias,
            digest=digest,
            code=code,
            reason=reason if isinstance(error, FedllmError) else _where(error),
        )

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._drains.add(task)
        task.add_done_callback(self._drains.discard)


def _kind(error: Exception) -> str:
    return error.code if isinstance(error, FedllmError) else type(error).__name__


def _where(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "?"

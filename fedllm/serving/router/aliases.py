"""Following the aliases: a version is ready on the replicas before the alias moves to it, all at one moment.

prepare on every healthy replica → one token as a probe → flip → drain the old version → unload it where the kind needs
it. A replica that cannot be made ready in time gets no request for that version until it can. If none can, the alias
stays where it is, and the version is tried again. The table's epoch never goes back: what is older than what was seen
is an error of the source, and changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from fedllm.clock import Clock
from fedllm.errors import FedllmError, IntegrityError, NotFound, NotReady, PeerUnavailable
from fedllm.ids import Digest
from fedllm.registry.model import AdapterVersion, AliasTable, VersionSource
from fedllm.serving.metrics import Counters
from fedllm.serving.router.fleet import Fleet
from fedllm.serving.router.models import Models
from fedllm.serving.router.replica import Replica
from fedllm.serving.vllm import enough
from fedllm.telemetry import event

_LOG = logging.getLogger("fedllm.serving.router")
PREPARE_S = 30.0
_POLL_S = 20.0
_AGAIN_S = 1.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


class AliasFollower:
    """Keeps what the router serves equal to what the aliases say.

    Parameters
    ----------
    source : VersionSource
        Verified versions and aliases.
    models : Models
        Whose aliases are flipped.
    fleet : Fleet
        Where versions are prepared.
    counters : Counters
        Flips, versions held back, source errors.
    clock : Clock
    prepare_s : float
        Seconds that a replica may take to get a version ready.
    """

    def __init__(
        self,
        source: VersionSource,
        models: Models,
        fleet: Fleet,
        counters: Counters,
        clock: Clock,
        *,
        prepare_s: float = PREPARE_S,
    ) -> None:
        self._source = source
        self._models = models
        self._fleet = fleet
        self._counters = counters
        self._clock = clock
        self._prepare_s = prepare_s
        self._retry_s = _FIRST_PAUSE_S
        self._preparing: set[tuple[Replica, Digest]] = set()
        self._known: dict[Digest, AdapterVersion] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pending = False
        self.source_error: str | None = None
        self.synced = asyncio.Event()

    async def run(self) -> None:
        """Follow until cancelled."""
        pause_s = _FIRST_PAUSE_S
        healing = asyncio.create_task(self._heal())
        try:
            while True:
                try:
                    await self.poll()
                except Exception as error:  # noqa: BLE001 - whatever the source raises, following must not end
                    code = error.code if isinstance(error, FedllmError) else type(error).__name__
                    self.source_error = code
                    self._counters.add("fedllm_source_errors_total")
                    event(_LOG, "version source failed", level=logging.WARNING, code=code, pause_s=pause_s)
                    await self._clock.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                else:
                    pause_s = _FIRST_PAUSE_S
        finally:
            tasks = [healing, *self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def poll(self) -> None:
        """Wait for one change of the table, or until held back versions are due again, and apply the table.

        Raises
        ------
        IntegrityError
            If the table is older than one seen before.
        Exception
            What the source raised.
        """
        models = self._models
        first = models.epoch < 0
        wait_s = 0.0 if first else self._retry_s if self._pending else _POLL_S
        table = await self._source.aliases(0 if first else models.epoch, wait_s)
        if table.epoch < models.epoch:
            raise IntegrityError(f"alias table of epoch {table.epoch} after one of epoch {models.epoch}")
        if table.epoch == models.epoch and not self._pending:
            self.source_error = None
            return
        # What was held back is tried again with growing pauses; a move of any alias begins them anew.
        again = table.epoch == models.epoch
        self._retry_s = min(2 * self._retry_s, _LONGEST_PAUSE_S) if again else _FIRST_PAUSE_S
        await self._learn(table)
        await self._apply(table)
        models.epoch = table.epoch
        self.source_error = None
        self.synced.set()

    async def _learn(self, table: AliasTable) -> None:
        if set(table.aliases.values()) <= self._known.keys():
            return
        listed = {version.digest: version for version in await self._source.versions()}
        missing = set(table.aliases.values()) - listed.keys()
        if missing:
            raise NotFound(f"the registry lists no version {min(missing)[:16]}…, which an alias names")
        self._known = listed

    async def _apply(self, table: AliasTable) -> None:
        for gone in set(self._models.served) - set(table.aliases):
            self._retire(self._models.flip(gone, None))
        for gone in set(self._models.held_back) - set(table.aliases):
            del self._models.held_back[gone]
        # What was prepared for an alias that has moved on before it was served, nobody else lets go of.
        wanted = set(table.aliases.values()) | {version.digest for version in self._models.served.values()}
        for digest in set().union(*(replica.prepared for replica in self._fleet.replicas.values())) - wanted:
            self._retire(self._known.get(digest))
        moves = [
            self._move(alias, self._known[digest])
            for alias, digest in table.aliases.items()
            if alias not in self._models.served or self._models.served[alias].digest != digest
        ]
        self._pending = not all(await asyncio.gather(*moves))

    async def _move(self, alias: str, version: AdapterVersion) -> bool:
        began_s = self._clock.monotonic()
        replicas = [r for r in self._fleet.replicas.values() if r.healthy]
        ready = await asyncio.gather(*(self._prepare(replica, alias, version) for replica in replicas))
        held_back = self._models.held_back
        # At a cold start there is nobody to prepare and nothing to lose: requests wait for the first replica.
        cold = not replicas and alias not in self._models.served
        if not cold and not enough((r.kind.min_ready, is_ready) for r, is_ready in zip(replicas, ready, strict=True)):
            if held_back.get(alias) != version.name:
                self._counters.add("fedllm_versions_refused_total", alias=alias)
                event(_LOG, "version held back", level=logging.ERROR, alias=alias, version=version.name)
            held_back[alias] = version.name
            return False
        held_back.pop(alias, None)
        previous = self._models.flip(alias, version)
        self._fleet.on_change()
        self._counters.add("fedllm_alias_flips_total", alias=alias)
        event(
            _LOG,
            "alias flipped",
            alias=alias,
            version=version.name,
            digest=version.digest,
            previous=previous.name if previous else None,
            ready=sum(ready),
            replicas=len(replicas),
            seconds=round(self._clock.monotonic() - began_s, 3),
        )
        self._retire(previous)
        return True

    async def _prepare(self, replica: Replica, alias: str, version: AdapterVersion) -> bool:
        """Make a version ready on one replica; ask again for a while, for the replica may follow the table later."""
        if version.digest in replica.prepared:
            return True
        try:
            async with asyncio.timeout(self._prepare_s):
                while replica.healthy:
                    try:
                        await replica.kind.prepare(version, alias)
                    except (PeerUnavailable, NotReady):
                        await self._clock.sleep(_AGAIN_S)
                    else:
                        replica.prepared.add(version.digest)
                        replica.cannot.discard(version.digest)
                        return True
            reason = "it is not healthy any more"
        except TimeoutError:
            reason = f"not within {self._prepare_s:g} s"
        except Exception as error:  # noqa: BLE001 - one replica must not keep the alias from the others
            reason = error.code if isinstance(error, FedllmError) else type(error).__name__
        if version.digest not in replica.cannot:  # said once, however often it is tried again
            event(
                _LOG,
                "version not ready",
                level=logging.ERROR,
                replica=replica.name,
                version=version.name,
                reason=reason,
            )
        replica.cannot.add(version.digest)
        return False

    def _retire(self, version: AdapterVersion | None) -> None:
        if version is not None and all(v.digest != version.digest for v in self._models.served.values()):
            self._background(self._drain(version))

    async def _drain(self, version: AdapterVersion) -> None:
        """Unload a version once no request holds it, unless an alias serves it then."""
        await self._models.flights.drained(version.digest)
        for replica in list(self._fleet.replicas.values()):
            if any(v.digest == version.digest for v in self._models.served.values()):
                return  # an alias came back to it
            if version.digest in replica.prepared:
                replica.prepared.discard(version.digest)
                try:
                    async with asyncio.timeout(self._prepare_s):
                        await replica.kind.unload(version)
                except Exception as error:  # noqa: BLE001 - it is gone, or keeps what nobody will ask for
                    event(_LOG, "version not unloaded", replica=replica.name, kind=type(error).__name__)
        event(_LOG, "version drained", version=version.name, digest=version.digest)

    def ensure(self, alias: str, version: AdapterVersion) -> None:
        """Have a version ready that a request pins and no alias serves, where no replica has it; then let it go."""
        healthy = [r for r in self._fleet.replicas.values() if r.healthy and not r.draining]
        if not any(replica.has(version.digest) for replica in healthy):
            self._background(self._lend(alias, version, healthy))

    async def _lend(self, alias: str, version: AdapterVersion, replicas: list[Replica]) -> None:
        await asyncio.gather(*(self._catch_up(replica, alias, version) for replica in replicas))
        await self._drain(version)

    async def _heal(self) -> None:
        """Prepare what is served on replicas that lack it: they have joined, come back, or were too slow before."""
        while True:
            await self._clock.sleep(_AGAIN_S)
            for replica in self._fleet.replicas.values():
                if not replica.healthy or replica.draining:
                    continue
                for alias, version in self._models.served.items():
                    if not replica.has(version.digest):
                        self._background(self._catch_up(replica, alias, version))

    async def _catch_up(self, replica: Replica, alias: str, version: AdapterVersion) -> None:
        """Prepare one version on one replica, unless that is being done."""
        key = (replica, version.digest)
        if key in self._preparing:
            return
        self._preparing.add(key)
        try:
            if await self._prepare(replica, alias, version):
                self._fleet.on_change()
                return
            # What failed is left alone for as long as it may take, unless the replica comes back as a new process.
            again_s = self._clock.monotonic() + self._prepare_s
            while version.digest in replica.cannot and self._clock.monotonic() < again_s:
                await self._clock.sleep(min(_AGAIN_S, self._prepare_s))
        finally:
            self._preparing.discard(key)

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

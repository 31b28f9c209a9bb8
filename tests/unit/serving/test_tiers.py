"""Versions in tiers: fetched once, kept within bounds, verified when read back, served on demand and in turn."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
from patience import PATIENCE_S
from unit.serving.registry_fake import FakeSource, make_version, with_manifest_of
from unit.serving.tiny_llama import BASE, MODULES, make_adapter, make_forcing_adapter, running_engine

from fedllm.adapter import AdapterSpec, AdapterState
from fedllm.clock import FakeClock
from fedllm.errors import DigestMismatch, NotFound, NotReady, Overloaded, RequestInvalid
from fedllm.registry.model import FetchedVersion
from fedllm.serving.answers import error_status
from fedllm.serving.engine import GenerationRequest, SamplingParams
from fedllm.serving.metrics import Counters
from fedllm.serving.tenants import Tenant
from fedllm.serving.tiers import Tiers
from fedllm.serving.versions import Versions
from fedllm.serving.watch import AliasWatcher


def small_adapter(seed: int) -> AdapterState:
    """Return an adapter of a few hundred bytes."""
    spec = AdapterSpec(BASE, 1, 2, {"q_proj": MODULES["q_proj"]}, (0,))
    flat = np.random.default_rng(seed).normal(size=spec.layout().size).astype(np.float32)
    return AdapterState(spec, spec.layout().unflatten(flat))


@asynccontextmanager
async def tiered(folder, *, memory_bytes: int = 1 << 20, max_waiting: int = 64, pin_aliases: int = 6, **sizes):
    """Run an engine, a fake source, and tiers, versions and a watcher over them."""
    async with running_engine(folder, **sizes) as engine:
        source = FakeSource()
        tiers = Tiers(engine, source, memory_bytes=memory_bytes, max_waiting=max_waiting)
        versions = Versions(engine, source, "tiny", tiers=tiers)
        watcher = AliasWatcher(source, engine, versions, Counters(), FakeClock(), pin_aliases=pin_aliases)
        yield engine, source, versions, watcher


async def say(engine, lease, count: int = 4) -> list[int]:
    """Generate under a lease and end it."""
    with lease:
        stream = engine.generate(lease, GenerationRequest((1, 2), SamplingParams(max_tokens=count)))
        try:
            return [t async for chunk in stream for t in chunk.token_ids]
        finally:
            await stream.aclose()


def test_many_requests_for_a_cold_version_fetch_and_copy_it_once(tiny_folder, drive) -> None:
    """Single flight: twenty requests, one fetch, one slot, all of the same version."""

    async def body():
        async with tiered(tiny_folder, max_running=4) as (engine, source, versions, _):
            digest = source.publish("acme/a", make_version(make_forcing_adapter(tiny_folder, 60), 1))
            leases = await asyncio.gather(*(versions.tiers.lease(digest) for _ in range(20)))
            assert {lease.digest for lease in leases} == {digest}
            assert engine.stats().slots_used == source.fetches == 1
            said = await asyncio.gather(*(say(engine, lease) for lease in leases))
            assert said == [[60] * 4] * 20
            assert engine._slots.requests(digest) == 0
            assert (versions.tiers.hits.fetched, versions.tiers.waiting) == (20, 0)

    drive(body())


def test_memory_holds_what_its_bytes_allow(tiny_folder, drive) -> None:
    """The least recently used factors go first, and come back from the source when they are asked for."""

    async def body():
        states = [small_adapter(i) for i in range(3)]
        size = sum(a.nbytes for a in states[0].factors.values())
        async with tiered(tiny_folder, memory_bytes=2 * size, slots=1) as (engine, source, versions, _):
            a, b, c = (source.publish(f"acme/{i}", make_version(s, i + 1)) for i, s in enumerate(states))
            tiers = versions.tiers
            for digest in (a, b, a, c, a, b):
                await say(engine, await tiers.lease(digest))
                assert tiers.held_bytes <= 2 * size
            assert tiers.held() == (a, b)
            assert source.fetches == 4
            assert (tiers.hits.slot, tiers.hits.memory, tiers.hits.fetched) == (0, 2, 4)
        async with tiered(tiny_folder, memory_bytes=0, slots=1) as (engine, source, versions, _):
            digest = source.publish("acme/a", make_version(states[0], 1))
            assert len(await say(engine, await versions.tiers.lease(digest))) == 4
            assert versions.tiers.held() == ()

    drive(body())


def test_hundreds_of_aliases_are_served_through_few_slots(tiny_folder, drive) -> None:
    """300 aliases, 4 slots, room for 16 in memory: the popular ones are pinned, the others load when asked for."""

    async def body():
        states = [small_adapter(i) for i in range(300)]
        size = sum(a.nbytes for a in states[0].factors.values())
        sizes = {"slots": 4, "max_running": 8, "kv_blocks": 256, "patience_s": 0.02}
        async with tiered(tiny_folder, memory_bytes=16 * size, pin_aliases=2, **sizes) as parts:
            engine, source, versions, watcher = parts
            names = [f"acme/a{i}" for i in range(300)]
            made = [make_version(state, i + 1) for i, state in enumerate(states)]
            digests = [source.publish(name, version) for name, version in zip(names, made, strict=True)]
            await watcher.poll()
            assert source.fetches == engine.stats().slots_used == 2
            tenant = Tenant("acme", "0" * 64, tuple(names))
            assert len(versions.visible(tenant)) == 300
            draw = np.random.default_rng(1)
            picks = np.minimum(draw.zipf(1.3, size=200) - 1, 299)
            gate = asyncio.Semaphore(24)

            async def ask(index: int) -> None:
                async with gate:
                    lease = await versions.lease(names[index], tenant)
                    assert lease.digest == digests[index]
                    assert len(await say(engine, lease, 3)) == 3

            await asyncio.gather(*(ask(int(i)) for i in picks))
            stats, hits = engine.stats(), versions.tiers.hits
            assert stats.free_blocks == stats.total_blocks
            assert all(engine._slots.requests(d) == 0 for d in digests)
            assert engine._slots.waiting() == ()
            assert hits.slot + hits.memory + hits.fetched >= 200
            assert len(versions.tiers.held()) <= 16

    drive(body())


def test_a_cold_version_is_served_beside_hot_ones_that_never_stop(tiny_folder, drive) -> None:
    """Two hot versions whose requests overlap hold both slots; the cold one is served all the same, within bounds."""

    async def body():
        async with tiered(tiny_folder, slots=2, max_running=8, kv_blocks=256, patience_s=0.05) as parts:
            engine, source, versions, _ = parts
            stop = asyncio.Event()
            hot = [source.publish(f"acme/hot{i}", make_version(make_adapter(i), i + 1)) for i in range(2)]
            cold = source.publish("acme/cold", make_version(make_forcing_adapter(tiny_folder, 77), 9))

            async def hammer(digest) -> int:
                served = 0
                while not stop.is_set():
                    await say(engine, await versions.tiers.lease(digest), 12)
                    served += 1
                return served

            hammers = [asyncio.create_task(hammer(d)) for d in hot for _ in range(3)]
            await asyncio.sleep(0.1)
            for _ in range(3):
                assert await asyncio.wait_for(say(engine, await versions.tiers.lease(cold)), PATIENCE_S) == [77] * 4
            stop.set()
            assert min(await asyncio.gather(*hammers)) > 0

    drive(body())


def test_too_many_that_wait_are_refused_and_those_who_leave_leave_nothing(tiny_folder, drive) -> None:
    """The queue for slots is bounded; a cancelled wait takes its version out of it."""

    async def body():
        async with tiered(tiny_folder, slots=1, max_waiting=2) as (engine, source, versions, _):
            tiers = versions.tiers
            busy, *others = (source.publish(f"acme/{i}", make_version(small_adapter(i), i + 1)) for i in range(4))
            with await tiers.lease(busy):
                waiting = [asyncio.create_task(tiers.lease(d)) for d in others[:2]]
                while len(engine._slots.waiting()) < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                with pytest.raises(Overloaded, match="2 requests wait"):
                    await tiers.lease(others[2])
                waiting[0].cancel()
                await asyncio.wait(waiting[:1])
                assert engine._slots.waiting() == (others[1],)
            with await waiting[1] as lease:
                assert lease.digest == others[1]
            assert tiers.waiting == 0
            with await tiers.lease(others[2]) as lease:
                assert lease.digest == others[2]

    drive(body())


def test_unusable_versions_are_refused_once_with_the_right_status(tiny_folder, drive) -> None:
    """A pin of what cannot be served is the client's mistake (400); trouble with the registry is ours (503)."""

    async def body():
        acme = Tenant("acme", "0" * 64, ("acme/a",))
        async with tiered(tiny_folder, max_rank=4) as (engine, source, versions, watcher):
            other = make_version(make_adapter(2), 2)
            bad = [
                (make_version(make_adapter(3, rank=8), 3), "rank 8, this endpoint holds up to 4"),
                (make_version(make_adapter(3, base="a" * 64), 4), "base aaaaaaaa"),
                (with_manifest_of(make_version(make_adapter(4), 5), other), "not the state"),
                (make_version(make_adapter(5, scale=1e18), 6), "non-finite"),
                (replace(other, files={}), "no adapter_config.json"),
            ]
            for version, _ in bad:
                source.publish("acme/a", version)
            good = source.publish("acme/a", make_version(make_adapter(1), 1))
            await watcher.poll()
            for version, reason in bad:
                for _ in range(2):
                    with pytest.raises(RequestInvalid, match=reason) as refused:
                        await versions.lease(f"acme/a@v{version.version.number}", acme)
                    assert error_status(refused.value) == 400
            assert source.fetches == 1 + 3
            lost = source.publish("acme/a", make_version(make_adapter(8), 8))
            source.publish("acme/a", make_version(make_adapter(1), 1))
            source.stored.pop(lost)
            fetch = source.fetch
            source.stored[lost] = make_version(make_adapter(8), 8)

            async def torn(digest: str) -> FetchedVersion:
                raise DigestMismatch("file is torn")

            source.fetch = torn
            with pytest.raises(NotReady, match="torn") as refused:
                await versions.lease("acme/a@v8", acme)
            assert error_status(refused.value) == 503
            source.fetch = fetch
            with await versions.lease("acme/a@v8", acme) as lease:
                assert lease.digest == lost
            await asyncio.gather(*versions.tiers._unloads)
            assert set(engine.loaded()) == {good, lost}

    drive(body())


def test_an_alias_taken_on_its_word_is_withdrawn_when_it_proves_bad(tiny_folder, drive) -> None:
    """Beyond the pinned ones nothing is downloaded at the start; what then does not load is refused and named."""

    async def body():
        names = tuple(f"acme/{i}" for i in range(4))
        acme = Tenant("acme", "0" * 64, names)
        async with tiered(tiny_folder, slots=2, pin_aliases=1, max_rank=4) as (engine, source, versions, watcher):
            pinned = source.publish(names[0], make_version(make_adapter(0), 1))
            source.publish(names[1], make_version(make_adapter(1, scale=1e18), 2))
            source.publish(names[2], make_version(make_adapter(2, rank=8), 3))
            fine = source.publish(names[3], make_version(make_adapter(3), 4))
            await watcher.poll()
            assert source.fetches == 1
            assert set(watcher.refused) == {names[2]}
            with pytest.raises(NotReady, match=r"refused: .*non-finite"):
                await versions.lease(names[1], acme)
            assert set(watcher.refused) == {names[1], names[2]}
            with pytest.raises(NotFound):
                await versions.lease(names[1], acme)
            with await versions.lease(names[3], acme) as lease:
                assert lease.digest == fine
            assert engine._slots.pinned(pinned)
            mended = source.publish(names[1], make_version(make_adapter(5), 5))
            await watcher.poll()
            assert set(watcher.refused) == {names[2]}
            with await versions.lease(names[1], acme) as lease:
                assert lease.digest == mended

    drive(body())


def test_a_moved_alias_beyond_the_pinned_ones_is_validated_before_it_flips(tiny_folder, drive) -> None:
    """Without a slot of its own, the old version serves on all the same if the new one is unusable."""

    async def body():
        acme = Tenant("acme", "0" * 64, ("acme/a",))
        async with tiered(tiny_folder, pin_aliases=0, max_rank=4) as (engine, source, versions, watcher):
            good = source.publish("acme/a", make_version(make_adapter(1), 1))
            await watcher.poll()
            assert engine.loaded() == ()
            with await versions.lease("acme/a", acme):
                source.publish(
                    "acme/a", with_manifest_of(make_version(make_adapter(2), 2), make_version(make_adapter(3), 3))
                )
                await watcher.poll()
                assert watcher.refused["acme/a"].code == "adapter-invalid"
            with await versions.lease("acme/a", acme) as lease:
                assert lease.digest == good
            newer = source.publish("acme/a", make_version(make_adapter(4), 4))
            await watcher.poll()
            await watcher.drained()
            assert engine.loaded() == ()
            with await versions.lease("acme/a", acme) as lease:
                assert lease.digest == newer

    drive(body())

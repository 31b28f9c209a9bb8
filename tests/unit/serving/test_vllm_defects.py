"""Defects observed in an engine that serves many adapters (vLLM 0.32 on a CPU, 2026), one test each.

The issue numbers are those of github.com/vllm-project/vllm.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import httpx
from patience import PATIENCE_S
from unit.serving.registry_fake import FakeSource, make_version
from unit.serving.tiny_llama import BASE, make_adapter, make_forcing_adapter, running_engine

from fedllm.adapter import from_peft, to_peft
from fedllm.clock import FakeClock, SystemClock
from fedllm.identity import SigningIdentity
from fedllm.messages.plan import Recipe
from fedllm.registry.model import PrivacyRecord
from fedllm.registry.remote import LocalVersionSource
from fedllm.registry.store import Registry, VersionDraft
from fedllm.rng import OsRng
from fedllm.serving.access import Access
from fedllm.serving.api import Endpoint, create_app
from fedllm.serving.engine import GenerationRequest, SamplingParams
from fedllm.serving.metrics import Counters
from fedllm.serving.tenants import TenantFile, create_tenant
from fedllm.serving.text import TextCodec
from fedllm.serving.versions import Versions
from fedllm.serving.watch import AliasWatcher

ALIAS = "acme/tools"
PROMPTS = [[5, 9, 2, 77, 30], [1] * 11, list(range(40, 61)), [300, 2], [8, 8, 9, 10, 11, 12, 200]]


async def collect(engine, digest, prompt, count: int = 12) -> list[int]:
    """Return all tokens of one request."""
    with engine.lease(digest) as lease:
        return await finish(engine.generate(lease, GenerationRequest(tuple(prompt), SamplingParams(max_tokens=count))))


async def finish(stream) -> list[int]:
    """Return what is left of a stream."""
    try:
        return [token async for chunk in stream for token in chunk.token_ids]
    finally:
        await stream.aclose()


async def together(engine, *requests):
    """Run requests that all begin in the same step: the step thread is held until the last one is queued."""
    gate = threading.Event()
    engine._commands.put(gate.wait)
    tasks = [asyncio.ensure_future(request) for request in requests]
    await asyncio.sleep(0.02)
    gate.set()
    return await asyncio.gather(*tasks)


@asynccontextmanager
async def endpoint(folder, tmp_path, source, **sizes) -> AsyncIterator[SimpleNamespace]:
    """Serve in process; yields engine, versions, watcher and an HTTP client with a key."""
    key = create_tenant(tmp_path / "tenants.toml", "acme", [ALIAS, "acme/other", "base"])
    async with running_engine(folder, **{"kv_blocks": 256, **sizes}) as engine:
        versions, counters = Versions(engine, source, "tiny"), Counters()
        watcher = AliasWatcher(source, engine, versions, counters, FakeClock())
        codec, access = TextCodec(folder), Access(TenantFile(tmp_path / "tenants.toml"), SystemClock())
        app = create_app(Endpoint(engine, versions, watcher, codec, access, counters, SystemClock(), OsRng()))
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://here", headers={"authorization": f"Bearer {key}"}
        ) as http:
            yield SimpleNamespace(engine=engine, versions=versions, watcher=watcher, http=http)


async def complete(http, model: str, count: int = 4, prompt=(1, 2, 3)) -> httpx.Response:
    """Ask for a completion by token ids."""
    body = {"model": model, "prompt": list(prompt), "max_tokens": count, "temperature": 0, "ignore_eos": True}
    body["return_token_ids"] = True
    return await http.post("/v1/completions", json=body)


def test_base_rows_beside_adapters_are_bit_equal(tiny_folder, drive) -> None:
    """#48421: base requests were given the last slot's adapter. Here their scores are equal to the last bit."""

    async def body():
        async with running_engine(tiny_folder, kv_blocks=256, max_step_tokens=512) as engine:
            loud = make_adapter(9, scale=5.0)
            await engine.load(loud.digest, loud)

            async def score(digest, prompt):
                with engine.lease(digest) as lease:
                    return await engine.score(lease, prompt, [7, 1, 300, 44])

            async def run(*digests):
                return await together(engine, *(score(d, p) for d, p in zip(digests, PROMPTS, strict=True)))

            plain = await run(BASE, BASE, BASE, BASE, BASE)
            mixed = await run(BASE, loud.digest, BASE, loud.digest, BASE)
            assert mixed[0::2] == plain[0::2]
            assert all(a != b for a, b in zip(mixed[1::2], plain[1::2], strict=True))

    drive(body())


def test_a_folder_deleted_after_load_changes_nothing(tiny_folder, tmp_path, drive) -> None:
    """#33791: the engine read the adapter's folder again in later steps, and died when it was gone."""
    coordinator = SigningIdentity.generate()
    home = tmp_path / "registry"
    registry = Registry(home, coordinator.public, SystemClock())
    recipe, privacy = (
        Recipe("sgd", 0.1, 1, 1, 1, 64),
        PrivacyRecord("record", "add-or-remove-one", None, 1e-5, "-", "advisory"),
    )
    draft = VersionDraft("tools", "tiny", None, 1, "ffa", recipe, {}, privacy, 3, 3, BASE)
    version = registry.add(make_forcing_adapter(tiny_folder, 50), draft, coordinator)
    registry.promote(ALIAS, version.digest, expected=None, actor="test", reason="first")

    async def body():
        source = LocalVersionSource(home, coordinator.public, SystemClock())
        async with endpoint(tiny_folder, tmp_path, source, slots=1) as here:
            await here.watcher.poll()
            first = await complete(here.http, ALIAS)
            shutil.rmtree(home / "blobs")
            other = make_adapter(1)
            for _ in range(2):
                answer = await complete(here.http, ALIAS)
                assert answer.status_code == 200
                assert answer.json()["choices"][0]["token_ids"] == first.json()["choices"][0]["token_ids"] == [50] * 4
                here.engine.unpin(version.digest)
                await here.engine.load(other.digest, other)  # out of its only slot, and back from memory
                assert here.engine.loaded() == (other.digest,)

    drive(body())
    registry.close()


def test_a_swap_in_mid_stream_keeps_the_version(tiny_folder, tmp_path, drive) -> None:
    """A running stream turned into another text 80 ms after a reload in place. Here it ends as it began."""

    async def body():
        source = FakeSource()
        async with endpoint(tiny_folder, tmp_path, source, slots=2) as here:
            source.publish(ALIAS, make_version(make_forcing_adapter(tiny_folder, 51), 1))
            await here.watcher.poll()
            with here.engine.lease(here.versions.served.versions[ALIAS].digest) as lease:
                request = GenerationRequest((1, 2), SamplingParams(max_tokens=150))
                stream = here.engine.generate(lease, request)
                said = list((await anext(stream)).token_ids)
                source.publish(ALIAS, make_version(make_forcing_adapter(tiny_folder, 52), 2))
                await here.watcher.poll()
                assert not stream._ended
                assert (await complete(here.http, ALIAS)).json()["choices"][0]["token_ids"] == [52] * 4
                assert said + await finish(stream) == [51] * 150

    drive(body())


def test_the_same_path_overwritten_has_another_prefix(tiny_folder, tmp_path, drive) -> None:
    """#42125: after a reload under the same name and path, prompts hit keys and values of the old version."""
    folder, prompt = tmp_path / "adapter", list(range(30, 70))
    folder.mkdir()

    async def load(engine, state):
        for name, data in to_peft(state, base_name="tiny").items():
            (folder / name).write_bytes(data)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        read = from_peft(files, base=BASE)
        await engine.load(read.digest, read)
        return read.digest

    async def body():
        old, new = make_adapter(1), make_adapter(2)
        async with running_engine(tiny_folder) as engine:
            fresh = await collect(engine, await load(engine, new), prompt)
        async with running_engine(tiny_folder) as engine:
            first = await load(engine, old)
            await collect(engine, first, prompt)
            await collect(engine, first, prompt)
            hits = engine.stats().prefix_hit_tokens
            assert hits > 0
            assert await collect(engine, await load(engine, new), prompt) == fresh
            assert engine.stats().prefix_hit_tokens == hits

    drive(body())


def test_unloading_frees_the_slot(tiny_folder, drive) -> None:
    """#54839, #42207: unload forgot the name and kept the weights. Here the slot is free for the next version."""

    async def body():
        async with running_engine(tiny_folder, slots=1) as engine:
            first, second = make_adapter(1), make_adapter(2)
            await engine.load(first.digest, first)
            engine.pin(first.digest)
            engine.unpin(first.digest)
            with engine.lease(first.digest) as lease:
                unloading = asyncio.create_task(engine.unload(first.digest))
                await asyncio.sleep(0)
                assert (engine.stats().slots_used, lease.slot) == (1, 0)
            await unloading
            assert (engine.stats().slots_used, engine.loaded()) == (0, ())
            await engine.load(second.digest, second)
            assert engine.loaded() == (second.digest,)

    drive(body())


def test_a_rank_too_high_is_a_400(tiny_folder, tmp_path, drive) -> None:
    """A rank above the limit was a 500. Here a pin says 400 with both numbers, and the alias keeps its version."""

    async def body():
        source = FakeSource()
        async with endpoint(tiny_folder, tmp_path, source, max_rank=4) as here:
            good = source.publish(ALIAS, make_version(make_adapter(1), 1))
            await here.watcher.poll()
            bad = source.publish(ALIAS, make_version(make_adapter(2, rank=8), 2))
            await here.watcher.poll()
            answer = await complete(here.http, f"{ALIAS}@v2")
            assert answer.status_code == 400
            assert "rank 8, this endpoint holds up to 4" in answer.json()["error"]["message"]
            answer = await complete(here.http, ALIAS)
            assert (answer.status_code, answer.headers["x-fedllm-version"]) == (200, good)
            health = (await here.http.get("/health")).json()
            assert health["refused"][ALIAS]["digest"] == bad
            assert "rank 8" in health["refused"][ALIAS]["reason"]
            metrics = (await here.http.get("/metrics")).text
            assert f'fedllm_versions_refused_total{{alias="{ALIAS}"}} 1' in metrics

    drive(body())


def test_a_cold_adapter_behind_a_hot_one_is_served_within_the_bound(tiny_folder, tmp_path, drive) -> None:
    """#16876: waiting requests of a resident adapter were always preferred. Here the cold one has its turn.

    In requests: once patience has ended, no further request of the hot version is admitted before the cold one.
    """

    async def body():
        source = FakeSource()
        async with endpoint(tiny_folder, tmp_path, source, slots=1, max_running=4, patience_s=0.05) as here:
            hot = source.publish(ALIAS, make_version(make_forcing_adapter(tiny_folder, 53), 1))
            cold = source.publish("acme/other", make_version(make_forcing_adapter(tiny_folder, 54), 2))
            await here.watcher.poll()
            order: list[str] = []
            running = True

            async def hammer() -> None:
                while running:
                    answer = await complete(here.http, ALIAS, 20)
                    assert answer.json()["choices"][0]["token_ids"] == [53] * 20
                    order.append("hot")

            hammers = [asyncio.create_task(hammer()) for _ in range(3)]
            while len(order) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            asking = asyncio.create_task(complete(here.http, "acme/other"))
            while cold not in here.engine._slots.waiting():  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.06)
            overdue = len(order)
            answer = await asyncio.wait_for(asking, PATIENCE_S)
            assert answer.json()["choices"][0]["token_ids"] == [54] * 4
            # Those of the hot version that ran when patience ended may end first: three clients, three requests.
            assert len(order) - overdue <= 3
            running = False
            await asyncio.gather(*hammers)
            assert hot != cold

    drive(body())


def test_a_load_does_not_change_requests_in_flight(tiny_folder, drive) -> None:
    """Loads stalled and changed other tenants' requests. Here versions come and go, and each text stays the same."""

    async def body():
        states = [make_adapter(i) for i in range(3)]
        async with running_engine(tiny_folder, slots=5, kv_blocks=256) as engine:
            for state in states:
                await engine.load(state.digest, state)
            cases = [(state.digest, prompt) for state in states for prompt in PROMPTS[:3]]
            quiet = await asyncio.gather(*(collect(engine, d, p, 60) for d, p in cases))
            for state in states:
                engine.pin(state.digest)
            streams = asyncio.gather(*(collect(engine, d, p, 60) for d, p in cases))
            loads = 0
            while not streams.done():
                other = make_adapter(100 + loads, scale=3.0)
                await engine.load(other.digest, other)
                loads += 1
            assert await streams == quiet
            assert loads > 3

    drive(body())

"""Two real vLLM servers behind a router: publish, move, drain, kill, start again. The tests are one story, in order.

Replica a loads from a shared folder, whose files the router verifies; replica b has the resolver and fetches itself.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator

import pytest
from vllm.servers import BASE_NAME, SLOTS, Replica, Transcript, Words, digest_of, route_process
from vllm.world import ALIAS, OTHER, Stream, World, answers, told, until

from fedllm.demo.cluster import free_ports
from fedllm.identity import SigningIdentity
from fedllm.ids import sha256
from fedllm.serving.tenants import create_tenant
from fedllm.serving.vllm import served_name

pytestmark = pytest.mark.timeout(900)
STREAMS, LENGTH = 6, 48


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Start two replicas, one on each core, and a router; v1 is published before."""
    folder = tmp_path_factory.mktemp("fleet")
    coordinator = SigningIdentity.generate()
    words = Words(folder / "registry", folder / "shared", coordinator, 8)
    registry, key = str(folder / "registry"), str(coordinator.public)
    port_a, port_b, port = free_ports(3)
    resolver = {"FEDLLM_REGISTRY": registry, "FEDLLM_COORDINATOR_KEY": key, "FEDLLM_ADAPTERS": str(folder / "adapters")}
    replicas = [Replica("a", folder, port_a, 0, {}), Replica("b", folder, port_b, 1, resolver)]
    (folder / "replicas.toml").write_text(
        f'[replicas.a]\nurl = "{replicas[0].url}"\nkind = "vllm"\nslots = {SLOTS}\nadapters = "{words.shared}"\n\n'
        f'[replicas.b]\nurl = "{replicas[1].url}"\nkind = "vllm"\nslots = {SLOTS}\n'
    )
    tenant = create_tenant(folder / "tenants.toml", "acme", [ALIAS, OTHER, "base"], operator=True)
    guest = create_tenant(folder / "tenants.toml", "guest", [ALIAS])
    router = route_process(folder, port, registry, key)
    made = World(folder, words, replicas, router, f"http://127.0.0.1:{port}", tenant, guest, Transcript())
    words.promote(ALIAS, made.add())
    try:
        for replica in replicas:
            replica.start()
        asyncio.run(_all_ready(replicas))
        made.say("two vLLM replicas, a and b, answer /health; neither has heard of any adapter")
        router.start()
        yield made
    finally:
        for process in (router, *(replica.process for replica in replicas)):
            process.terminate()
        words.registry.close()


async def _all_ready(replicas: list[Replica]) -> None:
    await asyncio.gather(*(replica.ready() for replica in replicas))


def test_a_version_is_fetched_by_its_digest(world: World) -> None:
    """Nobody pushes: the router names a version, and each replica fetches and verifies it."""

    async def body() -> None:
        (v1,) = world.versions
        async with world.client() as http:
            await until(lambda: answers(http))
            await world.serves(http, ALIAS, v1)
            await world.prepared(v1, world.replicas)
            answer = await world.ask(http, "The capital of France is")
            assert digest_of(answer) == v1.digest
            assert answer.json()["choices"][0]["text"] == world.words.word(v1.digest) * 8
        assert world.replicas[1].said(f"adapter {served_name(v1.digest)} verified")
        assert world.fetched == [v1.digest]
        world.say(f"{ALIAS} -> {v1.name}: loaded on a from the shared folder, fetched by b by its digest; both probed")
        world.say(f"{v1.name} says {answer.json()['choices'][0]['text']!r}")

    asyncio.run(body())


def test_an_alias_moves_under_running_streams(world: World) -> None:
    """No stream mixes versions: those that run end with the old one, which is then drained and forgotten."""

    async def body() -> None:
        (v1,) = world.versions
        v2 = world.add()
        async with world.client() as http:
            old = [Stream() for _ in range(STREAMS)]
            tasks = [asyncio.create_task(s.run(http, f"Question {i}:", 4 * LENGTH)) for i, s in enumerate(old)]
            await asyncio.gather(*(stream.begun.wait() for stream in old))
            world.say(f"{len(old)} streams run on {v1.name}, on replicas {', '.join(sorted({s.replica for s in old}))}")
            world.words.promote(ALIAS, v2)
            await world.serves(http, ALIAS, v2)
            running = sum(not task.done() for task in tasks)
            assert running, "the streams were too short to see the move"
            flip = next(line for line in world.events("alias flipped") if line["digest"] == v2.digest)
            said = f"ready on {flip['ready']} replicas after {flip['seconds']} s; {running} streams run on"
            world.say(f"{ALIAS} -> {v2.name}, {said}")
            new = await asyncio.gather(*(Stream().run(http, f"Question {i}:", LENGTH) for i in range(STREAMS)))
            await asyncio.gather(*tasks)
            for streams, version, count in ((old, v1, 4 * LENGTH), (new, v2, LENGTH)):
                assert {stream.digest for stream in streams} == {version.digest}
                assert {stream.text for stream in streams} == {world.words.word(version.digest) * count}
                world.say(f"{len(streams)} streams of {version.name}, {count} tokens each: all of them its own")

            async def forgotten() -> bool:
                return not any([v1.digest in await replica.names() for replica in world.replicas])

            await until(forgotten)
            assert world.events("version drained")
            world.say(f"{v1.name} drained, and unloaded on a and b")
            pinned = await world.ask(http, "Once more:", model=f"{ALIAS}@v1")
            assert (digest_of(pinned), pinned.json()["choices"][0]["text"]) == (
                v1.digest,
                world.words.word(v1.digest) * 8,
            )
            await until(forgotten)
            world.say(f"{ALIAS}@v1 asked for: loaded again, answered, and let go")

    asyncio.run(body())


def test_rows_of_the_base_are_refused(world: World) -> None:
    """VLLM 0.32 on a CPU gives base rows the adapter in its last slot; so the router does not send it any.

    Which version lies there is chance: one that was unloaded answers too, for its weights are still there.
    """

    async def body() -> None:
        v2 = world.versions[1]
        replica = world.replicas[0]
        said = {v.name: world.words.word(v.digest).strip() for v in world.versions}
        alone = (await replica.complete(BASE_NAME, 16)).json()["choices"][0]["text"]
        assert not any(word in alone for word in said.values())
        texts = []
        for _ in range(3):
            beside = replica.complete(served_name(v2.digest), 24), replica.complete(BASE_NAME, 16)
            _, answer = await asyncio.gather(*beside)
            texts.append(answer.json()["choices"][0]["text"])
        world.say(f"base alone, asked past the router:  {alone!r}")
        world.say(f"base beside rows of {v2.name}:       {texts[-1]!r}")
        whose = sorted({name for name, word in said.items() for text in texts if word in text})
        assert whose, "not seen: has vLLM mended it? then base = true may be allowed"
        world.say(f"that is what {', '.join(whose)} says")
        async with world.client() as http:
            refused = await world.ask(http, "The capital of France is", model=BASE_NAME)
        assert refused.status_code == 503
        world.say(f"base asked for at the router: {refused.status_code} {refused.json()['error']['code']}")

    asyncio.run(body())


def test_a_prefix_is_found_again_by_its_own_tenant_only(world: World) -> None:
    """The salt is the tenant's: how fast an answer begins tells nothing of what others asked."""

    async def body() -> None:
        prompt = "one two three four five six seven eight nine ten " * 30
        cached = []
        for key in (world.key, world.key, world.guest):
            async with world.client(key) as http:
                usage = (await world.ask(http, prompt, 1)).json()["usage"]
            cached.append((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        assert (cached[0], cached[2]) == (0, 0)
        assert cached[1] > 0
        world.say(f"one prompt of {usage['prompt_tokens']} tokens, cached: acme {cached[:2]}, then guest {cached[2:]}")

    asyncio.run(body())


def test_a_version_waits_until_all_replicas_can_serve_it(world: World) -> None:
    """A changed file in the shared folder keeps the alias where it was; mended, the alias moves by itself."""

    async def body() -> None:
        v3 = world.add()
        file = world.words.shared / v3.digest / "adapter_config.json"
        good = file.read_bytes()
        file.write_bytes(good.replace(b"0.0", b"0.1"))
        async with world.client() as http:
            world.words.promote(OTHER, v3)
            await until(lambda: told(world, "version held back"))
            assert (await world.ask(http, "Go on:", 4, OTHER)).status_code == 503
            assert {e["reason"] for e in world.events("version not ready")} == {"digest-mismatch"}
            assert v3.digest not in await world.replicas[0].names()
            world.say(
                f"{OTHER} -> {v3.name} held: a file of a's folder was changed (digest-mismatch); b alone is not enough"
            )
            file.write_bytes(good)
            await world.serves(http, OTHER, v3)
            world.say(f"the file mended: {OTHER} -> {v3.name}")

    asyncio.run(body())


def test_a_publication_that_needs_too_many_slots_is_held(world: World) -> None:
    """Two slots serve one alias that moves, or two that stand still; the third version is refused before it is sent."""

    async def body() -> None:
        v2, v3, v4 = *world.versions[1:3], world.add()
        async with world.client() as http:
            world.words.promote(ALIAS, v4)
            await until(lambda: told(world, "would run 3 versions at once"))
            answers = [await world.ask(http, "Go on:", 4, model) for model in (ALIAS, OTHER)]
            assert [digest_of(answer) for answer in answers] == [v2.digest, v3.digest]
            assert not any([v4.digest in await replica.names() for replica in world.replicas])
            refusal = next(e for e in world.events("replica") if "at once" in e["event"])
            world.say(f"{ALIAS} -> {v4.name} refused: {refusal['event']}")
            world.say(f"{ALIAS} serves {v2.name} on, {OTHER} {v3.name}")
            world.words.promote(ALIAS, v2)

    asyncio.run(body())


def test_a_killed_replica_loses_no_request_and_comes_back_by_itself(world: World) -> None:
    """Whole answers are asked for elsewhere, streams end with an error; the new process fetches by digest."""

    async def body() -> None:
        v2, v3 = world.versions[1:3]
        victim = world.replicas[1]
        async with world.client() as http:
            streams = [Stream() for _ in range(STREAMS)]
            tasks = [asyncio.create_task(s.run(http, f"Tale {i}:", 4 * LENGTH)) for i, s in enumerate(streams)]
            await asyncio.gather(*(stream.begun.wait() for stream in streams))
            wholes = [asyncio.create_task(world.ask(http, f"Whole {i}:", LENGTH)) for i in range(STREAMS)]
            await asyncio.sleep(1.0)
            failed = len(world.events("replica failed a request"))
            world.say(f"{len(streams)} streams and {len(wholes)} whole answers run; kill -9 of b")
            await asyncio.to_thread(victim.process.kill)
            await asyncio.gather(*tasks)
            answers = await asyncio.gather(*wholes)
            lost = [stream for stream in streams if stream.error]
            assert lost
            assert all((s.replica, s.error) == ("b", "replica-lost") for s in lost)
            assert all(s.text == world.words.word(v2.digest) * 4 * LENGTH for s in streams if not s.error)
            word = world.words.word(v2.digest)
            assert all(s.text == word * (len(s.text) // len(word)) for s in lost)
            assert [answer.status_code for answer in answers] == [200] * len(answers)
            assert {answer.json()["choices"][0]["text"] for answer in answers} == {word * LENGTH}
            assert {answer.headers["x-fedllm-replica"] for answer in answers} >= {"a"}
            ran = len(streams) - len(lost)
            world.say(f"{len(lost)} streams of b ended with the error replica-lost, {ran} of a ran on")
            retried = len(world.events("replica failed a request")) - failed - len(lost)
            assert retried > 0
            world.say(f"{len(answers)} whole answers, all 200: {retried} of them were asked for a second time, at a")
            before = len(victim.said("verified"))
            shutil.rmtree(world.folder / "adapters")
            victim.start()
            await victim.ready()
            await world.prepared(v2, [victim])
            await world.prepared(v3, [victim])
            assert len(victim.said("verified")) == before + 2
            assert world.fetched == sorted((v2.digest, v3.digest))
            world.say(f"b started again with an empty disk, and fetched {v2.name} and {v3.name} when they were named")

            async def both() -> bool:
                asks = (world.ask(http, f"Both {i}:", 2) for i in range(8))
                return {a.headers["x-fedllm-replica"] for a in await asyncio.gather(*asks)} == {"a", "b"}

            await until(both)
            world.say("both replicas answer again")

    asyncio.run(body())


def test_what_cannot_be_verified_is_not_served(world: World) -> None:
    """A changed file, another coordinator's signature and an unknown digest are refused; the log says why."""

    async def body() -> None:
        replica = world.replicas[1]
        tampered = world.add()
        weights = tampered.manifest.files["adapter_model.safetensors"].sha256
        (blob,) = (file for file in (world.words.folder / "blobs").rglob("*") if file.name.endswith(weights[2:]))
        blob.chmod(0o600)
        data = bytearray(blob.read_bytes())
        data[-1] ^= 1
        blob.write_bytes(data)
        foreign = world.words.add(identity=SigningIdentity.generate())
        cases = (
            (tampered.digest, "digest-mismatch"),
            (foreign.digest, "signature-invalid"),
            (sha256(b"x"), "not-found"),
        )
        for digest, code in cases:
            answer = await replica.complete(served_name(digest), 1)
            assert answer.status_code == 404
            (line,) = replica.said(f"{digest} refused")
            assert f"[{code}]" in line
            assert digest not in await replica.names()
            assert digest not in world.fetched
            said = line.partition("adapter fedllm-")[2].replace(digest, digest[:8] + "…")
            world.say(f"404, and b's log says: {said}")

    asyncio.run(body())

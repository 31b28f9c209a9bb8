"""Aliases that move under a router: ready before the flip, one version a request, drained after it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from unit.serving.registry_fake import make_version
from unit.serving.router.fake_replica import FakeReplica
from unit.serving.router.live_router import ALIAS, read, routed, until
from unit.serving.tiny_llama import make_adapter

from fedllm.errors import IntegrityError
from fedllm.registry.model import AliasTable

Drive = Callable[..., object]


def _two() -> list[FakeReplica]:
    return [FakeReplica("one"), FakeReplica("two")]


def test_versions_are_never_mixed(tmp_path: Path, drive: Drive) -> None:
    """While the alias moves again and again, every stream is answered by the one version it was bound to."""

    async def story() -> None:
        async with routed(tmp_path, _two()) as live:
            moving, answered = True, []

            async def ask(number: int) -> None:
                while moving:
                    events = await live.events(prompt=f"{number}")
                    assert events[-1] == "[DONE]"
                    (digest,) = {e["system_fingerprint"] for e in events[:-1]}
                    answered.append(digest)

            asking = [asyncio.create_task(ask(n)) for n in range(4)]
            published = [live.old]
            for number in range(2, 6):
                published.append(live.publish(number))
                await until(lambda: live.models.served[ALIAS].digest == published[-1])
                await until(lambda: published[-1] in answered)
            moving = False
            await asyncio.gather(*asking)
            assert set(answered) == set(published)
            assert all(r.healthy and r.breaker.state == "closed" for r in live.fleet.replicas.values())

    drive(story())


def test_it_is_ready_before_the_flip(tmp_path: Path, drive: Drive) -> None:
    """No request is bound to a version before every healthy replica has answered a probe by it."""

    async def story() -> None:
        async with routed(tmp_path, _two()) as live:
            live.replicas["two"].refuse_probes = True
            before = live.replicas["one"].probes
            new = live.publish(2)
            await until(lambda: live.replicas["one"].probes > before)
            await until(lambda: live.replicas["two"].probes > before + 1)
            assert (await live.post()).json()["system_fingerprint"] == live.old
            live.replicas["two"].refuse_probes = False
            await until(lambda: live.models.served[ALIAS].digest == new)
            assert all(new in r.prepared for r in live.fleet.replicas.values())

    drive(story())


def test_a_replica_that_cannot_is_left_out(tmp_path: Path, drive: Drive, caplog: pytest.LogCaptureFixture) -> None:
    """After a bounded time the others flip without it; it gets old versions only, and is asked again until it can."""

    async def story() -> None:
        async with routed(tmp_path, _two(), prepare_s=0.3) as live:
            live.replicas["two"].refuse_probes = True
            new = live.publish(2)
            await until(lambda: live.models.served[ALIAS].digest == new)
            prompt = live.prefer("two")
            assert (await live.post(prompt=prompt)).headers["x-fedllm-replica"] == "one"
            assert (await live.post(prompt=prompt, model="tiny")).status_code == 200
            probes = live.replicas["two"].probes
            await until(lambda: live.replicas["two"].probes > probes + 1)
            said = [record.fedllm_fields["replica"] for record in caplog.records if "not ready" in record.message]  # type: ignore[attr-defined]
            assert said.count("two") == 1
            live.replicas["two"].refuse_probes = False
            await until(lambda: new in live.fleet.replicas["two"].prepared)
            assert (await live.post(prompt=prompt)).headers["x-fedllm-replica"] == "two"

    drive(story())


def test_nobody_can(tmp_path: Path, drive: Drive) -> None:
    """If no replica can serve it, the alias stays where it is, health says so, and it is tried again."""

    async def story() -> None:
        async with routed(tmp_path, _two(), prepare_s=0.1) as live:
            for replica in live.replicas.values():
                replica.refuse_probes = True
            new = live.publish(2)
            await until(lambda: live.models.held_back)
            assert (await live.post()).json()["system_fingerprint"] == live.old
            health = await live.http.get("/health", headers={"authorization": f"Bearer {live.key}"})
            assert health.json()["held_back"] == {ALIAS: "tools@v2"}
            for replica in live.replicas.values():
                replica.refuse_probes = False
            await until(lambda: live.models.served[ALIAS].digest == new)
            assert live.models.held_back == {}

    drive(story())


def test_the_old_version_is_drained(tmp_path: Path, drive: Drive) -> None:
    """A version is unloaded when its last request has ended, one that waits for a place included."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one")]) as live:
            unloaded: list[str] = []

            async def unload(version: object) -> None:
                unloaded.append(version.digest)  # type: ignore[attr-defined]

            live.fleet.replicas["one"].kind.unload = unload  # type: ignore[method-assign]
            live.replicas["one"].script.append("hold")
            async with live.stream() as answer:
                events = read(answer)
                await anext(events)
                new = live.publish(2)
                await until(lambda: live.models.served[ALIAS].digest == new)
                assert (await live.post()).json()["system_fingerprint"] == new
                assert unloaded == []
                live.replicas["one"].gate.set()
                rest = [event async for event in events]
                assert {e["system_fingerprint"] for e in rest[:-1]} == {live.old}
            await until(lambda: unloaded == [live.old])

    drive(story())


def test_an_alias_goes(tmp_path: Path, drive: Drive) -> None:
    """A withdrawn alias is 404; a rollback is a move like any other."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one")]) as live:
            new = live.publish(2)
            await until(lambda: live.models.served[ALIAS].digest == new)
            live.publish(1)
            await until(lambda: live.models.served[ALIAS].digest == live.old)
            live.source.withdraw(ALIAS)
            await until(lambda: ALIAS not in live.models.served)
            assert (await live.post()).status_code == 404

    drive(story())


def test_the_epoch_never_goes_back(tmp_path: Path, drive: Drive) -> None:
    """A table older than one that was seen is an error of the source and moves nothing."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one")]) as live:
            new = live.publish(2)
            await until(lambda: live.models.served[ALIAS].digest == new)
            epoch = live.models.epoch
            live.source.table = AliasTable(epoch - 1, {ALIAS: live.old})
            polling = asyncio.create_task(live.follower.poll())
            await until(lambda: live.source._moved.set() or polling.done())  # the source's long-poll ends now
            with pytest.raises(IntegrityError, match=f"epoch {epoch - 1} after one of epoch {epoch}"):
                await polling
            assert live.models.served[ALIAS].digest == new
            await until(lambda: live.follower.source_error == "integrity")

    drive(story())


def test_one_bad_alias_keeps_nobody_back(tmp_path: Path, drive: Drive) -> None:
    """An alias that no replica can serve does not keep another one from its version."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one")], prepare_s=0.1) as live:
            prepare = live.fleet.replicas["one"].kind.prepare

            async def refuse(version: object, alias: str) -> None:
                if alias != ALIAS:
                    raise IntegrityError("no")
                await prepare(version, alias)  # type: ignore[arg-type]

            live.fleet.replicas["one"].kind.prepare = refuse  # type: ignore[method-assign]
            live.source.publish("acme/bad", make_version(make_adapter(9), 9, "bad"))
            new = live.publish(2)
            await until(lambda: live.models.served[ALIAS].digest == new)
            assert set(live.models.held_back) == {"acme/bad"}

    drive(story())

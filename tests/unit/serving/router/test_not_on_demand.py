"""Replicas that must be told of a version before they serve it, as vLLM servers must; and what is logged of prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from unit.serving.router.fake_replica import WORDS, FakeReplica
from unit.serving.router.live_router import ALIAS, Live, routed, until

from fedllm.errors import AdapterInvalid
from fedllm.registry.model import AdapterVersion
from fedllm.serving.router.app import replica_kinds
from fedllm.serving.tenants import Tenant

Drive = Callable[..., object]


class Shelf:
    """Makes a replica's kind one that serves what it was prepared for, and remembers what it was told."""

    def __init__(self, live: Live, name: str, min_ready: int | None = None) -> None:
        self.told: list[tuple[str, int]] = []
        self.refuse = False
        replica = live.fleet.replicas[name]
        self._prepare = replica.kind.prepare
        kind: Any = replica.kind
        kind.on_demand, kind.min_ready = False, min_ready
        kind.prepare, kind.unload = self.prepare, self.unload
        self.replica = replica

    async def prepare(self, version: AdapterVersion, alias: str) -> None:
        """Stand in for the kind's own."""
        if self.refuse:
            raise AdapterInvalid("no")
        await self._prepare(version, alias)
        self.told.append(("prepare", version.number))

    async def unload(self, version: AdapterVersion) -> None:
        """Stand in for the kind's own."""
        self.told.append(("unload", version.number))


def test_a_pin_is_prepared_and_let_go(tmp_path: Path, drive: Drive) -> None:
    """A request for an old version waits until it is ready, and the version is unloaded after it."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one")]) as live:
            shelf = Shelf(live, "one")
            new = live.publish(2)
            await until(lambda: live.models.served[ALIAS].digest == new)
            await until(lambda: ("unload", 1) in shelf.told)
            answer = await live.post(model=f"{ALIAS}@v1")
            assert answer.json()["system_fingerprint"] == live.old
            await until(lambda: shelf.told == [("prepare", 2), ("unload", 1), ("prepare", 1), ("unload", 1)])
            assert shelf.replica.prepared == {new}

    drive(story())


def test_all_or_enough(tmp_path: Path, drive: Drive) -> None:
    """Where all replicas must be ready, one that refuses holds the alias back; where one is enough, it does not."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one"), FakeReplica("two")]) as live:
            shelves = [Shelf(live, "one"), Shelf(live, "two")]
            shelves[1].refuse = True
            live.publish(2)
            await until(lambda: live.models.held_back == {ALIAS: "tools@v2"})
            assert (await live.post()).json()["system_fingerprint"] == live.old
            for name in ("one", "two"):
                live.fleet.replicas[name].kind.min_ready = 1  # type: ignore[misc]
            await until(lambda: live.models.served[ALIAS].number == 2)
            assert (await live.post(prompt=live.prefer("two"))).headers["x-fedllm-replica"] == "one"

    drive(story())


def test_one_that_returns_is_prepared_again(tmp_path: Path, drive: Drive) -> None:
    """A restarted replica has nothing: it gets no request before it was prepared for what is served."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one")]) as live:
            shelf = Shelf(live, "one")
            live.replicas["one"].healthy = False
            await until(lambda: not live.fleet.replicas["one"].healthy)
            live.replicas["one"].healthy = True
            assert (await live.post()).json()["system_fingerprint"] == live.old
            assert shelf.told == [("prepare", 1)]

    drive(story())


def test_kinds_of_replicas_toml() -> None:
    """A native replica has no options, a vLLM one has its own; both factories are there by name."""
    kinds = replica_kinds("tiny", None)  # type: ignore[arg-type]
    assert set(kinds) == {"native", "vllm"}
    assert kinds["native"].options({}, "x") is None
    assert kinds["vllm"].options({"slots": 2}, "x") == kinds["vllm"].options({"slots": 2}, "x")


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_are_logged_by_opt_in_only(tmp_path: Path, drive: Drive, stream: bool) -> None:
    """What a tenant asks and is answered reaches the log only if the tenant opted in."""

    class Log:
        def __init__(self) -> None:
            self.notes: list[tuple[str, str, str, str]] = []

        def note(self, tenant: Tenant, record_id: str, asked: str, answered: str) -> None:
            self.notes.append((tenant.name, record_id, asked, answered))

    async def story() -> None:
        log = Log()
        async with routed(tmp_path, [FakeReplica("one")], prompt_log=log) as live:
            for key in (live.key, live.open_key):
                answer = await live.post(key=key, prompt="the question", stream=stream)
                assert answer.status_code == 200
            await until(lambda: log.notes)
            assert log.notes == [("open", "cmpl-one-2", "the question", "".join(WORDS))]

    drive(story())

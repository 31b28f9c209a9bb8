"""Replicas that join, leave, drain, die and come back while requests run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from unit.serving.router.fake_replica import WORDS, FakeReplica
from unit.serving.router.live_router import read, routed, text, until

from fedllm.errors import ConfigError, FedllmError, NotFound
from fedllm.serving.router.replica_file import no_options, read_replicas

WHOLE = "".join(WORDS)
Drive = Callable[..., object]
KINDS = {"native": no_options}


def test_join_and_leave_without_a_dropped_stream(tmp_path: Path, drive: Drive) -> None:
    """A replica that leaves the file ends its streams and gets nothing new; one that joins takes over."""

    async def story() -> None:
        async with FakeReplica("two") as two, routed(tmp_path, [FakeReplica("one", always="hold")]) as live:
            async with live.stream() as answer:
                events = read(answer)
                seen = [await anext(events)]
                leaving = live.fleet.replicas["one"]
                live.replicas["two"] = two
                live.write("two")
                await until(lambda: "one" not in live.fleet.replicas and live.fleet.replicas["two"].healthy)
                assert text(await live.events()) == WHOLE
                assert len(two.asked) == 1
                assert (leaving.in_flight, leaving.client.is_closed) == (1, False)
                live.replicas["one"].gate.set()
                seen += [event async for event in events]
            assert seen[-1] == "[DONE]"
            assert text(seen) == WHOLE
            await until(lambda: leaving.client.is_closed)
            assert len(live.replicas["one"].asked) == 1

    drive(story())


def test_an_operator_drains_and_resumes(tmp_path: Path, drive: Drive) -> None:
    """A drained replica keeps what it has and gets nothing new until it is resumed."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one"), FakeReplica("two")]) as live:
            prompt = live.prefer("one")
            live.replicas["one"].script.append("hold")
            async with live.stream(prompt=prompt) as answer:
                events = read(answer)
                await anext(events)
                live.fleet.drain("one")
                await live.post(prompt=prompt)
                assert len(live.replicas["two"].asked) == 1
                live.replicas["one"].gate.set()
                assert [event async for event in events][-1] == "[DONE]"
            live.fleet.drain("two")
            waiting = asyncio.create_task(live.post(prompt=prompt))
            await until(lambda: len(live.line) == 1)
            assert (await live.http.get("/health")).status_code == 503
            live.fleet.resume("one")
            assert (await waiting).status_code == 200
            assert [(row["name"], row["draining"]) for row in live.fleet.rows()] == [("one", False), ("two", True)]
            with pytest.raises(NotFound, match="three"):
                live.fleet.drain("three")

    drive(story())


def test_death_and_return(tmp_path: Path, drive: Drive) -> None:
    """A killed replica loses its streams with an error, its other requests go on elsewhere; it comes back by itself."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one"), FakeReplica("two")]) as live:
            one, prompt = live.replicas["one"], live.prefer("one")
            one.script.extend(["hold", "hold"])
            streaming = asyncio.create_task(live.events(prompt=prompt))
            await until(lambda: live.fleet.replicas["one"].in_flight == 1 and live.line._queue.counter("acme") > 1)
            await until(lambda: one.asked)
            live.fleet.drain("two")  # so that the next one goes there, too
            asking = asyncio.create_task(live.post(prompt=prompt))
            await until(lambda: len(one.asked) == 2)
            live.fleet.resume("two")
            await one.die()
            events = await streaming
            assert events[-1]["error"]["code"] == "replica-lost"
            assert (await asking).json()["choices"][0]["text"] == WHOLE
            await until(lambda: not live.fleet.replicas["one"].healthy)
            for _ in range(3):
                assert (await live.post(prompt=prompt)).status_code == 200
            assert len(one.asked) == 2
            async with one:
                await until(lambda: live.fleet.replicas["one"].healthy)
                await live.post(prompt=prompt)
                assert len(one.asked) == 3

    drive(story())


def test_requests_wait_for_the_first_replica(tmp_path: Path, drive: Drive) -> None:
    """With no replica at all a request waits; the first one that joins has it."""

    async def story() -> None:
        async with FakeReplica("late") as late, routed(tmp_path, []) as live:
            assert (await live.http.get("/health")).json()["status"] == "failed"
            asking = asyncio.create_task(live.post())
            await until(lambda: len(live.line) == 1)
            live.replicas["late"] = late
            live.write("late")
            assert (await asking).json()["choices"][0]["text"] == WHOLE

    drive(story())


def test_a_spoilt_file_changes_nothing(tmp_path: Path, drive: Drive) -> None:
    """If the file cannot be read, the replicas known so far stay; a new key in it makes a new connection."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one")]) as live:
            before = live.fleet.replicas["one"]
            for content in ("[replicas", '[replicas.one]\nurl = "nowhere"\n', "[replica.one]\n"):
                live.file.write_text(content)
                live.fleet.refresh()
            live.file.unlink()
            live.fleet.refresh()
            assert live.fleet.replicas["one"] is before
            assert (await live.post()).status_code == 200
            live.write("one")
            live.fleet.refresh()
            assert live.fleet.replicas["one"] is before
            (tmp_path / "router.key").write_text("another\n")
            await until(lambda: live.fleet.replicas["one"] is not before and live.fleet.replicas["one"].healthy)
            await live.post()
            assert live.replicas["one"].asked[-1][1]["authorization"] == "Bearer another"

    drive(story())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[replicas.one]\nurl = "ftp://x"\n', "ftp://x"),
        ("[replicas.one]\n", "no http address"),
        ('[replicas.one]\nurl = "http://x"\nkind = "best"\n', "known: native"),
        ('[replicas.one]\nurl = "http://x"\nkeyfile = "k"\n', "keyfile"),
        ('[replicas.one]\nurl = "http://x"\nkey_file = "k"\n', "does not exist"),
        ("[replicas.one]\nurl = 5\n", "text expected"),
        ('[replicas.ONE]\nurl = "http://x"\n', "'ONE'"),
        ("replicas = 5\n", "is a int"),
        ("[replicas]\none = 5\n", "is a int"),
        ("[replica]\n", "replica"),
    ],
)
def test_file_faults_are_named(tmp_path: Path, content: str, said: str) -> None:
    """Every slip in the file is an error that names the replica, the key and what is allowed."""
    (tmp_path / "replicas.toml").write_text(content)
    with pytest.raises(FedllmError) as raised:
        read_replicas(tmp_path / "replicas.toml", kinds=KINDS)
    assert isinstance(raised.value, ConfigError | NotFound)
    assert said in raised.value.message


def test_keys_are_never_shown(tmp_path: Path) -> None:
    """A replica's key is in no repr."""
    (tmp_path / "key").write_text("fedllm-secret\n")
    (tmp_path / "replicas.toml").write_text('[replicas.one]\nurl = "http://x/"\nkey_file = "key"\n')
    found = read_replicas(tmp_path / "replicas.toml", kinds=KINDS)
    assert (found["one"].key, found["one"].url) == ("fedllm-secret", "http://x")
    assert "secret" not in repr(found)

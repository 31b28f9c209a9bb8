"""The direct transport on loopback: bytes pass, and broken connections are resumed."""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from patience import NEVER_S, PATIENCE_S
from unit.relay.direct_scene import CLOCK, MIB, Scene, asked, echo, greeted, play

from fedllm.errors import PeerUnavailable
from fedllm.relay import dial, direct
from fedllm.relay.carrier import Reply
from fedllm.relay.service import pack_frame

pytestmark = [pytest.mark.timeout(3 * PATIENCE_S), pytest.mark.usefixtures("unhurried")]
_SHIPPED_PATIENCE_S = direct.PATIENCE_S


def test_heads_and_parts_pass_unchanged(root: Path) -> None:
    """No part, one, three, and one of four MiB; requests of more than gRPC's usual 4 MiB; empty bytes too."""
    replies = {
        "east": Reply(b"head"),
        "north": Reply(b"", (b"one",)),
        "south": Reply(b"h", (os.urandom(MIB), os.urandom(MIB), b"rest")),
        "west": Reply(b"big", (os.urandom(4 * MIB),)),
    }
    heard: dict[str, bytes] = {}

    async def story(scene: Scene) -> None:
        for name, reply in replies.items():

            async def answer(data: bytes, name: str = name, reply: Reply = reply) -> Reply:
                heard[name] = data
                return reply

            await scene.owner(name, answer)
        await scene.here(*replies)
        request = os.urandom(9 * MIB)
        assert await scene.ask(*replies, data=request) == replies
        assert heard == dict.fromkeys(replies, request)
        assert await scene.ask("east", data=b"") == {"east": replies["east"]}
        assert heard["east"] == b""

    play(root, story)


def test_an_owner_that_is_enrolled_later_needs_no_restart(root: Path) -> None:
    """Before its certificate is there it is turned away; afterwards its dialler gets in by itself."""

    async def story(scene: Scene) -> None:
        await scene.owner("east")
        await scene.here("east")
        await scene.owner("late", enrolled=False)
        await asyncio.sleep(0.5)
        await scene.here("east")
        scene.identity("late")
        await scene.here("east", "late")
        assert await scene.ask("late") == {"late": Reply(b"ksa")}

    play(root, story)


def test_what_is_pending_is_asked_again_when_the_owner_is_back(root: Path) -> None:
    """The stream is lost before the answer: the same request comes once more, and is answered."""
    heard: list[bytes] = []
    first = asyncio.Event()

    async def answer(data: bytes) -> Reply:
        heard.append(data)
        if len(heard) == 1:
            first.set()
            await asyncio.sleep(NEVER_S)
        return Reply(b"answer", (b"part",))

    async def story(scene: Scene) -> None:
        await scene.owner("east", answer)
        await scene.here("east")
        asking = asyncio.create_task(scene.ask("east"))
        await first.wait()
        await scene.hang_up("east")
        await scene.here()
        scene.dial("east")
        assert await asking == {"east": Reply(b"answer", (b"part",))}
        assert heard == [b"ask", b"ask"]

    play(root, story)


def test_owners_come_back_to_a_coordinator_that_was_away(root: Path) -> None:
    """The listener goes and comes again on its port; owners that were connected are soon there again."""
    assert dial.LAST_PAUSE_S * 1.5 < _SHIPPED_PATIENCE_S  # the longest pause between two attempts

    async def story(scene: Scene) -> None:
        await scene.owner("east")
        await scene.here("east")
        await scene.carrier.close()
        with pytest.raises(PeerUnavailable):
            await scene.carrier.nodes()
        await asyncio.sleep(1)
        await scene.listen()
        await scene.here("east")
        assert await scene.ask("east") == {"east": Reply(b"ksa")}

    play(root, story)


def test_half_a_reply_is_thrown_away_and_asked_for_again(root: Path) -> None:
    """The stream breaks between two parts: what came is not mixed with what comes then."""

    async def story(scene: Scene) -> None:
        scene.identity("east")
        async with scene.line("east") as call:
            await greeted(call)
            asking = asyncio.create_task(scene.ask("east"))
            tag, _ = await asked(call)
            await call.write(pack_frame({"op": "head", "tag": tag, "more": True}, b"old"))
            await call.write(pack_frame({"op": "part", "tag": tag}, b"old part"))
            await asyncio.sleep(0.1)  # what can arrive of it, does
        await scene.here()
        async with scene.line("east") as call:
            await greeted(call)
            again, data = await asked(call)
            assert (again, data) == (tag, b"ask")
            await call.write(pack_frame({"op": "head", "tag": tag, "more": True}, b"new"))
            await call.write(pack_frame({"op": "part", "tag": tag}, b"new part"))
            await call.write(pack_frame({"op": "end", "tag": tag}))
            assert await asking == {"east": Reply(b"new", (b"new part",))}

    play(root, story)


def test_vectors_come_one_at_a_time_and_the_others_are_stopped(root: Path) -> None:
    """While the reader has one owner's vector, no more than a window of another's leaves its owner."""
    sent = {"east": 0, "west": 0}
    parts = tuple(bytes([i]) * (2 * MIB) for i in range(8))

    async def story(scene: Scene) -> None:
        async def push(call: Any, name: str) -> None:
            await greeted(call)
            tag, _ = await asked(call)
            await call.write(pack_frame({"op": "head", "tag": tag, "more": True}, name.encode()))
            for part in parts:
                await call.write(pack_frame({"op": "part", "tag": tag}, part))
                sent[name] += len(part)
            await call.write(pack_frame({"op": "end", "tag": tag}))

        for name in sent:
            scene.identity(name)
        async with scene.line("east") as east, scene.line("west") as west:
            pushing = [asyncio.create_task(push(call, name)) for call, name in ((east, "east"), (west, "west"))]
            await scene.here("east", "west")
            nodes = {scene.node(name): name for name in sent}
            seen = []
            async with aclosing(scene.carrier.exchange(dict.fromkeys(nodes, b"ask"), deadline_s=PATIENCE_S)) as replies:
                async for node, reply in replies:
                    name = nodes[node]
                    seen.append(name)
                    assert reply == Reply(name.encode(), parts)
                    other = "west" if name == "east" else "east"
                    if len(seen) == 1:
                        await asyncio.sleep(0.7)  # what could come, would
                        async with asyncio.timeout(PATIENCE_S):
                            while sent[name] < 16 * MIB:  # noqa: ASYNC110 - its last write is about to return
                                await asyncio.sleep(0.01)
                        assert sent[other] <= 2 * MIB
            assert sorted(seen) == ["east", "west"]
            await asyncio.gather(*pushing)
            assert sent == dict.fromkeys(sent, 16 * MIB)

    play(root, story)


def test_small_replies_pass_a_vector_that_waits_for_its_turn(root: Path) -> None:
    """An owner without parts is heard while the reader is busy with another's vector."""

    async def vector(_data: bytes) -> Reply:
        return Reply(b"v", (b"x",))

    async def story(scene: Scene) -> None:
        for name, answer in (("east", vector), ("west", vector), ("north", echo)):
            await scene.owner(name, answer)
        await scene.here("east", "west", "north")
        assert set(await scene.ask("east", "west", "north")) == {"east", "west", "north"}

    play(root, story)


def test_a_reader_that_stops_early_leaves_the_streams_usable(root: Path) -> None:
    """The exchange is closed with one vector read and two waiting: the next exchange gets all three again."""
    reply = Reply(b"v", tuple(os.urandom(MIB) for _ in range(4)))

    async def vector(_data: bytes) -> Reply:
        return reply

    async def story(scene: Scene) -> None:
        names = ("east", "north", "west")
        for name in names:
            await scene.owner(name, vector)
        await scene.here(*names)
        outbound = dict.fromkeys(map(scene.node, names), b"ask")
        async with aclosing(scene.carrier.exchange(outbound, deadline_s=PATIENCE_S)) as replies:
            async for _ in replies:
                break
        assert await scene.ask(*names) == dict.fromkeys(names, reply)
        await scene.here(*names)

    play(root, story)


def test_the_deadline_ends_an_exchange_and_travels_to_the_owner(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that answered in time are there; the dialler gives the request up at the same moment; the stream stays."""
    late = [True]

    async def slow(data: bytes) -> Reply:
        if late:
            await asyncio.sleep(NEVER_S)
        return Reply(data)

    async def story(scene: Scene) -> None:
        await scene.owner("east")
        await scene.owner("west", slow)
        await scene.here("east", "west")
        for deadline_s in (1.0, 5.0, 25.0):  # a machine that stands still may miss the first with both owners
            began = CLOCK.monotonic()
            heard = set(await scene.ask("east", "west", deadline_s=deadline_s))
            assert CLOCK.monotonic() - began > 0.9 * deadline_s
            if heard:
                break
        assert heard == {"east"}
        text = ""
        async with asyncio.timeout(PATIENCE_S):
            while "no whole answer: DEADLINE_EXCEEDED" not in text:
                text += capsys.readouterr().err
                await asyncio.sleep(0.05)
        late.clear()
        assert set(await scene.ask("east", "west")) == {"east", "west"}
        assert "lost" not in text

    play(root, story)


def test_an_owner_that_stays_away_is_given_up_before_the_deadline(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its silence costs the others the carrier's patience, not the whole phase."""
    monkeypatch.setattr(direct, "PATIENCE_S", 0.5)

    async def story(scene: Scene) -> None:
        await scene.owner("east")
        await scene.here("east")
        scene.identity("away")
        asking = scene.ask("east", "away", deadline_s=NEVER_S)
        assert set(await asyncio.wait_for(asking, PATIENCE_S)) == {"east"}

    play(root, story)


def test_another_connection_with_the_same_certificate_takes_the_place_of_the_first(root: Path) -> None:
    """A coordinator that has not noticed yet that a stream is dead must not keep the owner out."""

    async def story(scene: Scene) -> None:
        scene.identity("east")
        async with scene.line("east") as old, scene.line("east") as new:
            await greeted(old)
            asking = asyncio.create_task(scene.ask("east"))
            tag, _ = await asked(old)
            await greeted(new)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await old.read()
            assert (refused.value.code(), "took its place" in (refused.value.details() or "")) == (
                grpc.StatusCode.ABORTED, True,
            )  # fmt: skip
            assert (await asked(new))[0] == tag
            await new.write(pack_frame({"op": "head", "tag": tag, "more": False}, b"new"))
            assert await asking == {"east": Reply(b"new")}

    play(root, story)


def test_a_daemon_that_is_not_there_is_said_to_be_away(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dialler reports it after a moment; a daemon that fails inside is reported at once, without its reason."""
    monkeypatch.setattr(dial, "_DAEMON_GONE_S", 0.5)

    async def broken(_data: bytes) -> Reply:
        raise ValueError("a secret")

    async def story(scene: Scene) -> None:
        scene.identity("gone")
        scene.dial("gone")
        await scene.owner("east", broken)
        await scene.here("gone", "east")
        assert await asyncio.wait_for(scene.ask("gone", "east", deadline_s=NEVER_S), PATIENCE_S) == {}
        monkeypatch.setattr(dial, "_DAEMON_GONE_S", PATIENCE_S)
        await scene.serve("gone", echo)
        assert await scene.ask("gone") == {"gone": Reply(b"ksa")}

    play(root, story)

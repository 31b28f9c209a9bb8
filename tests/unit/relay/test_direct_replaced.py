"""What an exchange over the direct transport gets when a stream is replaced in mid-reply, or its time is just over."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest
from patience import NEVER_S, PATIENCE_S
from unit.relay.direct_scene import CLOCK, Scene, asked, greeted, play

from fedllm.clock import FakeClock
from fedllm.relay.carrier import Reply
from fedllm.relay.direct import DirectCarrier
from fedllm.relay.line import Line, Lost
from fedllm.relay.service import pack_frame
from fedllm.relay.turns import Turn

pytestmark = [pytest.mark.timeout(3 * PATIENCE_S), pytest.mark.usefixtures("unhurried")]


def test_a_vector_whose_stream_is_replaced_in_the_middle_is_read_whole_from_the_new_one(root: Path) -> None:
    """The stream that was replaced is a lost one: what came on it is thrown away, and the new one has its turn."""

    async def story(scene: Scene) -> None:
        node = scene.identity("east").certificate.fingerprint[:16]
        async with scene.line("east") as old, scene.line("east") as new:
            await greeted(old)
            asking = asyncio.create_task(scene.ask("east"))
            tag, _ = await asked(old)
            await old.write(pack_frame({"op": "head", "tag": tag, "more": True}, b"old"))
            await old.write(pack_frame({"op": "part", "tag": tag}, b"old part"))
            parcel = scene.carrier._parcels[node][tag]
            async with asyncio.timeout(PATIENCE_S):
                while parcel.waiting is None or not parcel.waiting.done():  # noqa: ASYNC110 - until its parts are read
                    await asyncio.sleep(0.01)
            await greeted(new)
            assert (await asked(new))[0] == tag
            await new.write(pack_frame({"op": "head", "tag": tag, "more": True}, b"new"))
            await new.write(pack_frame({"op": "part", "tag": tag}, b"new part"))
            await new.write(pack_frame({"op": "end", "tag": tag}))
            assert await asking == {"east": Reply(b"new", (b"new part",))}

    play(root, story)


class _Stream:
    """One owner's stream in memory, as gRPC gives it to the carrier."""

    def __init__(self) -> None:
        self.up: asyncio.Queue[bytes] = asyncio.Queue()
        self.read = self.up.get
        self.down: asyncio.Queue[bytes] = asyncio.Queue()
        self.write = self.down.put

    def say(self, op: str, *parts: bytes, **header: object) -> None:
        self.up.put_nowait(pack_frame({"op": op, "tag": "d0", **header}, *parts))


def test_a_replaced_stream_has_nothing_more_to_say() -> None:
    """The rest of its vector is there when it is replaced: a vector that is read has the turn, and this one lost it."""

    async def scenario() -> None:
        carrier, turn, (old, new) = DirectCarrier(dict, clock=CLOCK), Turn(), (_Stream(), _Stream())
        speaking = [asyncio.create_task(carrier._speak("east", Line(cast("Any", old))))]
        await asyncio.sleep(0)
        asking = asyncio.create_task(carrier._ask("east", b"ask", CLOCK.monotonic() + NEVER_S, turn))
        await asyncio.wait_for(old.down.get(), PATIENCE_S)
        old.say("head", b"old", more=True)
        async with asyncio.timeout(PATIENCE_S):
            while (go := carrier._parcels["east"]["d0"].waiting) is None or not go.done():  # noqa: ASYNC110 - see above
                await asyncio.sleep(0.01)
        speaking.append(asyncio.create_task(carrier._speak("east", Line(cast("Any", new)))))
        old.say("part", b"old part")
        old.say("end")
        await asyncio.wait_for(new.down.get(), PATIENCE_S)
        new.say("head", b"new", more=True)
        new.say("part", b"new part")
        new.say("end")
        assert await asyncio.wait_for(asking, PATIENCE_S) == Reply(b"new", (b"new part",))
        waiting = asyncio.create_task(turn.take("west"))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        for task in (*speaking, waiting):
            task.cancel()
        await asyncio.gather(*speaking, waiting, return_exceptions=True)

    asyncio.run(scenario())


def test_a_reply_that_is_there_at_the_deadline_is_not_dropped() -> None:
    """It was reported right behind the loss of its stream, and the machine stood still until after the deadline."""

    async def scenario() -> None:
        clock = FakeClock()
        carrier = DirectCarrier(dict, clock=clock)
        asking = asyncio.create_task(carrier._ask("east", b"ask", clock.monotonic() + 5.0, Turn()))
        await asyncio.sleep(0)
        parcel = carrier._parcels["east"]["d0"]
        parcel.hear(Lost())
        parcel.hear(Reply(b"head"))
        clock.advance(10.0)
        assert await asyncio.wait_for(asking, PATIENCE_S) == Reply(b"head")

    asyncio.run(scenario())

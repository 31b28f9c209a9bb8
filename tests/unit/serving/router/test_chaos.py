"""Many requests, replicas that fail in every way, aliases that move, clients that leave: nothing is lost silently."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from unit.serving.router.fake_replica import WORDS, FakeReplica
from unit.serving.router.live_router import ALIAS, Live, read, routed, text, until

Drive = Callable[..., object]
WHOLE = "".join(WORDS)
FAULTS = ["reset", "cut", "break", "truncate", "error", "error-later", "mixed", "mixed-later"]
FAULTS += [f"refuse:{status}" for status in (400, 404, 429, 500, 503)]


REQUESTS = 120


async def _stream(live: Live, number: int) -> str:
    """Ask for a stream, check what comes, and return how it ended; every tenth client leaves after one event."""
    events = []
    async with live.stream(prompt=f"{number}") as answer:
        if answer.status_code != 200:
            return f"{answer.status_code}"
        async for event in read(answer):
            events.append(event)
            if number % 10 == 0:
                return "left"
    last = events.pop()
    assert len({event["system_fingerprint"] for event in events}) == 1
    if last == "[DONE]":
        assert text(events) == WHOLE
        return "whole"
    assert last["error"]["code"] in ("replica-lost", "replica-mixed")
    assert text(events) in ("one two ", WHOLE)
    return "broken off"


async def _whole(live: Live, number: int) -> str:
    """Ask for a whole answer, check it, and return how it ended."""
    answer = await live.post(prompt=f"{number}")
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
        return f"{answer.status_code}"
    assert answer.json()["choices"][0]["text"] == WHOLE
    assert answer.json()["system_fingerprint"] == answer.headers["x-fedllm-version"]
    return "whole"


@pytest.mark.parametrize("seed", [1, 2])
def test_every_request_ends_as_it_must(tmp_path: Path, drive: Drive, seed: int) -> None:
    """Each of 120 requests is whole, or broken off with an event, or refused with a reason; afterwards all is free.

    A whole answer is by one version and complete. A replica's fault is seen by a client only after its first token, or
    when all replicas have failed it. Every request has one record.
    """
    draw = np.random.default_rng(seed)

    async def story() -> None:
        replicas = [FakeReplica(name) for name in ("one", "two", "three")]
        for replica in replicas:
            replica.script.extend(str(how) for how in draw.choice([*FAULTS, *["answer"] * 24], REQUESTS))
        async with routed(tmp_path, replicas, max_in_flight=4, max_waiting=20) as live:
            seen: Counter[str] = Counter()

            async def move() -> None:
                for number in range(2, 6):
                    new = live.publish(number)
                    await until(lambda new=new: live.models.served[ALIAS].digest == new)

            async def trickle(first: int) -> None:
                for number in range(first, first + 6):
                    seen[await (_whole if number % 3 else _stream)(live, number)] += 1

            await asyncio.gather(move(), *(trickle(first) for first in range(0, REQUESTS, 6)))
            assert seen.total() == REQUESTS
            assert set(seen) <= {"whole", "broken off", "left", "400", "429", "502", "503"}, seen
            assert seen["whole"] > REQUESTS / 2
            await until(lambda: len(live.records) == REQUESTS)
            assert Counter(r.status for r in live.records)[200] >= seen["whole"]
            await _is_idle(live)
            for replica in replicas:
                replica.script.clear()
            assert (await live.post()).status_code == 200

    drive(story())


async def _is_idle(live: Live) -> None:
    """Wait until no replica has a request, and check that nothing else is held."""
    await until(lambda: all(r.in_flight == r.tokens == 0 for r in live.fleet.replicas.values()))
    assert (len(live.line), len(live.line._places), live.line.backlog_tokens) == (0, 0, 0)
    assert not live.models.flights._counts


def test_half_a_connection_is_none(tmp_path: Path, drive: Drive) -> None:
    """A client that closes half of its connection in mid-stream is gone; its place is free again."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one", always="hold")]) as live:
            url = httpx.URL(str(live.http.base_url))
            reader, writer = await asyncio.open_connection(url.host, url.port)
            body = f'{{"model": "{ALIAS}", "prompt": "x", "stream": true}}'.encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {live.key}\r\n"
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            await reader.readuntil(b"one ")
            writer.write_eof()
            await until(lambda: live.fleet.replicas["one"].in_flight == 0)
            await until(lambda: live.replicas["one"].left == 1)
            writer.close()
            assert [r.status for r in live.records] == [499]

    drive(story())

"""A hostile relay at the daemon's unix socket: whatever it sends, the daemon stays up and answers the others."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from malicious.removals import cut
from malicious.scene import EAST, begin, plan, verdict
from patience import PATIENCE_S
from unit.client.owner_fakes import daemon, opened, sealed

from fedllm.client.daemon import Daemon
from fedllm.messages import envelope
from fedllm.messages.round import Body, Confirm, Hello
from fedllm.relay.carrier import Reply
from fedllm.relay.service import DELIVER, EnvelopeServer, deliver_channel, deliver_over, serve_deliver

HONEST = sealed(Hello(bytes(32)), EAST, round_number=0)


@asynccontextmanager
async def served(home: Path) -> AsyncIterator[tuple[Daemon, EnvelopeServer, grpc.aio.Channel]]:
    """Serve one owner's daemon, and dial it."""
    east = daemon(EAST, home / "home")
    server = await serve_deliver(home / "s" / "r", east.handle)
    channel = deliver_channel(server.path)
    try:
        yield east, server, channel
    finally:
        await channel.close()
        await server.stop(0)


async def said(channel: grpc.aio.Channel, data: bytes) -> str:
    """Deliver bytes over the socket; return the verdict."""
    return verdict(await body_of(channel, data))


async def body_of(channel: grpc.aio.Channel, data: bytes) -> Body:
    """Deliver bytes over the socket; return the answer, verified as the owner's."""
    reply: Reply = await deliver_over(channel, data, timeout_s=PATIENCE_S)
    assert reply.parts == ()
    return opened(reply, EAST)


async def still_there(channel: grpc.aio.Channel) -> None:
    """Check that an honest request is answered."""
    assert await asyncio.wait_for(said(channel, HONEST), PATIENCE_S) == "HelloReply"


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"\xff" * 1000, HONEST[:-1], HONEST[: len(HONEST) // 2], HONEST + HONEST, b"\x9f" * 100_000],
    ids=["nothing", "a byte", "ones", "truncated", "half", "twice in one", "nested lists without an end"],
)
def test_wrong_bytes_get_one_signed_refusal(tmp_path: Path, data: bytes) -> None:
    """Always the same sentence, which says nothing of what was wrong; and the daemon goes on."""

    async def scenario() -> Body:
        async with served(tmp_path) as (_, _, channel):
            answer = await body_of(channel, data)
            await still_there(channel)
            return answer

    answer = asyncio.run(scenario())
    assert verdict(answer) == "authentication"
    assert "not a request of the pinned coordinator" in str(answer)


def test_huge_garbage_is_refused_and_kept_nowhere(tmp_path: Path) -> None:
    """64 MB, three times over: refused; the audit log grows by a line each."""

    async def scenario() -> None:
        async with served(tmp_path) as (_, _, channel):
            for _ in range(3):
                assert await said(channel, os.urandom(1 << 10) * (64 << 10)) == "authentication"
            await still_there(channel)

    asyncio.run(scenario())
    assert (tmp_path / "home" / "audit.jsonl").stat().st_size < 2000


@pytest.mark.parametrize(
    "raw", [b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096, b"\0" * 65536]
)
def test_what_is_not_even_grpc_ends_its_own_connection_only(tmp_path: Path, raw: bytes) -> None:
    """Raw bytes at the socket: that connection is closed, the next one is served."""

    async def scenario() -> None:
        async with served(tmp_path) as (_, server, channel):
            reader, writer = await asyncio.open_unix_connection(server.path)
            writer.write(raw)
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await writer.drain()
                    while await reader.read(4096):
                        pass
            except ConnectionError:
                pass  # closed in our face, which is as good as closed
            writer.close()
            await still_there(channel)

    asyncio.run(scenario())


def test_connections_that_never_finish_hold_nobody_up(tmp_path: Path) -> None:
    """Forty that stop in mid-greeting, and forty calls that are cut off while they send."""

    async def scenario() -> None:
        async with served(tmp_path) as (_, server, channel):
            slow = [await asyncio.open_unix_connection(server.path) for _ in range(40)]
            for _, writer in slow:
                writer.write(b"PRI * HTTP/2.0\r\n")
            method = channel.unary_stream(DELIVER)
            cut_off = [method(os.urandom(1 << 20)) for _ in range(40)]
            await asyncio.sleep(0)
            for call in cut_off:
                call.cancel()
            await still_there(channel)
            for _, writer in slow:
                writer.close()

    asyncio.run(scenario())


def test_two_hundred_requests_at_once_are_each_answered_for_what_they_are(tmp_path: Path) -> None:
    """Garbage, replays, requests of no round and honest ones, all together: one training, one answer to one plan."""

    async def scenario() -> tuple[list[str], int]:
        async with served(tmp_path) as (east, _, channel):
            plans = sealed(begin(plan()), EAST)
            kinds = [b"garbage", HONEST, plans, plans[:-1], sealed(Confirm("update", ()), EAST)] * 40
            answers = await asyncio.gather(*(said(channel, data) for data in kinds))
            await still_there(channel)
            return answers, len(east._trainer.trained)  # type: ignore[attr-defined]

    answers, trained = asyncio.run(scenario())
    for at, wanted in enumerate(("authentication", "HelloReply", "Advertised", "authentication")):
        assert set(answers[at::5]) == {wanted}
    assert set(answers[4::5]) <= {"step-mismatch"}
    assert trained == 1


def test_a_relay_learns_nothing_of_an_owner_that_it_cannot_ask_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A greeting that the relay signed gets no name; without the signature's check it would."""
    made_up = sealed(Hello(bytes(32)), EAST, round_number=0, signer="stranger")

    async def scenario(home: Path) -> str:
        async with served(home) as (_, _, channel):
            return await said(channel, made_up)

    assert asyncio.run(scenario(tmp_path / "1")) == "authentication"
    cut(envelope.unseal, "key.verify")(monkeypatch)
    assert asyncio.run(scenario(tmp_path / "2")) == "HelloReply"

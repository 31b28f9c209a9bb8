"""The envelope service on its unix sockets, and the carrier that dials them."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from fedllm.clock import SystemClock
from fedllm.errors import ConfigError, DecodeError, PortBusy
from fedllm.relay.local import LocalCarrier
from fedllm.relay.service import MAX_SOCKET_PATH, pack_frame, serve_deliver, unpack_frame


def test_envelopes_of_many_megabytes_pass_unchanged(tmp_path: Path) -> None:
    """The usual limit of gRPC, 4 MiB, does not apply; several owners are asked at once."""

    async def scenario() -> None:
        servers, sockets = [], {}
        for name in ("a", "b"):
            sockets[name] = tmp_path / name / "relay.sock"

            async def deliver(data: bytes, name: str = name) -> bytes:
                return name.encode() + data

            servers.append(await serve_deliver(sockets[name], deliver))
        carrier = LocalCarrier(sockets, clock=SystemClock())
        assert await carrier.nodes() == ("a", "b")
        big = os.urandom(9_000_000)
        replies = await carrier.exchange({"a": big, "b": b"small"}, deadline_s=20)
        assert replies == {"a": b"a" + big, "b": b"bsmall"}
        await carrier.close()
        for server in servers:
            await server.stop()
        assert await carrier.nodes() == ()

    asyncio.run(scenario())


def test_only_the_user_reaches_the_socket(tmp_path: Path) -> None:
    """Folder 0700, socket 0600."""

    async def scenario() -> None:
        path = tmp_path / "home" / "relay.sock"
        server = await serve_deliver(path, _echo)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        with pytest.raises(PortBusy):
            await serve_deliver(path, _echo)
        await server.stop()
        assert not path.exists()

    asyncio.run(scenario())


async def _echo(data: bytes) -> bytes:
    return data


def test_a_socket_left_by_a_killed_daemon_is_replaced(tmp_path: Path) -> None:
    """Nobody answers there, so it is removed; a plain file of that name is not."""
    import socket

    path = tmp_path / "relay.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def scenario() -> None:
        server = await serve_deliver(path, _echo)
        await server.stop()
        path.write_text("precious")
        with pytest.raises(ConfigError):
            await serve_deliver(path, _echo)
        assert path.read_text() == "precious"

    asyncio.run(scenario())


def test_a_path_too_long_for_a_socket_is_a_configuration_error(tmp_path: Path) -> None:
    """The kernel's limit would otherwise come up as a riddle."""
    with pytest.raises(ConfigError, match=str(MAX_SOCKET_PATH)):
        asyncio.run(serve_deliver(tmp_path / ("x" * 120) / "relay.sock", _echo))


def test_a_daemon_that_fails_or_is_gone_is_missing(tmp_path: Path) -> None:
    """One owner's trouble neither raises nor holds up the others; the error's text stays at home."""

    async def fail(_data: bytes) -> bytes:
        raise RuntimeError("the patient's name")

    async def scenario() -> dict[str, bytes]:
        bad = await serve_deliver(tmp_path / "bad" / "s", fail)
        good = await serve_deliver(tmp_path / "good" / "s", _echo)
        sockets = {"bad": bad.path, "good": good.path, "gone": tmp_path / "gone" / "s"}
        carrier = LocalCarrier(sockets, clock=SystemClock())
        replies = await carrier.exchange(dict.fromkeys([*sockets, "unknown"], b"x"), deadline_s=5)
        await carrier.close()
        await bad.stop()
        await good.stop()
        return replies

    assert asyncio.run(asyncio.wait_for(scenario(), 4)) == {"good": b"x"}


def test_a_slow_daemon_is_given_up_at_the_deadline(tmp_path: Path) -> None:
    """The exchange ends on time with whatever came."""

    async def slow(data: bytes) -> bytes:
        await asyncio.sleep(5)
        return data

    async def scenario() -> dict[str, bytes]:
        server = await serve_deliver(tmp_path / "s", slow)
        carrier = LocalCarrier({"slow": server.path}, clock=SystemClock())
        replies = await carrier.exchange({"slow": b"x"}, deadline_s=0.3)
        await carrier.close()
        await server.stop(0)
        return replies

    assert asyncio.run(asyncio.wait_for(scenario(), 4)) == {}


def test_frames_of_the_link_are_exact() -> None:
    """What was packed is unpacked; anything cut, padded or not JSON is refused."""
    frame = pack_frame({"op": "send"}, b"one", b"", b"three")
    header, parts = unpack_frame(frame)
    assert (header["op"], parts) == ("send", [b"one", b"", b"three"])
    for bad in (b"", frame[:-1], frame + b"x", b"\xff\xff\xff\xff{}", b"\0\0\0\2[]"):
        with pytest.raises(DecodeError):
            unpack_frame(bad)

"""What a serving process promises around its routes: requests end before its stores do, and no head grows for ever."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from patience import NEVER_S, PATIENCE_S

from fedllm.serving.process import listening, serve_until_signalled, serving_beside

HEAD = b"GET / HTTP/1.1\r\nhost: x\r\n"


class Hanging:
    """An application that answers nothing, and takes a moment to end when it is told to."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.ended = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Wait."""
        self.begun.set()
        try:
            await asyncio.sleep(NEVER_S)
        finally:
            await asyncio.sleep(0.01)
            self.ended += 1


def with_listener(test: Callable[[socket.socket, int], Awaitable[None]]) -> None:
    """Run a test with a bound socket, and its port."""
    with listening("127.0.0.1", 0) as listener:
        asyncio.run(asyncio.wait_for(test(listener, listener.getsockname()[1]), PATIENCE_S))


def test_a_second_signal_ends_requests_before_the_stores_are_closed() -> None:
    """It waits for no answer, but for every request's end: its record would otherwise come when nobody counts."""

    async def test(listener: socket.socket, port: int) -> None:
        app = Hanging()
        serving = asyncio.create_task(serve_until_signalled(app, listener))
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                break
            except ConnectionError:
                await asyncio.sleep(0.01)
        writer.write(HEAD + b"\r\n")
        await app.begun.wait()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.05)
        await serving
        assert app.ended == 1
        writer.close()

    with_listener(test)


def test_a_head_without_an_end_is_cut_off() -> None:
    """A stranger's headers take no more memory than the limit, whichever parsers are installed."""

    async def test(listener: socket.socket, port: int) -> None:
        async with serving_beside(Hanging(), listener):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD)
            sent = 0
            try:
                while sent < 1024 and not reader.at_eof():
                    writer.write(b"x: " + b"a" * 65536 + b"\r\n")
                    await writer.drain()
                    sent += 1
            except ConnectionError:
                pass
            assert sent < 1024
            writer.close()

    with_listener(test)

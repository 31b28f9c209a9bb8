"""What a serving process does around its routes: bind, serve until told to stop, drain. Used by endpoint and router."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from fedllm.errors import PortBusy
from fedllm.telemetry import event

if TYPE_CHECKING:
    import uvicorn

DRAIN_S = 30
_END_S = 5.0
_LOG = logging.getLogger("fedllm.serving")


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Bind before anything is loaded, so that a taken port is known at once.

    Raises
    ------
    PortBusy
        If another program listens there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # accepted sockets inherit it; asyncio sets it only where the protocol is named, and a short reply waits 40 ms
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise PortBusy(f"port {port} on {host} is taken", hint="choose another with --port") from None
        yield listener


async def serve_until_signalled(app: Any, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; a second one does not wait for running requests.

    uvicorn's own handlers raise the signal again when it has drained, which would end this process before the
    engine is closed; they are taken back as soon as it is up.
    """
    server = _server(app)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():  # noqa: ASYNC110 - uvicorn offers no event
        await asyncio.sleep(0.01)

    def drain() -> None:
        event(_LOG, "draining", seconds_at_most=0 if server.should_exit else DRAIN_S)
        server.force_exit = server.should_exit
        server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, drain)
    await serving
    await _end_requests(server)


@asynccontextmanager
async def serving_beside(app: Any, listener: socket.socket) -> AsyncIterator[None]:
    """Serve another listener while the block lasts: an operator sees the drain of the first."""
    server = _server(app)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():  # noqa: ASYNC110 - uvicorn offers no event
        await asyncio.sleep(0.01)
    host, port = listener.getsockname()[:2]
    event(_LOG, "admin listening", host=host, port=port)
    try:
        yield
    finally:
        server.should_exit = True
        await serving
        await _end_requests(server)


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run something while the block lasts; cancel it at its end."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _end_requests(server: uvicorn.Server) -> None:
    """Cancel what was not waited for, and let it end: its record must find the stores open."""
    tasks = list(server.server_state.tasks)
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_END_S)


def _server(app: Any) -> uvicorn.Server:
    import uvicorn

    # h11 bounds a request's head (16 KiB); httptools, which would be taken where it is installed, does not.
    config = uvicorn.Config(
        app,
        http="h11",
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=DRAIN_S,
    )
    return uvicorn.Server(config)

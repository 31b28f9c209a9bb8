"""Sending server-sent events to a client that may be slow, deaf or gone. Plain ASGI; no web framework.

What a client has not read is bounded: the transport's buffer, one event, and the tokens that its own request may
still generate. A client that takes nothing for `stall_s` while something is ready for it is cut off, and so is one
that closes its side of the connection, even half of it. Nobody else waits for it: generation never does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from fedllm.telemetry import event

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

STALL_S = 30.0
_LOG = logging.getLogger("fedllm.serving")


async def send_events(
    receive: Receive, send: Send, events: AsyncIterator[bytes], headers: Mapping[str, str], *, stall_s: float
) -> None:
    """Send a whole response, or as much of it as the client takes; the response stays cut off if it leaves.

    Parameters
    ----------
    receive, send
        Of the ASGI request, whose body has been read.
    events : async iterator of bytes
        Encoded events.
    headers : mapping
        Of the response; ASCII.
    stall_s : float
        Seconds that one event may wait for a client which does not read.
    """
    sending = asyncio.create_task(_send_all(send, events, headers, stall_s))
    leaving = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (sending, leaving):
            task.cancel()
        results = await asyncio.gather(sending, leaving, return_exceptions=True)
    if isinstance(results[0], TimeoutError):
        event(_LOG, "reader-stalled", seconds=stall_s)
    elif isinstance(results[0], Exception):
        raise results[0]


async def _send_all(send: Send, events: AsyncIterator[bytes], headers: Mapping[str, str], stall_s: float) -> None:
    async def put(message: Message) -> None:
        async with asyncio.timeout(stall_s):
            await send(message)

    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await put({"type": "http.response.start", "status": 200, "headers": encoded})
    async for data in events:
        await put({"type": "http.response.body", "body": data, "more_body": True})
    await put({"type": "http.response.body", "body": b"", "more_body": False})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

"""Owners on this machine, dialled on their own sockets with no Flower between."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path

import grpc
import grpc.aio

from fedllm import telemetry
from fedllm.clock import Clock
from fedllm.errors import DecodeError
from fedllm.relay.carrier import Reply
from fedllm.relay.service import deliver_channel, start_delivery
from fedllm.relay.turns import Turn, as_they_come

_LOG = logging.getLogger(__name__)
_RETRY_S = 0.1


class LocalCarrier:
    """Calls ``Deliver`` on each owner's unix socket.

    Parameters
    ----------
    sockets : Mapping[str, Path]
        Node to the socket that its daemon serves.
    clock : Clock
        Measures deadlines.
    """

    def __init__(self, sockets: Mapping[str, Path], *, clock: Clock) -> None:
        self._sockets = dict(sockets)
        self._clock = clock
        self._channels: dict[str, grpc.aio.Channel] = {}

    @property
    def patience_s(self) -> float:
        """A daemon that is restarted by its supervisor binds its socket again within this."""
        return 3.0

    async def nodes(self) -> tuple[str, ...]:
        """Return the nodes whose socket exists."""
        return tuple(sorted(node for node, path in self._sockets.items() if path.is_socket()))

    async def exchange(
        self, outbound: Mapping[str, bytes], *, deadline_s: float
    ) -> AsyncGenerator[tuple[str, Reply], None]:
        """Ask every node at once; one that is away is dialled again until the deadline; see `Carrier`."""
        began_s, answered, bytes_in = self._clock.monotonic(), 0, 0

        async def ask(node: str, turn: Turn) -> Reply | None:
            return await self._one(node, outbound[node], began_s + deadline_s, turn)

        try:
            async with aclosing(as_they_come(outbound, ask)) as replies:
                async for node, reply in replies:
                    answered, bytes_in = answered + 1, bytes_in + reply.size
                    yield node, reply
                    del reply
        finally:
            telemetry.event(
                _LOG, "exchange", level=logging.DEBUG, nodes=len(outbound), answered=answered,
                bytes_out=sum(map(len, outbound.values())), bytes_in=bytes_in,
                seconds=round(self._clock.monotonic() - began_s, 4),
            )  # fmt: skip

    async def close(self) -> None:
        """Close the channels."""
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))
        self._channels.clear()

    async def _one(self, node: str, data: bytes, until_s: float, turn: Turn) -> Reply | None:
        path = self._sockets.get(node)
        if path is None:
            return None
        while (left_s := until_s - self._clock.monotonic()) > 0:
            if not path.is_socket():
                return None  # the daemon is gone: waiting for it would only hold the others up
            channel = self._channels.get(node)
            if channel is None:
                channel = self._channels[node] = deliver_channel(path)
            try:
                delivery = await start_delivery(channel, data, timeout_s=left_s)
                try:
                    await turn.take(node)
                    return await delivery.reply()
                finally:
                    delivery.cancel()
            except (DecodeError, TimeoutError) as error:
                telemetry.event(_LOG, "node failed", level=logging.WARNING, node=node, error=type(error).__name__)
                return None
            except grpc.aio.AioRpcError as error:
                turn.give_back(node)
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    telemetry.event(_LOG, "node failed", level=logging.WARNING, node=node, code=error.code().name)
                    return None
                # a socket that refuses was left by a killed daemon; one that resets is restarting
                await self._drop(node)
                if "refused" in (error.details() or "").lower():
                    return None
                await self._clock.sleep(_RETRY_S)
        return None

    async def _drop(self, node: str) -> None:
        channel = self._channels.pop(node, None)
        if channel is not None:
            await channel.close()

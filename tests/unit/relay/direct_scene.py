"""A coordinator listening on loopback, and owners that dial it from this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from patience import PATIENCE_S

from fedllm.clock import SystemClock
from fedllm.relay import dial
from fedllm.relay.carrier import Reply
from fedllm.relay.direct import DirectCarrier
from fedllm.relay.service import EnvelopeServer, pack_frame, serve_deliver, unpack_frame
from fedllm.relay.tls import PinnedOwners, TlsIdentity

CLOCK = SystemClock()
MIB = 1 << 20
Answer = Callable[[bytes], Awaitable[Reply]]


async def echo(data: bytes) -> Reply:
    """Answer with the request turned round."""
    return Reply(data[::-1])


class Scene:
    """A coordinator's carrier and some owners, each with a daemon's socket and a dialler in this process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.coordinator = TlsIdentity.create(root / "c", CLOCK)
        self.pins = root / "pins"
        self.pins.mkdir()
        self.port = 0
        self.carrier: DirectCarrier
        self.identities: dict[str, TlsIdentity] = {}
        self.servers: dict[str, EnvelopeServer] = {}
        self.dialling: dict[str, asyncio.Task[None]] = {}

    async def listen(self) -> None:
        """Open the carrier, on the same port as before if there was one."""
        self.carrier = await DirectCarrier.open(
            host="127.0.0.1", port=self.port, identity=self.coordinator, pinned=PinnedOwners([self.pins], CLOCK),
            clock=CLOCK,
        )  # fmt: skip
        self.port = self.carrier.port

    def identity(self, name: str, *, enrolled: bool = True) -> TlsIdentity:
        """Return an owner's certificate, made and enrolled when it is first asked for."""
        if name not in self.identities:
            self.identities[name] = TlsIdentity.create(self.root / name, CLOCK)
        if enrolled:
            (self.pins / f"{name}.pem").write_bytes(self.identities[name].certificate.pem)
        return self.identities[name]

    def node(self, name: str) -> str:
        """Return the carrier's name of an owner."""
        return self.identities[name].certificate.fingerprint[:16]

    def socket(self, name: str) -> Path:
        """Return an owner's socket."""
        return self.root / name / "s" / "relay.sock"

    async def serve(self, name: str, answer: Answer) -> None:
        """Start a daemon."""
        self.servers[name] = await serve_deliver(self.socket(name), answer)

    def dial(self, name: str, *, pinned: TlsIdentity | None = None, port: int | None = None) -> None:
        """Start a dialler in this process."""
        coordinator = (pinned or self.coordinator).certificate
        (self.root / name / "coordinator.pem").write_bytes(coordinator.pem)
        options = dial.Options(f"127.0.0.1:{port or self.port}", coordinator.name, self.root / name, self.socket(name))
        self.dialling[name] = asyncio.create_task(dial.Dialler(options).keep())

    async def owner(self, name: str, answer: Answer = echo, *, enrolled: bool = True) -> None:
        """Start daemon and dialler."""
        self.identity(name, enrolled=enrolled)
        await self.serve(name, answer)
        self.dial(name)

    async def here(self, *names: str) -> None:
        """Wait until exactly these are connected."""
        async with asyncio.timeout(PATIENCE_S):
            while await self.carrier.nodes() != tuple(sorted(map(self.node, names))):  # noqa: ASYNC110 - of others' making
                await asyncio.sleep(0.02)

    async def ask(self, *names: str, data: bytes = b"ask", deadline_s: float = PATIENCE_S) -> dict[str, Reply]:
        """Send the same to these owners; return replies by name."""
        nodes = {self.node(name): name for name in names}
        async with aclosing(self.carrier.exchange(dict.fromkeys(nodes, data), deadline_s=deadline_s)) as replies:
            return {nodes[node]: reply async for node, reply in replies}

    async def hang_up(self, name: str) -> None:
        """End a dialler."""
        task = self.dialling.pop(name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def close(self) -> None:
        """End everything."""
        for name in list(self.dialling):
            await self.hang_up(name)
        await self.carrier.close()
        for server in self.servers.values():
            await server.stop(0)

    @asynccontextmanager
    async def line(self, name: str) -> AsyncIterator[Any]:
        """Yield a stream of an owner that says what the test wants."""
        me = self.identities[name]
        credentials = grpc.ssl_channel_credentials(self.coordinator.certificate.pem, me.key_pem, me.certificate.pem)
        options = (
            ("grpc.ssl_target_name_override", self.coordinator.certificate.name),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_send_message_length", -1),
        )
        async with grpc.aio.secure_channel(f"127.0.0.1:{self.port}", credentials, options=options) as channel:
            call = channel.stream_stream(dial.OWNER, request_serializer=None, response_deserializer=None)()
            try:
                yield call
            finally:
                call.cancel()


async def greeted(call: Any) -> None:
    """Say hello and hear the welcome."""
    await call.write(pack_frame({"op": "hello", "protocol": 1}))
    assert unpack_frame(await call.read())[0]["op"] == "welcome"


async def asked(call: Any) -> tuple[str, bytes]:
    """Return tag and bytes of the next request."""
    header, (data,) = unpack_frame(await call.read())
    assert header["op"] == "ask"
    return header["tag"], data


def play(root: Path, story: Callable[[Scene], Awaitable[None]], *, within_s: float = 2 * PATIENCE_S) -> None:
    """Run a story with a listening carrier; nothing is left of it."""

    async def whole() -> None:
        scene = Scene(root)
        await scene.listen()
        try:
            await asyncio.wait_for(story(scene), within_s)
        finally:
            await scene.close()

    asyncio.run(whole())

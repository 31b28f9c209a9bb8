"""The direct transport's coordinator end: owners dial in over mutual TLS and keep one gRPC stream open each.

Who an owner's stream belongs to is read from the certificate that TLS verified, never from what the peer says.
Every peer is taken for hostile: what it sends is bounded in size, number and time, and nonsense ends its own
stream only. A request that is pending when a stream is lost is sent again on the next one; owners answer a
repeated request from their record. See docs/adr/0007.

Frames are those of `fedllm.relay.service`. Up: ``hello``; for every reply a ``head``, which says whether more
follows, then ``part`` after ``part`` and ``end``; or ``failed``. Down: ``welcome``, then ``ask``.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import ssl
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio

from fedllm import telemetry
from fedllm.clock import Clock
from fedllm.errors import DecodeError, PeerUnavailable, PortBusy
from fedllm.ids import Digest, sha256
from fedllm.relay.carrier import Reply
from fedllm.relay.line import Event, Failed, Line, Lost, Parcel, Vector
from fedllm.relay.parcels import next_in_time
from fedllm.relay.service import MAX_PART, MAX_PARTS, SERVICE
from fedllm.relay.tls import Pinned, TlsIdentity
from fedllm.relay.turns import Turn, as_they_come

_LOG = logging.getLogger(__name__)
PROTOCOL = 1
MAX_FRAME = MAX_PART + (1 << 16)
"""Bytes of the largest message that is taken from an owner: a part, or a head, which is far smaller."""
PATIENCE_S = 10.0
HELLO_S = 10.0
PART_S = 30.0
"""Seconds that 4 MiB of a vector may take: an owner slower than that would hold up all the others."""
NODE_DIGITS = 16
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", MAX_FRAME),
    ("grpc.max_concurrent_streams", 4),
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    # gRPC would let a stream that nobody reads fill 8 MiB and more; there may be hundreds of them
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1 << 20),
)


class DirectCarrier:
    """Reaches owners that dialled in; construct with `open`.

    Parameters
    ----------
    pinned : Pinned
        Certificates of the enrolled owners, asked for at every handshake: a new owner needs no restart.
    clock : Clock
        Measures deadlines.

    Attributes
    ----------
    port : int
        Where it listens.
    """

    def __init__(self, pinned: Pinned, *, clock: Clock) -> None:
        self._pinned = pinned
        self._clock = clock
        self._lines: dict[str, Line] = {}
        self._lost_s: dict[str, float] = {}
        self._parcels: defaultdict[str, dict[str, Parcel]] = defaultdict(dict)
        self._tags = itertools.count()
        self._server: grpc.aio.Server | None = None
        self._closed = False
        self.port = 0

    @classmethod
    async def open(cls, *, host: str, port: int, identity: TlsIdentity, pinned: Pinned, clock: Clock) -> DirectCarrier:
        """Listen for owners.

        Parameters
        ----------
        host, port
            Where; port 0 is any free one.
        identity : TlsIdentity
            The coordinator's, which owners pin.
        pinned, clock
            See the class.

        Raises
        ------
        PortBusy
            If another program listens there, or nobody may.
        """
        carrier = cls(pinned, clock=clock)
        server = grpc.aio.server(options=_OPTIONS)
        method = grpc.stream_stream_rpc_method_handler(carrier._serve, None, None)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Owner": method}),))
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            carrier.port = server.add_secure_port(address, _credentials(identity, pinned))
        except RuntimeError:
            raise PortBusy(f"cannot listen on {address} for owners", hint="choose another direct_port") from None
        await server.start()
        carrier._server = server
        telemetry.event(_LOG, "listening for owners", address=address, enrolled=len(pinned()))
        return carrier

    @property
    def patience_s(self) -> float:
        """Owners that lost their stream dial again with pauses of up to 7.5 s."""
        return PATIENCE_S

    async def nodes(self) -> tuple[str, ...]:
        """Return the nodes that are connected: the first digits of their certificates' fingerprints."""
        if self._closed:
            raise PeerUnavailable("the direct transport was closed")
        return tuple(sorted(self._lines))

    async def exchange(
        self, outbound: Mapping[str, bytes], *, deadline_s: float
    ) -> AsyncGenerator[tuple[str, Reply], None]:
        """Ask every node at once; see `Carrier`. A node that is away for longer than `patience_s` is given up."""
        if self._closed:
            raise PeerUnavailable("the direct transport was closed")
        began_s = self._clock.monotonic()
        answered = bytes_in = 0

        async def ask(node: str, turn: Turn) -> Reply | None:
            return await self._ask(node, outbound[node], began_s + deadline_s, turn)

        try:
            async with aclosing(as_they_come(sorted(outbound), ask)) as replies:
                async for node, reply in replies:
                    answered += 1
                    bytes_in += reply.size
                    yield node, reply
                    del reply
        finally:
            telemetry.event(
                _LOG, "exchange", nodes=len(outbound), answered=answered,
                bytes_out=sum(map(len, outbound.values())), bytes_in=bytes_in,
                seconds=round(self._clock.monotonic() - began_s, 4),
            )  # fmt: skip

    async def close(self) -> None:
        """Hang up on everybody and stop listening."""
        self._closed = True
        if self._server is not None:
            await self._server.stop(0)

    async def _ask(self, node: str, data: bytes, until_s: float, turn: Turn) -> Reply | None:
        parcel = Parcel(f"d{next(self._tags)}", data, self._clock.monotonic(), until_s)
        self._parcels[node][parcel.tag] = parcel
        if node in self._lines:
            self._lines[node].outbox.put_nowait(parcel)
        try:
            while (event := await self._next(node, parcel)) is not None:
                if isinstance(event, Reply):
                    return event
                if isinstance(event, Failed):
                    return None
                if isinstance(event, Vector) and not event.go.done():
                    async with asyncio.timeout(until_s - self._clock.monotonic()):
                        await turn.take(node)
                    # its stream may have been lost while it waited for the others
                    if not event.go.done():
                        event.go.set_result(True)
                        following = await self._next(node, parcel)
                        if not isinstance(following, Lost):
                            # with the turn: whoever reads the replies gives it back
                            return following if isinstance(following, Reply) else None
                    turn.give_back(node)
            return None
        except TimeoutError:
            return None
        finally:
            del self._parcels[node][parcel.tag]
            parcel.close()

    async def _next(self, node: str, parcel: Parcel) -> Event | None:
        """Return what is heard next of a parcel; None when its deadline or the node's absence is over."""
        while True:
            until_s = parcel.until_s
            if node not in self._lines:
                away_s = max(parcel.began_s, self._lost_s.get(node, parcel.began_s))
                until_s = min(until_s, away_s + PATIENCE_S)
            left_s = until_s - self._clock.monotonic()
            event = await next_in_time(parcel.events, left_s)
            if event is not None or left_s <= 0:
                return event

    async def _serve(self, _frames: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Speak with one owner until its stream ends."""
        node = self._node(context)
        if node is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this certificate is not enrolled")
            return
        line = Line(context)
        try:
            async with asyncio.timeout(HELLO_S):
                header, _ = await line.read()
            if header["op"] != "hello" or header.get("protocol") != PROTOCOL:
                raise DecodeError(f"no hello of protocol {PROTOCOL}")
            await line.write({"op": "welcome"})
            await self._speak(node, line)
            await context.abort(grpc.StatusCode.ABORTED, "another connection with this certificate took its place")
        except EOFError:
            return
        except (DecodeError, TimeoutError) as error:
            why = error.message if isinstance(error, DecodeError) else "too slow"
            telemetry.event(_LOG, "owner's stream dropped", level=logging.WARNING, node=node, why=why)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, why)

    def _node(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> str | None:
        """Return the name of the peer whose certificate TLS verified, None if it is not enrolled itself."""
        (pem,) = context.auth_context().get("x509_pem_cert") or (b"",)
        try:
            fingerprint = sha256(ssl.PEM_cert_to_DER_cert(pem.decode("ascii")))
        except ValueError:
            return None
        # a verified chain could also end in an enrolled certificate instead of being one
        return fingerprint[:NODE_DIGITS] if fingerprint in self._pinned() else None

    async def _speak(self, node: str, line: Line) -> None:
        """Return when another stream of the same owner has taken the place of this one; raise when it ends."""
        if node in self._lines:
            self._lines[node].replaced.set()
            for parcel in self._parcels[node].values():
                parcel.hear(Lost())
        self._lines[node] = line
        telemetry.event(_LOG, "owner connected", node=node, connected=len(self._lines))
        for parcel in self._parcels[node].values():
            line.outbox.put_nowait(parcel)
        tasks = [asyncio.create_task(each) for each in (self._read(node, line), self._write(line))]
        tasks.append(asyncio.create_task(_wait(line.replaced)))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._lines.get(node) is line:
                del self._lines[node]
                self._lost_s[node] = self._clock.monotonic()
                telemetry.event(_LOG, "owner lost", node=node, connected=len(self._lines))
                for parcel in self._parcels[node].values():
                    parcel.hear(Lost())

    async def _write(self, line: Line) -> None:
        while True:
            parcel = await line.outbox.get()
            left_s = parcel.until_s - self._clock.monotonic()
            if left_s > 0 and not parcel.settled:
                await line.write({"op": "ask", "tag": parcel.tag, "deadline_s": round(left_s, 3)}, parcel.data)

    async def _read(self, node: str, line: Line) -> None:
        while True:
            header, parts = await line.read()
            parcel = self._parcels[node].get(str(header.get("tag")))  # none: too late, or never asked
            if header["op"] == "head" and len(parts) == 1 and isinstance(header.get("more"), bool):
                if header["more"]:
                    await self._read_vector(line, parcel, parts[0])
                else:
                    _report(line, parcel, Reply(parts[0]))
            elif header["op"] == "failed" and not parts:
                _report(line, parcel, Failed())
            else:
                raise DecodeError(f"{header['op'][:20]!r} with {len(parts)} parts where a reply begins")

    async def _read_vector(self, line: Line, parcel: Parcel | None, head: bytes) -> None:
        """Read the parts behind a head once it is their turn; to nowhere if nobody wants them any more."""
        go: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        wanted = parcel is not None and not parcel.settled
        if parcel is not None and wanted:
            _report(line, parcel, Vector(go))
            wanted = await go  # cancelled with this stream
        kept: list[bytes] = []
        began_s, count, size = self._clock.monotonic(), 0, 0
        while True:
            try:
                async with asyncio.timeout(began_s + PART_S * (1 + size / MAX_PART) - self._clock.monotonic()):
                    header, parts = await line.read()
            except TimeoutError:
                _report(line, parcel, Failed())  # not asked again: it would hold up the others once more
                raise
            if header["op"] == "failed":
                _report(line, parcel, Failed())
            if header["op"] == "end" and wanted:
                _report(line, parcel, Reply(head, tuple(kept)))
            if header["op"] in {"failed", "end"}:
                return
            count, size = count + 1, size + sum(map(len, parts))
            if header["op"] != "part" or len(parts) != 1 or not 0 < len(parts[0]) <= MAX_PART or count > MAX_PARTS:
                raise DecodeError(f"{header['op'][:20]!r} of {size} bytes so far where a part was expected")
            if wanted and parcel is not None and not parcel.settled:
                kept += parts


def _report(line: Line, parcel: Parcel | None, event: Event) -> None:
    """Report of a parcel, if anybody asks; a line that was replaced is lost and has nothing more to say."""
    if parcel is not None and not line.replaced.is_set():
        parcel.hear(event)


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


def _credentials(identity: TlsIdentity, pinned: Pinned) -> Any:
    """Return server credentials that require one of the certificates which are pinned at the time of a handshake."""
    mine = identity.certificate.pem
    made: dict[frozenset[Digest], Any] = {}

    def configuration() -> Any:
        found = pinned()
        wanted = frozenset(found)
        if wanted not in made:
            # without any root gRPC would refuse to ask for certificates: then our own admits nobody else
            roots = b"".join(found[each].pem for each in sorted(found)) or mine
            made.clear()
            made[wanted] = grpc.ssl_server_certificate_configuration([(identity.key_pem, mine)], roots)
        return made[wanted]

    return grpc.dynamic_ssl_server_credentials(configuration(), configuration, require_client_authentication=True)

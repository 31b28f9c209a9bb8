"""The direct transport among strangers and enrolled owners that misbehave."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from contextlib import aclosing
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import NameOID
from patience import NEVER_S, PATIENCE_S
from unit.relay.direct_scene import CLOCK, MIB, Scene, asked, greeted, play

from fedllm.clock import FakeClock
from fedllm.relay import dial, direct
from fedllm.relay.carrier import Reply
from fedllm.relay.service import MAX_PART, pack_frame
from fedllm.relay.tls import TlsIdentity

pytestmark = [pytest.mark.timeout(3 * PATIENCE_S), pytest.mark.usefixtures("unhurried")]


def _issued_by(owner: TlsIdentity) -> TlsIdentity:
    """Return a certificate that an enrolled owner's key signed, as an authority would."""
    key, issuer = load_pem_private_key(owner.key_pem, None), x509.load_pem_x509_certificate(owner.certificate.pem)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    mine = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedllm-" + "a" * 32)])
    begins, ends = issuer.not_valid_before_utc, issuer.not_valid_after_utc
    made = x509.CertificateBuilder(issuer.subject, subject, mine.public_key(), 7, begins, ends)
    pem = made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM) + owner.certificate.pem
    secret = mine.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return TlsIdentity(dataclasses.replace(owner.certificate, pem=pem), secret)


def test_a_stranger_is_turned_away_whatever_it_brings(root: Path) -> None:
    """An unknown certificate, an expired one, one that an owner issued, none, plaintext: nobody gets a stream."""

    async def story(scene: Scene) -> None:
        await scene.owner("east")
        await scene.here("east")
        scene.identity("stranger", enrolled=False)
        scene.identities["expired"] = TlsIdentity.create(root / "expired", FakeClock(CLOCK.now() - 11 * 365 * 86_400))
        scene.identity("expired")
        scene.identities["issued"] = _issued_by(scene.identity("east"))
        for name in ("stranger", "expired", "issued"):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                async with scene.line(name) as call:
                    await greeted(call)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE, name
        for credentials in (grpc.ssl_channel_credentials(scene.coordinator.certificate.pem), None):
            address = f"127.0.0.1:{scene.port}"
            override = (("grpc.ssl_target_name_override", scene.coordinator.certificate.name),)
            channel = (
                grpc.aio.secure_channel(address, credentials, options=override)
                if credentials is not None
                else grpc.aio.insecure_channel(address)
            )
            async with channel:
                call = channel.stream_stream(dial.OWNER, request_serializer=None, response_deserializer=None)()
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await greeted(call)
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        await scene.here("east")
        assert await scene.ask("east") == {"east": Reply(b"ksa")}

    play(root, story)


def test_a_certificate_that_is_taken_out_gets_no_further_stream(root: Path) -> None:
    """Enrolment is looked up at every connection, not only when the coordinator starts."""

    async def story(scene: Scene) -> None:
        await scene.owner("east")
        await scene.here("east")
        await scene.hang_up("east")
        (scene.pins / "east.pem").unlink()
        scene.dial("east")
        await asyncio.sleep(0.7)
        await scene.here()

    play(root, story)


def _frame(header: bytes, *parts: bytes) -> bytes:
    return len(header).to_bytes(4, "big") + header + b"".join(parts)


HELLO = pack_frame({"op": "hello", "protocol": 1})
NONSENSE = {
    "nothing": [b""],
    "no hello": [pack_frame({"op": "head", "tag": "d0", "more": False}, b"x")],
    "another protocol": [pack_frame({"op": "hello", "protocol": 2})],
    "not a frame": [HELLO, os.urandom(1000)],
    "a header that is a list": [HELLO, _frame(b"[]")],
    "a header nested very deep": [HELLO, _frame(b"[" * 500_000)],
    "an infinite size": [HELLO, _frame(b'{"op":"head","sizes":[1e999]}')],
    "a negative size": [HELLO, _frame(b'{"op":"head","sizes":[-1, 1]}')],
    "a size that is not there": [HELLO, _frame(b'{"op":"head","sizes":[9]}')],
    "an op that is no word": [HELLO, _frame(b'{"op":[],"sizes":[]}')],
    "an op nobody knows": [HELLO, pack_frame({"op": "sing", "tag": "d0"})],
    "a part without a head": [HELLO, pack_frame({"op": "part", "tag": "d0"}, b"x")],
    "two heads in one": [HELLO, pack_frame({"op": "head", "tag": "d0", "more": False}, b"x", b"y")],
    "more that is no truth": [HELLO, pack_frame({"op": "head", "tag": "d0", "more": 1}, b"x")],
    "a head within a reply": [HELLO, *[pack_frame({"op": "head", "tag": "none", "more": True}, b"x")] * 2],
    "an empty part": [
        HELLO, pack_frame({"op": "head", "tag": "none", "more": True}, b"x"), pack_frame({"op": "part"}, b""),
    ],
    "a part too large": [
        HELLO, pack_frame({"op": "head", "tag": "none", "more": True}, b"x"),
        pack_frame({"op": "part"}, bytes(MAX_PART + 1)),
    ],
    "a message too large": [HELLO, pack_frame({"op": "head", "tag": "d0", "more": False}, bytes(5 * MIB))],
}  # fmt: skip


def test_nonsense_ends_the_stream_it_came_on_and_no_other(root: Path) -> None:
    """Each kind of broken or oversized message drops its sender; others are connected and answered all the while."""

    async def story(scene: Scene) -> None:
        await scene.owner("east")
        scene.identity("odd")
        await scene.here("east")
        for case, frames in NONSENSE.items():
            async with scene.line("odd") as call:
                try:
                    for frame in frames:
                        await call.write(frame)
                    async with asyncio.timeout(PATIENCE_S):
                        while await call.read() is not grpc.aio.EOF:
                            pass
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    pass
                except TimeoutError:
                    raise AssertionError(f"{case}: the stream was not ended") from None
                assert await call.code() in {
                    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED,
                }, case  # fmt: skip
            await scene.here("east")
            assert await scene.ask("east", data=case.encode()) == {"east": Reply(case.encode()[::-1])}

    play(root, story)


def test_an_owner_that_stalls_in_its_vector_is_dropped_and_the_others_are_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that promises parts, and then silence: it loses its turn and its stream, and is not asked again."""
    monkeypatch.setattr(direct, "PART_S", 0.5)
    dropped = asyncio.Event()

    async def vector(_data: bytes) -> Reply:
        await dropped.wait()
        return Reply(b"v", (b"x",))

    async def story(scene: Scene) -> None:
        scene.identity("stall")
        await scene.owner("west", vector)
        async with scene.line("stall") as call:
            await greeted(call)
            await scene.here("stall", "west")
            asking = asyncio.create_task(scene.ask("stall", "west", deadline_s=NEVER_S))
            tag, _ = await asked(call)
            await call.write(pack_frame({"op": "head", "tag": tag, "more": True}, b"s"))
            with pytest.raises(grpc.aio.AioRpcError, match="too slow"):
                await call.read()
            monkeypatch.setattr(direct, "PART_S", PATIENCE_S)  # the honest one is not the one to be hurried
            dropped.set()
            assert await asyncio.wait_for(asking, PATIENCE_S) == {"west": Reply(b"v", (b"x",))}

    play(root, story)


def test_a_count_without_end_is_cut_off(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No reply has more parts than the bound, however small they are."""
    monkeypatch.setattr(direct, "MAX_PARTS", 3)
    asked_east: list[bytes] = []

    async def many(data: bytes) -> Reply:
        asked_east.append(data)
        return Reply(b"v", (b"x",) * 4)

    async def three(_data: bytes) -> Reply:
        return Reply(b"v", (b"x",) * 3)

    async def story(scene: Scene) -> None:
        await scene.owner("east", many)
        await scene.owner("west", three)
        await scene.here("east", "west")
        outbound = dict.fromkeys(map(scene.node, ("east", "west")), b"ask")
        async with aclosing(scene.carrier.exchange(outbound, deadline_s=NEVER_S)) as replies:
            assert await anext(replies) == (scene.node("west"), Reply(b"v", (b"x",) * 3))
            more = asyncio.create_task(anext(replies))
            async with asyncio.timeout(PATIENCE_S):
                # each time it was cut off, and asked again on its next stream
                while len(asked_east) < 4 and not more.done():  # noqa: ASYNC110 - set by the daemon
                    await asyncio.sleep(0.01)
            assert not more.done()
            more.cancel()
            await asyncio.gather(more, return_exceptions=True)

    play(root, story)


def _impostor_frames() -> dict[str, list[bytes]]:
    return {
        "no welcome": [pack_frame({"op": "ask", "tag": "d0", "deadline_s": 5}, b"x")],
        "no frame": [pack_frame({"op": "welcome"}), b"\xff" * 40],
        "no request": [pack_frame({"op": "welcome"}), pack_frame({"op": "sing"})],
        "no deadline": [pack_frame({"op": "welcome"}), pack_frame({"op": "ask", "tag": "d0", "deadline_s": "x"}, b"x")],
        "too many": [
            pack_frame({"op": "welcome"}),
            *(pack_frame({"op": "ask", "tag": f"d{i}", "deadline_s": 5}, b"x") for i in range(dial.MOST_WAITING + 1)),
        ],
        "the end": [pack_frame({"op": "welcome"}), b""],
    }


def test_a_dialler_lives_through_whatever_the_coordinator_sends(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of nonsense ends the stream and is said in the log; it dials again, and nothing piles up."""
    monkeypatch.setattr(dial, "LAST_PAUSE_S", 0.2)
    left = _impostor_frames()
    cases = list(left)

    async def odd(_frames: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await context.read()  # the hello: a stream that ends under it is another story
        if not left:
            await asyncio.sleep(NEVER_S)
        for frame in left.pop(next(iter(left))):
            if frame:
                await context.write(frame)
        if left:
            while await context.read() is not grpc.aio.EOF:
                pass

    async def slow(_data: bytes) -> Reply:
        await asyncio.sleep(NEVER_S)
        raise AssertionError("given up before")

    async def story(scene: Scene) -> None:
        await scene.carrier.close()
        mine = scene.coordinator
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        method = grpc.stream_stream_rpc_method_handler(odd)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("fedllm.Relay", {"Owner": method}),))
        pair = [(mine.key_pem, mine.certificate.pem)]
        server.add_secure_port(f"127.0.0.1:{scene.port}", grpc.ssl_server_credentials(pair))
        await server.start()
        try:
            scene.identity("east")
            await scene.serve("east", slow)
            scene.dial("east")
            text = ""
            async with asyncio.timeout(PATIENCE_S):
                while left or "ended the stream" not in text:
                    text += capsys.readouterr().err
                    await asyncio.sleep(0.05)
            assert not scene.dialling["east"].done()
            assert "ValueError while speaking with the coordinator" in text
            assert text.count("lost 127.0.0.1") == len(cases) - 1
        finally:
            await server.stop(0)

    play(root, story)

"""The direct transport with real processes, killed and started again, and what its log says."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from patience import NEVER_S, PATIENCE_S
from unit.relay.direct_scene import CLOCK, MIB, Scene, echo, play

from fedllm.client.sandbox import confined, probe, python_reads
from fedllm.errors import PortBusy
from fedllm.relay import dial
from fedllm.relay.carrier import Reply
from fedllm.relay.node import dial_process, programs_dir
from fedllm.relay.processes import Supervised
from fedllm.relay.tls import TlsIdentity

pytestmark = [pytest.mark.timeout(3 * PATIENCE_S), pytest.mark.usefixtures("unhurried")]


def test_the_log_says_in_words_what_is_wrong_and_nothing_of_the_payload(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens, another coordinator's certificate, ours unknown, connected, lost: each is one line."""
    monkeypatch.setattr(dial, "LAST_PAUSE_S", 0.2)

    async def said(words: str) -> None:
        text = ""
        async with asyncio.timeout(PATIENCE_S):
            while words not in text:
                text += capsys.readouterr().err
                await asyncio.sleep(0.05)
        assert "ASK-ME" not in text

    async def story(scene: Scene) -> None:
        scene.identity("east")
        await scene.serve("east", echo)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            nobody = free.getsockname()[1]
        scene.dial("east", port=nobody)
        await said("nobody listens there")
        await asyncio.sleep(0.5)
        assert capsys.readouterr().err == ""  # the same once only
        await scene.hang_up("east")

        scene.dial("east", pinned=TlsIdentity.create(scene.root / "impostor", CLOCK))
        await said("another certificate than the one pinned here")
        await scene.here()
        await scene.hang_up("east")

        (scene.pins / "east.pem").rename(scene.pins / "east.away")
        scene.dial("east")
        await said("does not know this owner's certificate")
        (scene.pins / "east.away").rename(scene.pins / "east.pem")
        await said("connected to 127.0.0.1")
        await scene.ask("east", data=b"ASK-ME")
        await scene.carrier.close()
        await said("lost 127.0.0.1")
        await scene.listen()

    play(root, story)


def test_a_taken_port_is_said_to_be_taken(root: Path) -> None:
    """Two coordinators do not share a port in silence."""

    async def story(scene: Scene) -> None:
        other = Scene(scene.root / "other")
        other.port = scene.port
        with pytest.raises(PortBusy, match=str(scene.port)):
            await other.listen()

    (root / "other").mkdir()
    play(root, story)


def _process(scene: Scene, name: str) -> Supervised:
    home = scene.root / name

    def confine(command: list[str]) -> list[str]:
        if probe().kind != "landlock":
            return command
        return confined(command, read=[*python_reads(), programs_dir(home / "direct")], write=[])

    return dial_process(
        home / "direct", address=f"127.0.0.1:{scene.port}", identity=scene.identity(name),
        coordinator=scene.coordinator.certificate, daemon_socket=scene.socket(name), environ={},
        log=home / "dial.log", confine=confine,
    )  # fmt: skip


def test_a_dialler_killed_in_mid_vector_is_started_again_and_the_vector_arrives_whole(root: Path) -> None:
    """The real process, confined where the system can: SIGKILL while parts are under way; another takes over."""
    reply = Reply(b"head", tuple(os.urandom(4 * MIB) for _ in range(12)))
    calls: list[bytes] = []

    async def answer(data: bytes) -> Reply:
        calls.append(data)
        return reply

    async def story(scene: Scene) -> None:
        await scene.serve("east", answer)
        process = _process(scene, "east")
        process.start()
        try:
            await scene.here("east")
            asking = asyncio.create_task(scene.ask("east"))
            while not calls:  # noqa: ASYNC110 - set by the socket's server
                await asyncio.sleep(0.005)
            process.kill()
            assert not asking.done()
            _process(scene, "east")  # its folder is made anew, as at a restart
            process.start()
            assert await asking == {"east": reply}
            assert len(calls) == 2
            assert process.pid is not None
            os.kill(process.pid, signal.SIGTERM)
            await scene.here()
        finally:
            await asyncio.to_thread(process.terminate)
        log = (scene.root / "east" / "dial.log").read_text()
        assert [line.split(" ", 1)[1].split(" ")[0] for line in log.splitlines()] == ["connected"] * 2 + ["stopped"]

    scene_root = root
    play(scene_root, story)


COORDINATOR = """
import asyncio, sys
from pathlib import Path
from fedllm.clock import SystemClock
from fedllm.relay.direct import DirectCarrier
from fedllm.relay.tls import PinnedOwners, TlsIdentity

async def main(home, port):
    clock = SystemClock()
    carrier = await DirectCarrier.open(host="127.0.0.1", port=port, identity=TlsIdentity.load(home / "c", clock),
                                       pinned=PinnedOwners([home / "pins"], clock), clock=clock)
    while not (nodes := await carrier.nodes()):
        await asyncio.sleep(0.02)
    async for node, reply in carrier.exchange(dict.fromkeys(nodes, b"same request"), deadline_s=60):
        print(reply.head.decode(), len(reply.parts), flush=True)
    await carrier.close()

asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
"""


def test_a_coordinator_killed_in_mid_exchange_gets_the_answer_after_its_restart(root: Path) -> None:
    """SIGKILL with a request under way; the one started in its place asks again and is answered."""
    heard: list[bytes] = []
    first = asyncio.Event()

    async def answer(data: bytes) -> Reply:
        heard.append(data)
        if len(heard) == 1:
            first.set()
            await asyncio.sleep(NEVER_S)
        return Reply(b"answer", (b"one", b"two"))

    async def story(scene: Scene) -> None:
        await scene.carrier.close()
        await scene.owner("east", answer)
        log = scene.root / "coordinator.log"
        command = [sys.executable, "-c", COORDINATOR, str(scene.root), str(scene.port)]
        process = Supervised("coordinator", command, env=dict(os.environ), log=log)
        process.start()
        try:
            await asyncio.wait_for(first.wait(), PATIENCE_S)
            process.kill()
            process.start()
            async with asyncio.timeout(PATIENCE_S):
                while process.alive():  # noqa: ASYNC110 - a process has no event
                    await asyncio.sleep(0.05)
            # gRPC's server may write of a call that its end has cancelled into the same log
            assert (process.returncode, log.read_text().partition("\n")[0]) == (0, "answer 2")
            assert heard == [b"same request"] * 2
        finally:
            await asyncio.to_thread(process.terminate)

    play(root, story)

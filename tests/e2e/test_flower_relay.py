"""The Flower relay with real processes: a SuperLink, two sandboxed SuperNodes, and what survives their loss."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from fedllm.client.sandbox import confined, probe, python_reads
from fedllm.clock import SystemClock
from fedllm.relay.carrier import Reply
from fedllm.relay.flower import FlowerCarrier
from fedllm.relay.node import owner_processes, programs_dir
from fedllm.relay.processes import Supervised
from fedllm.relay.service import EnvelopeServer, serve_deliver
from fedllm.relay.tether import descendants
from fedllm.rng import OsRng

pytestmark = [pytest.mark.flower, pytest.mark.timeout(280)]
OWNERS = 2
DEADLINE_S = 90.0


@pytest.fixture
def root() -> Iterator[Path]:
    """Return a folder with a path short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="fr", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Setting:
    """A carrier, its owners' sockets and SuperNodes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seen: list[tuple[int, bytes]] = []
        self.parts: tuple[bytes, ...] = ()
        self.servers: list[EnvelopeServer] = []
        self.nodes: list[Supervised] = []
        self.carrier: FlowerCarrier

    async def open(self) -> None:
        """Start everything and wait until both nodes are there."""
        port, *node_ports = _ports(1 + OWNERS)
        self.carrier = await FlowerCarrier.open(
            self.root / "c", host="127.0.0.1", port=port, clock=SystemClock(), rng=OsRng(), environ=os.environ
        )
        for i in range(OWNERS):
            home = self.root / f"o{i}"

            async def deliver(data: bytes, i: int = i) -> Reply:
                self.seen.append((i, data))
                return Reply(bytes([i]) + data[::-1], self.parts[i:])

            self.servers.append(await serve_deliver(home / "relay" / "relay.sock", deliver))
            for process in self._processes(home, f"127.0.0.1:{port}", node_ports[i]):
                process.start()
                self.nodes.append(process)
        async with asyncio.timeout(90):
            while len(await self.carrier.nodes()) < OWNERS:  # noqa: ASYNC110 - other processes
                await asyncio.sleep(0.2)

    def _processes(self, home: Path, superlink: str, port: int) -> tuple[Supervised, ...]:
        def confine(command: list[str]) -> list[str]:
            if probe().kind != "landlock":
                return command
            return confined(command, read=[*python_reads(), programs_dir(home / "flower")], write=[home / "flower"])

        return owner_processes(
            home / "flower",
            superlink=superlink,
            port=port,
            daemon_socket=home / "relay" / "relay.sock",
            environ=os.environ,
            log=home / "supernode.log",
            confine=confine,
        )

    async def exchange(self, data: bytes) -> dict[int, Reply]:
        """Send the same to every node; return replies by owner."""
        outbound = dict.fromkeys(await self.carrier.nodes(), data)
        async with aclosing(self.carrier.exchange(outbound, deadline_s=DEADLINE_S)) as replies:
            return {reply.head[0]: Reply(reply.head[1:], reply.parts) async for _, reply in replies}

    async def close(self) -> None:
        """End everything."""
        await asyncio.gather(*(asyncio.to_thread(node.terminate) for node in self.nodes))
        await self.carrier.close()
        for server in self.servers:
            await server.stop(0)


@asynccontextmanager
async def _setting(root: Path) -> AsyncIterator[Setting]:
    setting = Setting(root)
    try:
        await setting.open()
        yield setting
    finally:
        await setting.close()


def _serverapps(superlink: int) -> list[int]:
    found = []
    for pid in descendants(superlink):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"flwr-serverapp" in command:
            found.append(pid)
    return found


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_envelopes_pass_and_a_lost_run_or_superlink_is_replaced(root: Path) -> None:
    """One long scenario, because each start costs seconds: bytes pass; runs and SuperLink are lost in mid-exchange."""

    async def scenario() -> None:
        async with _setting(root) as setting:
            both = {0, 1}
            big = os.urandom(6_000_000)
            setting.parts = (os.urandom(4 << 20), os.urandom(1 << 20), os.urandom(7))
            assert await setting.exchange(big) == {i: Reply(big[::-1], setting.parts[i:]) for i in both}

            # the ServerApp is killed while messages are under way: another run takes over
            superlink = setting.carrier.superlink.pid
            assert superlink is not None
            pending = asyncio.create_task(setting.exchange(b"after the run was lost"))
            await asyncio.sleep(0.3)
            (relay,) = _serverapps(superlink)
            os.kill(relay, signal.SIGKILL)
            assert set(await pending) == both
            assert setting.carrier.runs == 2

            # the SuperLink itself is killed: it is started again, the nodes come back with their names
            names = await setting.carrier.nodes()
            pending = asyncio.create_task(setting.exchange(b"after the superlink was lost"))
            await asyncio.sleep(0.3)
            setting.carrier.superlink.kill()
            assert set(await pending) == both
            assert await setting.carrier.nodes() == names
            assert setting.carrier.superlink.pid != superlink

            # a daemon that is gone is missing, and soon: nobody waits for the deadline
            await setting.servers[1].stop(0)
            async with asyncio.timeout(60):
                assert set(await setting.exchange(b"one daemon is gone")) == {0}
            leashes = [p.pid for p in (*setting.nodes, setting.carrier.superlink) if p.pid]
            started = {d for leash in leashes for d in descendants(leash)}
        assert not [pid for pid in started if _runs(pid)]

    asyncio.run(scenario())

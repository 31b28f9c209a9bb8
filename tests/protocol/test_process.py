"""The coordinator as a real process: four owners on sockets, kill -9 in mid-round, a clean stop, busy ports."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from patience import NEVER_S, PATIENCE_S
from round_world import OWNERS, Agent, kind_of

from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import OwnerId
from fedllm.registry.remote import HttpVersionSource
from fedllm.relay.service import serve_deliver

MAIN = """
import json, sys
from pathlib import Path
from fedllm.config import CoordinatorSettings, FederationSettings
from fedllm.errors import FedllmError
from fedllm.server import api
from fedllm.server.app import run
api.MAX_WAIT_S = 300.0
home, port, base, sockets = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
federation = FederationSettings(
    name="tools", base=base, alias="acme/tools", rank=2, alpha=4, last_layers=1, target_modules=("q_proj",),
    transport="local", sockets=sockets, privacy=False, clip_range=1.0, phase_deadline_s=120.0, train_deadline_s=120.0,
    declared_records=dict.fromkeys(sockets, 10),
)
try:
    run(CoordinatorSettings(home=home, port=port), [federation])
except FedllmError as error:
    print(error.code, file=sys.stderr)
    raise SystemExit(error.exit_code)
"""


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class House:
    """One coordinator process and four agents on sockets."""

    def __init__(self, root: Path, base: Path) -> None:
        self.home, self.base, self.port = root / "home", base, free_port()
        self.identity = SigningIdentity.create(self.home / "coordinator.pem")
        keys = {OwnerId(o): SigningIdentity.generate() for o in OWNERS}
        self.roster = Roster.of({o: k.public for o, k in keys.items()})
        (self.home / "rosters").mkdir()
        self.roster.save(self.home / "rosters" / "tools.json")
        self.agents = {str(o): Agent(o, k, self.roster, self.identity.public, polls=1) for o, k in keys.items()}
        self.sockets = {o: str(root / f"{o}.sock") for o in OWNERS}
        self.on_request: Callable[[str, str], None] = lambda _owner, _kind: None
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=PATIENCE_S)

    def deliver(self, owner: str) -> Callable[[bytes], Awaitable[bytes]]:
        """Return the handler of one owner's socket."""

        async def handle(data: bytes) -> bytes:
            self.on_request(owner, kind_of(data))
            return await self.agents[owner].deliver(data)

        return handle

    async def start(self, port: int | None = None) -> asyncio.subprocess.Process:
        """Start the coordinator; its stderr is kept."""
        return await asyncio.create_subprocess_exec(
            sys.executable, "-c", MAIN, str(self.home), str(port or self.port), str(self.base),
            json.dumps(self.sockets), stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip

    def control(self) -> dict[str, str]:
        """Return the operator's header."""
        return {"Authorization": f"Bearer {(self.home / 'operator.token').read_text().strip()}"}

    async def until_up(self) -> None:
        """Wait until the API answers."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    await self.client.get("/health")
                except httpx.TransportError:
                    await asyncio.sleep(0.05)
                else:
                    return

    async def until_ended(self, rounds: int) -> list[dict[str, object]]:
        """Wait until so many rounds have ended."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                answer = await self.client.get("/v1/federations/tools/rounds", headers=self.control())
                found = answer.json()["rounds"]
                if sum(r["ended"] is not None for r in found) >= rounds:
                    return list(found)
                await asyncio.sleep(0.1)


def test_kill_and_restart_in_mid_round(tmp_path: Path, tiny_base: Path) -> None:
    """Kill -9 while keys are shared, start again: the round ends by itself and the second one asked for runs."""

    async def scenario() -> None:
        house = House(tmp_path, tiny_base)
        servers = [await serve_deliver(Path(p), house.deliver(o)) for o, p in house.sockets.items()]
        process = await house.start()
        await house.until_up()
        killed: list[str] = []

        def kill(owner: str, kind: str) -> None:
            if kind == "ShareKeys" and owner == "north" and not killed:
                killed.append(kind)
                process.kill()

        house.on_request = kill
        asked = await house.client.post("/v1/federations/tools/rounds", headers=house.control(), json={"rounds": 2})
        assert asked.status_code == 202
        await process.wait()
        assert killed
        process = await house.start()
        await house.until_up()
        first, second = await house.until_ended(2)
        assert (first["state"], second["state"]) == ("JUDGED", "JUDGED")
        assert first["survivors"] == 4
        assert [len(agent.begun) for agent in house.agents.values()] == [2] * 4
        source = HttpVersionSource("", house.identity.public, client=house.client)
        (digest,) = (await source.aliases(-1, 0.0)).aliases.values()
        assert (await source.fetch(digest)).version.number == 2
        second_process = await house.start(free_port())
        _, stderr = await second_process.communicate()
        assert (second_process.returncode, stderr.decode().split()[-1]) == (2, "config")
        poll = asyncio.create_task(source.aliases(99, NEVER_S))
        await asyncio.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            assert await process.wait() == 0
        await asyncio.gather(poll, return_exceptions=True)
        for server in servers:
            await server.stop(0)
        await house.client.aclose()

    asyncio.run(scenario())


@pytest.mark.parametrize(("breakage", "code"), [("port", "port-busy"), ("key", "not-found"), ("roster", "not-found")])
def test_what_is_missing_or_taken_is_named(tmp_path: Path, tiny_base: Path, breakage: str, code: str) -> None:
    """A busy port, no key, no roster: each its own code, and nothing half-made is left behind."""

    async def scenario() -> None:
        house = House(tmp_path, tiny_base)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            if breakage == "port":
                house.port = taken.getsockname()[1]
            elif breakage == "key":
                (house.home / "coordinator.pem").unlink()
            else:
                (house.home / "rosters" / "tools.json").unlink()
            process = await house.start()
            _, stderr = await process.communicate()
        assert stderr.decode().split()[-1] == code
        assert not (house.home / "operator.token").exists()
        await house.client.aclose()

    asyncio.run(scenario())

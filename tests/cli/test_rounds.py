"""A coordinator process, real owners' daemons on sockets with a toy trainer, and the operator's commands."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cli.command_line import Said, fedllm
from cli.conftest import OWNERS, Scene
from patience import PATIENCE_S

from fedllm import wire
from fedllm.client.daemon import Daemon
from fedllm.client.policy import OwnerPolicy
from fedllm.client.toy import ToyTrainer
from fedllm.clock import SystemClock
from fedllm.demo.cluster import free_ports
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import Digest, FederationName, OwnerId
from fedllm.messages.envelope import COORDINATOR, ENVELOPE_VERSION, Envelope, seal, unseal
from fedllm.messages.plan import PLAN_CONTEXT, PLAN_VERSION, SignedPlan
from fedllm.messages.round import Begin, Hello, Refused, decode_body
from fedllm.privacy.ledger import Ledger
from fedllm.relay.carrier import Reply
from fedllm.relay.service import serve_deliver
from fedllm.rng import OsRng


def daemon(scene: Scene, owner: str, *, base: str | None = None) -> Daemon:
    """Return an owner's daemon as `client start` makes it, but for the trainer."""
    home, clock = scene.owner(owner), SystemClock()
    identity, policy = SigningIdentity.load(home / "owner.pem"), OwnerPolicy.load(home / "policy.toml")
    trainer = ToyTrainer(Digest(base or policy.allowed_bases[0]), OwnerId(owner))
    return Daemon(
        owner=OwnerId(owner), federation=FederationName("tools"), home=home, identity=identity,
        roster=Roster.load(home / "roster.json"),
        coordinator=SigningIdentity.load(scene.home / "coordinator.pem").public,
        policy=policy, trainer=trainer, clock=clock, rng=OsRng(), release="test",
        ledger=Ledger.open(home / "ledger.jsonl", identity, clock, dataset=trainer.dataset,
                           limit_epsilon=policy.limit_epsilon, delta=policy.delta),
    )  # fmt: skip


class Owners:
    """Four daemons behind sockets, served from a thread; what model they have loaded can be changed."""

    def __init__(self, scene: Scene, folder: Path) -> None:
        self.paths = {owner: folder / f"{owner}.sock" for owner in OWNERS}
        self._scene = scene
        self._loop = asyncio.new_event_loop()
        self._daemons: dict[str, Daemon] = {}

    def load(self, base: str | None) -> None:
        """Start daemons anew, with their own base model (None) or another."""
        self._daemons = {owner: daemon(self._scene, owner, base=base) for owner in OWNERS}

    def _handle(self, owner: str) -> Callable[[bytes], Awaitable[Reply]]:
        async def handle(data: bytes) -> Reply:
            return await self._daemons[owner].handle(data)

        return handle

    @contextmanager
    def served(self) -> Iterator[None]:
        """Serve the sockets."""
        servers: list[Any] = []

        async def serve() -> None:
            for owner, path in self.paths.items():
                servers.append(await serve_deliver(path, self._handle(owner)))

        async def stop() -> None:
            for server in servers:
                await server.stop(0)

        thread = threading.Thread(target=self._loop.run_forever)
        thread.start()
        try:
            asyncio.run_coroutine_threadsafe(serve(), self._loop).result(PATIENCE_S)
            yield
        finally:
            asyncio.run_coroutine_threadsafe(stop(), self._loop).result(PATIENCE_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join(PATIENCE_S)
            self._loop.close()


@contextmanager
def running(scene: Scene, owners: Owners) -> Iterator[None]:
    """Run a coordinator process over the owners' sockets."""
    (port,) = free_ports(1)
    sockets = ", ".join(f"{owner} = {json.dumps(str(path))}" for owner, path in owners.paths.items())
    keys = [
        'transport = "local"', f"sockets = {{ {sockets} }}", "rank = 2", "noise_multiplier = 2.0",
        "learning_rate = 0.02", "gate_margin = 5.0", 'target_modules = ["q_proj"]', "",
    ]  # fmt: skip
    config = scene.home / "fedllm.toml"
    text = config.read_text(encoding="utf-8").replace("port = 1\n", f"port = {port}\n")
    config.write_text(text.replace("last_layers = 2\n", "last_layers = 2\n" + "\n".join(keys)), encoding="utf-8")
    (scene.home / "operator.token").unlink()
    command = [sys.executable, "-m", "fedllm", "coordinator", "start", "--home", str(scene.home)]
    with (
        owners.served(),
        (scene.root / "coordinator.log").open("w") as log,
        subprocess.Popen(command, stderr=log) as child,
    ):
        try:
            _until_up(scene, child)
            yield
        finally:
            child.send_signal(signal.SIGTERM)
            assert child.wait(PATIENCE_S) == 0


def _until_up(scene: Scene, child: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while True:
        said = fedllm("coordinator", "status", "--home", scene.home, "--json")
        if said.exit_code == 0 and all(o["connected"] for o in said.json()["federations"][0]["owners"]):
            return
        assert child.poll() is None, (scene.root / "coordinator.log").read_text()
        assert time.monotonic() < until_s, said
        time.sleep(0.1)


def _run(scene: Scene, *more: object) -> Said:
    return fedllm("round", "run", "--home", scene.home, *more)


@pytest.fixture
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder whose name is short enough for unix sockets."""
    return tmp_path_factory.mktemp("s")


def test_rounds_refused_and_passed(scene: Scene, sockets: Path) -> None:
    """Owners with another base refuse (exit 3); then a round passes; then their budget, just lowered, is spent."""
    owners = Owners(scene, sockets)
    owners.load("ab" * 32)
    with running(scene, owners):
        said = _run(scene)
        assert said.exit_code == 3, said
        assert "error[base-mismatch]: round 1 was aborted" in said.err
        assert "the one loaded here is abababababababab" in said.err
        assert [_ledger(scene, owner)["reservations"] for owner in OWNERS] == [0] * 4
        owners.load(None)
        good = _run(scene, "--json")
        assert good.exit_code == 0, good
        assert [r["state"] for r in good.json()] == ["JUDGED"]
        spent = _ledger(scene, "east")["epsilon"]
        for owner in OWNERS:
            set_limit = ("client", "policy", "set", "max_epsilon", 1.01 * spent, "--home", scene.owner(owner))
            assert fedllm(*set_limit).exit_code == 0
        bad = _run(scene, "--json")
        assert bad.exit_code == 3, bad
        assert [r["code"] for r in bad.json()] == ["budget-exhausted"]
        assert "error[budget-exhausted]: round 3 was aborted" in bad.err
        assert _ledger(scene, "east")["epsilon"] == spent
        _read_everything(scene)


def _ledger(scene: Scene, owner: str) -> dict[str, Any]:
    found: dict[str, Any] = fedllm("privacy", "show", "--home", scene.owner(owner), "--json").json()
    return found


def _read_everything(scene: Scene) -> None:
    at = ("--home", scene.home)
    version = fedllm("adapter", "list", *at, "--json").json()["versions"][0]
    assert fedllm("adapter", "show", version["name"], *at).json()["digest"] == version["digest"]
    assert len(fedllm("round", "list", *at, "--json").json()) == 3
    assert fedllm("round", "show", 1, *at, "--json").json()["number"] == 1
    assert fedllm("adapter", "history", *at, "--json").json()[0]["new"] == version["digest"]
    assert fedllm("client", "audit", "--home", scene.owner("east"), "--json").json()
    for command in (("round", "list"), ("round", "show", 1), ("adapter", "list"), ("adapter", "history")):
        assert fedllm(*command, *at).exit_code == 0
    out = scene.root / "exported"
    assert fedllm("adapter", "export", version["name"], out, *at).exit_code == 0
    assert "adapter_model.safetensors" in {p.name for p in out.iterdir()}
    fedllm("adapter", "export", version["name"], out, *at).fails(2, "config", "not overwritten")
    fedllm("adapter", "show", "tools@v9", *at).fails(5, "not-found", "adapter list")
    fedllm("round", "show", 9, *at).fails(5, "not-found")
    fedllm("round", "abort", 1, *at).fails(75, "not-ready", "not in progress")
    fedllm("adapter", "rollback", *at).fails(5, "not-found")
    token = scene.home / "operator.token"
    token.write_text("wrong\n", encoding="utf-8")
    fedllm("round", "list", *at).fails(4, "authentication", "operator.token")


@dataclass(frozen=True)
class _NewerPlan:
    """All that a reader may look at in a plan of another version."""

    version: int


def _asked(scene: Scene, body: Any, *, version: int = ENVELOPE_VERSION, key: SigningIdentity | None = None) -> Refused:
    """Return east's refusal of one sealed request."""
    coordinator = SigningIdentity.load(scene.home / "coordinator.pem")
    request = Envelope(version, type(body).__name__, "tools", 1, COORDINATOR, "east", bytes(16), wire.encode(body))
    east = daemon(scene, "east")
    reply = asyncio.run(east.handle(seal(request, key or coordinator)))
    asyncio.run(east.close())
    opened = unseal(reply.head, SigningIdentity.load(scene.owner("east") / "owner.pem").public,
                    sender="east", receiver=COORDINATOR)  # fmt: skip
    answer = decode_body(opened.kind, opened.body)
    assert isinstance(answer, Refused), answer
    return answer


def test_other_versions_and_other_keys_are_refused_by_the_daemon(scene: Scene) -> None:
    """A newer envelope, a newer plan, a stranger's signature: each refusal has its code, and nothing is charged."""
    assert _asked(scene, Hello(b"0" * 16), version=2).code == "version-unsupported"
    assert _asked(scene, Hello(b"0" * 16), key=SigningIdentity.generate()).code == "authentication"
    coordinator = SigningIdentity.load(scene.home / "coordinator.pem")
    newer = wire.encode(_NewerPlan(PLAN_VERSION + 1))
    plan = SignedPlan(newer, coordinator.sign(PLAN_CONTEXT, newer))
    refused = _asked(scene, Begin(plan, b"", None))
    assert refused.code == "version-unsupported"
    assert f"plan version {PLAN_VERSION + 1} found, {PLAN_VERSION} spoken here" in refused.message
    assert refused.hint == "install the same fedllm release on coordinator and owners"
    assert fedllm("privacy", "show", "--home", scene.owner("east"), "--json").json()["reservations"] == 0

"""A coordinator process, real owners' daemons on sockets with a toy trainer, and the operator's commands."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cli.command_line import Said, fedllm
from cli.conftest import OWNERS, Scene

from fedllm import wire
from fedllm.client.daemon import Daemon
from fedllm.client.policy import OwnerPolicy
from fedllm.client.toy import ToyTrainer
from fedllm.clock import SystemClock
from fedllm.demo.cluster import free_ports
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import Digest, FederationName, OwnerId
from fedllm.messages.envelope import COORDINATOR, ENVELOPE_VERSION, Envelope, seal, unseal
from fedllm.messages.plan import PLAN_CONTEXT, SignedPlan
from fedllm.messages.round import Begin, Hello, Refused, decode_body
from fedllm.privacy.ledger import Ledger
from fedllm.relay.service import serve_deliver
from fedllm.rng import OsRng


def daemon(scene: Scene, owner: str, *, base: str | None = None) -> Daemon:
    """Return an owner's daemon as `client start` makes it, but for the trainer."""
    home, clock = scene.owner(owner), SystemClock()
    identity, policy = SigningIdentity.load(home / "owner.pem"), OwnerPolicy.load(home / "policy.toml")
    trainer = ToyTrainer(Digest(base or policy.allowed_bases[0]), OwnerId(owner))
    return Daemon(
        owner=OwnerId(owner), federation=FederationName("tools"), home=home, identity=identity,
        roster=Roster.load(home / "roster.json"), coordinator=SigningIdentity.load(scene.home / "coordinator.pem").public,
        policy=policy, trainer=trainer, clock=clock, rng=OsRng(), release="test",
        ledger=Ledger.open(home / "ledger.jsonl", identity, clock, dataset=trainer.dataset,
                           limit_epsilon=policy.limit_epsilon, delta=policy.delta),
    )  # fmt: skip


@contextmanager
def running(scene: Scene, sockets: Path, *, base: str | None = None) -> Iterator[None]:
    """Serve four daemons from a thread, and a coordinator from a process."""
    port, _ = free_ports(2)
    paths = {owner: sockets / f"{owner}.sock" for owner in OWNERS}
    keys = "\n".join([
        'transport = "local"', f"sockets = {{ {', '.join(f'{o} = {json.dumps(str(p))}' for o, p in paths.items())} }}",
        "rank = 2", "noise_multiplier = 2.0", "learning_rate = 0.02", "gate_margin = 5.0", 'target_modules = ["q_proj"]',
    ])  # fmt: skip
    config = scene.home / "fedllm.toml"
    text = config.read_text(encoding="utf-8").replace("port = 1\n", f"port = {port}\n")
    config.write_text(text.replace("last_layers = 2\n", f"last_layers = 2\n{keys}\n"), encoding="utf-8")
    (scene.home / "operator.token").unlink()
    loop, served = asyncio.new_event_loop(), []

    async def serve() -> None:
        for owner, path in paths.items():
            served.append(await serve_deliver(path, daemon(scene, owner, base=base).handle))

    async def stop() -> None:
        for server in served:
            await server.stop()

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    command = [sys.executable, "-m", "fedllm", "coordinator", "start", "--home", str(scene.home)]
    log = (scene.root / "coordinator.log").open("w")
    try:
        asyncio.run_coroutine_threadsafe(serve(), loop).result(20)
        with log, subprocess.Popen(command, stderr=log) as child:
            try:
                _until_up(scene, child)
                yield
            finally:
                child.send_signal(signal.SIGTERM)
                assert child.wait(20) == 0
        asyncio.run_coroutine_threadsafe(stop(), loop).result(20)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


def _until_up(scene: Scene, child: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        said = fedllm("coordinator", "status", "--home", scene.home, "--json")
        if said.exit_code == 0 and all(o["connected"] for o in said.json()["federations"][0]["owners"]):
            return
        assert child.poll() is None, (scene.root / "coordinator.log").read_text()
        threading.Event().wait(0.1)
    raise AssertionError(said)


def _run(scene: Scene, *more: object) -> Said:
    return fedllm("round", "run", "--home", scene.home, *more)


@pytest.fixture
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder whose name is short enough for unix sockets."""
    return tmp_path_factory.mktemp("s")


def test_rounds_until_the_budget_is_spent(scene: Scene, sockets: Path) -> None:
    """One round passes, every command about it prints one JSON document; then the owners' budget ends it, exit 3."""
    for owner in OWNERS:
        assert fedllm("client", "policy", "set", "max_epsilon", 2.2, "--home", scene.owner(owner)).exit_code == 0
    with running(scene, sockets):
        good = _run(scene, "--json")
        assert good.exit_code == 0, good
        assert [r["state"] for r in good.json()] == ["JUDGED"]
        spent = fedllm("privacy", "show", "--home", scene.owner("east"), "--json").json()["epsilon"]
        assert spent < 2.2
        bad = _run(scene, "--json")
        assert bad.exit_code == 3, bad
        assert [r["code"] for r in bad.json()] == ["budget-exhausted"]
        assert "error[budget-exhausted]: round 2 was aborted" in bad.err
        assert fedllm("privacy", "show", "--home", scene.owner("east"), "--json").json()["epsilon"] == spent
        _read_everything(scene)


def _read_everything(scene: Scene) -> None:
    at = ("--home", scene.home)
    version = fedllm("adapter", "list", *at, "--json").json()["versions"][0]
    assert fedllm("adapter", "show", version["name"], *at).json()["digest"] == version["digest"]
    assert len(fedllm("round", "list", *at, "--json").json()) == 2
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
    fedllm("round", "abort", 1, *at).fails(2, "config")
    fedllm("adapter", "rollback", *at).fails(5, "not-found")
    token = scene.home / "operator.token"
    token.write_text("wrong\n", encoding="utf-8")
    fedllm("round", "list", *at).fails(4, "authentication", "operator.token")


def test_owners_with_another_base_refuse(scene: Scene, sockets: Path) -> None:
    """The owners' loaded model is another than the plan's: nobody trains, exit 3, and nothing is charged."""
    with running(scene, sockets, base="ab" * 32):
        said = _run(scene)
    assert said.exit_code == 3, said
    assert "error[base-mismatch]: round 1 was aborted" in said.err
    assert "the one loaded here is abababababababab" in said.err
    for owner in OWNERS:
        assert fedllm("privacy", "show", "--home", scene.owner(owner), "--json").json()["reservations"] == 0


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
    opened = unseal(reply, SigningIdentity.load(scene.owner("east") / "owner.pem").public,
                    sender="east", receiver=COORDINATOR)  # fmt: skip
    answer = decode_body(opened.kind, opened.body)
    assert isinstance(answer, Refused), answer
    return answer


def test_other_versions_and_other_keys_are_refused_by_the_daemon(scene: Scene) -> None:
    """A newer envelope, a newer plan, a stranger's signature: each refusal has its code, and nothing is charged."""
    assert _asked(scene, Hello(b"0" * 16), version=2).code == "version-unsupported"
    assert _asked(scene, Hello(b"0" * 16), key=SigningIdentity.generate()).code == "authentication"
    coordinator = SigningIdentity.load(scene.home / "coordinator.pem")
    newer = wire.encode(_NewerPlan(2))
    plan = SignedPlan(newer, coordinator.sign(PLAN_CONTEXT, newer))
    refused = _asked(scene, Begin(plan, b""))
    assert refused.code == "version-unsupported"
    assert "plan version 2 found, 1 spoken here" in refused.message
    assert refused.hint == "install the same fedllm release on coordinator and owners"
    assert fedllm("privacy", "show", "--home", scene.owner("east"), "--json").json()["reservations"] == 0

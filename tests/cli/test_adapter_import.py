"""A coordinator without any federation: adapters imported, promoted, reported on and compared by an operator."""

from __future__ import annotations

import json
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from cli.command_line import fedllm, process
from patience import PATIENCE_S

from fedllm.adapter import AdapterSpec, AdapterState, to_peft
from fedllm.basemodel.inspect import open_base
from fedllm.registry.observed import TTFT_BOUNDS_S, Observation, Report
from fedllm.rng import SeededRng

NO_FLOWER = "import sys; sys.modules['flwr'] = None; sys.modules['grpc'] = None; sys.argv[0] = 'fedllm'; "


@dataclass(frozen=True)
class Desk:
    """A home without a federation, and the port of its control API."""

    home: Path
    port: int
    base: Path

    def adapter(self, verb: str, *more: object) -> Any:
        """Run a verb of ``fedllm adapter`` on this home."""
        return fedllm("adapter", verb, *more, "--home", self.home)

    def folder(self, name: str, seed: int) -> Path:
        """Write a PEFT folder for the base."""
        base = open_base(self.base)
        shapes = {module: base.module_shapes(module) for module in ("q_proj", "v_proj")}
        state = AdapterState.initial(AdapterSpec(base.digest, 2, 4, shapes, (0, 1)), SeededRng(seed))
        folder = self.home.parent / name
        folder.mkdir()
        for file, data in to_peft(state, base_name="x").items():
            (folder / file).write_bytes(data)
        return folder

    def bring(self, name: str, seed: int, *more: object, line: str = "support") -> Any:
        """Import such a folder."""
        return self.adapter("import", self.folder(name, seed), "--federation", line, "--base", self.base, *more)

    def report(self, *observations: Observation) -> httpx.Response:
        """Report as an endpoint does."""
        token = (self.home / "observer.token").read_text(encoding="utf-8").strip()
        body = Report("north", "0" * 16, 1, observations).to_json()
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.post(f"http://127.0.0.1:{self.port}/v1/observations", json=body, headers=headers, trust_env=False)


@pytest.fixture
def desk(tmp_path: Path, tiny_base: Path) -> Desk:
    """Return a home of ``fedllm init`` without a base: keys and ports, no federation."""
    home = tmp_path / "home"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    assert "adapter import" in fedllm("init", home, "--port", port).err
    return Desk(home, port, tiny_base)


@contextmanager
def running(desk: Desk) -> Iterator[None]:
    """Run its coordinator in a process where nothing of Flower can be imported."""
    command = [sys.executable, "-c", NO_FLOWER + "from fedllm.cli import main; main()"]
    log = desk.home.parent / "coordinator.log"
    with (
        log.open("w") as out,
        subprocess.Popen([*command, "coordinator", "start", "--home", str(desk.home)], stderr=out) as child,
    ):
        try:
            until_s = time.monotonic() + PATIENCE_S
            while fedllm("coordinator", "status", "--home", desk.home, "--json").exit_code != 0:
                assert child.poll() is None, log.read_text()
                assert time.monotonic() < until_s, log.read_text()
                time.sleep(0.1)
            yield
        finally:
            child.send_signal(signal.SIGTERM)
            assert child.wait(PATIENCE_S) == 0, log.read_text()


def _seen(digest: str, requests: int, failed: int, up: int) -> Observation:
    ttft = [0] * (len(TTFT_BOUNDS_S) + 1)
    ttft[5] = requests - failed
    return Observation(digest, "acme/support", 1.0, 31.0, requests, 0, failed, tuple(ttft), 100, 50, up, 1)  # type: ignore[arg-type]


def test_a_registry_without_a_federation(desk: Desk) -> None:
    """Imported, promoted by name, reported on, listed, compared, rolled back: with no Flower and no federation."""
    first = desk.bring("one", 1, "--alias", "acme/support")
    assert first.exit_code == 0, first
    assert "privacy unit: none" in first.err
    assert "adapter promote support@v1 --federation support" in first.err
    one = first.out.split()[1]
    with running(desk):
        assert fedllm("coordinator", "status", "--home", desk.home, "--json").json()["federations"] == []
        for file in ("operator.token", "observer.token"):
            assert stat.S_IMODE((desk.home / file).stat().st_mode) == 0o600
        assert not (desk.home / "flower").exists()
        two = desk.bring("two", 2, "--json").json()["digest"]
        assert desk.adapter("list", "--json").json()["aliases"] == {}, "an import moves no alias"
        for version, digest in (("support@v1", one), ("support@v2", two)):
            said = desk.adapter("promote", version, "--federation", "support")
            assert (said.exit_code, said.out) == (0, f"acme/support -> {digest}\n")
        assert desk.adapter("promote", two[:12], "--alias", "acme/second").out == f"acme/second -> {two}\n"
        _reports(desk, one, two)
        assert desk.adapter("rollback").out == f"acme/support -> {one}\n", "the only line needs no name"
        moves = desk.adapter("history", "--federation", "support", "--json").json()
        assert [(m["new"], m["actor"]) for m in moves] == [(one, "operator"), (two, "operator"), (one, "operator")]
        desk.adapter("promote", "support@v1", "--federation", "nope").fails(5, "not-found", "known: support", "--alias")
        desk.adapter("history", "--alias", "no-slash").fails(2, "config", "tenant/name")


def _reports(desk: Desk, one: str, two: str) -> None:
    assert desk.report(_seen(one, 100, 1, 9), _seen(two, 50, 10, 0)).json() == {"new": True}
    assert desk.report(_seen(one, 100, 1, 9)).json() == {"new": False}
    shown = desk.adapter("show", "support@v1").json()
    assert (shown["method"], shown["unit"], shown["epsilon"], shown["owners"]) == ("import", "none", None, None)
    assert shown["observations"]["source"] == "reported by endpoints, not verified"
    assert shown["observations"]["total"]["requests"] == 100
    listed = desk.adapter("list").out
    assert all(word in listed for word in ("requests", "5xx", "feedback", "1.0%", "20.0%", "+9 -1"))
    assert "acme/second, acme/support" in listed
    rows = desk.adapter("list", "--json").json()["versions"]
    assert [row["observations"]["total"]["error_rate"] for row in rows] == [0.01, 0.2]
    both = desk.adapter("compare", "support@v2", "--json").json()
    assert [v["name"] for v in both["versions"]] == ["support@v2", "support@v1"], "by default with the one before"
    assert [v["error_rate"] for v in both["versions"]] == [0.2, 0.01]
    table = desk.adapter("compare", "support@v1", two[:8]).out
    assert "not verified" in table
    assert "first token, p99" in table
    desk.adapter("compare", "support@v1").fails(5, "not-found", "first of its line")
    desk.adapter("compare", "support@v1", "support@v9").fails(5, "not-found", "support@v9")


def test_what_cannot_be_imported_says_why(desk: Desk) -> None:
    """No alias, a bad name, a folder without safetensors, a base that is none: nothing is added by any of them."""
    desk.bring("a", 1).fails(5, "not-found", "--alias")
    desk.bring("b", 2, "--alias", "support").fails(2, "config", "tenant/name")
    desk.bring("c", 3, "--alias", "acme/x", line="Bad Name").fails(2, "config", "federation 'Bad Name'")
    at = ("--federation", "x", "--alias", "acme/x")
    desk.adapter("import", desk.home, *at, "--base", desk.base).fails(5, "not-found", "adapter_config.json")
    folder = desk.folder("d", 4)
    desk.adapter("import", folder, *at, "--base", desk.home).fails(2, "base-unsupported", "config.json")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}), encoding="utf-8")
    desk.adapter("import", folder, *at, "--base", desk.base).fails(1, "adapter-invalid", "use_dora")
    assert desk.bring("e", 5, "--alias", "acme/x", "--json").json()["name"] == "support@v1"


def test_a_federations_name_is_not_for_imports(desk: Desk) -> None:
    """What rounds make and what was brought are never one line."""
    section = f'[federation.tools]\nbase = {json.dumps(str(desk.base))}\nalias = "acme/tools"\n'
    with (desk.home / "fedllm.toml").open("a", encoding="utf-8") as file:
        file.write(section)
    said = desk.bring("a", 1, "--alias", "acme/x", line="tools")
    said.fails(2, "config", "trained here", "--federation")
    assert not (desk.home / "registry" / "registry.sqlite").exists()


def test_an_empty_home_is_no_coordinator(tmp_path: Path) -> None:
    """Without a key nothing is served; the error says which command makes one."""
    (tmp_path / "fedllm.toml").write_text("", encoding="utf-8")
    process("coordinator", "start", "--home", tmp_path, "--port", 0).fails(
        5, "not-found", "coordinator.pem", "fedllm init"
    )

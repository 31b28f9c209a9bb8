"""The router's settings: what is missing or wrong is said before anything is served."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from cli.command_line import fedllm

from fedllm.identity import SigningIdentity
from fedllm.serving.tenants import create_tenant


@pytest.fixture
def flags(tmp_path: Path) -> dict[str, str]:
    """Return flags of a router that could start."""
    create_tenant(tmp_path / "tenants.toml", "acme", ["base"])
    (tmp_path / "replicas.toml").write_text('[replicas.one]\nurl = "http://127.0.0.1:9"\n')
    return {
        "--replicas": str(tmp_path / "replicas.toml"),
        "--registry": "http://127.0.0.1:9",
        "--coordinator-key": str(SigningIdentity.generate().public),
        "--tenants": str(tmp_path / "tenants.toml"),
        "--base-name": "tiny",
        "--port": "0",
    }


@pytest.mark.parametrize("missing", ["--replicas", "--registry", "--coordinator-key", "--tenants", "--base-name"])
def test_what_is_missing_is_named(flags: dict[str, str], missing: str) -> None:
    """Without one of these there is no router; the error names the key of ``route.toml``."""
    del flags[missing]
    said = fedllm("route", *(part for pair in flags.items() for part in pair))
    said.fails(2, "config", f"[route] {missing[2:].replace('-', '_')} is missing")


@pytest.mark.parametrize(
    ("flag", "value", "exit_code", "code"),
    [
        ("--replicas", "nowhere.toml", 5, "not-found"),
        ("--tenants", "nowhere.toml", 5, "not-found"),
        ("--registry", "nowhere", 5, "not-found"),
        ("--coordinator-key", "nobody's", 2, "config"),
    ],
)
def test_what_is_wrong_is_named(flags: dict[str, str], flag: str, value: str, exit_code: int, code: str) -> None:
    """A file that is not there, and a key that is none, end the command with their own codes."""
    flags[flag] = value
    said = fedllm("route", *(part for pair in flags.items() for part in pair))
    assert said.exit_code == exit_code
    assert f"error[{code}]: " in said.err
    assert "Traceback" not in said.err


def test_a_taken_port(flags: dict[str, str]) -> None:
    """The address is tried before anything else is opened."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags["--port"] = str(taken.getsockname()[1])
        said = fedllm("route", *(part for pair in flags.items() for part in pair))
    assert said.exit_code == 1
    assert f"error[port-busy]: port {flags['--port']} " in said.err

"""``fedllm tenant`` and ``fedllm chat``: a key is shown once, and never asked for on a command line."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from cli.command_line import Said, fedllm

from fedllm.cli import app
from fedllm.serving.tenants import authenticate, load_tenants

DAY_S = 86_400


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where the tenants file will be."""
    return tmp_path / "tenants.toml"


def tenant(path: Path, *arguments: object) -> Said:
    """Run a command on the file; it must succeed."""
    said = fedllm("tenant", *arguments, "--tenants", path)
    assert said.exit_code == 0, said
    return said


def test_a_tenants_life(path: Path) -> None:
    """Added, listed, rotated, limited, revoked and removed; a key is on stdout when it is made, and never again."""
    first = tenant(path, "add", "acme", "--allow", "acme/tools", "--weight", 2, "--concurrent", 3).out.strip()
    tenant(path, "add", "front", "--router", "--allow", "*", "--log-prompts", "--share-cache")
    second = tenant(path, "rotate", "acme", "--overlap-hours", 1).out.strip()
    assert first != second
    tenant(path, "limit", "acme", "tokens_per_minute=60000", "concurrent=none")
    tenant(path, "allow", "acme", "base", "acme/other")
    assert "may use base, acme/other" in tenant(path, "deny", "acme", "acme/tools").err
    (acme, front) = tenant(path, "list", "--json").json()
    assert (acme["allow"], acme["weight"], front["router"]) == (["base", "acme/other"], 2.0, True)
    flags = ("operator", "router", "share_cache", "log_prompts")
    assert [[row[flag] for flag in flags] for row in (acme, front)] == [[False] * 4, [False, True, True, True]]
    assert acme["limits"] == {
        "requests_per_minute": None, "tokens_per_minute": 60000, "concurrent": None, "tokens_per_month": None,
    }  # fmt: skip
    assert [(key["name"], key["state"], key["expires"] is None) for key in acme["keys"]] == [
        ("key-1", "valid", False),
        ("key-2", "valid", True),
    ]
    found = load_tenants(path)
    now = found[0].keys[0].created
    assert authenticate(found, first, now)[1].name == "key-1"
    assert authenticate(found, second, now + DAY_S)[1].name == "key-2"
    assert "key-1" in tenant(path, "revoke", "acme", "--key", "key-1").err
    table = tenant(path, "list")
    assert "key-1 revoked, key-2 valid" in table.out
    assert "tokens_per_minute=60000" in table.out
    assert "router" in table.out
    tenant(path, "revoke", "acme")
    assert {key["state"] for key in tenant(path, "list", "--json").json()[0]["keys"]} == {"revoked"}
    tenant(path, "remove", "acme")
    assert [row["name"] for row in tenant(path, "list", "--json").json()] == ["front"]
    for said in (table, tenant(path, "list"), tenant(path, "list", "--json")):
        assert first not in said.out + said.err
    assert first not in path.read_text()


def test_a_key_with_a_last_day(path: Path) -> None:
    """``--expires-days`` is in the list, for the first key and for a later one."""
    tenant(path, "add", "acme", "--expires-days", 2)
    tenant(path, "rotate", "acme", "--expires-days", 1)
    keys = load_tenants(path)[0].keys
    assert [round((key.expires or 0) - key.created) // DAY_S for key in keys] in ([1, 1], [0, 1])
    assert "valid until 20" in tenant(path, "list").out


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code", "words"),
    [
        (("limit", "acme", "tokens_per_min=5"), 2, "config", "did you mean 'tokens_per_minute'"),
        (("limit", "acme", "concurrent"), 2, "config", "LIMIT=NUMBER"),
        (("limit", "acme", "concurrent=-1"), 2, "config", "LIMIT=NUMBER"),
        (("limit", "acme", "concurrent=0"), 2, "config", "concurrent is 0"),
        (("limit", "nobody", "concurrent=1"), 5, "not-found", "'nobody'"),
        (("rotate", "nobody"), 5, "not-found", "'nobody'"),
        (("revoke", "acme", "--key", "key-7"), 5, "not-found", "'key-7'"),
        (("deny", "acme", "base"), 5, "not-found", "'base'"),
        (("allow", "acme", "*"), 2, "config", "routers only"),
        (("allow", "acme", "tools"), 2, "config", "tenant/name"),
        (("add", "b", "--weight", "11"), 2, "config", "--weight"),
        (("remove", "nobody"), 5, "not-found", "'nobody'"),
    ],
)
def test_slips_are_errors_that_change_nothing(path: Path, arguments, exit_code: int, code: str, words: str) -> None:
    """The file is as it was, and the error names what was meant."""
    tenant(path, "add", "acme")
    before = path.read_bytes()
    fedllm("tenant", *arguments, "--tenants", path).fails(exit_code, code, words)
    assert path.read_bytes() == before


def test_an_old_file_is_named_as_one(path: Path) -> None:
    """The form of an older release is refused with what to write instead."""
    path.write_text(f'[acme]\nkey_sha256 = "{"0" * 64}"\nallow = []\n')
    fedllm("tenant", "list", "--tenants", path).fails(2, "config", "older release", "[tenants.NAME]")


def test_no_command_takes_a_key_on_its_command_line() -> None:
    """Arguments are seen by every user of the machine: options that speak of keys take files, names or public keys."""
    taken: dict[str, set[str]] = {}

    def walk(command: object, path: str) -> None:
        words = ("key", "secret", "password", "token")
        named = {p.name for p in getattr(command, "params", ()) if any(word in p.name for word in words)}
        if named:
            taken[path] = named
        for name, child in getattr(command, "commands", {}).items():
            walk(child, f"{path} {name}".strip())

    walk(typer.main.get_command(app), "")
    public_or_file = {"coordinator_key", "key_file", "max_tokens", "observations_token"}
    for command in ("serve", "chat", "route"):
        assert taken[command] <= public_or_file, command
    rest = {path: names for path, names in taken.items() if path.startswith("tenant ")}
    assert rest == {"tenant add": {"tokens_per_minute", "tokens_per_month"}, "tenant revoke": {"key"}}


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Serve answers ``reply 1``, ``reply 2``, ... and keep what was asked; a question ``fail`` is refused with 429."""
    asked: list[dict[str, object]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append({"key": self.headers["authorization"], **body})
            if body["messages"][-1]["content"] == "fail":
                error = {"message": "concurrent: 1 allowed", "type": "rate_limit_error", "code": "rate_limit_exceeded"}
                self._send(429, json.dumps({"error": error}).encode())
                return
            choice = {"index": 0, "delta": {"content": f"reply {len(asked)}"}}
            chunk = {"choices": [choice], "system_fingerprint": "ab" * 32}
            self._send(200, f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode())

        def _send(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    monkeypatch.setenv("FEDLLM_API_KEY", "fedllm-of-a-tenant")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", asked=asked)
        server.shutdown()
        thread.join()


def roles(messages: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Return who said what."""
    return [(message["role"], message["content"]) for message in messages]


def test_a_question_is_answered_once(endpoint) -> None:
    """With a prompt the command ends with its answer; the key comes from the environment."""
    said = fedllm("chat", "acme/tools", "hi", "--url", endpoint.url)
    assert (said.exit_code, said.out) == (0, "reply 1\n")
    assert endpoint.asked[0]["key"] == "Bearer fedllm-of-a-tenant"
    assert "abababab" in said.err
    assert "fedllm-of-a-tenant" not in said.err


def test_a_conversation_remembers_until_the_input_ends(endpoint, monkeypatch) -> None:
    """Each question goes with all that was said before; empty lines ask nothing; the end of input is exit 0."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n  two \nthree"))
    said = fedllm("chat", "acme/tools", "--url", endpoint.url)
    assert (said.exit_code, said.out) == (0, "reply 1\nreply 2\nreply 3\n")
    assert roles(endpoint.asked[-1]["messages"]) == [
        ("user", "one"), ("assistant", "reply 1"), ("user", "two"), ("assistant", "reply 2"), ("user", "three"),
    ]  # fmt: skip


@pytest.mark.parametrize("terminal", [True, False])
def test_a_question_that_fails_ends_a_script_and_not_a_talk(endpoint, monkeypatch, terminal: bool) -> None:
    """At a terminal the error is shown and forgotten; from a pipe it is the command's."""
    lines = io.StringIO("one\nfail\ntwo\n")
    lines.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", lines)
    said = fedllm("chat", "acme/tools", "--url", endpoint.url)
    assert "concurrent: 1 allowed" in said.err
    if terminal:
        assert said.exit_code == 0
        assert roles(endpoint.asked[-1]["messages"]) == [("user", "one"), ("assistant", "reply 1"), ("user", "two")]
        assert "> " in said.err
    else:
        assert (said.exit_code, len(endpoint.asked)) == (75, 2)

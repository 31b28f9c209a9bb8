"""``fedllm serve``, ``tenant`` and ``chat``: the endpoint and who may use it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx
import typer

from fedllm import telemetry
from fedllm.cli.context import error_class, error_of, serve_settings
from fedllm.cli.output import print_json, print_line, print_table, say
from fedllm.cli.plain import Noun
from fedllm.clock import SystemClock
from fedllm.errors import AuthenticationError, ConfigError, FedllmError, NotFound, PeerUnavailable

tenants = Noun("Who may ask the endpoint, and for what.")
FILE = typer.Option(..., "--tenants", help="TOML file of tenants; keys in it are hashed.")


def register(app: typer.Typer) -> None:
    """Add the top-level commands."""
    app.command("serve")(serve)
    app.command("chat")(chat)


def serve(
    config: Path | None = typer.Option(None, help="serve.toml; flags win over it."),
    base: Path | None = typer.Option(None, help="Folder of the base model."),
    registry: str | None = typer.Option(None, help="URL of the coordinator, or a shared registry folder."),
    coordinator_key: str | None = typer.Option(None, help="Pinned key that versions must be signed with."),
    tenants_file: Path | None = typer.Option(None, "--tenants", help="TOML file of tenants."),
    host: str | None = typer.Option(None, help="Address to listen on; loopback unless told otherwise."),
    port: int | None = typer.Option(None, help="Port of the OpenAI API."),
    slots: int | None = typer.Option(None, help="Adapters held on the device at once."),
    pin_aliases: int | None = typer.Option(None, help="Aliases that keep a slot each; others load when asked for."),
    cache: str | None = typer.Option(None, help="Folder that keeps fetched adapters across restarts."),
    threads: int | None = typer.Option(None, help="CPU threads of the engine."),
    device: str | None = typer.Option(None, help="cpu or cuda."),
    dtype: str | None = typer.Option(None, help="bfloat16 or float32."),
) -> None:
    """Run the endpoint until SIGTERM: OpenAI API, batched LoRA engine, hot-load of every published version."""
    flags = {
        "base": base, "registry": registry, "coordinator_key": coordinator_key, "tenants": tenants_file,
        "host": host, "port": port, "slots": slots, "pin_aliases": pin_aliases, "cache": cache,
        "threads": threads, "device": device, "dtype": dtype,
    }  # fmt: skip
    settings, _ = serve_settings(config, flags)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    telemetry.configure(SystemClock())
    from fedllm.serving.app import run

    run(settings)


@tenants.command("add")
def add(
    name: str = typer.Argument(..., help="Name of the tenant."),
    allow: list[str] = typer.Option(..., help="Alias the tenant may use (repeat for several)."),
    operator: bool = typer.Option(False, "--operator", help="Let its key read the whole endpoint's counters."),
    file: Path = FILE,
) -> None:
    """Make a tenant; its key is printed once and stored only as a hash."""
    from fedllm.serving.tenants import create_tenant

    secret = create_tenant(file, name, allow, operator=operator)
    say(f"tenant {name} may use {', '.join(allow)}; the key below is shown once")
    print_line(secret)


@tenants.command("list")
def list_tenants(file: Path = FILE, as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List tenants and what they may use; never keys."""
    from fedllm.serving.tenants import load_tenants

    found = load_tenants(file)
    if as_json:
        print_json([{"name": t.name, "allow": list(t.allow)} for t in found])
    else:
        print_table(str(file), ("tenant", "aliases"), [(t.name, ", ".join(t.allow)) for t in found])


def chat(
    model: str = typer.Argument(..., help="Alias, alias@vN or alias@digest."),
    prompt: str = typer.Argument(..., help="What to ask."),
    url: str = typer.Option("http://127.0.0.1:8000", help="Address of the endpoint."),
    key_file: Path | None = typer.Option(None, help="File with the tenant key; else FEDLLM_API_KEY."),
    max_tokens: int = typer.Option(128, help="Tokens of the answer at most."),
) -> None:
    """Ask an endpoint from a terminal; the answer streams to stdout, the version to stderr."""
    if key_file is not None and not key_file.is_file():
        raise NotFound(f"no key file {key_file}", hint="'fedllm tenant add' prints a key, once")
    key = key_file.read_text(encoding="utf-8").strip() if key_file else os.environ.get("FEDLLM_API_KEY", "")
    if not key:
        raise AuthenticationError("no tenant key: --key-file or FEDLLM_API_KEY", hint="'fedllm tenant add' prints one")
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
        "max_tokens": max_tokens,
    }
    try:
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=body, timeout=120.0, trust_env=False,
            headers={"Authorization": f"Bearer {key}"},
        ) as answer:  # fmt: skip
            if answer.is_error:
                answer.read()
                raise error_of(answer, who="the endpoint")
            fingerprint = ""
            for line in answer.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = _chunk(line[6:])
                fingerprint = chunk.get("system_fingerprint") or fingerprint
                sys.stdout.write("".join(c["delta"].get("content") or "" for c in chunk["choices"]))
                sys.stdout.flush()
    except httpx.InvalidURL as error:
        raise ConfigError(f"--url {url!r} is no address: {error}", hint="e.g. http://127.0.0.1:8000") from None
    except httpx.TransportError as error:
        raise PeerUnavailable(f"no endpoint answers at {url} ({type(error).__name__})", hint="'fedllm serve'") from None
    print_line("")
    say(f"answered by version {fingerprint[:16]}")


def _chunk(data: str) -> dict[str, Any]:
    """Return one event of the stream, or raise the error that it carries in mid-answer."""
    try:
        chunk: dict[str, Any] = dict(json.loads(data))
        if "error" in chunk:
            kind = error_class(str(chunk["error"].get("code"))) or FedllmError
            raise kind(f"the endpoint broke off: {chunk['error']['message']}")
        return {"choices": [], **chunk}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PeerUnavailable("what answers there is no fedllm endpoint", hint="check --url") from None

"""``fedllm serve`` and ``chat``: the endpoint, and a terminal that asks it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import typer

from fedllm import telemetry
from fedllm.cli.context import error_class, error_of, serve_settings
from fedllm.cli.output import print_error, print_line, say
from fedllm.clock import SystemClock
from fedllm.errors import AuthenticationError, ConfigError, FedllmError, NotFound, PeerUnavailable


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


def chat(
    model: str = typer.Argument(..., help="Alias, alias@vN or alias@digest."),
    prompt: str | None = typer.Argument(None, help="What to ask; without it, a conversation: Ctrl-D ends it."),
    url: str = typer.Option("http://127.0.0.1:8000", help="Address of the endpoint or router."),
    key_file: Path | None = typer.Option(None, help="File with the tenant key; else FEDLLM_API_KEY."),
    max_tokens: int = typer.Option(128, help="Tokens of an answer at most."),
) -> None:
    """Ask an endpoint from a terminal; the answer streams to stdout, the version to stderr."""
    if key_file is not None and not key_file.is_file():
        raise NotFound(f"no key file {key_file}", hint="'fedllm tenant add' prints a key, once")
    key = key_file.read_text(encoding="utf-8").strip() if key_file else os.environ.get("FEDLLM_API_KEY", "")
    if not key:
        raise AuthenticationError("no tenant key: --key-file or FEDLLM_API_KEY", hint="'fedllm tenant add' prints one")

    def ask(messages: list[dict[str, str]]) -> str:
        return _ask(url, key, {"model": model, "messages": messages, "stream": True, "max_tokens": max_tokens})

    if prompt is not None:
        ask([{"role": "user", "content": prompt}])
    else:
        _converse(ask)


def _converse(ask: Callable[[list[dict[str, str]]], str]) -> None:
    """Ask one line after the other, each with all that was said before, until the input ends."""
    terminal, messages = sys.stdin.isatty(), list[dict[str, str]]()
    while True:
        if terminal:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        question = {"role": "user", "content": line.strip()}
        try:
            answer = ask([*messages, question])
        except FedllmError as error:
            if not terminal:
                raise
            print_error(error)  # what failed is not part of the conversation
        else:
            messages += [question, {"role": "assistant", "content": answer}]


def _ask(url: str, key: str, body: dict[str, Any]) -> str:
    """Stream one answer to stdout and return it."""
    parts, fingerprint = [], ""
    try:
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=body, timeout=120.0, trust_env=False,
            headers={"Authorization": f"Bearer {key}"},
        ) as answer:  # fmt: skip
            if answer.is_error:
                answer.read()
                raise error_of(answer, who="the endpoint")
            for line in answer.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = _chunk(line[6:])
                fingerprint = chunk.get("system_fingerprint") or fingerprint
                parts.append("".join(c["delta"].get("content") or "" for c in chunk["choices"]))
                sys.stdout.write(parts[-1])
                sys.stdout.flush()
    except httpx.InvalidURL as error:
        raise ConfigError(f"--url {url!r} is no address: {error}", hint="e.g. http://127.0.0.1:8000") from None
    except httpx.TransportError as error:
        raise PeerUnavailable(f"no endpoint answers at {url} ({type(error).__name__})", hint="'fedllm serve'") from None
    print_line("")
    say(f"answered by version {fingerprint[:16]}")
    return "".join(parts)


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

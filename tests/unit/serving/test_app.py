"""The endpoint as a real process: it starts on a shared folder, drains on SIGTERM, refuses a taken port."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from fedllm.clock import FakeClock
from fedllm.config import ServeSettings
from fedllm.errors import PortBusy
from fedllm.identity import SigningIdentity
from fedllm.registry.remote import HttpVersionSource
from fedllm.serving.app import open_source, run
from fedllm.serving.disk import CachingClient, DiskCache
from fedllm.serving.tenants import create_tenant

PROGRAM = """
import sys, json
from pathlib import Path
from fedllm.config import ServeSettings
from fedllm.serving.app import run
fields = json.loads(sys.argv[1])
for name in ("base", "tenants"):
    fields[name] = Path(fields[name])
run(ServeSettings(**fields))
"""


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def settings(folder: Path, tenants: Path, port: int) -> dict[str, object]:
    """Return settings whose registry does not answer: the base is served all the same."""
    return {
        "base": str(folder),
        "registry": f"http://127.0.0.1:{free_port()}",
        "coordinator_key": str(SigningIdentity.generate().public),
        "tenants": str(tenants),
        "port": port,
        "kv_blocks": 128,
        "cache": str(tenants.parent / "cache"),
        "slots": 3,
        "pin_aliases": 1,
        "slot_patience_s": 0.1,
        "memory_mb": 8,
        "cache_mb": 8,
    }


def test_sigterm_lets_a_running_stream_end(tiny_folder, tmp_path) -> None:
    """A stream that runs when SIGTERM comes gets all its tokens; then the process ends with code 0."""
    tenants, port = tmp_path / "tenants.toml", free_port()
    key = create_tenant(tenants, "acme", ["base"])
    fields = json.dumps(settings(tiny_folder, tenants, port))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, fields], env=environment)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            try:
                assert httpx.get(f"{url}/health").json()["status"] == "starting"
                break
            except httpx.TransportError:
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
        body = {"model": tiny_folder.resolve().name, "prompt": "x", "max_tokens": 300, "stream": True}
        body["ignore_eos"] = True
        headers = {"authorization": f"Bearer {key}"}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]"
        assert len(events) == 300
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def test_a_taken_port_is_named(tiny_folder, tmp_path) -> None:
    """The port is tried before the model is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        fields = settings(tiny_folder, tmp_path / "tenants.toml", port)
        paths = {"base": tiny_folder, "tenants": tmp_path / "tenants.toml"}
        with pytest.raises(PortBusy, match=f"port {port} on 127.0.0.1 is taken"):
            run(ServeSettings(**{**fields, **paths}))


def test_a_registry_over_http_has_a_tier_on_disk_if_a_folder_is_set(tmp_path) -> None:
    """The cache sits on the way to the registry; without a folder nothing is kept."""
    key = SigningIdentity.generate().public
    cache = DiskCache(tmp_path / "cache", key, max_bytes=1000)
    cached = open_source("http://127.0.0.1:1", key, FakeClock(), cache=cache)
    plain = open_source("http://127.0.0.1:1", key, FakeClock())
    assert isinstance(cached, HttpVersionSource)
    assert isinstance(plain, HttpVersionSource)
    assert isinstance(cached._client, CachingClient)
    assert cached._client.cache is cache
    assert not isinstance(plain._client, CachingClient)
    assert not (tmp_path / "cache").exists()

"""A small federation of real processes for end-to-end tests: tiny base model, four owners, one endpoint."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from fedllm.clock import SystemClock
from fedllm.demo.cluster import Cluster, command, free_ports
from fedllm.demo.recipe import FEDERATION, DemoRecipe
from fedllm.demo.run import Control, health, until_ready

CLOCK = SystemClock()
OWNERS = ("east", "north", "south", "west")
PRIVATE = {
    "privacy": True, "optimizer": "sgd", "learning_rate": 4.0, "local_steps": 2, "clip_norm": 0.05,
    "noise_multiplier": 1.0, "sample_rate": 0.5, "delta": 1e-5, "last_layers": 2, "rank": 4, "alpha": 8,
    "max_tokens": 160, "train_deadline_s": 90.0, "phase_deadline_s": 120.0, "gate_margin": 5.0,
}  # fmt: skip


@asynccontextmanager
async def running(
    base: Path, data: Mapping[str, Path], *, transport: str, limits: Mapping[str, str] | None = None, **keys: Any
) -> AsyncIterator[tuple[Cluster, Control]]:
    """Run coordinator, daemons and endpoint; nothing is left afterwards, except logs when a test failed.

    `limits` are set in every owner's policy before it starts.
    """
    root = Path(tempfile.mkdtemp(prefix="fl-"))
    federation = {**PRIVATE, "transport": "flower" if transport == "direct" else transport, **keys}
    if transport == "local":
        federation["sockets"] = {o: str(root / o / "relay" / "relay.sock") for o in data}
    cluster = Cluster(root, base, data, DemoRecipe(100.0, 1, federation))
    cluster.enrol(dict.fromkeys(data, 40))
    if transport == "direct":
        _move_to_direct(cluster)
    for owner in data:
        for limit, value in (limits or {}).items():
            command("client", "policy", "set", limit, value, "--home", cluster.owner_home(owner))
    cluster.start()
    try:
        await until_ready(cluster, CLOCK)
        yield cluster, Control(cluster)
    except BaseException:
        for log in sorted((root / "logs").glob("*.log")):
            print(f"==> {log.name}\n{log.read_text(errors='replace')[-3000:]}")  # noqa: T201
        raise
    finally:
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)


def _move_to_direct(cluster: Cluster) -> None:
    """Give a federation that was set up on Flower the direct transport, as its operator and owners would."""
    config = cluster.home / "fedllm.toml"
    text = config.read_text(encoding="utf-8").replace('transport = "flower"', 'transport = "direct"')
    config.write_text(text.replace("direct_port = 7403", f"direct_port = {free_ports(1)[0]}"), encoding="utf-8")
    for owner in cluster.data:
        command("owner", "certificate", owner, cluster.owner_home(owner) / "tls.pem", "--home", cluster.home)
    join = cluster.root / "tools.join"
    join.write_text(command("owner", "join-file", "--home", cluster.home), encoding="utf-8")
    for owner, folder in cluster.data.items():
        command("client", "join", join, "--owner", owner, "--home", cluster.owner_home(owner), "--data", folder,
                "--base", cluster.base)  # fmt: skip


async def ask_for(control: Control, rounds: int) -> None:
    """Ask the coordinator for rounds."""
    await control.post(f"/v1/federations/{FEDERATION}/rounds", {"rounds": rounds})


async def rounds_of(control: Control) -> list[dict[str, Any]]:
    """Return all rounds, oldest first."""
    found: list[dict[str, Any]] = (await control.get(f"/v1/federations/{FEDERATION}/rounds"))["rounds"]
    return sorted(found, key=lambda r: r["number"])


async def until(
    control: Control, holds: Callable[[list[dict[str, Any]]], bool], within_s: float
) -> list[dict[str, Any]]:
    """Poll the rounds until `holds`; fail after `within_s` seconds with what was last seen."""
    end = CLOCK.monotonic() + within_s
    seen: list[dict[str, Any]] = []
    while CLOCK.monotonic() < end:
        try:
            seen = await rounds_of(control)
        except (OSError, httpx.HTTPError):  # it is being restarted
            seen = []
        if seen and holds(seen):
            return seen
        await asyncio.sleep(0.05)
    raise AssertionError(
        f"not within {within_s} s; last seen: {[(r['number'], r['state'], r['reason']) for r in seen]}"
    )


def ended(number: int) -> Callable[[list[dict[str, Any]]], bool]:
    """Return a condition: round `number` has ended, well or not."""
    return lambda rounds: any(r["number"] == number and r["ended"] is not None for r in rounds)


def in_state(number: int, *states: str) -> Callable[[list[dict[str, Any]]], bool]:
    """Return a condition: round `number` is in one of the states."""
    return lambda rounds: any(r["number"] == number and r["state"] in states for r in rounds)


def kill(cluster: Cluster, name: str) -> None:
    """SIGKILL a process as a crash would."""
    cluster.processes[name].kill()


def live_processes(root: Path) -> list[int]:
    """Return pids whose command line names `root`; must be empty after a stop."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                text = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(root) in text:
                found.append(int(entry.name))
    return found


__all__ = ["health"]

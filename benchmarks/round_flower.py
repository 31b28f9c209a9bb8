"""Flower's own systems of a round: a real SuperLink, four SuperNodes, one run of an app in ``flower_peers``."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.round_updates import OWNERS, read_records
from fedllm.demo.cluster import free_ports
from fedllm.errors import ProcessDied
from fedllm.relay.flower import flower_environment, flower_program
from fedllm.relay.processes import Supervised

ROOT = Path(__file__).parents[1]
EXCHANGES = {"secagg": 4, "fedavg": 1}
"""Of one round, by peer: each waits for all owners."""
LIMIT_S = 1500.0
_CONNECTION = "bench"
_TAIL = 3000


def run_peer(name: str, dim: int, rounds: int) -> list[dict[str, Any]]:
    """Run a peer of `EXCHANGES` and return its rounds as its recorder wrote them.

    Raises
    ------
    ProcessDied
        If the run ended without all its rounds; carries the end of its log.
    """
    with scratch("fp-") as root:
        app = root / "app"
        shutil.copytree(ROOT / "benchmarks" / "flower_peers" / name, app, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "LICENSE", app)
        link, *nodes = free_ports(1 + OWNERS)
        environ = _environment(root, link)
        settings = f"records={json.dumps(str(root))} dim={dim} rounds={rounds}"
        superlink = Supervised("superlink", [
            flower_program("flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(link),
            "--database", str(root / "superlink.db"), "--disable-runtime-dependency-installation",
        ], env=environ, log=root / "superlink.log", cwd=root)  # fmt: skip
        supernodes = [
            Supervised(f"supernode{i}", [
                flower_program("flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{link}",
                "--host", "127.0.0.1", "--port", str(port),
                "--node-config", f"partition-id={i} num-partitions={OWNERS}",
            ], env=environ, log=root / f"supernode{i}.log", cwd=root)
            for i, port in enumerate(nodes)
        ]  # fmt: skip
        submit = [flower_program("flwr"), "run", str(app), _CONNECTION, "--stream", "-c", settings]
        run = Supervised("run", submit, env=environ, log=root / "run.log", cwd=root)
        with running([superlink]):
            _wait_listening(link, superlink, root)
            with running([*supernodes, run]):
                wait_for_rounds(root, rounds, [*supernodes, superlink, run], LIMIT_S)
        return read_records(root)


def _environment(root: Path, link: int) -> dict[str, str]:
    """Return fedllm's own settings for Flower's processes, faster polls included: they help both alike."""
    environ = flower_environment(os.environ, root / "flwr")
    connection = f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
    connection += f'address = "127.0.0.1:{link}"\ninsecure = true\n'
    (root / "flwr" / "config.toml").write_text(connection, encoding="utf-8")
    return {**environ, "PYTHONPATH": str(ROOT)}


@contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """Make a folder, short because unix socket paths are, and remove it at the end."""
    root = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextmanager
def running(processes: list[Supervised]) -> Iterator[None]:
    """Start processes; whatever happens, none of them is left."""
    try:
        for process in processes:
            process.start()
        yield
    finally:
        # all at once: each takes its grace period, and there are several of them
        with ThreadPoolExecutor(max_workers=len(processes)) as pool:
            list(pool.map(Supervised.terminate, processes))


def wait_for_rounds(folder: Path, rounds: int, processes: list[Supervised], limit_s: float) -> None:
    """Return once the recorder in `folder` has written `rounds` rounds.

    A process's log lies beside, by its name; that of the last process is shown when time is over.

    Raises
    ------
    ProcessDied
        If a process ends before, or they take longer than `limit_s`.
    """
    end_s = time.monotonic() + limit_s
    while len(read_records(folder)) < rounds:
        gone = [process.name for process in processes if not process.alive()]
        if gone and len(read_records(folder)) < rounds:
            raise ProcessDied(f"{gone[-1]} ended before its rounds did; the end of its log:\n{_tail(folder, gone[-1])}")
        if time.monotonic() > end_s:
            last = processes[-1].name
            raise ProcessDied(f"not done after {limit_s:g} s; the end of the log of {last}:\n{_tail(folder, last)}")
        time.sleep(0.2)


def _wait_listening(port: int, process: Supervised, folder: Path) -> None:
    """Wait for the SuperLink: nodes that come before it try again after long pauses."""
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if not process.alive():
            raise ProcessDied(f"{process.name} ended at once; the end of its log:\n{_tail(folder, process.name)}")
        time.sleep(0.2)


def _tail(folder: Path, name: str) -> str:
    log = folder / f"{name}.log"
    return log.read_text(encoding="utf-8", errors="replace")[-_TAIL:] if log.is_file() else "(none)"

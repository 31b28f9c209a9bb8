"""The demo's processes: one coordinator, four owners' daemons, one endpoint, set up as their people would.

Everything is done with the command line and files, in a folder of its own, on loopback and free ports.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedllm.demo.recipe import ALIAS, DELTA, FEDERATION, TENANT, DemoRecipe
from fedllm.errors import ProcessDied
from fedllm.relay.processes import Supervised

_CLI = (sys.executable, "-m", "fedllm")


def free_ports(count: int) -> list[int]:
    """Return loopback ports that are free now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def command(*arguments: str | Path, environ: Mapping[str, str] | None = None) -> str:
    """Run one ``fedllm`` command; return its stdout, or raise what it said.

    Raises
    ------
    ProcessDied
        If it exits with anything but 0; carries its stderr.
    """
    argv = [*_CLI, *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ, **(environ or {})})
    if done.returncode:
        raise ProcessDied(f"'fedllm {arguments[0]} {arguments[1]}' ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()


def toml_value(value: object) -> str:
    """Return a number, string, boolean or flat table as TOML."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {json.dumps(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


@dataclass
class Cluster:
    """Folders, ports and processes of one demo.

    Parameters
    ----------
    root : Path
        Folder of everything; short, because unix socket paths are.
    base : Path
        The base model.
    data : Mapping[str, Path]
        Owner to folder of ``train.jsonl`` and ``heldout.jsonl``.
    recipe : DemoRecipe
    """

    root: Path
    base: Path
    data: Mapping[str, Path]
    recipe: DemoRecipe
    processes: dict[str, Supervised] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Choose ports."""
        ports = free_ports(3 + len(self.data))
        self.api_port, self.flower_port, self.serve_port, *node_ports = ports
        self.node_ports = dict(zip(self.data, node_ports, strict=True))

    @property
    def home(self) -> Path:
        """The coordinator's folder."""
        return self.root / "coordinator"

    @property
    def endpoint(self) -> str:
        """URL of the endpoint."""
        return f"http://127.0.0.1:{self.serve_port}"

    def owner_home(self, owner: str) -> Path:
        """Return an owner's folder."""
        return self.root / owner

    def enrol(self, records: Mapping[str, int]) -> None:
        """Make keys, roster, join files, policies: what operator and owners do once, by hand."""
        key = command("init", self.home, "--federation", FEDERATION, "--base", self.base, "--alias", ALIAS,
                      "--port", str(self.api_port), "--flower-port", str(self.flower_port))  # fmt: skip
        self._configure()
        for owner in self.data:
            public = command("client", "key", "--home", self.owner_home(owner))
            command("owner", "add", owner, public, "--records", str(records[owner]), "--home", self.home)
        join = self.root / "tools.join"
        join.write_text(command("owner", "join-file", "--home", self.home), encoding="utf-8")
        threads = max(1, (os.cpu_count() or 1) // len(self.data))
        limits = ["--max-epsilon", str(self.recipe.epsilon), "--delta", str(DELTA)]
        for owner, folder in self.data.items():
            command("client", "join", join, "--owner", owner, "--home", self.owner_home(owner), "--data", folder,
                    "--base", self.base, "--threads", str(threads), "--node-port", str(self.node_ports[owner]),
                    *(["--allow-without-dp"] if self.recipe.epsilon is None else limits))  # fmt: skip
        secret = command(
            "tenant", "add", TENANT, "--allow", ALIAS, "--allow", "base", "--tenants", self.root / "tenants.toml"
        )
        (self.root / "tenant.key").write_text(secret, encoding="utf-8")
        self.coordinator_key = key.splitlines()[-1]
        self.tenant_key = secret.splitlines()[-1]

    def _configure(self) -> None:
        path = self.home / "fedllm.toml"
        keys = "\n".join(f"{name} = {toml_value(value)}" for name, value in self.recipe.federation.items())
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(f'alias = "{ALIAS}"\n', f'alias = "{ALIAS}"\n{keys}\n'), encoding="utf-8")

    def start(self) -> None:
        """Start every process; they come up at their own pace."""
        self.start_process("coordinator", "coordinator", "start", "--home", str(self.home))
        for owner in self.data:
            self.start_process(owner, "client", "start", "--home", str(self.owner_home(owner)))
        self.start_process("endpoint", *self.endpoint_arguments())

    def endpoint_arguments(self) -> list[str]:
        """Return the command that starts the endpoint."""
        return [
            "serve", "--base", str(self.base), "--registry", f"http://127.0.0.1:{self.api_port}",
            "--coordinator-key", self.coordinator_key, "--tenants", str(self.root / "tenants.toml"),
            "--port", str(self.serve_port), "--threads", "1",
        ]  # fmt: skip

    def start_process(self, name: str, *arguments: str) -> None:
        """Start one ``fedllm`` program, its log in ``<root>/logs/<name>.log``."""
        (self.root / "logs").mkdir(exist_ok=True)
        environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.processes[name] = Supervised(
            name, [*_CLI, *arguments], env=environ, log=self.root / "logs" / f"{name}.log"
        )
        self.processes[name].start()

    def check_alive(self) -> None:
        """Raise `ProcessDied` with the end of its log if a process is gone."""
        for name, process in self.processes.items():
            if not process.alive():
                log = self.root / "logs" / f"{name}.log"
                tail = log.read_text(encoding="utf-8", errors="replace")[-2000:] if log.exists() else ""
                raise ProcessDied(f"{name} ended on its own; the end of its log:\n{tail}", hint=str(log))

    def stop(self) -> None:
        """End every process and everything they started."""
        # All at once: an owner in the middle of a step takes its grace period, and there are several of them.
        with ThreadPoolExecutor(max_workers=max(1, len(self.processes))) as pool:
            list(pool.map(lambda process: process.terminate(), self.processes.values()))

    def rounds_of(self, owner: str) -> list[dict[str, Any]]:
        """Return an owner's private record of its rounds; the demo plays every part, so it may look."""
        path = self.owner_home(owner) / "rounds.jsonl"
        if not path.is_file():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def spent(self, owner: str) -> dict[str, Any]:
        """Return what the owner's ledger of record says."""
        answer: dict[str, Any] = json.loads(command("privacy", "show", "--home", self.owner_home(owner), "--json"))
        return answer


@contextmanager
def running(cluster: Cluster) -> Iterator[Cluster]:
    """Run a cluster; whatever happens, nothing of it is left running."""
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()

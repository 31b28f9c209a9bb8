"""fedllm's systems of a round: one real coordinator and four real daemons on one transport, each a process tree."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.round_federation import enrol
from benchmarks.round_flower import ROOT, running, scratch, wait_for_rounds
from benchmarks.round_updates import OWNERS, read_records
from fedllm.demo.cluster import free_ports
from fedllm.relay.processes import Supervised

LIMIT_S = 900.0


def run_ours(transport: str, dim: int, rounds: int) -> list[dict[str, Any]]:
    """Run a federation over ``flower`` or ``direct`` and return its rounds as its recorder wrote them.

    Raises
    ------
    ProcessDied
        If a process ended, or the rounds took too long; carries the end of its log.
    """
    with scratch("fo-") as root:
        enrol(root)
        port, *node_ports = free_ports(1 + OWNERS)
        processes = [
            _process(root, transport, "owner", i, "--address", f"127.0.0.1:{port}", "--node-port", node_port)
            for i, node_port in enumerate(node_ports)
        ]
        processes.append(_process(root, transport, "coordinator", "--port", port, "--dim", dim, "--rounds", rounds))
        with running(processes):
            wait_for_rounds(root, rounds, processes, LIMIT_S)
        return read_records(root)


def _process(root: Path, transport: str, role: str, *arguments: object) -> Supervised:
    name = f"{role}{arguments[0]}" if role == "owner" else role
    command = [sys.executable, "-m", f"benchmarks.round_{role}", str(root), *map(str, arguments)]
    environ = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    return Supervised(name, [*command, "--transport", transport], env=environ, log=root / f"{name}.log", cwd=root)

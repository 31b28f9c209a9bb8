"""The owner's side of a carrier, confined: a SuperNode and the warm start of its apps, or one process that dials."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from fedllm.relay.flower import flower_environment, flower_program, supernode_command
from fedllm.relay.processes import Supervised
from fedllm.relay.tls import CERTIFICATE_FILE, KEY_FILE, Certificate, TlsIdentity, write_private
from fedllm.relay.warm import PROGRAM, install

_DIAL = Path(__file__).with_name("dial.py")
Confine = Callable[[list[str]], list[str]]
"""Wraps a command so that it runs with less access."""


def programs_dir(run_dir: Path) -> Path:
    """Return the folder of the programs that `owner_processes` installs: to be read, never written, by them."""
    return run_dir.with_name(f"{run_dir.name}-bin")


def owner_processes(
    run_dir: Path,
    *,
    superlink: str,
    port: int,
    daemon_socket: Path,
    environ: Mapping[str, str],
    log: Path,
    confine: Confine,
) -> tuple[Supervised, ...]:
    """Return the processes to keep running at an owner, none of them started.

    Parameters
    ----------
    run_dir : Path
        All that these processes may write; made if missing.
    superlink : str
        ``host:port`` of the federation's SuperLink.
    port : int
        Loopback port for the SuperNode's own processes.
    daemon_socket : Path
        Where the daemon is reached.
    environ : Mapping[str, str]
        What they inherit; nothing private should be in it.
    log : Path
    confine : Confine
    """
    scratch = run_dir / "tmp"
    scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
    flower = flower_environment({**environ, "TMPDIR": str(scratch)}, run_dir)
    programs = programs_dir(run_dir)
    host = install(programs, run_dir, sys.executable, flower_program(PROGRAM))
    flower["PATH"] = f"{programs}{os.pathsep}{flower['PATH']}"
    commands = {"app host": host, "supernode": supernode_command(superlink, port, daemon_socket)}
    return tuple(
        Supervised(name, confine(command), env=flower, log=log, cwd=run_dir) for name, command in commands.items()
    )


def dial_process(
    run_dir: Path,
    *,
    address: str,
    identity: TlsIdentity,
    coordinator: Certificate,
    daemon_socket: Path,
    environ: Mapping[str, str],
    log: Path,
    confine: Confine,
) -> Supervised:
    """Return the process that keeps an owner's stream to the coordinator; not started.

    Parameters
    ----------
    run_dir : Path
        Where it runs; it has no need to write there. Program, key and certificates go into `programs_dir`.
    address : str
        ``host:port`` of the coordinator.
    identity : TlsIdentity
        This owner's, for TLS only.
    coordinator : Certificate
        The one that is pinned.
    daemon_socket : Path
        Where the daemon is reached.
    environ, log, confine
        As in `owner_processes`.
    """
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    programs = programs_dir(run_dir)
    shutil.rmtree(programs, ignore_errors=True)
    programs.mkdir(mode=0o700)
    script = programs / _DIAL.name
    script.write_bytes(_DIAL.read_bytes())
    write_private(programs / KEY_FILE, identity.key_pem)
    write_private(programs / CERTIFICATE_FILE, identity.certificate.pem)
    write_private(programs / "coordinator.pem", coordinator.pem)
    command = [
        sys.executable, "-I", str(script), "--address", address, "--name", coordinator.name, "--tls", str(programs),
        "--socket", str(daemon_socket),
    ]  # fmt: skip
    environ = {**environ, "GRPC_VERBOSITY": "NONE", "PYTHONUNBUFFERED": "1"}  # its own words are in the log
    return Supervised("dialler", confine(command), env=environ, log=log, cwd=run_dir)

"""The warm start: the same program with the same arguments, only sooner; and never less than the cold one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import PATIENCE_S

from fedllm.relay import warm

# a host whose entry point notes its arguments and exits, as Flower's does
HOST = """
import pathlib, sys
from fedllm.relay.warm import serve
def entry():
    pathlib.Path(sys.argv[1]).write_text(f'{sys.argv[0]} {sys.argv[2:]}')
    sys.exit(3)
serve(pathlib.Path(sys.argv[1]), entry)
"""


@pytest.fixture
def fallback(tmp_path: Path) -> Path:
    """Return a stand-in for Flower's own program."""
    program = tmp_path / "cold"
    program.write_text('#!/bin/sh\necho cold "$@" > "$1"\n')
    program.chmod(0o700)
    return program


@pytest.fixture
def launcher(tmp_path: Path, fallback: Path) -> Path:
    """Return the launcher that lies first in the SuperNode's PATH."""
    (tmp_path / "run").mkdir(exist_ok=True)
    warm.install(tmp_path / "bin", tmp_path / "run", sys.executable, str(fallback))
    return tmp_path / "bin" / warm.PROGRAM


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Path]:
    """Run a host; yields its socket."""
    path = tmp_path / "run" / warm.SOCKET
    path.parent.mkdir(exist_ok=True)
    with subprocess.Popen([sys.executable, "-c", HOST, str(path)]) as running:
        while not path.exists():
            time.sleep(0.02)
        yield path
        running.kill()


def _written(path: Path) -> str:
    until_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < until_s:
        if path.exists() and path.read_text():
            return path.read_text().strip()
        time.sleep(0.02)
    raise AssertionError("nothing was written")


def test_without_a_host_flowers_own_program_runs(tmp_path: Path, launcher: Path) -> None:
    """A warm start is never needed."""
    done = subprocess.run([launcher, str(tmp_path / "out"), "--token", "a b"], check=False, timeout=PATIENCE_S)
    assert done.returncode == 0
    assert _written(tmp_path / "out") == f"cold {tmp_path / 'out'} --token a b"


def test_the_host_runs_the_entry_point_with_the_arguments_in_a_fork(tmp_path: Path, launcher: Path, host: Path) -> None:
    """Each launch is a process of its own; the host survives what it runs."""
    for name in ("one", "two"):
        done = subprocess.run([launcher, str(tmp_path / name), "--token", "a b"], check=False, timeout=PATIENCE_S)
        assert done.returncode == 0
        assert _written(tmp_path / name) == f"{warm.PROGRAM} ['--token', 'a b']"
    assert host.stat().st_mode & 0o077 == 0


def test_flowers_entry_point_is_where_the_host_looks_for_it() -> None:
    """The one name of Flower's that this relies on is its console script."""
    pytest.importorskip("flwr")
    from importlib.metadata import entry_points

    (program,) = entry_points(group="console_scripts", name=warm.PROGRAM)
    assert program.value
    assert os.access(Path(sys.executable).parent / warm.PROGRAM, os.X_OK)

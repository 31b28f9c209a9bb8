"""What a confined process can still do, and what it cannot."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE_S

from fedllm.client.sandbox import EXIT_UNRESTRICTED, confined, probe, python_reads

needs_landlock = pytest.mark.skipif(probe().kind != "landlock", reason="this kernel has no Landlock")


def _run(code: str, *arguments: str | Path, write: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", code, *map(str, arguments)]
    command = confined(argv, read=python_reads(), write=[write])
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=write, timeout=PATIENCE_S)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Return the one folder that the child may write."""
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@needs_landlock
def test_a_confined_child_cannot_read_a_key(tmp_path: Path, run_dir: Path) -> None:
    """Opening a file outside its folders fails, whatever its mode says."""
    key = tmp_path / "owner.pem"
    key.write_text("secret")
    open_it = "import sys; print(open(sys.argv[1]).read())"
    inside = run_dir / "own.txt"
    inside.write_text("mine")
    denied, allowed = _run(open_it, key, write=run_dir), _run(open_it, inside, write=run_dir)
    assert denied.returncode == 1
    assert "PermissionError" in denied.stderr
    assert "secret" not in denied.stdout
    assert (allowed.returncode, allowed.stdout.strip()) == (0, "mine")


@needs_landlock
def test_a_confined_child_cannot_list_or_write_next_to_its_folder(tmp_path: Path, run_dir: Path) -> None:
    """Names of data files are private too, and nothing can be planted beside the key."""
    lists = _run("import os, sys; os.listdir(sys.argv[1])", tmp_path, write=run_dir)
    writes = _run("import sys; open(sys.argv[1], 'w')", tmp_path / "planted", write=run_dir)
    assert "PermissionError" in lists.stderr
    assert "PermissionError" in writes.stderr
    assert not (tmp_path / "planted").exists()


@needs_landlock
def test_restrictions_pass_to_grandchildren(tmp_path: Path, run_dir: Path) -> None:
    """The SuperNode starts a process per message: each is as confined as it is."""
    key = tmp_path / "owner.pem"
    key.write_text("secret")
    code = "import subprocess, sys; sys.exit(subprocess.run(['cat', sys.argv[1]], capture_output=True).returncode)"
    assert _run(code, key, write=run_dir).returncode != 0


@needs_landlock
def test_a_confined_child_reaches_the_daemons_socket(tmp_path: Path, run_dir: Path) -> None:
    """The one thing it is there for still works: connecting to the socket and writing in its own folder."""
    path = tmp_path / "relay.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        code = (
            "import socket, sys, pathlib\n"
            "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
            "pathlib.Path('x').write_text('y'); print('connected')"
        )
        done = _run(code, path, write=run_dir)
    assert (done.returncode, done.stdout.strip()) == (0, "connected"), done.stderr


@needs_landlock
def test_a_program_that_does_not_exist_is_not_taken_for_a_started_one(run_dir: Path) -> None:
    """The launcher fails with its own code and a sentence."""
    command = confined(["/no/such/program"], read=python_reads(), write=[run_dir])
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == EXIT_UNRESTRICTED
    assert "not started" in done.stderr


def test_data_inside_a_folder_everybody_reads_is_reported(tmp_path: Path) -> None:
    """Isolation that could not hold is not claimed."""
    isolation = probe([tmp_path / "home"], reads=[tmp_path])
    assert isolation.kind == "none"
    assert isolation.why

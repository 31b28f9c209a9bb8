"""The tests of the Triton kernels, in Triton's interpreter, each file in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from unit.kernels.interpreter import with_loops

FILES = sorted(Path(__file__).parent.glob("test_triton_*.py"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU, in this process")
@with_loops
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file: Path) -> None:
    """Every test of the file passes, and there is one."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(file)]
    done = subprocess.run(
        command,
        env=env | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout

"""The Triton kernels compile for a GPU, on a machine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_the_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """Down to machine code, as they are launched: wide loads in decode, tensor cores in prefill, atomics in none."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_child.py"))],
        env=env | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["decode"] == {"_shrink": ["wide load"], "_expand": ["wide load"]}
    assert "tensor core" in found["prefill"]["_shrink"]
    assert "tensor core" in found["prefill"]["_expand"]
    assert not any("atomic" in codes for kernels in found.values() for codes in kernels.values())

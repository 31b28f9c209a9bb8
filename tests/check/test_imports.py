"""What an import may cost."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "flwr", "transformers", "peft", "opacus", "dp_accounting", "sqlalchemy", "fastapi")


@pytest.mark.parametrize("module", ["fedllm", "fedllm.cli", "fedllm.config", "fedllm.messages.round"])
def test_import_is_lean(module: str) -> None:
    """`import fedllm` and the command line load neither torch nor flwr nor any other heavy package."""
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

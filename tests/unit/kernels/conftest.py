"""Where Triton's tests run.

Triton reads ``TRITON_INTERPRET`` when it is imported, and torch imports Triton: in a process of many tests it is
too late to set, and left behind it would reach others. ``test_interpreted.py`` therefore runs every
``test_triton_*.py`` in a process of its own; on a GPU they are collected like any other. By hand:
``TRITON_INTERPRET=1 python -m pytest tests/unit/kernels/test_triton_decode.py``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedllm.kernels import triton_plan

# Opacus installs a package that is also called ``benchmarks``; ours, at the project's root, goes first.
sys.path.insert(0, str(Path(__file__).parents[3]))

here = os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
collect_ignore_glob = [] if here else ["test_triton_*.py"]


@pytest.fixture(scope="module")
def nan_workspace() -> Iterator[None]:
    """Unset memory for partial sums is NaN."""
    from unit.kernels import triton_scene

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_plan, "workspace", triton_scene.unset_is_nan)
        yield

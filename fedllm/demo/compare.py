"""Each owner's own adapter, as many at a time as there are cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedllm.demo.recipe import DemoRecipe
from fedllm.errors import ProcessDied


def train_all_alone(data: Mapping[str, Path], base: Path, recipe: DemoRecipe) -> dict[str, tuple[float, float]]:
    """Train and score every owner's own adapter; return owner to (loss at home, mean loss everywhere)."""
    workers = min(len(data), os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="fedllm-alone-") as folder, ThreadPoolExecutor(workers) as pool:
        rows = pool.map(lambda owner: _train(owner, data, base, recipe, Path(folder)), data)
        losses = dict(zip(data, rows, strict=True))
    return {owner: (row[owner], sum(row.values()) / len(row)) for owner, row in losses.items()}


def _train(owner: str, data: Mapping[str, Path], base: Path, recipe: DemoRecipe, folder: Path) -> dict[str, float]:
    task = folder / f"{owner}.json"
    task.write_text(
        json.dumps({
            "owner": owner, "data": {o: str(p) for o, p in data.items()}, "base": str(base),
            "keys": recipe.federation, "rounds": recipe.rounds, "threads": 1,
        })
    )  # fmt: skip
    argv = [sys.executable, "-m", "fedllm.demo.alone", str(task)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ProcessDied(f"training {owner} alone ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    losses: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return losses

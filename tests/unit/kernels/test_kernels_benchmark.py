"""The kernels' benchmark: its gate can fail, its floor is right, and without a GPU it says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from unit.kernels.interpreter import with_loops

from benchmarks import kernels
from benchmarks.document import NOT_MEASURED, GateFailed
from benchmarks.kernels_mixes import MIXES, Scene, mix
from benchmarks.kernels_peers import find_peers, plain_torch

CASE = kernels.Case(5, 4, 16, "uniform")


def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """The status says so, and the document has no figure."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert kernels.main(["--json"]) == NOT_MEASURED
    found = json.loads(capsys.readouterr().out)
    assert found["gate"] is None
    assert found["error"].startswith("not measured: no CUDA device")
    assert "timings" not in found


@with_loops
def test_the_interpreter_runs_the_gates() -> None:
    """One small case of each popularity agrees with the specification; times stay unmeasured."""
    code = (
        "import sys; from benchmarks import kernels; kernels.INTERPRETED = ((2,), (8,), (32,), kernels.POPULARITIES);"
        "sys.exit(kernels.main(['--interpret', '--json']))"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["gate"] is True
    assert found["cases"] == 4
    assert found["timings"] == kernels.NO_GPU
    assert set(found["max_rel_error"]) == {"fedllm", "torch"}
    assert "not measured" in "".join(str(c) for column in kernels.table(found).columns for c in column.cells)


def doing_nothing(_: Scene) -> Callable[[], None]:
    """Return a step that adds nothing."""
    return lambda: None


def test_a_wrong_provider_fails_the_gate() -> None:
    """A step that leaves the base output as it is, is not timed."""
    assert kernels.gate(CASE, {"torch": plain_torch}, torch.float32, "cpu")["torch"] < 1e-5
    with pytest.raises(GateFailed, match=r"idle is off by .* in Case\(batch=5"):
        kernels.gate(CASE, {"idle": doing_nothing}, torch.float32, "cpu")


def test_floor_of_one_layer_by_hand() -> None:
    """32 rows on 32 adapters of rank 16 of a 4096-wide group: A is 12.6 MB, B 6.3 MB, inputs and outputs 1 MB."""
    case = kernels.Case(32, 16, 4096, "distinct")
    a = 32 * 3 * 16 * 4096 * 2
    b = 32 * 16 * (4096 + 1024 + 1024) * 2
    inputs, outputs = 32 * 4096 * 2, 2 * 32 * 6144 * 2
    assert kernels.floor_bytes(case, 32, 2) == a + b + inputs + outputs


@pytest.mark.parametrize("name", MIXES)
def test_mixes_are_what_they_are_called(name: str) -> None:
    """One adapter, as many as rows, drawn ones, ones with a favourite; with and without the base."""
    slots = mix(name, 64, 64)
    live, most = len(set(slots)), max(slots.count(slot) for slot in slots)
    assert len(slots) == 64
    assert all(-1 <= slot < 64 for slot in slots)
    assert {"identical": live == 1, "distinct": live == 64, "skewed": most > 16}.get(name, True)
    assert (-1 in slots) == name.endswith("base")


def test_a_peer_that_is_not_there_is_said_to_be_unmeasured() -> None:
    """Every peer is either found or has a reason."""
    found, missing = find_peers()
    assert set(found) | set(missing) == {"vllm", "sglang"}
    assert all(reason.startswith("not measured: ") for reason in missing.values())

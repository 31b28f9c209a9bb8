"""Compiles the Triton kernels for a GPU that need not be there, from the launches of `apply`; prints JSON.

Run by ``test_compiles.py`` in a process of its own, which has no interpreter.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[3]))

from benchmarks.kernels_mixes import filled_stack, scene
from fedllm.kernels import PlanBuffers, triton_decode, triton_prefill, tuning

CODES = {"wide load": r"ld\.global\.v4", "tensor core": r"\bw?g?mma\.", "atomic": r"\b(atom|red)\."}
HOPPER = SimpleNamespace(
    get_current_device=lambda: 0,
    get_current_stream=lambda _: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
)
ptx: dict[str, str] = {}
launch = JITFunction.run


def compile_only(kernel: JITFunction, *args, warmup: bool, **kwargs) -> None:
    """Do all that a launch does, but for the launch."""
    if "UPCAST" in kwargs:
        kwargs["UPCAST"] = False  # as on a GPU
    ptx[kernel.__name__] = launch(kernel, *args, warmup=True, **kwargs).asm["ptx"]


def compiled(module: ModuleType, way: tuning.Way) -> dict[str, list[str]]:
    """Return, for each kernel of a module, which of some instructions its code has."""
    ptx.clear()
    batch = scene([0, 1] * 16, filled_stack((16, 16), 16, 1024, (1024, 256, 256), torch.bfloat16))
    plan = PlanBuffers(32, 2, device="cpu").plan(batch.segments, way=way)
    module.apply(batch.y_TO, batch.x_TD, batch.stack, plan)
    return {name: [code for code, pattern in CODES.items() if re.search(pattern, text)] for name, text in ptx.items()}


if __name__ == "__main__":
    driver.set_active(HOPPER)
    JITFunction.run = compile_only
    found = {"decode": compiled(triton_decode, "decode"), "prefill": compiled(triton_prefill, "prefill")}
    sys.stdout.write(json.dumps(found))

"""One step of DP-SGD next to one plain step of the same LoRA, and to the same step of Opacus' own optimiser.

The product's own functions are timed, hooks, clipping, noise and assignment included. Batch 4, 64 tokens a record,
float32, one thread, LoRA r=8 on q and v of every layer; steps of the providers take turns and medians are compared.
The gate comes first: each record's gradient must be the one that plain autograd gives for that record alone.
"""

from __future__ import annotations

import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn

from benchmarks.document import Document, check, model_folder, parser, rounded, run
from fedllm.adapter import AdapterSpec, AdapterState
from fedllm.client import dpsgd
from fedllm.client.dataset import Example, Unit
from fedllm.client.model import LoraModel
from fedllm.client.train import train_plain
from fedllm.ids import sha256
from fedllm.messages.mechanism import RELATION_ADD_REMOVE, UNIT_RECORD, Mechanism
from fedllm.messages.plan import Recipe
from fedllm.rng import OsRng, SeededRng, uniform_floats

BATCH, TOKENS, RANK = 4, 64, 8
GATE_LENGTHS = (64, 57, 40, 23)
"""Of different lengths: records of one length are never padded, and then even a padding mistake agrees."""
MAX_REL_ERROR = 1e-3
CLIP_NORM = 1.0
NOISE = 1.0
RATE = 1e-4
"""Learning rate: small, so that repetitions see about the same model."""
BASE = sha256(b"benchmarks.dp_step")


def make_model() -> LoraModel:
    """Return the real base model in float32 with an adapter whose B is not zero, so that A has gradients, too."""
    model = LoraModel(model_folder(), BASE)
    model._causal.float()  # the gate compares exact sums, and the document says float32 on every machine
    config = model._causal.config
    head_dim = config.hidden_size // config.num_attention_heads
    shapes = {
        "q_proj": (config.num_attention_heads * head_dim, config.hidden_size),
        "v_proj": (config.num_key_value_heads * head_dim, config.hidden_size),
    }
    spec = AdapterSpec(BASE, RANK, 2 * RANK, shapes, tuple(range(config.num_hidden_layers)))
    state = AdapterState.initial(spec, SeededRng("start"))
    layout = spec.layout(("B",))
    flat = (uniform_floats(SeededRng("b"), layout.size) - 0.5).astype(np.float32) * 0.05
    model.load_state(state.replace(layout.unflatten(flat)))
    return model


def make_examples(vocabulary: int, lengths: Sequence[int]) -> list[Example]:
    """Return random records of the given lengths, loss on every token."""
    draw = np.random.default_rng(3)
    rows = [tuple(int(t) for t in draw.integers(0, vocabulary, length)) for length in lengths]
    return [Example(row, row) for row in rows]


def gate(model: LoraModel, parameters: Sequence[nn.Parameter], examples: Sequence[Example]) -> float:
    """Return the largest relative error of a record's gradient against one-by-one autograd of HF's own loss.

    Raises
    ------
    GateFailed
        If it is not below `MAX_REL_ERROR`.
    """
    with dpsgd._per_record(model) as upper:
        found = dpsgd.record_gradients(model, upper, parameters, examples)
    errors: list[float] = []
    for row, example in enumerate(examples):
        loss = model._causal(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])).loss
        gradients = torch.autograd.grad(loss, list(parameters))
        expected = torch.cat([gradient.ravel() for gradient in gradients]).double().numpy()
        errors.append(float(np.linalg.norm(found[row] - expected) / np.linalg.norm(expected)))
    worst = float(np.max(errors))  # keeps a NaN, which Python's max may drop
    check(worst < MAX_REL_ERROR, f"a record's gradient is {worst:.2e} off its own autograd, {MAX_REL_ERROR} allowed")
    return worst


def _silent(done: int, total: int) -> None:
    """Report no progress."""


def plain_step(model: LoraModel, parameters: Sequence[nn.Parameter], examples: Sequence[Example]) -> None:
    """Take one step without privacy."""
    recipe = Recipe("sgd", RATE, 1, BATCH, BATCH, TOKENS)
    train_plain(model, parameters, examples, recipe, OsRng(), _silent)


def private_step(model: LoraModel, parameters: Sequence[nn.Parameter], examples: Sequence[Example]) -> None:
    """Take one step of DP-SGD on every record, each a unit of its own."""
    recipe = Recipe("sgd", RATE, 1, BATCH, BATCH, TOKENS)
    mechanism = Mechanism("dp-sgd", UNIT_RECORD, RELATION_ADD_REMOVE, NOISE, CLIP_NORM, 1.0, 1, 1e-5)
    units = [Unit((example,)) for example in examples]
    dpsgd.train_private(model, parameters, units, recipe, mechanism, BATCH, OsRng(), _silent)


def opacus_step(model: LoraModel, parameters: Sequence[nn.Parameter], examples: Sequence[Example]) -> None:
    """Take the same step with Opacus' `DPOptimizer`: its clipping and its (not cryptographic) noise."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model.train_mode(True)
    hooked: Any = GradSampleModule(model.tail, batch_first=True, loss_reduction="sum", strict=False)
    try:
        plain = torch.optim.SGD(list(parameters), lr=RATE)
        optimizer: Any = DPOptimizer(
            plain, noise_multiplier=NOISE, max_grad_norm=CLIP_NORM, expected_batch_size=BATCH, loss_reduction="mean"
        )
        sums, counts = model.answer_losses(examples, upper=hooked)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            (sums / counts).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    finally:
        hooked.to_standard_module()
        model.train_mode(False)


STEPS: dict[str, Callable[[LoraModel, Sequence[nn.Parameter], Sequence[Example]], None]] = {
    "plain": plain_step,
    "fedllm": private_step,
    "opacus": opacus_step,
}


def measure(options: Namespace) -> Document:
    """Gate, one warm step each, then timed steps in turns."""
    torch.set_num_threads(1)
    model = make_model()
    vocabulary = int(model._causal.config.vocab_size)
    parameters = model.parameters(("A", "B"))
    worst = gate(model, parameters, make_examples(vocabulary, GATE_LENGTHS))
    examples = make_examples(vocabulary, [TOKENS] * BATCH)
    repetitions = 3 if options.quick else 10
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    for repetition in range(-1, repetitions):
        for name, step in STEPS.items():
            start = time.process_time()
            step(model, parameters, examples)
            if repetition >= 0:
                seconds[name].append(time.process_time() - start)
    typical = {name: median(values) for name, values in seconds.items()}
    return {
        "gate": True,
        "max_rel_error": rounded(worst),
        "dtype": "float32",
        "threads": 1,
        "batch": [BATCH, TOKENS],
        "rank": RANK,
        "trained_parameters": sum(parameter.numel() for parameter in parameters),
        "repetitions": repetitions,
        "providers": {name: {"step_cpu_s": rounded(value)} for name, value in typical.items()},
        "slowdown": rounded(typical["fedllm"] / typical["plain"]),
        "opacus_slowdown": rounded(typical["opacus"] / typical["plain"]),
    }


def table(document: Document) -> Table:
    """Return the document as a table."""
    made = Table(
        title=f"dp_step: batch {document['batch'][0]}x{document['batch'][1]}, {document['dtype']}, 1 thread",
        caption=f"worst per-record gradient error {document['max_rel_error']:.1e}",
    )
    for column in ("provider", "step s", "over plain"):
        made.add_column(column, justify="left" if column == "provider" else "right")
    plain = document["providers"]["plain"]["step_cpu_s"]
    for name, row in document["providers"].items():
        made.add_row(name, f"{row['step_cpu_s']:.3f}", f"{row['step_cpu_s'] / plain:.2f}")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    return run("dp_step", parser("dp_step", "What does a private step cost over a plain one?"), measure, table, argv)


if __name__ == "__main__":
    sys.exit(main())

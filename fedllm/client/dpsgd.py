"""DP-SGD on LoRA factors (Abadi et al. 2016, arXiv 1607.00133): clipping by unit, integer noise, Poisson sampling.

Opacus gives per-record gradients (`GradSampleHooks`) and nothing else: grouping by person, clipping, sampling and
noise are done here, in float64, with randomness from the OS CSPRNG. What makes the accounting true, each with a test:
a record's loss does not depend on its batch mates; a unit's gradient is one vector, however many records it has; an
empty batch still takes a step of noise; the divisor is the declared size, never a private count; and adapters are
read from the model itself, which is under hooks and in no wrapper.

Not covered: floating-point kernels may round one record's gradient differently in another batch. That moves it in
the last bits of bfloat16 activations, before clipping, and is not part of the sensitivity that is accounted.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedllm import telemetry
from fedllm.client.dataset import Example, Unit
from fedllm.client.dpftrl import StreamStore, train_stream
from fedllm.client.model import LoraModel
from fedllm.client.trainer import Progress
from fedllm.messages.mechanism import Mechanism
from fedllm.messages.plan import Recipe
from fedllm.privacy.adaptive import next_clip_norm, step_grid
from fedllm.privacy.clip import SLACK
from fedllm.rng import Rng, uniform_floats

F64 = NDArray[np.float64]
T = TypeVar("T")
_LOG = logging.getLogger(__name__)


def train_private(
    model: LoraModel,
    parameters: Sequence[nn.Parameter],
    units: Sequence[Unit],
    recipe: Recipe,
    mechanism: Mechanism,
    declared_records: int,
    rng: Rng,
    progress: Progress,
) -> None:
    """Take `mechanism.steps` noisy steps on `parameters`, in place.

    Each step is ``theta -= learning_rate / C * (clipped sum + N(0, (sigma C)^2)) / (q * declared_records)``. C is the
    plan's, or starts there and follows a quantile of the norms (`fedllm.privacy.adaptive`).

    Parameters
    ----------
    model : LoraModel
    parameters : Sequence[nn.Parameter]
        The factors that are trained; nothing else of the model may require gradients.
    units : Sequence[Unit]
        The owner's privacy units.
    recipe, mechanism
        Learning rate and microbatch; noise, clip norm, sampling and steps.
    declared_records : int
        The public size N, in units.
    rng : Rng
        `OsRng`: it samples the batches and makes the noise.
    progress : Progress

    Raises
    ------
    ConfigError
        If the noise grid is too coarse for the clip norm, see `GaussianGrid.check`.
    """
    rate = recipe.learning_rate / (mechanism.sample_rate * declared_records)
    clip_norm = mechanism.clip_norm
    # Parameters live in float32; moving them in float64 and rounding once keeps small steps.
    position = _flat(parameters)
    with _per_record(model) as upper:
        for step in range(mechanism.steps):
            grid = step_grid(mechanism, clip_norm, position.size)
            batch = poisson_sample(units, mechanism.sample_rate, rng)
            total, balance = clipped_sum(model, upper, parameters, batch, clip_norm, recipe.microbatch)
            position -= rate / clip_norm * grid.add_noise(total, rng)
            _assign(parameters, position)
            clip_norm = next_clip_norm(mechanism, clip_norm, balance, declared_records, rng)
            progress(step + 1, mechanism.steps)


def train_correlated(
    model: LoraModel,
    parameters: Sequence[nn.Parameter],
    units: Sequence[Unit],
    recipe: Recipe,
    mechanism: Mechanism,
    declared_records: int,
    store: StreamStore,
    rng: Rng,
    progress: Progress,
    *,
    charged: int,
) -> None:
    """Take the next `mechanism.steps` steps of a DP-FTRL stream on `parameters`, in place.

    The stream picks each step's units and makes the noise (`fedllm.client.dpftrl`); gradients are those of DP-SGD.
    """
    with _per_record(model) as upper:

        def gradient(indices: Sequence[int]) -> F64:
            batch = [units[i] for i in indices]
            return clipped_sum(model, upper, parameters, batch, mechanism.clip_norm, recipe.microbatch)[0]

        train_stream(
            gradient, [unit.key for unit in units], _flat(parameters), mechanism=mechanism,
            learning_rate=recipe.learning_rate, declared_records=declared_records, store=store, rng=rng,
            progress=progress, assign=partial(_assign, parameters), charged=charged,
        )  # fmt: skip


def poisson_sample(units: Sequence[T], rate: float, rng: Rng) -> list[T]:
    """Return each unit with probability `rate`, independently; often not the expected number, sometimes none."""
    chosen = uniform_floats(rng, len(units)) < rate
    return [unit for unit, taken in zip(units, chosen, strict=True) if taken]


def clipped_sum(
    model: LoraModel,
    upper: nn.Module,
    parameters: Sequence[nn.Parameter],
    batch: Sequence[Unit],
    clip_norm: float,
    microbatch: int,
) -> tuple[F64, int]:
    """Return the sum of the units' gradients, each clipped to ``clip_norm * (1 - 2^-10)``, and how many were short.

    Returns
    -------
    total : F64
        Shape ``(dimension,)``, in the order of `parameters`; zero for no units.
    balance : int
        Units whose norm is at most `clip_norm`, less those whose is not or is no number.
    """
    total = np.zeros(sum(parameter.numel() for parameter in parameters))
    balance = 0
    for gradients in _unit_gradients(model, upper, parameters, batch, microbatch):
        norms = np.linalg.norm(gradients, axis=1)
        short = norms <= clip_norm
        balance += int(short.sum()) - int((~short).sum())
        bad = ~np.isfinite(norms)
        if bad.any():
            # A refusal here would be a noiseless bit about a unit, outside epsilon: an overflowing unit adds
            # nothing to the sum, as if it had not been sampled, and only this owner's log counts it.
            telemetry.event(_LOG, "gradients not finite", level=logging.WARNING, units=int(bad.sum()))
            gradients[bad] = 0.0
            norms[bad] = 0.0
        bound = clip_norm * (1 - SLACK)
        total += (bound / np.maximum(norms, bound)) @ gradients
    return total, balance


def _unit_gradients(
    model: LoraModel,
    upper: nn.Module,
    parameters: Sequence[nn.Parameter],
    batch: Sequence[Unit],
    microbatch: int,
) -> Iterator[F64]:
    """Yield gradients of whole units, ``(units, dimension)``, each the mean over the unit's records of their own.

    Records go through the model unit after unit, `microbatch` at once, so that at most one unit is ever unfinished
    and memory does not grow with the number of a person's records.
    """
    ordered = sorted(batch, key=lambda unit: max(len(example.input_ids) for example in unit.examples))
    records = [(index, example) for index, unit in enumerate(ordered) for example in unit.examples]
    unfinished: F64 | None = None
    for start in range(0, len(records), microbatch):
        part = records[start : start + microbatch]
        rows = record_gradients(model, upper, parameters, [example for _, example in part])
        sizes = [(index, len(list(run))) for index, run in groupby(index for index, _ in part)]
        if len(sizes) < len(part):
            firsts = np.cumsum([0, *(size for _, size in sizes[:-1])])
            with np.errstate(invalid="ignore"):  # infinities of both signs: no number, found by its norm
                rows = np.add.reduceat(rows, firsts, axis=0)
        if unfinished is not None:
            with np.errstate(invalid="ignore"):
                rows[0] += unfinished
        unfinished = None
        if start + len(part) < len(records) and records[start + len(part)][0] == part[-1][0]:
            unfinished, rows = rows[-1], rows[:-1]
        records_each = np.array([len(ordered[index].examples) for index, _ in sizes[: len(rows)]])
        if (records_each > 1).any():
            rows = rows / records_each[:, None]
        yield rows


def record_gradients(
    model: LoraModel, upper: nn.Module, parameters: Sequence[nn.Parameter], examples: Sequence[Example]
) -> F64:
    """Return each record's own gradient of its own token-mean loss, shape ``(batch, dimension)``.

    Parameters
    ----------
    upper : nn.Module
        The model's tail under Opacus' hooks, with ``loss_reduction="sum"``.
    """
    sums, counts = model.answer_losses(examples, upper=upper)
    with warnings.catch_warnings():
        # The lowest adapted layer's input is frozen: that is the point of cutting the model there.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        (sums / counts).sum().backward()  # type: ignore[no-untyped-call]
    gradients = np.empty((len(examples), sum(parameter.numel() for parameter in parameters)))
    at = 0
    for parameter in parameters:
        own = parameter.grad_sample.reshape(len(examples), -1)  # type: ignore[attr-defined]
        gradients[:, at : at + own.shape[1]] = own.float().numpy()
        at += own.shape[1]
        parameter.grad = None
        parameter.grad_sample = None  # type: ignore[attr-defined]
    return gradients


@contextmanager
def _per_record(model: LoraModel) -> Iterator[nn.Module]:
    """Yield the model's tail with Opacus' hooks on its trained layers, and take every trace of them off again."""
    from opacus.grad_sample.grad_sample_module import GradSampleHooks

    model.train_mode(True)
    # Opacus walks through every module that it is given, so it is given no others.
    trained = [m for m in model.tail.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    hooks = GradSampleHooks(nn.ModuleList(trained), batch_first=True, loss_reduction="sum", strict=False)
    try:
        yield model.tail
    finally:
        hooks.cleanup()
        for module in trained:  # left by a forward pass without its backward pass, they would spoil the next one's
            for name in ("activations", "max_batch_len"):
                vars(module).pop(name, None)
        model.train_mode(False)


def _flat(parameters: Sequence[nn.Parameter]) -> F64:
    return np.concatenate([parameter.detach().double().numpy().ravel() for parameter in parameters])


def _assign(parameters: Sequence[nn.Parameter], position: F64) -> None:
    at = 0
    with torch.no_grad():
        for parameter in parameters:
            part = position[at : at + parameter.numel()].reshape(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(part))
            at += parameter.numel()

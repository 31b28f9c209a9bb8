"""DP-SGD on LoRA factors (Abadi et al. 2016, arXiv 1607.00133): per-record clipping, integer noise, Poisson sampling.

Opacus gives per-record gradients (`GradSampleModule`, hooks) and nothing else: clipping, sampling and noise are done
here, in float64, with randomness from the OS CSPRNG. What makes the accounting true, each with a test: a record's
loss does not depend on its batch mates; an empty batch still takes a step of noise; the divisor is the declared
size, never a private count; and adapters are read from the model itself, not from Opacus' wrapper.

Not covered: floating-point kernels may round one record's gradient differently in another batch. That moves it in
the last bits of bfloat16 activations, before clipping, and is not part of the sensitivity that is accounted.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedllm import telemetry
from fedllm.client.dataset import Example
from fedllm.client.model import LoraModel
from fedllm.client.trainer import Progress
from fedllm.messages.mechanism import Mechanism
from fedllm.messages.plan import Recipe
from fedllm.privacy.clip import SLACK
from fedllm.privacy.noise import GaussianGrid
from fedllm.rng import Rng, uniform_floats

F64 = NDArray[np.float64]
_LOG = logging.getLogger(__name__)


def train_private(
    model: LoraModel,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Example],
    recipe: Recipe,
    mechanism: Mechanism,
    declared_records: int,
    rng: Rng,
    progress: Progress,
) -> None:
    """Take `mechanism.steps` noisy steps on `parameters`, in place.

    Each step is ``theta -= learning_rate / C * (clipped sum + N(0, (sigma C)^2)) / (q * declared_records)``.

    Parameters
    ----------
    model : LoraModel
    parameters : Sequence[nn.Parameter]
        The factors that are trained; nothing else of the model may require gradients.
    examples : Sequence[Example]
        The owner's records, one privacy unit each.
    recipe, mechanism
        Learning rate and microbatch; noise, clip norm, sampling and steps.
    declared_records : int
        The public size N.
    rng : Rng
        `OsRng`: it samples the batches and makes the noise.
    progress : Progress

    Raises
    ------
    ConfigError
        If the noise grid is too coarse for the clip norm, see `GaussianGrid.check`.
    """
    dimension = sum(parameter.numel() for parameter in parameters)
    grid = GaussianGrid(mechanism.noise_multiplier * mechanism.clip_norm)
    grid.check(dimension, mechanism.clip_norm)
    scale = recipe.learning_rate / mechanism.clip_norm / (mechanism.sample_rate * declared_records)
    # Parameters live in float32; moving them in float64 and rounding once keeps small steps.
    position = _flat(parameters)
    with _per_record(model) as upper:
        for step in range(mechanism.steps):
            batch = poisson_sample(examples, mechanism.sample_rate, rng)
            total = clipped_sum(model, upper, parameters, batch, mechanism.clip_norm, recipe.microbatch)
            position -= scale * grid.add_noise(total, rng)
            _assign(parameters, position)
            progress(step + 1, mechanism.steps)


def poisson_sample(examples: Sequence[Example], rate: float, rng: Rng) -> list[Example]:
    """Return each example with probability `rate`, independently; often not the expected number, sometimes none."""
    chosen = uniform_floats(rng, len(examples)) < rate
    return [example for example, taken in zip(examples, chosen, strict=True) if taken]


def clipped_sum(
    model: LoraModel,
    upper: nn.Module,
    parameters: Sequence[nn.Parameter],
    batch: Sequence[Example],
    clip_norm: float,
    microbatch: int,
) -> F64:
    """Return the sum of per-record gradients, each clipped to ``clip_norm * (1 - 2^-10)``; zero for no records.

    Returns
    -------
    F64
        Shape ``(dimension,)``, in the order of `parameters`.
    """
    total = np.zeros(sum(parameter.numel() for parameter in parameters))
    ordered = sorted(batch, key=lambda example: len(example.input_ids))
    for start in range(0, len(ordered), microbatch):
        gradients = record_gradients(model, upper, parameters, ordered[start : start + microbatch])
        norms = np.linalg.norm(gradients, axis=1)
        bad = ~np.isfinite(norms)
        if bad.any():
            # A refusal here would be a noiseless bit about a record, outside epsilon: an overflowing record adds
            # nothing to the sum, as if it had not been sampled, and only this owner's log counts it.
            telemetry.event(_LOG, "record gradients not finite", level=logging.WARNING, records=int(bad.sum()))
            gradients[bad] = 0.0
            norms[bad] = 0.0
        factors = np.minimum(1.0, clip_norm * (1 - SLACK) / np.maximum(norms, np.finfo(np.float64).tiny))
        total += factors @ gradients
    return total


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
    rows = [parameter.grad_sample.reshape(len(examples), -1) for parameter in parameters]  # type: ignore[attr-defined]
    gradients = torch.cat(rows, dim=1).double().numpy()
    for parameter in parameters:
        parameter.grad = None
        parameter.grad_sample = None  # type: ignore[attr-defined]
    return np.asarray(gradients)


@contextmanager
def _per_record(model: LoraModel) -> Iterator[nn.Module]:
    """Yield the model's tail with Opacus' hooks, and take every trace of them off again."""
    from opacus import GradSampleModule

    model.train_mode(True)
    hooked = GradSampleModule(model.tail, batch_first=True, loss_reduction="sum", strict=False)
    try:
        yield hooked
    finally:
        hooked.to_standard_module()
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

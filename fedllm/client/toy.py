"""A trainer without a model: linear regression through the LoRA factors, for tests of whole federations.

Every owner has its own linear map per adapted projection, mostly shared between owners; a record is one input
and its noisy output under all of them. Real gradients, real clipping and real noise, in numpy and milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedllm.adapter import AdapterSpec, AdapterState, Factor
from fedllm.client.trainer import Progress, Scores, Trained, check_steps, declared_size
from fedllm.ids import Digest, OwnerId, sha256
from fedllm.messages.plan import RoundPlan
from fedllm.privacy.clip import SLACK, clip_l2
from fedllm.privacy.noise import GaussianGrid
from fedllm.rng import Rng, SeededRng, uniform_floats

F64 = NDArray[np.float64]
_HELD_OUT = 32


@dataclass(frozen=True)
class ToyTrainer:
    """Linear regression per adapted projection; implements `fedllm.client.trainer.Trainer`.

    Parameters
    ----------
    base : Digest
        Passed through; no model is read.
    owner : OwnerId
        Seeds this owner's data.
    records : int
        Training records.
    difference : float
        Share of an owner's map that other owners do not have.
    """

    base: Digest
    owner: OwnerId
    records: int = 40
    difference: float = 0.2
    _data: dict[Digest, _Data] = field(default_factory=dict, repr=False, compare=False)

    @property
    def dataset(self) -> Digest:
        """Digest of what seeds the data."""
        return sha256(f"toy/{self.owner}/{self.records}/{self.difference}".encode())

    def fit(
        self, head: AdapterState, plan: RoundPlan, factors: tuple[Factor, ...], rng: Rng, progress: Progress
    ) -> Trained:
        """Train by DP-SGD as the plan says, or by gradient descent of at most unit relative step size."""
        check_steps(plan)
        data, state = self._of(head.spec), head
        layout = head.spec.layout(factors)
        steps = plan.recipe.steps
        loss = 0.0
        for step in range(steps):
            private = plan.mechanism.kind != "none"
            chosen = uniform_floats(rng, self.records) < (plan.mechanism.sample_rate if private else 1.0)
            gradients, losses = _gradients(state, data.inputs[chosen], data.targets(chosen), factors)
            if private:
                move = self._private_step(gradients, plan, rng)
            else:
                loss += float(losses.mean()) / steps
                move = gradients.mean(axis=0) * min(plan.recipe.learning_rate, 1.0) / _curvature(state)
            flat = layout.flatten(state.factors).astype(np.float64) - move
            state = state.replace(layout.unflatten(flat.astype(np.float32)))
            progress(step + 1, steps)
        return Trained(state, self.records, loss if plan.mechanism.kind == "none" else None, steps, 0.0)

    def score(self, state: AdapterState) -> Scores:
        """Return the mean squared error on held-out records."""
        data = self._of(state.spec)
        _, losses = _gradients(state, data.held_inputs, data.held_targets, ())
        return Scores(float(losses.mean()), _HELD_OUT, _HELD_OUT)

    def _private_step(self, gradients: F64, plan: RoundPlan, rng: Rng) -> F64:
        mechanism = plan.mechanism
        clipped = [clip_l2(g, mechanism.clip_norm * (1 - SLACK))[0] for g in gradients]
        total = np.sum(clipped, axis=0) if clipped else np.zeros(gradients.shape[1])
        grid = GaussianGrid(mechanism.noise_multiplier * mechanism.clip_norm)
        grid.check(total.size, mechanism.clip_norm)
        scale = plan.recipe.learning_rate / mechanism.clip_norm
        scaled: F64 = scale * grid.add_noise(total, rng) / (mechanism.sample_rate * declared_size(plan, self.owner))
        return scaled

    def _of(self, spec: AdapterSpec) -> _Data:
        if spec.digest not in self._data:
            self._data[spec.digest] = _Data.make(spec, self.owner, self.records, self.difference)
        return self._data[spec.digest]


@dataclass(frozen=True)
class _Data:
    """Inputs ``(records, width)`` and, per projection, targets ``(records, out)``."""

    inputs: F64
    outputs: dict[str, F64]
    held_inputs: F64
    held_targets: dict[str, F64]

    def targets(self, chosen: NDArray[np.bool_]) -> dict[str, F64]:
        return {path: target[chosen] for path, target in self.outputs.items()}

    @classmethod
    def make(cls, spec: AdapterSpec, owner: OwnerId, records: int, difference: float) -> _Data:
        shared, own = SeededRng(f"toy/{spec.digest}"), SeededRng(f"toy/{spec.digest}/{owner}")
        width = max(in_dim for _, in_dim in spec.modules.values())
        count = records + _HELD_OUT
        x = _normal(own, (count, width))
        targets: dict[str, F64] = {}
        for name, (_, cols) in spec.layout(("A",)).entries:
            path, module = name.removesuffix(".lora_A"), name.split(".")[-2]
            out_dim = spec.modules[module][0]
            common, extra = _normal(shared, (out_dim, cols)), _normal(own, (out_dim, cols))
            weight = spec.scaling * ((1 - difference) * common + difference * extra)
            targets[path] = x[:, :cols] @ weight.T + 0.1 * _normal(own, (count, out_dim))
        return cls(
            x[:records], {p: t[:records] for p, t in targets.items()},
            x[records:], {p: t[records:] for p, t in targets.items()},
        )  # fmt: skip


def _normal(rng: SeededRng, shape: tuple[int, int]) -> F64:
    # Irwin-Hall: twelve uniforms are normal enough for made-up data
    return np.asarray(uniform_floats(rng, 12 * shape[0] * shape[1]).reshape(12, *shape).sum(axis=0) - 6.0)


def _gradients(
    state: AdapterState, inputs: F64, targets: dict[str, F64], factors: tuple[Factor, ...]
) -> tuple[F64, F64]:
    """Return per-record gradients ``(records, size)`` in the layout's order, and per-record losses."""
    spec, count = state.spec, inputs.shape[0]
    parts: list[F64] = []
    losses = np.zeros(count)
    outputs = sum(target.shape[1] for target in targets.values())
    for path, target in targets.items():
        a = state.factors[f"{path}.lora_A"].astype(np.float64)
        b = state.factors[f"{path}.lora_B"].astype(np.float64)
        x = inputs[:, : a.shape[1]]
        low = x @ a.T
        error = spec.scaling * low @ b.T - target
        losses += (error * error).sum(axis=1) / outputs
        back = 2 * spec.scaling * error / outputs
        if "A" in factors:
            parts.append(((back @ b)[:, :, None] * x[:, None, :]).reshape(count, -1))
        if "B" in factors:
            parts.append((back[:, :, None] * low[:, None, :]).reshape(count, -1))
    return (np.concatenate(parts, axis=1) if parts else np.zeros((count, 0))), losses


def _curvature(state: AdapterState) -> float:
    """Return an upper bound of the loss's second derivative, so that a unit step never overshoots."""
    spec = state.spec
    outputs = sum(spec.modules[module][0] for module in spec.modules) * len(spec.layers)
    largest = max(float(np.linalg.norm(f.astype(np.float64), 2)) ** 2 for f in state.factors.values())
    return 4 * spec.scaling**2 * largest * 2 / outputs

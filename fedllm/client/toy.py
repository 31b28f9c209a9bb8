"""A trainer without a model: linear regression through the LoRA factors, for tests of whole federations.

Every owner has its own linear map per adapted projection, mostly shared between owners; a record is one input
and its noisy output under all of them. Real gradients, real clipping and real noise, in numpy and milliseconds.
Thousands of owners in one process draw their records from one `ToyPool` instead, which is made once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedllm.adapter import AdapterSpec, AdapterState, Factor
from fedllm.client.dpftrl import StreamStore, train_stream
from fedllm.client.trainer import Progress, Scores, Trained, check_steps, declared_size, stream_folder
from fedllm.errors import NonFiniteUpdate
from fedllm.ids import Digest, OwnerId, sha256
from fedllm.messages.mechanism import DP_FTRL, DP_SGD, NONE
from fedllm.messages.plan import RoundPlan
from fedllm.privacy.adaptive import next_clip_norm, step_grid
from fedllm.privacy.clip import SLACK
from fedllm.rng import Rng, SeededRng, uniform_floats

F64 = NDArray[np.float64]
Rows = NDArray[np.intp]
_HELD_OUT = 32


@dataclass(frozen=True)
class ToyPool:
    """Records that many owners draw from: owner by owner another stretch of the same read-only arrays.

    Parameters
    ----------
    records, held_out : int
        Records to train on and to score on; an owner with more has some of them several times.
    """

    records: int = 16
    held_out: int = 4
    _data: dict[Digest, _Data] = field(default_factory=dict, repr=False, compare=False)

    def of(self, spec: AdapterSpec) -> _Data:
        """Return the arrays for one adapter, making them on first use."""
        if spec.digest not in self._data:
            self._data[spec.digest] = _Data.make(spec, "pool", self.records, self.held_out, 0.0)
        return self._data[spec.digest]


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
        Share of an owner's map that other owners do not have; unused with a pool.
    pool : ToyPool, optional
        Where the records are, instead of arrays of this owner's own.
    streams : Path, optional
        Folder of what DP-FTRL streams remember from round to round; without it no such plan can be trained.
    """

    base: Digest
    owner: OwnerId
    records: int = 40
    difference: float = 0.2
    pool: ToyPool | None = None
    streams: Path | None = None
    _data: dict[Digest, _Data] = field(default_factory=dict, repr=False, compare=False)

    @property
    def dataset(self) -> Digest:
        """Digest of what seeds the data."""
        pooled = "" if self.pool is None else f"/{self.pool.records}"
        return sha256(f"toy/{self.owner}/{self.records}/{self.difference}{pooled}".encode())

    def fit(
        self,
        head: AdapterState,
        plan: RoundPlan,
        factors: tuple[Factor, ...],
        rng: Rng,
        progress: Progress,
        *,
        charged: int = 0,
    ) -> Trained:
        """Train as the plan's mechanism says: DP-SGD, DP-FTRL, or gradient descent of at most unit relative step size.

        Raises
        ------
        PolicyRefused, ConfigError, IntegrityError, DiskFull
            As `fedllm.client.train.LoraTrainer.fit`.
        NonFiniteUpdate
            If a record's gradient is not finite under DP.
        """
        check_steps(plan)
        loss: float | None = None
        if plan.mechanism.kind == DP_SGD:
            state = self._fit_private(head, plan, factors, rng, progress)
        elif plan.mechanism.kind == DP_FTRL:
            state = self._fit_stream(head, plan, factors, rng, progress, charged)
        else:
            state, plain = self._fit_plain(head, plan, factors, progress)
            loss = plain if plan.mechanism.kind == NONE else None
        return Trained(state, self.records, loss, plan.recipe.steps, 0.0)

    def score(self, state: AdapterState) -> Scores:
        """Return the mean squared error on held-out records."""
        data = self._of(state.spec)
        _, losses = _gradients(state, data.held_inputs, data.held_targets, ())
        return Scores(float(losses.mean()), losses.size, losses.size)

    @property
    def _first(self) -> int:
        # records of a pool begin elsewhere for each owner
        return 0 if self.pool is None else int(sha256(self.owner.encode())[:8], 16)

    def _fit_plain(
        self, head: AdapterState, plan: RoundPlan, factors: tuple[Factor, ...], progress: Progress
    ) -> tuple[AdapterState, float]:
        state, steps = head, plan.recipe.steps
        loss = 0.0
        for step in range(steps):
            gradients, losses, counts = self._records(state, np.arange(self.records), factors)
            share = counts / counts.sum()
            loss += float(losses @ share) / steps
            move = gradients.total(share) * min(plan.recipe.learning_rate, 1.0) / _curvature(state)
            state = _placed(state, factors, _flat(state, factors) - move)
            progress(step + 1, steps)
        return state, loss

    def _fit_private(
        self, head: AdapterState, plan: RoundPlan, factors: tuple[Factor, ...], rng: Rng, progress: Progress
    ) -> AdapterState:
        state, mechanism, declared = head, plan.mechanism, declared_size(plan, self.owner)
        clip_norm = mechanism.clip_norm
        for step in range(mechanism.steps):
            chosen = np.flatnonzero(uniform_floats(rng, self.records) < mechanism.sample_rate)
            gradients, _, counts = self._records(state, chosen, factors)
            balance = int(counts @ np.where(gradients.norms() <= clip_norm, 1, -1))
            total = gradients.total(counts * gradients.clipping(clip_norm * (1 - SLACK)))
            noisy = step_grid(mechanism, clip_norm, total.size).add_noise(total, rng)
            scale = plan.recipe.learning_rate / clip_norm
            move = scale * noisy / (mechanism.sample_rate * declared)
            state = _placed(state, factors, _flat(state, factors) - move)
            clip_norm = next_clip_norm(mechanism, clip_norm, balance, declared, rng)
            progress(step + 1, mechanism.steps)
        return state

    def _fit_stream(
        self,
        head: AdapterState,
        plan: RoundPlan,
        factors: tuple[Factor, ...],
        rng: Rng,
        progress: Progress,
        charged: int,
    ) -> AdapterState:
        state = head

        def gradient(indices: Sequence[int]) -> F64:
            gradients, _, counts = self._records(state, np.array(indices, dtype=np.intp), factors)
            return gradients.total(counts * gradients.clipping(plan.mechanism.clip_norm * (1 - SLACK)))

        def assign(position: F64) -> None:
            nonlocal state
            state = _placed(state, factors, position)

        keys = [bytes.fromhex(sha256(f"{self.dataset}/{record}".encode())) for record in range(self.records)]
        train_stream(
            gradient, keys, _flat(head, factors), mechanism=plan.mechanism, learning_rate=plan.recipe.learning_rate,
            declared_records=declared_size(plan, self.owner), store=StreamStore(stream_folder(self.streams)), rng=rng,
            progress=progress, assign=assign, charged=charged,
        )  # fmt: skip
        return state

    def _records(self, state: AdapterState, chosen: Rows, factors: tuple[Factor, ...]) -> tuple[_Gradients, F64, Rows]:
        """Return gradients and losses of the rows that the chosen records are, and how often each row is one."""
        data = self._of(state.spec)
        rows, counts = np.unique((self._first + chosen) % data.inputs.shape[0], return_counts=True)
        gradients, losses = _gradients(state, data.inputs[rows], data.targets(rows), factors)
        return gradients, losses, counts

    def _of(self, spec: AdapterSpec) -> _Data:
        if self.pool is not None:
            return self.pool.of(spec)
        if spec.digest not in self._data:
            self._data[spec.digest] = _Data.make(spec, self.owner, self.records, _HELD_OUT, self.difference)
        return self._data[spec.digest]


@dataclass(frozen=True)
class _Data:
    """Inputs ``(records, width)`` and, per projection, targets ``(records, out)``."""

    inputs: F64
    outputs: dict[str, F64]
    held_inputs: F64
    held_targets: dict[str, F64]

    def targets(self, rows: Rows) -> dict[str, F64]:
        return {path: target[rows] for path, target in self.outputs.items()}

    @classmethod
    def make(cls, spec: AdapterSpec, owner: str, records: int, held_out: int, difference: float) -> _Data:
        shared, own = SeededRng(f"toy/{spec.digest}"), SeededRng(f"toy/{spec.digest}/{owner}")
        width = max(in_dim for _, in_dim in spec.modules.values())
        count = records + held_out
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


@dataclass(frozen=True)
class _Gradients:
    """Gradients record by record: for each factor, in the layout's order, the outer products of two rows.

    A record's gradient of a LoRA factor has rank one, so that its norm is the product of two and a sum over
    records is one matrix product: nothing of shape ``(records, size)`` is ever made.

    Attributes
    ----------
    parts : list[tuple[F64, F64]]
        ``(records, rows)`` and ``(records, columns)`` of each factor.
    """

    parts: list[tuple[F64, F64]]

    def total(self, weights: F64) -> F64:
        """Return the weighted sum over records, flat in the layout's order."""
        return np.concatenate([((left * weights[:, None]).T @ right).ravel() for left, right in self.parts])

    def norms(self) -> F64:
        """Return each record's L2 norm."""
        squares = [(left * left).sum(axis=1) * (right * right).sum(axis=1) for left, right in self.parts]
        found: F64 = np.sqrt(np.sum(squares, axis=0))
        return found

    def clipping(self, max_norm: float) -> F64:
        """Return the factor, 1 at most, that brings each record's gradient to an L2 norm of at most `max_norm`."""
        norms = self.norms()
        if not np.isfinite(norms).all():
            raise NonFiniteUpdate("a record's gradient is not finite and cannot be clipped")
        factors: F64 = max_norm / np.maximum(norms, max_norm)
        return factors


def _flat(state: AdapterState, factors: tuple[Factor, ...]) -> F64:
    return state.spec.layout(factors).flatten(state.factors).astype(np.float64)


def _placed(state: AdapterState, factors: tuple[Factor, ...], position: F64) -> AdapterState:
    return state.replace(state.spec.layout(factors).unflatten(position.astype(np.float32)))


def _normal(rng: SeededRng, shape: tuple[int, int]) -> F64:
    # Irwin-Hall: twelve uniforms are normal enough for made-up data
    total = np.full(shape, -6.0)
    for _ in range(12):
        total += uniform_floats(rng, total.size).reshape(shape)
    return total


def _gradients(
    state: AdapterState, inputs: F64, targets: dict[str, F64], factors: tuple[Factor, ...]
) -> tuple[_Gradients, F64]:
    """Return per-record gradients of `factors`, and per-record losses ``(records,)``."""
    spec, count = state.spec, inputs.shape[0]
    parts: list[tuple[F64, F64]] = []
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
            parts.append((back @ b, x))
        if "B" in factors:
            parts.append((back, low))
    return _Gradients(parts), losses


def _curvature(state: AdapterState) -> float:
    """Return an upper bound of the loss's second derivative, so that a unit step never overshoots."""
    spec = state.spec
    outputs = sum(spec.modules[module][0] for module in spec.modules) * len(spec.layers)
    largest = max(float(np.linalg.norm(f.astype(np.float64), 2)) ** 2 for f in state.factors.values())
    return 4 * spec.scaling**2 * largest * 2 / outputs

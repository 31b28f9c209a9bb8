"""The small model of `benchmarks.utility`: a frozen two-layer network, LoRA on both layers, and who has which records.

Records are made up. A teacher, the frozen network moved by a low-rank change, labels them; each owner has inputs of
its own mean, labels of its own leaning and a teacher that is moved a little further. A record's gradient of a factor
has rank one, so that two hundred owners with hundreds of records each take milliseconds a step, in numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedllm.adapter import F32, AdapterSpec, Layout, module_path
from fedllm.ids import sha256

F64 = NDArray[np.float64]
INPUTS, HIDDEN, CLASSES, RANK = 32, 64, 8, 8
SPEC = AdapterSpec(
    sha256(b"benchmarks.utility"), RANK, 2 * RANK, {"up_proj": (HIDDEN, INPUTS), "down_proj": (CLASSES, HIDDEN)}, (0,)
)
UP, DOWN = module_path(0, "up_proj"), module_path(0, "down_proj")
_NAMES = tuple(f"{path}.lora_{factor}" for path in (UP, DOWN) for factor in "AB")
Factors = Mapping[str, F32]
"""Factors by name, as an `AdapterState` holds them."""
_WORLD = 20261121
_CHANGE_UP, _CHANGE_DOWN, _CHANGE_RANK = 1.0, 1.0, 8
_OWN_MEAN, _OWN_LEANING, _OWN_CHANGE, _FLIPPED = 0.4, 0.3, 0.2, 0.05


@dataclass(frozen=True)
class Records:
    """One silo's records.

    Attributes
    ----------
    inputs : F64
        Shape ``(records, INPUTS)``.
    labels : NDArray[int64]
        Shape ``(records,)``.
    declared : int
        The public size, that steps divide by; a sample of a silo, or one whose records are gone, keeps it.
    """

    inputs: F64
    labels: NDArray[np.int64]
    declared: int

    def __len__(self) -> int:
        """Return how many there are."""
        return self.labels.size

    def pick(self, rows: NDArray[np.intp]) -> Records:
        """Return a sample of them."""
        return Records(self.inputs[rows], self.labels[rows], self.declared)

    def split(self, at: int) -> tuple[Records, Records]:
        """Return the first `at` records and the others, as two sets."""
        first, rest = self.inputs[:at], self.inputs[at:]
        return Records(first, self.labels[:at], len(first)), Records(rest, self.labels[at:], len(rest))

    @classmethod
    def empty(cls, declared: int) -> Records:
        """Return no records of a declared size."""
        return cls(np.empty((0, INPUTS)), np.empty(0, dtype=np.int64), declared)

    @classmethod
    def joined(cls, parts: list[Records]) -> Records:
        """Return the records of all parts in one place."""
        labels = np.concatenate([part.labels for part in parts])
        return cls(np.concatenate([part.inputs for part in parts]), labels, sum(part.declared for part in parts))


@dataclass(frozen=True)
class World:
    """What is fixed and public: the frozen network, where inputs lie, and what the task changes for everyone."""

    up: F64
    down: F64
    spread: F64
    new_up: F64
    new_down: F64

    @classmethod
    def make(cls) -> World:
        """Return the one world that every seed shares, as a base model and a task are shared."""
        draw = np.random.default_rng(_WORLD)
        # Variances fall as k^-1.5 along random axes, as those of a real model's activations do.
        axes, _ = np.linalg.qr(draw.normal(size=(INPUTS, INPUTS)))
        variances = np.arange(1.0, INPUTS + 1) ** -1.5
        spread = axes * np.sqrt(variances / variances.sum())
        up = draw.normal(size=(HIDDEN, INPUTS))
        down = draw.normal(size=(CLASSES, HIDDEN)) / np.sqrt(HIDDEN)
        new_up = up + _CHANGE_UP * _low_rank(draw, HIDDEN, INPUTS)
        new_down = down + _CHANGE_DOWN * _low_rank(draw, CLASSES, HIDDEN) / np.sqrt(HIDDEN)
        return cls(up, down, spread, new_up, new_down)

    def owner(self, seed: tuple[int, ...], count: int) -> Records:
        """Return `count` records of the owner that `seed` names."""
        draw = np.random.default_rng(seed)
        mean = _OWN_MEAN * self.spread @ draw.normal(size=INPUTS)
        leaning = _OWN_LEANING * draw.normal(size=CLASSES)
        down = self.new_down + _OWN_CHANGE * draw.normal(size=(CLASSES, HIDDEN)) / np.sqrt(HIDDEN)
        x = mean + draw.normal(size=(count, INPUTS)) @ self.spread.T
        labels = np.argmax(np.tanh(x @ self.new_up.T) @ down.T + leaning, axis=1)
        flipped = draw.random(count) < _FLIPPED
        return Records(x, np.where(flipped, draw.integers(0, CLASSES, count), labels), count)


def _low_rank(draw: np.random.Generator, rows: int, columns: int) -> F64:
    left, right = draw.normal(size=(rows, _CHANGE_RANK)), draw.normal(size=(_CHANGE_RANK, columns))
    return np.asarray(left @ right / np.sqrt(_CHANGE_RANK))


@dataclass(frozen=True)
class Gradients:
    """Gradients record by record: for each factor, in the layout's order, the outer product of two rows."""

    parts: list[tuple[F64, F64]]

    def norms(self) -> F64:
        """Return each record's L2 norm over all factors: a rank-one matrix has the product of its rows' norms."""
        squares = [(left * left).sum(axis=1) * (right * right).sum(axis=1) for left, right in self.parts]
        return np.asarray(np.sqrt(np.sum(squares, axis=0)))

    def total(self, weights: F64) -> F64:
        """Return the weighted sum over records, flat."""
        return np.concatenate([((left * weights[:, None]).T @ right).ravel() for left, right in self.parts])


def gradients(world: World, adapter: Factors, records: Records, trained: Layout) -> Gradients:
    """Return the gradients of each record's cross entropy by the factors of a layout."""
    _, up_b, down_a, down_b = _factors(adapter)
    scale = SPEC.scaling
    low, hidden, low_hidden, logits = _forward(world, adapter, records.inputs)
    error = np.exp(_log_softmax(logits))
    error[np.arange(len(records)), records.labels] -= 1
    through_b = scale * error @ down_b
    back = (error @ world.down + through_b @ down_a) * (1 - hidden * hidden)
    parts = {
        f"{DOWN}.lora_A": (through_b, hidden),
        f"{DOWN}.lora_B": (scale * error, low_hidden),
        f"{UP}.lora_A": (scale * back @ up_b, records.inputs),
        f"{UP}.lora_B": (scale * back, low),
    }
    return Gradients([parts[name] for name, _ in trained.entries])


def score(world: World, adapter: Factors, records: Records) -> tuple[float, float]:
    """Return accuracy and mean cross entropy in nats."""
    logits = _forward(world, adapter, records.inputs)[3]
    right = float((logits.argmax(axis=1) == records.labels).mean())
    return right, float(-_log_softmax(logits)[np.arange(len(records)), records.labels].mean())


def _factors(adapter: Factors) -> tuple[F64, F64, F64, F64]:
    up_a, up_b, down_a, down_b = (adapter[name].astype(np.float64) for name in _NAMES)
    return up_a, up_b, down_a, down_b


def _forward(world: World, adapter: Factors, x: F64) -> tuple[F64, F64, F64, F64]:
    up_a, up_b, down_a, down_b = _factors(adapter)
    low = x @ up_a.T
    hidden = np.tanh(x @ world.up.T + SPEC.scaling * low @ up_b.T)
    low_hidden = hidden @ down_a.T
    return low, hidden, low_hidden, hidden @ world.down.T + SPEC.scaling * low_hidden @ down_b.T


def _log_softmax(logits: F64) -> F64:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))

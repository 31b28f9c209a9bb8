"""Gradient inversion by a span check (Petrov et al. 2024, DAGER, arXiv 2405.15586), carried over to LoRA.

With A public and frozen and one plain step from B = 0, the update of a projection of layer 0 is
``dB = -rate * scaling * sum_t delta_t (A x_t)^T``, where ``x_t`` is the normalised embedding of token t and nothing
else: no position, no context. Every row of dB lies in the span of the ``A x_t`` of the record's tokens, so whoever
sees dB tests each token of the vocabulary against that span. It works while the tokens are fewer than the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.document import Document, check, rounded
from benchmarks.leakage_training import (
    DEMO_OWNER,
    F64,
    RATE,
    Keys,
    Row,
    Silo,
    as_examples,
    open_model,
    owner_rows,
    private,
    solve_noise,
)
from fedllm.adapter import AdapterState, module_path
from fedllm.aggregation.fixedpoint import FixedPoint
from fedllm.aggregation.secagg.masking import mask_and_pack
from fedllm.basemodel.inspect import BaseModel
from fedllm.client.model import LoraModel
from fedllm.client.tokenizer import ChatTokenizer
from fedllm.demo.recipe import DELTA, MAX_EPSILON
from fedllm.rng import KEY_BYTES, SeededRng

SETTINGS = ((12, 64), (40, 64), (40, 256))
"""Most tokens of a record, the end token included, and the adapter's rank."""
SUMS = (4, 16)
TARGETS = 8
MODULES = ("q_proj", "v_proj")
FLOAT_FLOOR = 1e-6
"""Singular values below this share of the largest are float32's rounding."""
LEAST_CONTROL = 0.8
MOST_MASKED = 0.1
"""Recall above chance that masked vectors may show, over some records."""
VALUE_BITS = 16
RING_BITS = 24
NO_NOISE = 1e-6

Pieces = dict[str, F64]
"""Module of layer 0 to dB, shape ``(out, rank)``."""


def span_residuals(update: F64, directions: F64, *, floor: float = 0.0) -> F64:
    """Return each direction's relative squared distance from the row space of an update.

    Parameters
    ----------
    update : F64
        dB, shape ``(out, rank)``.
    directions : F64
        ``A x`` of each token, shape ``(tokens, rank)``.
    floor : float
        Spectral norm of the noise that the attacker knows to be in the update; smaller singular values are noise.

    Returns
    -------
    F64
        In [0, 1], shape ``(tokens,)``; about 0 for a token of the record.
    """
    _, values, rows = np.linalg.svd(update, full_matrices=False)
    kept = int((values > max(FLOAT_FLOOR * values[0], floor)).sum())
    # Where the row space is everything, or nothing is above the noise, the stronger half is the best there is.
    basis = rows[: kept if 0 < kept < rows.shape[1] else rows.shape[1] // 2]
    lengths = np.maximum((directions**2).sum(axis=1), np.finfo(np.float64).tiny)
    return np.asarray(np.clip(1.0 - ((directions @ basis.T) ** 2).sum(axis=1) / lengths, 0.0, 1.0))


@dataclass(frozen=True)
class Public:
    """What everybody has: the base model's first layer, and the frozen A of the plan's adapter.

    Attributes
    ----------
    directions : dict[str, F64]
        Module to ``A x`` of every token of the vocabulary, shape ``(vocabulary, rank)``.
    """

    directions: dict[str, F64]

    @classmethod
    def of(cls, base: BaseModel, head: AdapterState) -> Public:
        """Compute the directions with the base model's own embedding and norm, as its forward pass does."""
        inner = LoraModel(base.path, base.digest)._causal.model
        with torch.inference_mode():
            states = inner.layers[0].input_layernorm(inner.embed_tokens.weight).double().numpy()
        return cls({m: states @ head.factors[_factor(m, "A")].astype(np.float64).T for m in MODULES})

    def guess(self, pieces: Pieces, count: int, *, deviation: float = 0.0) -> list[int]:
        """Return the `count` tokens that fit an update best.

        The first token of a record never moves q (it attends to itself alone), hence the better of both modules.

        Parameters
        ----------
        deviation : float
            Standard deviation of an entry's noise, known to the attacker.
        """
        fits = [span_residuals(pieces[m], self.directions[m], floor=deviation * _spread(pieces[m])) for m in MODULES]
        return [int(token) for token in np.argsort(np.minimum(*fits), kind="stable")[:count]]


def _factor(module: str, factor: str) -> str:
    return f"{module_path(0, module)}.lora_{factor}"


def _spread(piece: F64) -> float:
    """Return the spectral norm of such a matrix of independent entries of unit variance, to first order."""
    return float(np.sqrt(piece.shape[0]) + np.sqrt(piece.shape[1]))


def recall(guessed: Sequence[int], tokens: frozenset[int]) -> float:
    """Return the share of a record's distinct tokens that were guessed."""
    return len(tokens & set(guessed)) / len(tokens)


def make_texts(base: BaseModel, rows: Sequence[Row], tokens: int) -> list[Row]:
    """Return text records: requests of the demo's data, then their signatures, cut to whole words in so many tokens."""
    tokenizer = ChatTokenizer(base.path)
    made: list[Row] = []
    for row in rows:
        tools, _, request = row["messages"][0]["content"].partition("\nRequest: ")
        text = ""
        for word in f"{request} {tools.removeprefix('Tools:')}".split():
            longer = f"{text} {word}".strip()
            if len(tokenizer.encode(longer)) >= tokens:
                break
            text = longer
        made.append({"text": text})
    return made


def step_keys(base: BaseModel, tokens: int, rank: int, **changes: object) -> Keys:
    """Return the federation's keys for one plain step that adapts every layer."""
    plain: Keys = {
        "method": "ffa", "rank": rank, "alpha": 2 * rank, "last_layers": base.num_layers, "max_tokens": tokens,
        "privacy": False, "optimizer": "sgd", "learning_rate": 1.0, "local_steps": 1, "batch_size": 1,
    }  # fmt: skip
    return plain | changes


class Ring:
    """An update's way onto the ring and back, with the product's own rounding and masking.

    Parameters
    ----------
    clip_range : float
        Just what the largest entry needs: the finest grid, which suits the attacker.
    """

    def __init__(self, clip_range: float) -> None:
        self._grid = FixedPoint(VALUE_BITS, clip_range)

    @property
    def deviation(self) -> float:
        """Largest standard deviation of one entry's rounding."""
        return self._grid.step / 2

    def opened(self, parts: Sequence[Pieces], seed: str) -> Pieces:
        """Return the sum of encoded updates, as opening a masked sum gives it."""
        rng = SeededRng(seed)
        total = np.zeros(sum(parts[0][m].size for m in MODULES), dtype=np.uint32)
        for part in parts:
            total += self._grid.encode(_flat(part), rng)
        return _cut(self._grid.decode_sum(total, len(parts)), parts[0])

    def masked(self, part: Pieces, seed: str) -> Pieces:
        """Return one update encoded and masked, read as if it had no mask."""
        rng = SeededRng(seed)
        encoded = self._grid.encode(_flat(part), rng)
        width = RING_BITS // 8
        packed = b"".join(mask_and_pack(encoded, [(rng.token(KEY_BYTES), 1)], width))
        words = np.frombuffer(packed, dtype=np.uint8).reshape(-1, width).astype(np.int64)
        values = (words << (8 * np.arange(width))).sum(axis=1) - self._grid.levels
        centred = (values + (1 << (RING_BITS - 1))) % (1 << RING_BITS) - (1 << (RING_BITS - 1))
        return _cut(centred * self._grid.step, part)


def _flat(part: Pieces) -> F64:
    return np.concatenate([part[m].ravel() for m in MODULES])


def _cut(flat: F64, like: Pieces) -> Pieces:
    pieces: Pieces = {}
    at = 0
    for m in MODULES:
        pieces[m] = flat[at : at + like[m].size].reshape(like[m].shape)
        at += like[m].size
    return pieces


class Attack:
    """All attacks at one record length and rank.

    Parameters
    ----------
    base : BaseModel
    rows : Sequence[Row]
        Records of the demo's data.
    tokens, rank : int
        See `SETTINGS`.
    """

    def __init__(self, base: BaseModel, rows: Sequence[Row], tokens: int, rank: int) -> None:
        self._base, self._tokens, self._rank = base, tokens, rank
        self._rows = make_texts(base, rows, tokens)
        examples = as_examples(base, self._rows)
        # Every record ends in the same public token; an attacker has no need to guess it.
        self.tokens = [frozenset(example.input_ids[:-1]) for example in examples]
        self.lengths = [len(example.input_ids) for example in examples]
        self._public: Public | None = None

    def update(self, index: int, **changes: object) -> Pieces:
        """Return what one step on one record moves in layer 0, by the product's trainer."""
        silo = Silo(self._base, [self._rows[index]], [{"text": "held out"}], max_tokens=self._tokens)
        keys = step_keys(self._base, self._tokens, self._rank, **changes)
        head = silo.start(keys)
        if self._public is None:
            self._public = Public.of(self._base, head)
        state = silo.round(keys, head, 1, f"inversion/{index}")
        return {m: state.factors[_factor(m, "B")].astype(np.float64) for m in MODULES}

    def row(
        self, targets: int, owners: int, seen: Callable[[int], Pieces], *, deviation: float = 0.0, control: bool = False
    ) -> Document:
        """Attack the sums of `owners` updates from each target on; return means over the targets.

        Recall is of the target's tokens among as many guesses as the sum has distinct tokens; chance is the recall
        of a record of the same kind that is in no sum.
        """
        assert self._public is not None  # an update was made, or there is nothing to attack
        recalls, chances, precisions, counts = [], [], [], []
        for target in range(targets):
            inside = frozenset().union(*self.tokens[target : target + owners])
            guessed = self._public.guess(seen(target), len(inside), deviation=deviation)
            recalls.append(recall(guessed, self.tokens[target]))
            chances.append(recall(guessed, self.tokens[target + owners]))
            precisions.append(len(inside & set(guessed)) / len(guessed))
            counts.append(len(inside))
        return {
            "owners": owners, "control": control, "recall": rounded(float(np.mean(recalls)), 3),
            "chance": rounded(float(np.mean(chances)), 3), "precision": rounded(float(np.mean(precisions)), 3),
            "distinct_tokens": rounded(float(np.mean(counts)), 3),
            "recalls": [rounded(value, 3) for value in recalls],
        }  # fmt: skip


def attack_setting(base: BaseModel, rows: Sequence[Row], tokens: int, rank: int, *, quick: bool) -> Document:
    """Run every row of the table at one record length and rank."""
    targets = 2 if quick else TARGETS
    sums = SUMS[:1] if quick else SUMS
    attack = Attack(base, rows[: targets + max(sums)], tokens, rank)
    plain = [attack.update(index) for index in range(targets + max(sums) - 1)]
    ring = Ring(max(float(np.abs(part[m]).max()) for part in plain for m in MODULES))
    found = {
        "raw update, one owner": attack.row(targets, 1, lambda i: plain[i], control=True),
        "encoded, not masked": attack.row(
            targets, 1, lambda i: ring.opened(plain[i : i + 1], f"round/{i}"), deviation=ring.deviation, control=True
        ),
    }
    for owners in sums:
        found[f"opened sum of {owners} owners"] = attack.row(
            targets, owners, lambda i, n=owners: ring.opened(plain[i : i + n], f"round/{i}"),  # type: ignore[misc]
            deviation=ring.deviation * np.sqrt(owners),
        )  # fmt: skip
    found["one masked vector"] = attack.row(targets, 1, lambda i: ring.masked(plain[i], f"mask/{i}"))
    if rank == SETTINGS[0][1]:
        adam = [attack.update(index, optimizer="adamw") for index in range(targets)]
        found["raw update, one AdamW step"] = attack.row(targets, 1, lambda i: adam[i])
        # All of the budget in one step that has the record in it for sure: less noise than a step of the demo has.
        noise = solve_noise(1.0, 1)
        for name, multiplier in (("DP-SGD, noise left out", NO_NOISE), (f"DP-SGD, epsilon {MAX_EPSILON:g}", noise)):
            noised = [attack.update(index, **private(multiplier, 1.0)) for index in range(targets)]
            found[name] = attack.row(
                targets, 1, lambda i, n=noised: n[i],  # type: ignore[misc]
                deviation=RATE * multiplier, control=multiplier == NO_NOISE,
            )  # fmt: skip
            found[name]["noise_multiplier"] = multiplier
    gate(found)
    lengths = attack.lengths[:targets]
    return {"tokens": tokens, "rank": rank, "records": targets, "mean_tokens": float(np.mean(lengths)), "rows": found}


def gate(rows: Document) -> None:
    """Raise `GateFailed` if a control does not leak, or a masked vector does."""
    for name, row in rows.items():
        if row["control"]:
            check(row["recall"] >= LEAST_CONTROL, f"{name}: control recall {row['recall']}, {LEAST_CONTROL} needed")
    masked = rows["one masked vector"]
    beyond = masked["recall"] - masked["chance"]
    check(beyond <= MOST_MASKED, f"one masked vector: recall {beyond:.3f} above chance, {MOST_MASKED} allowed")


def inversion(*, quick: bool) -> Document:
    """Return the table of the inversion attack."""
    base = open_model()
    rows, _ = owner_rows(base, DEMO_OWNER)
    settings = SETTINGS[:2] if quick else SETTINGS
    return {
        "attack": "span check, layer 0, method ffa, one step from B = 0, one record an owner",
        "seeds": "inversion/<record>, round/<record>, mask/<record>",
        "epsilon": MAX_EPSILON, "delta": DELTA, "unit": "record", "relation": "add-or-remove-one",
        "settings": [attack_setting(base, rows, tokens, rank, quick=quick) for tokens, rank in settings],
    }  # fmt: skip

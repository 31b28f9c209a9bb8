"""What a trained adapter remembers: exposure of planted canaries, and membership of records.

Exposure is that of Carlini et al. 2019 (The Secret Sharer, arXiv 1802.08232): ``log2 |R| - log2 rank`` of the planted
code among random codes R, by loss. Membership is the loss attack of Yeom et al. 2018 (arXiv 1709.01604), plain and
less the base model's loss, read as Carlini et al. 2022 (arXiv 2112.03570) ask: true positives at few false ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from benchmarks.document import Document, check, rounded
from benchmarks.leakage_training import (
    DEMO_OWNER,
    F64,
    HALF,
    Judge,
    Keys,
    Row,
    Silo,
    as_examples,
    open_model,
    owner_rows,
    private,
    solve_noise,
)
from fedllm.adapter import AdapterState
from fedllm.client.dataset import Example
from fedllm.demo.recipe import DELTA, LOCAL_STEPS, MAX_EPSILON, ROUNDS, SAMPLE_RATE
from fedllm.demo.recipe import recipe as demo_recipe

REPEATS = (0, 1, 4, 16)
"""How often a canary is in the data; one that is not is the chance row."""
CODES = 1024
"""The planted code and random others: the most exposure is 10 bits."""
BACKGROUND = 150
NAMES = (
    "Alder", "Birk", "Cardew", "Dunmore", "Eskil", "Farrow", "Galt", "Hollis", "Ivers", "Jessop", "Karst", "Lomax",
    "Merrin", "Norwood", "Ostrow", "Pell",
)  # fmt: skip
LEAST_EXPOSURE = 6.0
"""Mean exposure, in bits, of the control's most repeated canaries; chance is 1.44."""
LEAST_AUC = 0.6
"""Lower end of the control's interval; chance is 0.5."""
FALSE_POSITIVES = 0.01
CONTROL, PRIVATE = "plain AdamW, overfitted", f"DP-SGD, epsilon {MAX_EPSILON:g}, demo's recipe"
CANARY_EPOCHS, MEMBER_EPOCHS = 3, 6
_RESAMPLES = 1000


def exposure(losses: F64) -> float:
    """Return the exposure in bits of the first candidate among all, the lowest loss ranked first.

    Parameters
    ----------
    losses : F64
        Shape ``(candidates,)``; the planted code is at 0. Ties count against it.
    """
    rank = 1 + int((losses[1:] <= losses[0]).sum())
    return float(np.log2(losses.size) - np.log2(rank))


def chance_exposure(size: int) -> float:
    """Return the mean exposure of a code that nobody planted: about ``log2 e``."""
    return float(np.log2(size) - np.log2(np.arange(1, size + 1)).mean())


def auc(members: F64, others: F64) -> float:
    """Return the probability that a member scores above a non-member; ties count half."""
    ordered = np.sort(others)
    below, upto = np.searchsorted(ordered, members, "left"), np.searchsorted(ordered, members, "right")
    return float((below + upto).sum() / (2 * members.size * others.size))


def tpr_at(members: F64, others: F64, rate: float) -> float:
    """Return the share of members above the lowest threshold that at most a share `rate` of non-members exceeds."""
    allowed = int(rate * others.size)
    threshold = np.sort(others)[::-1][allowed] if allowed < others.size else -np.inf
    return float((members > threshold).mean())


def interval(statistic: Callable[[F64, F64], float], members: F64, others: F64, seed: int) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % points of a statistic over bootstrap samples of members and of non-members."""
    draw = np.random.default_rng(seed)
    found = [statistic(draw.choice(members, members.size), draw.choice(others, others.size)) for _ in range(_RESAMPLES)]
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def private_keys() -> Keys:
    """Return the demo's keys with DP-SGD at its whole budget over `ROUNDS` rounds."""
    return _plain() | private(solve_noise(SAMPLE_RATE, ROUNDS * LOCAL_STEPS), SAMPLE_RATE)


def _plain() -> Keys:
    return dict(demo_recipe(None, ROUNDS).federation)


def overfitted(silo: Silo, epochs: int, seed: str) -> AdapterState:
    """Return the adapter after so many passes over a silo's records in one round of the demo's plain optimiser."""
    keys = _plain()
    return silo.rounds(keys | {"local_steps": ceil(epochs * silo.records / keys["batch_size"])}, 1, seed)


def guarantee(keys: Keys) -> Document:
    """Return what is claimed for a private row."""
    return {
        "epsilon": MAX_EPSILON, "delta": DELTA, "unit": "record", "relation": "add-or-remove-one",
        "noise_multiplier": keys["noise_multiplier"], "sample_rate": SAMPLE_RATE, "steps": ROUNDS * LOCAL_STEPS,
    }  # fmt: skip


@dataclass(frozen=True)
class Canary:
    """A made-up secret: who it is of, how often it is in the data, and the code, the first of all candidates."""

    name: str
    repeats: int
    codes: tuple[str, ...]

    def rows(self) -> list[Row]:
        """Return a record for each candidate code, the planted one first."""
        return [{"prompt": f"The access code of {self.name} is ", "completion": code} for code in self.codes]


def plant(repeats: Sequence[int], each: int, codes: int) -> list[Canary]:
    """Return `each` canaries for every number of repetitions; which code is planted is the seed's choice."""
    draw = np.random.default_rng(1)
    names = iter(NAMES)
    return [
        Canary(next(names), count, tuple(f"{code:06d}" for code in draw.choice(10**6, codes, replace=False)))
        for count in repeats
        for _ in range(each)
    ]


def canary(*, quick: bool) -> Document:
    """Return the exposure of planted codes after each kind of training."""
    base = open_model()
    rows, others = owner_rows(base, DEMO_OWNER)
    repeats, each, codes, background = ((0, 16), 1, CODES // 4, 24) if quick else (REPEATS, 2, CODES, BACKGROUND)
    planted = plant(repeats, each, codes)
    train = rows[:background] + [secret.rows()[0] for secret in planted for _ in range(secret.repeats)]
    silo, judge, keys = Silo(base, train, others[:1]), Judge(base), private_keys()
    states: dict[str, Callable[[], AdapterState]] = {
        CONTROL: lambda: overfitted(silo, CANARY_EPOCHS, "canary/plain"),
        PRIVATE: lambda: silo.rounds(keys, ROUNDS, "canary/private"),
    }
    candidates = [as_examples(base, secret.rows()) for secret in planted]
    found: Document = {}
    for name, make in states.items():
        state = make()
        bits = [exposure(judge.losses(state, examples)) for examples in candidates]
        by_repeats = {
            str(count): [rounded(b) for b, secret in zip(bits, planted, strict=True) if secret.repeats == count]
            for count in repeats
        }
        found[name] = {
            "control": name == CONTROL,
            "mean_exposure": {count: rounded(float(np.mean(values)), 3) for count, values in by_repeats.items()},
            "exposure": by_repeats,
        }
        _progress(f"canary, {name}: {found[name]['mean_exposure']}")
        if name == CONTROL:
            gate_exposure(found[name], max(repeats))
    found[PRIVATE] |= guarantee(keys)
    return {
        "attack": "rank by loss among random codes of six digits", "candidates": codes, "canaries_each": each,
        "demo_records": background, "records": silo.records, "control_epochs": CANARY_EPOCHS,
        "chance": rounded(chance_exposure(codes), 3), "most": float(np.log2(codes)),
        "seeds": "codes 1; canary/plain, canary/private", "rows": found,
    }  # fmt: skip


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def gate_exposure(row: Document, most: int) -> None:
    """Raise `GateFailed` if the control's most repeated canaries are not exposed."""
    bits = row["mean_exposure"][str(most)]
    check(bits >= LEAST_EXPOSURE, f"control: canaries planted {most} times have {bits} bits, {LEAST_EXPOSURE} needed")


def attack_row(members: F64, others: F64, seed: int) -> Document:
    """Return AUC and true-positive rate of one attack's scores, each with its interval."""

    def few(inside: F64, outside: F64) -> float:
        return tpr_at(inside, outside, FALSE_POSITIVES)

    return {
        "auc": rounded(auc(members, others), 3),
        "auc_interval": [rounded(end, 3) for end in interval(auc, members, others, seed)],
        "tpr": rounded(few(members, others), 3),
        "tpr_interval": [rounded(end, 3) for end in interval(few, members, others, seed)],
    }


def membership(*, quick: bool) -> Document:
    """Return how well losses tell an owner's training records from as many that it kept back."""
    base = open_model()
    size = 40 if quick else HALF
    inside, outside = (rows[:size] for rows in owner_rows(base, DEMO_OWNER))
    silo, judge, keys = Silo(base, inside, outside), Judge(base), private_keys()
    states: dict[str, Callable[[], AdapterState]] = {
        "base model": lambda: silo.start(_plain()),
        CONTROL: lambda: overfitted(silo, MEMBER_EPOCHS, "membership/plain"),
        PRIVATE: lambda: silo.rounds(keys, ROUNDS, "membership/private"),
    }
    examples: list[Example] = as_examples(base, inside) + as_examples(base, outside)
    before: F64 | None = None
    found: Document = {}
    for name, make in states.items():
        losses = judge.losses(make(), examples)
        before = losses if before is None else before
        attacks = {"loss": -losses, "calibrated": before - losses}
        found[name] = {
            "control": name == CONTROL,
            "loss": [rounded(float(losses[:size].mean()), 3), rounded(float(losses[size:].mean()), 3)],
            "attacks": {
                attack: attack_row(scores[:size], scores[size:], 2)
                for attack, scores in attacks.items()
                if name != "base model" or attack == "loss"
            },
        }
        _progress(f"membership, {name}: {found[name]}")
        if name == CONTROL:
            untrained = found["base model"]["attacks"]["loss"]["auc"]
            gate_membership(found[name], max(untrained, 0.5 if quick else LEAST_AUC))
    found[PRIVATE] |= guarantee(keys)
    return {
        "attack": "loss, and loss less the base model's", "members": size, "non_members": len(examples) - size,
        "control_epochs": MEMBER_EPOCHS, "false_positives": FALSE_POSITIVES, "interval": "95 %, bootstrap by record",
        "seeds": "membership/plain, membership/private; bootstrap 2", "rows": found,
    }  # fmt: skip


def gate_membership(row: Document, least: float) -> None:
    """Raise `GateFailed` if the loss attack on the control is not clearly above `least`: chance, or the base model."""
    low = row["attacks"]["loss"]["auc_interval"][0]
    check(low > least, f"control: AUC from {low} on, more than {least} needed")

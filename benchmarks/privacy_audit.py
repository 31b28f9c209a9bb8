"""Does training leak less than the epsilon it is priced at? A lower bound on epsilon from one run of it.

Random records (canaries) are in the training data with probability one half each. The product trains on them: JSON
lines, `LoraTrainer.fit`, DP-SGD, noise from the OS CSPRNG, with the noise multiplier that `fedllm.privacy.calibrate`
solves for the claim. Every step is a round of its own, whose trained factors are released. The attacker knows
everything but who is in: base model, plan, canaries, their clipped gradients at every released state. It guesses for
the canaries it is surest of, and the number of right guesses refutes every epsilon below `epsilon_lower_bound`.

Two controls show that the audit can see: without noise it must find an epsilon of 3 at least, at half the noise more
than at all of it. Both run the same code; only the sampler's standard deviation is multiplied.
"""

from __future__ import annotations

import base64
import json
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from benchmarks.audit_statistics import F32, F64, Attack, Bits, count_correct, epsilon_lower_bound
from benchmarks.document import Document, check, parser, rounded, run
from fedllm.adapter import ATTENTION_MODULES, MLP_MODULES, AdapterState
from fedllm.aggregation.methods import get_method
from fedllm.basemodel.inspect import open_base
from fedllm.client.dataset import HELDOUT_FILE, TRAIN_FILE, Example, read
from fedllm.client.model import LoraModel, native_dtype
from fedllm.client.tokenizer import ChatTokenizer
from fedllm.client.train import LoraTrainer
from fedllm.config import FederationSettings
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import OwnerId
from fedllm.messages.mechanism import RELATION_ADD_REMOVE, UNIT_RECORD
from fedllm.privacy import noise
from fedllm.privacy.accountant import epsilon
from fedllm.privacy.calibrate import noise_multiplier
from fedllm.privacy.clip import SLACK
from fedllm.rng import OsRng, Rng, SeededRng, uniform_floats
from fedllm.server.federation import Federation, Head, adapter_spec, initial_state
from fedllm.server.plan import make_plan

DELTA = 1e-5
CONFIDENCE = 0.95
GUESSED = 0.3
"""Share of the canaries that are guessed, fixed in advance."""
LEAST_CONTROL = 3.0
HONEST, HALF, OFF = 1.0, 0.5, 0.0
"""Factors on the noise's standard deviation."""
HIDDEN, LAYERS, VOCAB = 64, 2, 258
LETTERS, ANSWER = 8, 4
"""Letters of a canary, and how many of them are the answer."""
CLIP_NORM = 1.0
RATE = 1.0
MICROBATCH = 64
OWNERS = (OwnerId("audited"), OwnerId("second"), OwnerId("third"))


@dataclass(frozen=True)
class Case:
    """One claim and the training that makes it.

    Attributes
    ----------
    claimed : float
        Epsilon over all rounds, at `DELTA`.
    sample_rate : float
        1 is full batch.
    rounds, canaries, rank : int
    """

    claimed: float
    sample_rate: float
    rounds: int
    canaries: int
    rank: int = 8

    @property
    def guesses(self) -> int:
        """Canaries that are guessed: an even number, known before anything is drawn."""
        return 2 * int(GUESSED * self.canaries / 2)


QUICK = (Case(1.0, 1.0, 2, 2000), Case(4.0, 1.0, 2, 2000), Case(4.0, 0.25, 16, 1000))
FULL = (Case(1.0, 1.0, 2, 4000, 16), Case(4.0, 1.0, 2, 4000, 16), Case(4.0, 0.25, 16, 2000))


def make_base(folder: Path) -> Path:
    """Write a random Llama and a tokenizer of single bytes; return the folder.

    Weights this large make the gradients of random records nearly orthogonal, which is the attacker's best case.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN // 2, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        initializer_range=0.2, bos_token_id=VOCAB - 2, eos_token_id=VOCAB - 1, pad_token_id=VOCAB - 1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def make_canaries(count: int) -> list[str]:
    """Return records of random letters as lines of JSON, the same in every run: they are public."""
    draw = SeededRng("privacy_audit/canaries")
    texts = [base64.b64encode(draw.token(3 * LETTERS // 4)).decode() for _ in range(count)]
    return [json.dumps({"prompt": text[:-ANSWER], "completion": text[-ANSWER:]}) + "\n" for text in texts]


@contextmanager
def noise_times(factor: float) -> Iterator[list[int]]:
    """Multiply the standard deviation of the integer noise, 0 for none; yields how many integers each call drew.

    The sampler is the lowest seam there is: clipping, rounding to the grid and every check around it stay.
    """
    sampler = noise.discrete_gaussian
    drawn: list[int] = []

    def scaled(sigma: float, count: int, rng: Rng) -> NDArray[np.int64]:
        drawn.append(count)
        return sampler(factor * sigma, count, rng) if factor else np.zeros(count, dtype=np.int64)

    with patch.object(noise, "discrete_gaussian", scaled):
        yield drawn


class Attacker:
    """Knows the base model and all canaries; computes their clipped gradients with a model of its own.

    Parameters
    ----------
    base : Path
    lines : Sequence[str]
        The canaries.
    folder : Path
        A place for a file of them.
    """

    def __init__(self, base: Path, lines: Sequence[str], folder: Path) -> None:
        file = folder / "canaries.jsonl"
        file.write_text("".join(lines), encoding="utf-8")
        self._examples: Sequence[Example] = read(file, ChatTokenizer(base), max_tokens=2 * LETTERS).examples
        self._model = LoraModel(base, open_base(base).digest)

    def gradients(self, state: AdapterState, factors: Sequence[str]) -> F32:
        """Return the clipped gradients at a released state, shape ``(canaries, dimension)``."""
        from opacus import GradSampleModule

        model = self._model
        model.load_state(state)
        parameters: Sequence[Any] = model.parameters(factors)
        model.train_mode(True)
        hooked = GradSampleModule(model.tail, batch_first=True, loss_reduction="sum", strict=False)
        rows: list[F32] = []
        for start in range(0, len(self._examples), MICROBATCH):
            batch = self._examples[start : start + MICROBATCH]
            sums, counts = model.answer_losses(batch, upper=hooked)
            with warnings.catch_warnings():
                # the lowest adapted layer's input is frozen, as in training
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                (sums / counts).sum().backward()  # type: ignore[no-untyped-call]
            rows.append(torch.cat([p.grad_sample.reshape(len(batch), -1) for p in parameters], dim=1).float().numpy())
            for parameter in parameters:
                parameter.grad = parameter.grad_sample = None
        hooked.to_standard_module()
        found = np.concatenate(rows)
        norms = np.linalg.norm(found, axis=1, keepdims=True)
        found *= np.minimum(1.0, CLIP_NORM * (1 - SLACK) / norms)
        return found


class Audit:
    """One case: who is in, drawn once, and a trainer on their records; every run trains anew with fresh noise.

    Parameters
    ----------
    case : Case
    folder : Path
        Empty; base model and data are written to it.
    rng : Rng
        `OsRng`, except in tests.
    """

    def __init__(self, case: Case, folder: Path, rng: Rng) -> None:
        self._case = case
        self._rng = rng
        path = make_base(folder / "base")
        base = open_base(path)
        lines = make_canaries(case.canaries + 1)
        held_out = lines.pop()
        self.included: Bits = uniform_floats(rng, case.canaries) < 0.5
        data = folder / "data"
        data.mkdir()
        chosen = [line for line, is_in in zip(lines, self.included, strict=True) if is_in]
        (data / TRAIN_FILE).write_text("".join(chosen), encoding="utf-8")
        (data / HELDOUT_FILE).write_text(held_out, encoding="utf-8")
        self._trainer = LoraTrainer(path, base.digest, data, max_tokens=2 * LETTERS, owner=OWNERS[0])
        check(self._trainer.records == len(chosen), f"{self._trainer.records} of {len(chosen)} canaries were read")
        self._attacker = Attacker(path, lines, folder)
        # Declared is what everybody expects, half of the canaries; the true number is the owner's secret.
        self.settings = FederationSettings(
            name="audit", base=path, alias="audit/audit", rank=case.rank, alpha=2 * case.rank,
            target_modules=ATTENTION_MODULES + MLP_MODULES, last_layers=LAYERS, learning_rate=RATE, local_steps=1,
            microbatch=MICROBATCH, max_tokens=2 * LETTERS, clip_norm=CLIP_NORM, sample_rate=case.sample_rate,
            delta=DELTA, declared_records=dict.fromkeys(OWNERS, case.canaries // 2),
            noise_multiplier=noise_multiplier(
                epsilon=case.claimed, delta=DELTA, sample_rate=case.sample_rate, steps=case.rounds
            ),
        )  # fmt: skip
        shapes = {module: base.module_shapes(module) for module in self.settings.target_modules}
        spec = adapter_spec(self.settings, base=base.digest, num_layers=base.num_layers, shapes=shapes)
        roster = Roster.of({owner: SigningIdentity.generate().public for owner in OWNERS})
        self._federation = Federation(self.settings, spec, roster)
        self._method = get_method(self.settings.method)
        self.dimension = spec.layout(self._method.trainable(1)).size
        self.accounted = 0.0

    def attack(self, factor: float) -> F64:
        """Train with the noise's standard deviation times `factor`; return every canary's score.

        Raises
        ------
        GateFailed
            If training did not draw its noise where the factor applies, one integer for each parameter and step.
        """
        case, settings = self._case, self.settings
        spread = factor * settings.noise_multiplier * settings.clip_norm
        attack = Attack(case.canaries, spread, case.sample_rate)
        divisor = case.sample_rate * settings.declared_records[OWNERS[0]]
        state = initial_state(settings.name, self._federation.spec)
        mechanisms = []
        with noise_times(factor) as drawn:
            for number in range(1, case.rounds + 1):
                plan = make_plan(self._federation, Head(state, None), number, OWNERS, self._rng)
                mechanisms.append(plan.mechanism)
                factors = self._method.trainable(number)
                trained = self._trainer.fit(state, plan, factors, self._rng, _silent).state
                moved = self._method.update(trained, state, number).astype(np.float64)
                released = -moved * plan.mechanism.clip_norm * divisor / plan.recipe.learning_rate
                attack.observe(self._attacker.gradients(state, factors), released)
                state = trained
        expected = f"{case.rounds} times for {self.dimension} parameters"
        check(
            drawn == [self.dimension] * case.rounds, f"noise was drawn {len(drawn)} times: {drawn[:3]}, not {expected}"
        )
        self.accounted = epsilon(mechanisms, DELTA)
        return attack.scores()

    def row(self) -> Document:
        """Attack honest training and the controls; return the row of this case."""
        case, guesses = self._case, self._case.guesses
        correct = partial(count_correct, included=self.included, guesses=guesses)
        bound = partial(epsilon_lower_bound, case.canaries, guesses, delta=DELTA, confidence=CONFIDENCE)
        found = {
            "": correct(self.attack(HONEST)),
            "half_noise_": correct(self.attack(HALF)),
            "control_": correct(self.attack(OFF)),
            "no_attack_": correct(uniform_floats(self._rng, case.canaries)),
        }
        return {
            "claimed_epsilon": case.claimed,
            "epsilon_lower_bound": bound(found[""]),
            "half_noise_lower_bound": bound(found["half_noise_"]),
            "control_lower_bound": bound(found["control_"]),
            "no_attack_lower_bound": bound(found["no_attack_"]),
            "max_detectable_epsilon": bound(guesses),
            "accounted_epsilon": self.accounted,
            "noise_multiplier": self.settings.noise_multiplier,
            "clip_norm": self.settings.clip_norm,
            "sample_rate": case.sample_rate,
            "rounds": case.rounds,
            "canaries": case.canaries,
            "guesses": guesses,
            **{f"{name}correct": value for name, value in found.items()},
            "dimension": self.dimension,
        }


def judge(row: Document) -> None:
    """Fail if a claim is refuted, or if the audit could not have refuted it.

    Raises
    ------
    GateFailed
    """
    claim = row["claimed_epsilon"]
    name = f"claim epsilon {claim:g}, sample rate {row['sample_rate']:g}"
    check(row["accounted_epsilon"] <= claim, f"{name}: the rounds are priced at {row['accounted_epsilon']:.4f}")
    bound, half, control = (row[f"{kind}_lower_bound"] for kind in ("epsilon", "half_noise", "control"))
    check(control >= LEAST_CONTROL, f"{name}: the audit is dead, {control:.2f} without noise, {LEAST_CONTROL} needed")
    check(bound <= claim, f"{name}: refuted, epsilon is at least {bound:.2f}")
    check(half > bound, f"{name}: the audit is dead, {half:.2f} at half the noise and {bound:.2f} at all of it")


def measure(options: Namespace) -> Document:
    """Audit every case, then judge."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    rows: list[Document] = []
    for case in QUICK if options.quick else FULL:
        with TemporaryDirectory() as folder:
            rows.append(Audit(case, Path(folder), OsRng()).row())
    for row in rows:
        judge(row)
    return {
        "gate": True,
        "delta": DELTA,
        "confidence": CONFIDENCE,
        "unit": UNIT_RECORD,
        "relation": RELATION_ADD_REMOVE,
        "model": {
            "hidden": HIDDEN,
            "layers": LAYERS,
            "vocabulary": VOCAB,
            "dtype": str(native_dtype()).removeprefix("torch."),
        },
        "audits": [{k: rounded(v) if isinstance(v, float) else v for k, v in row.items()} for row in rows],
        "seconds": round(time.perf_counter() - started, 1),
    }


def table(document: Document) -> Table:
    """Return the document as a table."""
    made = Table(
        title=f"epsilon per {document['unit']} ({document['relation']}), delta {document['delta']:g}:"
        f" lower bounds at {document['confidence']:.0%}"
    )
    columns = {
        "claimed": "claimed_epsilon", "sample rate": "sample_rate", "right": "", "epsilon >=": "epsilon_lower_bound",
        "half noise": "half_noise_lower_bound", "no noise": "control_lower_bound",
        "no attack": "no_attack_lower_bound", "at most": "max_detectable_epsilon",
    }  # fmt: skip
    for column in columns:
        made.add_column(column, justify="right")
    for row in document["audits"]:
        right = f"{row['correct']}/{row['guesses']}"
        made.add_row(*(f"{row[key]:.3g}" if key else right for key in columns.values()))
    return made


def _silent(_done: int, _total: int) -> None:
    """Report no progress."""


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    return run(
        "privacy_audit", parser("privacy_audit", "Does training leak less than its epsilon?"), measure, table, argv
    )


if __name__ == "__main__":
    sys.exit(main())

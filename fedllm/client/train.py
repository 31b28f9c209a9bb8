"""`LoraTrainer`: the real `Trainer`, one base model and one owner's records held in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedllm.adapter import AdapterState, Factor
from fedllm.client.dataset import Example, open_dataset
from fedllm.client.dpftrl import StreamStore
from fedllm.client.dpsgd import train_correlated, train_private
from fedllm.client.evaluate import evaluate
from fedllm.client.model import LoraModel
from fedllm.client.tokenizer import ChatTokenizer
from fedllm.client.trainer import Progress, Scores, Trained, check_steps, declared_size, stream_folder
from fedllm.errors import ConfigError, DataError, NonFiniteUpdate
from fedllm.ids import Digest, OwnerId
from fedllm.messages.mechanism import DP_FTRL, DP_SGD, NONE
from fedllm.messages.plan import Recipe, RoundPlan
from fedllm.rng import Rng


class LoraTrainer:
    """Trains LoRA factors on one owner's records; loads the base model once.

    Parameters
    ----------
    base_path : Path
        Folder of the base model.
    base : Digest
        Its digest, computed by the caller.
    data : Path
        Folder with ``train.jsonl`` and ``heldout.jsonl``.
    max_tokens : int
        Longer records are left out; a plan may leave out more, never fewer.
    owner : OwnerId, optional
        This owner's name in plans. May be left out where a plan declares one owner only.
    unit_column : str
        Key of every record that names its person; empty where each record is a unit of its own.
    streams : Path, optional
        Folder of what DP-FTRL streams remember from round to round; without it no such plan can be trained.
    checkpointing : bool
        Trade time for memory, see `LoraModel`.

    Raises
    ------
    DataError
        If the data folder cannot be used.
    BaseUnsupported
        If the base model cannot.
    """

    def __init__(
        self,
        base_path: Path,
        base: Digest,
        data: Path,
        *,
        max_tokens: int,
        owner: OwnerId | None = None,
        unit_column: str = "",
        streams: Path | None = None,
        checkpointing: bool = False,
    ) -> None:
        self._tokenizer = ChatTokenizer(base_path)
        self._max_tokens = max_tokens
        self._owner = owner
        self._streams = streams
        self._data = open_dataset(data, self._tokenizer, max_tokens=max_tokens, unit_column=unit_column)
        self._model = LoraModel(base_path, base, checkpointing=checkpointing)

    @property
    def base(self) -> Digest:
        """Digest of the base model."""
        return self._model.base

    @property
    def dataset(self) -> Digest:
        """Digest of the data files, for the owner's own ledger."""
        return self._data.digest

    @property
    def records(self) -> int:
        """Number of privacy units to train on: usable records, or persons where a column groups them."""
        return len(self._data.units)

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
        """Train `factors` from `head` by the plan's recipe and kind of mechanism.

        With ``skellam`` training is plain, and of what it makes only the noised sum may leave: no loss. A stream goes
        on after the `charged` steps that other plans paid for. An exception raised by `progress` ends the training.

        Raises
        ------
        PolicyRefused
            If the plan prices another number of steps than it trains, or does not name this owner.
        ConfigError
            If the plan's noise has too coarse a grid, or it has a stream and there is no folder of streams.
        IntegrityError, DiskFull
            If the stream's state cannot be read or kept, see `train_stream`.
        NonFiniteUpdate
            If a gradient of plain training is not finite.
        """
        check_steps(plan)
        started = time.perf_counter()
        recipe, mechanism = plan.recipe, plan.mechanism
        units = [kept for unit in self._data.units if (kept := unit.within(recipe.max_tokens)) is not None]
        self._model.load_state(head)
        parameters = self._model.parameters(factors)
        loss: float | None = None
        if mechanism.kind == DP_SGD:
            declared = declared_size(plan, self._owner)
            train_private(self._model, parameters, units, recipe, mechanism, declared, rng, progress)
        elif mechanism.kind == DP_FTRL:
            store, declared = StreamStore(stream_folder(self._streams)), declared_size(plan, self._owner)
            train_correlated(
                self._model, parameters, units, recipe, mechanism, declared, store, rng, progress, charged=charged
            )
        elif units or mechanism.kind == NONE:  # else the zero update: an error would tell that no record fits
            examples = [example for unit in units for example in unit.examples]
            plain = train_plain(self._model, parameters, examples, recipe, rng, progress)
            loss = plain if mechanism.kind == NONE else None
        seconds = time.perf_counter() - started
        return Trained(self._model.read_state(), len(units), loss, recipe.steps, seconds)

    def score(self, state: AdapterState) -> Scores:
        """Return the held-out loss of an adapter."""
        return evaluate(self._model, state, self._data.heldout)

    def rescore(self, state: AdapterState, folder: Path) -> float:
        """Return the held-out loss of an adapter on another folder's records; for comparisons on public data."""
        other = open_dataset(folder, self._tokenizer, max_tokens=self._max_tokens)
        return evaluate(self._model, state, other.heldout).mean_loss


def train_plain(
    model: LoraModel,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Example],
    recipe: Recipe,
    rng: Rng,
    progress: Progress,
) -> float:
    """Take `recipe.steps` steps without privacy, in place; return the mean training loss per record.

    The loss is the mean over a batch of each record's token-mean answer loss; microbatches change memory only.

    Raises
    ------
    ConfigError
        If the recipe names an unknown optimiser.
    NonFiniteUpdate
        If a loss or gradient is not finite.
    """
    if not examples:
        raise DataError(f"no training record has at most {recipe.max_tokens} tokens")
    optimizer = _optimizer(recipe, parameters)
    batches = _batches(len(examples), recipe.batch_size, rng)
    total = 0.0
    model.train_mode(True)
    for step in range(recipe.steps):
        batch = sorted((examples[i] for i in next(batches)), key=lambda example: len(example.input_ids))
        optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(batch), recipe.microbatch):
            sums, counts = model.answer_losses(batch[start : start + recipe.microbatch])
            loss = (sums / counts).sum() / len(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item() / recipe.steps
        if not all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in parameters):
            raise NonFiniteUpdate(f"step {step + 1}: a gradient is not finite", hint="lower the learning rate")
        optimizer.step()
        progress(step + 1, recipe.steps)
    optimizer.zero_grad(set_to_none=True)
    model.train_mode(False)
    return total


def _optimizer(recipe: Recipe, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=recipe.learning_rate)
    raise ConfigError(f"optimizer {recipe.optimizer!r}: adamw or sgd allowed")


def _batches(records: int, size: int, rng: Rng) -> Iterator[list[int]]:
    """Yield batches of indices without replacement, in a fresh random order each pass."""
    queue: list[int] = []
    while True:
        while len(queue) < min(size, records):
            keys = np.frombuffer(rng.token(8 * records), dtype="<u8")
            queue += [int(i) for i in np.argsort(keys)]
        yield queue[: min(size, records)]
        del queue[: min(size, records)]

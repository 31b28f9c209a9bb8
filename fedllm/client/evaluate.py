"""Held-out answer loss of an adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedllm.adapter import AdapterState
from fedllm.client.dataset import Example
from fedllm.client.model import LoraModel
from fedllm.client.trainer import Scores
from fedllm.errors import NonFiniteUpdate

_BATCH = 8


def evaluate(model: LoraModel, state: AdapterState, examples: Sequence[Example]) -> Scores:
    """Return the mean loss over all answer tokens of `examples` under an adapter.

    Raises
    ------
    NonFiniteUpdate
        If the loss is NaN or infinite.
    """
    model.load_state(state)
    model.train_mode(False)
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(ordered), _BATCH):
            sums, counts = model.answer_losses(ordered[start : start + _BATCH])
            total += float(sums.double().sum())
            tokens += int(counts.sum())
    mean = total / max(1, tokens)
    if not torch.isfinite(torch.tensor(mean)):
        raise NonFiniteUpdate(f"adapter {state.digest[:16]}: held-out loss is {mean}")
    return Scores(mean, len(ordered), tokens)

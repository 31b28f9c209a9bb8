"""Held-out answer loss of an adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedllm.adapter import AdapterState
from fedllm.aggregation.vector import LOSS_LIMIT
from fedllm.client.dataset import Example
from fedllm.client.model import LoraModel
from fedllm.client.trainer import Scores

_BATCH = 8


def evaluate(model: LoraModel, state: AdapterState, examples: Sequence[Example]) -> Scores:
    """Return the mean loss over all answer tokens of `examples` under an adapter; always finite.

    A record whose loss overflows counts as `LOSS_LIMIT` a token, the most that a score can say. To raise instead would
    tell a coordinator, which chooses the candidate, in clear which owner holds a record that overflows under it.
    """
    model.load_state(state)
    model.train_mode(False)
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(ordered), _BATCH):
            sums, counts = model.answer_losses(ordered[start : start + _BATCH])
            most = LOSS_LIMIT * counts
            total += float(torch.where(torch.isfinite(sums), sums, most).double().sum())
            tokens += int(counts.sum())
    return Scores(total / max(1, tokens), len(ordered), tokens)

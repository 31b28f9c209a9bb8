"""Training on every family of base model: the model that is cut in two computes what the whole one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from unit.serving.tiny_families import CASES, make_family

from fedllm.adapter import AdapterSpec, AdapterState
from fedllm.client.dataset import Example
from fedllm.client.model import LoraModel
from fedllm.rng import SeededRng


@pytest.mark.parametrize("name", CASES)
def test_a_cut_model_has_the_loss_of_the_whole_one(tmp_path: Path, name: str) -> None:
    """Only the last layer is adapted, so that all below it are the frozen prefix; windows go with their layers."""
    folder = tmp_path / name
    make_family(folder, name)
    model = LoraModel(folder, "b" * 64)  # type: ignore[arg-type]
    model._causal.float()
    config = model._causal.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    last = config.num_hidden_layers - 1
    spec = AdapterSpec(model.base, 2, 4, {"q_proj": (heads * width, config.hidden_size)}, (last,))
    model.load_state(AdapterState.initial(spec, SeededRng(name)))
    draw = torch.Generator().manual_seed(5)
    row = tuple(int(t) for t in torch.randint(0, config.vocab_size, (40,), generator=draw))
    with torch.inference_mode():
        sums, counts = model.answer_losses([Example(row, row)])
        whole = model._causal(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss
    assert float(sums[0] / counts[0]) == pytest.approx(float(whole), rel=1e-4)

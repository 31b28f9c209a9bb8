"""Tiny random models of every family and switch, and a model driven by hand, step by step, for their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedllm.kernels import build_segments, plan_lora
from fedllm.serving.native.families import read_config
from fedllm.serving.native.loader import load_weights
from fedllm.serving.native.model import LlamaModel, Span, StepInput

VOCAB = 96
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-head-dim": {"model_type": "llama", "head_dim": 6, "num_key_value_heads": 4},
    "llama-linear": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "mistral": {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 1},
    "mistral-window": {"model_type": "mistral", "sliding_window": 6, "head_dim": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}},
    "qwen2-window": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-biases": {"model_type": "qwen3", "head_dim": 12, "attention_bias": True, "tie_word_embeddings": True},
}


def make_family(folder: Path, case: str, *, dtype: torch.dtype = torch.float32, **save: Any) -> Any:
    """Write a random two-layer model of a case and return transformers' own, with no parameter left at its default."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**sizes, **CASES[case]}), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.2)
            if "norm" in name:
                parameter.add_(1.0)
    model.to(dtype).save_pretrained(folder, **save)
    return model.eval()


def transformers_logits(model: Any, tokens: list[int]) -> Tensor:
    """Return transformers' logits after each token, float32."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens])).logits[0].float()
    return logits


class HandDriven:
    """A model whose steps a test composes itself: which tokens, of which sequences, in which blocks.

    Blocks are given out from the front and never come back.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        block_tokens: int = 4,
        blocks: int = 160,
        attention: str = "gathered",
    ) -> None:
        config = read_config(folder)
        weights = load_weights(folder, config, dtype=dtype, device="cpu")
        sizes = {"slots": 2, "max_rank": 4, "blocks": blocks, "block_tokens": block_tokens}
        self.model = LlamaModel(config, weights, attention=attention, **sizes)
        self._next = 0

    def blocks(self, tokens: int) -> list[int]:
        """Return unused blocks for some tokens."""
        first, self._next = self._next, self._next + -(-tokens // self.model.block_tokens)
        return list(range(first, self._next))[::-1]  # never in ascending order

    def chunk(self, tokens: list[int], begin: int, blocks: list[int], *, slot: int = -1) -> Tensor:
        """Compute the next tokens of one sequence that has `begin` in the cache; return all their logits."""
        return self.step([(tokens, begin, blocks)], slots=[slot])

    def step(self, parts: list[tuple[list[int], int, list[int]]], *, slots: list[int] | None = None) -> Tensor:
        """Compute equally many next tokens of several sequences; return all their logits, float32."""
        size, count = self.model.block_tokens, len(parts[0][0])
        tokens = [token for part, _, _ in parts for token in part]
        places = [(begin + i, blocks) for part, begin, blocks in parts for i in range(len(part))]
        owners = [slot for slot in slots or [-1] * len(parts) for _ in range(count)]
        width = max(-(-(begin + count) // size) for _, begin, _ in parts)
        table = [(blocks + [blocks[0]] * width)[:width] for _, _, blocks in parts]
        group = self.model.config.num_attention_heads // self.model.config.num_key_value_heads
        last = torch.tensor([p for p, _ in places]).view(len(parts), count)
        mask = torch.zeros(len(parts), count, width * size).masked_fill(
            torch.arange(width * size) > last[:, :, None], float("-inf")
        )
        span = Span(
            rows=slice(0, len(tokens)),
            blocks_BN=torch.tensor(table),
            mask_B1QL=mask.repeat(1, group if count > 1 else 1, 1)[:, None].to(self.model.dtype),
            sequences=len(parts),
            count=count,
        )
        step = StepInput(
            tokens_T=torch.tensor(tokens),
            positions_T=torch.tensor([p for p, _ in places]),
            cache_rows_T=torch.tensor([blocks[p // size] * size + p % size for p, blocks in places]),
            spans=(span,),
            lora=plan_lora(build_segments(owners), device="cpu"),
            logit_rows=torch.arange(len(tokens)),
        )
        with torch.inference_mode():
            return self.model.forward(step).float()

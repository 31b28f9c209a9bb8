"""A tiny random Llama with a tokenizer, and adapters for it: everything the endpoint needs, in milliseconds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import torch

from fedllm.adapter import AdapterSpec, AdapterState
from fedllm.ids import Digest, sha256
from fedllm.rng import SeededRng
from fedllm.serving.native.engine import EngineLimits, NativeEngine, open_engine

BASE = sha256(b"tiny base")
VOCAB = 384
MODULES = {
    "q_proj": (64, 64),
    "k_proj": (32, 64),
    "v_proj": (32, 64),
    "o_proj": (64, 64),
    "gate_proj": (96, 64),
    "up_proj": (96, 64),
    "down_proj": (64, 96),
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tiny_model(folder: Path) -> None:
    """Write a random two-layer Llama with a byte-level tokenizer and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
        eos_token_id=383,
        bos_token_id=382,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([f"<extra{i}>" for i in range(VOCAB - 2 - len(alphabet))])
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    assert tokenizer.get_vocab_size() == VOCAB
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def make_adapter(
    seed: int,
    *,
    rank: int = 4,
    modules: tuple[str, ...] = tuple(MODULES),
    layers: tuple[int, ...] = (0, 1),
    base: Digest = BASE,
    scale: float = 1.0,
) -> AdapterState:
    """Return a random adapter that visibly changes the tiny model."""
    spec = AdapterSpec(base, rank, 2 * rank, {m: MODULES[m] for m in modules}, layers)
    draw = np.random.default_rng(seed)
    factors = {
        name: (scale * draw.normal(size=shape) / np.sqrt(shape[1])).astype(np.float32)
        for name, shape in spec.layout().entries
    }
    return AdapterState(spec, factors)


def make_forcing_adapter(folder: Path, token: int) -> AdapterState:
    """Return a rank-1 adapter that makes the tiny model say one token for ever.

    In the last layer's MLP, units 0 and 1 get gate = up = +z and -z for a large z = w.h: silu(z) z + silu(-z)(-z)
    is z squared, positive whatever the input, and ``down_proj`` turns it into the token's embedding.
    """
    from safetensors.numpy import load_file

    row = load_file(folder / "model.safetensors")["model.embed_tokens.weight"][token].astype(np.float32)
    modules = ("gate_proj", "up_proj", "down_proj")
    spec = AdapterSpec(BASE, 1, 1, {m: MODULES[m] for m in modules}, (1,))
    factors = {name: np.zeros(shape, dtype=np.float32) for name, shape in spec.layout().entries}
    for module in ("gate_proj", "up_proj"):
        factors[f"model.layers.1.mlp.{module}.lora_A"][0] = np.random.default_rng(1).normal(size=64)
        factors[f"model.layers.1.mlp.{module}.lora_B"][:2, 0] = (1e3, -1e3)
    factors["model.layers.1.mlp.down_proj.lora_A"][0, :2] = 1.0
    factors["model.layers.1.mlp.down_proj.lora_B"][:, 0] = 1e5 * row
    return AdapterState(spec, factors)


@asynccontextmanager
async def running_engine(folder: Path, **sizes: int) -> AsyncIterator[NativeEngine]:
    """Run an engine on the tiny model in float32."""
    limits = EngineLimits(**{"slots": 4, "max_rank": 8, "kv_blocks": 64, "block_tokens": 4, **sizes})
    engine = await open_engine(folder, base=BASE, limits=limits, rng=SeededRng(1), dtype="float32")
    try:
        yield engine
    finally:
        await engine.close()

"""What the hotswap benchmark serves: a tiny base model, and adapters each of which makes one token certain."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedllm.adapter import ATTENTION_MODULES, MLP_MODULES, AdapterSpec, AdapterState
from fedllm.ids import Digest
from fedllm.serving.native.loader import read_config

F32 = NDArray[np.float32]
VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 384, 64, 96, 2, 4, 2
_CANDIDATES = 1024


def make_tiny_base(folder: Path) -> None:
    """Write a random two-layer Llama of 0.1 M parameters with a byte-level tokenizer."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    draw = np.random.default_rng(5)
    head = HIDDEN // HEADS
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)}
    shapes |= {f"self_attn.{name}_proj": (KV_HEADS * head, HIDDEN) for name in "kv"}
    shapes |= {f"mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")} | {"mlp.down_proj": (HIDDEN, INNER)}
    tensors: dict[str, F32] = {"model.embed_tokens.weight": draw.normal(0, 0.2, (VOCAB, HIDDEN)).astype(np.float32)}
    tensors["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = np.ones(HIDDEN, np.float32)
        for name, shape in shapes.items():
            tensors[f"{prefix}{name}.weight"] = draw.normal(0, 0.2, shape).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": VOCAB - 2,
        "eos_token_id": VOCAB - 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([f"<extra{i}>" for i in range(VOCAB - 2 - len(alphabet))])
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<bos>", "eos_token": "<eos>"}')


class ForcingAdapters:
    """Makes adapters of a base that each say one token, whatever the prompt.

    Units 0 and 1 of the last layer's MLP get gate = up = +z and -z for a large z: ``silu(z) z + silu(-z)(-z)`` is z
    squared, positive for any input, and ``down_proj`` turns it into the token's embedding. All other factors are
    there at full size, with B zero.

    Parameters
    ----------
    folder : Path
        The base model.
    base : Digest
        Its digest.
    rank : int
        LoRA rank.
    """

    def __init__(self, folder: Path, base: Digest, rank: int) -> None:
        from safetensors.torch import load_file

        config = read_config(folder)
        weights = load_file(folder / "model.safetensors")
        self._rows: F32 = weights["model.embed_tokens.weight"].float().numpy()
        self._norm: F32 = weights["model.norm.weight"].float().numpy()
        modules = {name: config.projection_shape(name) for name in ATTENTION_MODULES + MLP_MODULES}
        self.spec = AdapterSpec(base, rank, rank, modules, tuple(range(config.num_hidden_layers)))
        self._mlp = f"model.layers.{config.num_hidden_layers - 1}.mlp"
        draw = np.random.default_rng(1)
        self._factors: dict[str, F32] = {
            name: np.zeros(shape, np.float32)
            if name.endswith("lora_B")
            else draw.normal(0, shape[1] ** -0.5, shape).astype(np.float32)
            for name, shape in self.spec.layout().entries
        }
        for module in ("gate_proj", "up_proj"):
            self._factors[f"{self._mlp}.{module}.lora_A"][0] = np.random.default_rng(2).normal(size=config.hidden_size)
            self._factors[f"{self._mlp}.{module}.lora_B"][:2, 0] = (1e3, -1e3)
        down = self._factors[f"{self._mlp}.down_proj.lora_A"]
        down[0] = 0.0
        down[0, :2] = 1.0

    def tokens(self, count: int) -> list[int]:
        """Return the tokens whose embedding is most clearly nearest to itself: only they can be forced."""
        candidates = np.random.default_rng(3).permutation(len(self._rows))[:_CANDIDATES]
        rows = self._rows[candidates]
        logits = (rows / np.sqrt((rows**2).mean(1, keepdims=True)) * self._norm) @ self._rows.T
        own = logits[np.arange(len(candidates)), candidates].copy()
        logits[np.arange(len(candidates)), candidates] = -np.inf
        clearest = np.argsort(logits.max(1) - own)[:count]
        return [int(token) for token in candidates[clearest]]

    def make(self, token: int) -> AdapterState:
        """Return the adapter that says `token`."""
        name = f"{self._mlp}.down_proj.lora_B"
        down = np.zeros_like(self._factors[name])
        down[:, 0] = 1e5 * self._rows[token]
        return AdapterState(self.spec, {**self._factors, name: down})

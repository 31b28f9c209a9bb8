"""From a Hugging Face model folder, and from a validated adapter, to tensors on a device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedllm.adapter import AdapterState, module_path
from fedllm.errors import AdapterInvalid, BaseMismatch, BaseUnsupported, ConfigError
from fedllm.ids import Digest
from fedllm.serving.native.model import GROUPS, LayerWeights, LlamaConfig, LlamaWeights


def choose_dtype(name: str, device: str) -> torch.dtype:
    """Return the dtype to compute in.

    Parameters
    ----------
    name : str
        ``float32``, or ``bfloat16``: that is, bfloat16 where the device multiplies it. A CPU without such
        instructions emulates it, 3 to 8 times slower than float32 in a batch, so float32 is taken there.
    device : str
        A torch device.

    Raises
    ------
    ConfigError
        If the name is another.
    """
    if name not in ("bfloat16", "float32"):
        raise ConfigError(f"dtype {name!r} is not known: bfloat16 or float32")
    native = device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if name == "bfloat16" and native else torch.float32


def read_config(folder: Path) -> LlamaConfig:
    """Read and check ``config.json``.

    Raises
    ------
    BaseUnsupported
        If the folder is not a model of the Llama family that this engine computes exactly.
    """
    try:
        raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise BaseUnsupported(f"{folder} has no readable config.json ({type(error).__name__})") from None
    if raw.get("model_type") != "llama":
        raise BaseUnsupported(f"model_type {raw.get('model_type')!r} in {folder}, 'llama' supported")
    if raw.get("attention_bias") or raw.get("mlp_bias"):
        raise BaseUnsupported(f"{folder} uses biases in its linear layers, none supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise BaseUnsupported(f"hidden_act {raw['hidden_act']!r} in {folder}, 'silu' supported")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise BaseUnsupported(f"rope_type {kind!r} in {folder}, 'default' supported")
    heads = int(raw["num_attention_heads"])
    return LlamaConfig(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_hidden_layers=int(raw["num_hidden_layers"]),
        num_attention_heads=heads,
        num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // heads),
        rms_norm_eps=float(raw["rms_norm_eps"]),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        max_position_embeddings=int(raw["max_position_embeddings"]),
    )


def load_weights(folder: Path, config: LlamaConfig, *, dtype: torch.dtype, device: str) -> LlamaWeights:
    """Read all safetensors files of a folder and fuse the projections.

    Raises
    ------
    BaseUnsupported
        If a tensor is missing or has another shape than the config says.
    """
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt", device=device) as file:
            tensors |= {name: file.get_tensor(name).to(dtype) for name in file.keys()}  # noqa: SIM118
    reader = _Reader(tensors, folder)
    hidden = (config.hidden_size,)
    layers = []
    for layer in range(config.num_hidden_layers):
        linears = {
            group: torch.cat(
                [reader.take(module_path(layer, m) + ".weight", config.projection_shape(m)) for m in modules]
            ).T.contiguous()
            for group, modules in GROUPS.items()
        }
        prefix = f"model.layers.{layer}."
        input_norm = reader.take(prefix + "input_layernorm.weight", hidden)
        post_norm = reader.take(prefix + "post_attention_layernorm.weight", hidden)
        layers.append(LayerWeights(input_norm, post_norm, linears))
    table = (config.vocab_size, config.hidden_size)
    embedding = reader.take("model.embed_tokens.weight", table)
    head = reader.take("lm_head.weight", table) if "lm_head.weight" in tensors else embedding
    return LlamaWeights(embedding, tuple(layers), reader.take("model.norm.weight", hidden), head)


@dataclass(frozen=True)
class _Reader:
    tensors: Mapping[str, Tensor]
    folder: Path

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.tensors.get(name)
        if tensor is None or tuple(tensor.shape) != shape:
            found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise BaseUnsupported(f"tensor {name} in {self.folder} is {found}, {shape} expected")
        return tensor


LayerFactors = dict[str, list[tuple[Tensor, Tensor] | None]]


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter ready for one slot copy: per layer and fused group, its factors on the device."""

    rank: int
    scale: float
    layers: tuple[LayerFactors, ...]


def pack_adapter(
    state: AdapterState, config: LlamaConfig, *, base: Digest, max_rank: int, device: str
) -> PackedAdapter:
    """Check an adapter against this engine and lay out its factors; runs beside the step loop.

    Raises
    ------
    BaseMismatch
        If it was made for another base model.
    AdapterInvalid
        If its rank, layers or shapes do not fit.
    """
    spec = state.spec
    if spec.base != base:
        raise BaseMismatch(f"adapter is for base {spec.base[:8]}, this endpoint serves base {base[:8]}")
    if spec.rank > max_rank:
        raise AdapterInvalid(
            f"adapter has rank {spec.rank}, this endpoint holds up to {max_rank}", hint="raise max_rank"
        )
    if spec.layers[-1] >= config.num_hidden_layers:
        raise AdapterInvalid(f"adapter has layer {spec.layers[-1]}, the base has {config.num_hidden_layers}")
    for module, shape in spec.modules.items():
        if shape != config.projection_shape(module):
            raise AdapterInvalid(f"adapter's {module} has shape {shape}, the base's {config.projection_shape(module)}")
    layers: list[LayerFactors] = [{} for _ in range(config.num_hidden_layers)]
    for layer in spec.layers:
        for group, modules in GROUPS.items():
            if set(modules) & set(spec.modules):
                layers[layer][group] = [_pair(state, layer, m, device) for m in modules]
    return PackedAdapter(spec.rank, spec.scaling, tuple(layers))


def _pair(state: AdapterState, layer: int, module: str, device: str) -> tuple[Tensor, Tensor] | None:
    if module not in state.spec.modules:
        return None
    path = module_path(layer, module)
    a_RD, b_OR = (torch.from_numpy(state.factors[f"{path}.lora_{f}"]) for f in "AB")
    return a_RD.to(device), b_OR.to(device)

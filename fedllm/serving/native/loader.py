"""From a Hugging Face model folder, and from a validated adapter, to tensors on a device."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedllm.adapter import AdapterState, module_path
from fedllm.errors import AdapterInvalid, BaseMismatch, BaseUnsupported, ConfigError
from fedllm.ids import Digest
from fedllm.serving.native.families import LlamaConfig, read_config
from fedllm.serving.native.linear import Linear, new_linear
from fedllm.serving.native.model import GROUPS, LayerWeights, LlamaWeights

__all__ = ["LayerFactors", "PackedAdapter", "choose_dtype", "load_weights", "pack_adapter", "read_config"]


def choose_dtype(name: str, device: str) -> torch.dtype:
    """Return the dtype to compute in.

    Parameters
    ----------
    name : str
        ``float32``, or ``bfloat16``: that is, bfloat16 where the device multiplies it. A CPU without such
        instructions emulates it, 3 to 8 times slower than float32 in a batch, so float32 is taken there, as on a
        GPU older than Ampere.
    device : str
        A torch device.

    Raises
    ------
    ConfigError
        If the name is another.
    """
    if name not in ("bfloat16", "float32"):
        raise ConfigError(f"dtype {name!r} is not known: bfloat16 or float32")
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if name == "bfloat16" and native else torch.float32


def load_weights(folder: Path, config: LlamaConfig, *, dtype: torch.dtype, device: str) -> LlamaWeights:
    """Read a folder's safetensors, sharded or not, and fuse the projections; one layer is held twice at a time.

    Raises
    ------
    BaseUnsupported
        If a shard or tensor is missing, lies in two shards, is quantised or has another shape than the config says,
        or if there is a tensor that this engine would not use.
    """
    with ExitStack() as stack:
        reader = _Reader(_open_shards(folder, device, stack), folder, dtype)
        layers = tuple(_load_layer(reader, config, layer) for layer in range(config.num_hidden_layers))
        table = (config.vocab_size, config.hidden_size)
        norm = reader.take("model.norm.weight", (config.hidden_size,))
        embedding = head = reader.take("model.embed_tokens.weight", table)
        if not config.tied or _HEAD in reader.left:
            head = reader.take(_HEAD, table)
        if config.tied and torch.equal(head, embedding):
            head = embedding
        unused = sorted(name for name in reader.left if not name.endswith(_COMPUTED))
        if unused:
            raise BaseUnsupported(f"tensor {unused[0]} in {folder} is not one that config.json lets this engine use")
    return LlamaWeights(embedding, layers, norm, new_linear(head))


_INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"
_COMPUTED = "rotary_emb.inv_freq"
"""Old checkpoints store what every reader computes."""
_DISK_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _load_layer(reader: _Reader, config: LlamaConfig, layer: int) -> LayerWeights:
    def joined(modules: tuple[str, ...]) -> Linear:
        parts = [reader.take(module_path(layer, m) + ".weight", config.projection_shape(m)) for m in modules]
        if not config.has_bias(modules[0]):
            return new_linear(torch.cat(parts))
        biases = [reader.take(module_path(layer, m) + ".bias", config.projection_shape(m)[:1]) for m in modules]
        return new_linear(torch.cat(parts), torch.cat(biases))

    prefix = f"model.layers.{layer}."
    heads = (config.num_attention_heads, config.num_key_value_heads)
    qk_norm = None
    if config.qk_norm:
        norms = [reader.take(f"{prefix}self_attn.{name}_norm.weight", (config.head_dim,)) for name in "qk"]
        qk_norm = torch.cat([norm.expand(count, -1) for norm, count in zip(norms, heads, strict=True)])
    return LayerWeights(
        input_norm=reader.take(prefix + "input_layernorm.weight", (config.hidden_size,)),
        post_norm=reader.take(prefix + "post_attention_layernorm.weight", (config.hidden_size,)),
        linears={group: joined(modules) for group, modules in GROUPS.items()},
        qk_norm_NH=qk_norm,
    )


def _open_shards(folder: Path, device: str, stack: ExitStack) -> dict[str, Any]:
    """Return the open file of each tensor; the choice of files is transformers'."""
    index: dict[str, str] | None = None
    single, listing = folder / "model.safetensors", folder / _INDEX
    if single.is_file():
        paths = [single]
    elif listing.is_file():
        index = _read_index(listing)
        paths = [folder / name for name in sorted(set(index.values()))]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    files: dict[str, Any] = {}
    for path in paths:
        try:
            file = stack.enter_context(safe_open(path, framework="pt", device=device))
        except (OSError, SafetensorError) as error:
            held = next((name for name, shard in sorted((index or {}).items()) if shard == path.name), "of the model")
            raise BaseUnsupported(f"shard {path}, with tensor {held}, is unreadable ({type(error).__name__})") from None
        for name in file.keys():  # noqa: SIM118 - not a mapping
            if name in files:
                raise BaseUnsupported(f"tensor {name} in {folder} is in two shards, {path.name} and one before it")
            if index is not None and index.get(name) != path.name:
                raise BaseUnsupported(f"tensor {name} is in {path}; {_INDEX} says {index.get(name, 'nowhere')}")
            files[name] = file
    return files


def _read_index(listing: Path) -> dict[str, str]:
    try:
        found = json.loads(listing.read_text(encoding="utf-8"))["weight_map"]
        index = {str(name): str(shard) for name, shard in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseUnsupported(f"{listing} is not an index of shards ({type(error).__name__})") from None
    for name, shard in index.items():
        if shard != Path(shard).name or not shard.endswith(".safetensors"):
            raise BaseUnsupported(f"{listing}: tensor {name} in {shard!r}; allowed: a safetensors file beside it")
    return index


class _Reader:
    """Takes tensors out of open files, checked and in the dtype to compute in."""

    def __init__(self, files: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
        self._files = files
        self._folder = folder
        self._dtype = dtype
        self.left = set(files)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        file = self._files.get(name)
        if file is None:
            raise BaseUnsupported(f"tensor {name} in {self._folder} is missing, {shape} expected")
        found = tuple(file.get_slice(name).get_shape())
        if found != shape:
            raise BaseUnsupported(f"tensor {name} in {self._folder} is of shape {found}, {shape} expected")
        tensor: Tensor = file.get_tensor(name)
        if tensor.dtype not in _DISK_DTYPES:
            raise BaseUnsupported(f"tensor {name} in {self._folder} is {tensor.dtype}; allowed: bf16, fp16, fp32")
        self.left.discard(name)
        return tensor.to(self._dtype)


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

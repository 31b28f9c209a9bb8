"""What distinguishes Llama, Mistral, Qwen2 and Qwen3, read from ``config.json`` into one set of switches.

The four compute the same layer but for biases, norms of queries and keys, the width of a head, an attention window
and the scaling of rotary frequencies. What this engine does not compute exactly is refused here, when a folder is
read, with the key and the value found.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedllm.basemodel.inspect import FAMILIES
from fedllm.errors import BaseUnsupported


@dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al., arXiv 2104.09864) and how their frequencies are scaled.

    Parameters
    ----------
    theta : float
        Base of the frequencies.
    kind : str
        ``default``, ``linear`` (all divided by `factor`) or ``llama3`` (only the slow ones, with a smooth passage).
    factor, low_freq_factor, high_freq_factor, original_positions : float
        Of ``llama3``; a wavelength above ``original_positions / low_freq_factor`` is slow, one below
        ``original_positions / high_freq_factor`` is fast.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: float = 8192.0

    def frequencies(self, head_dim: int) -> Tensor:
        """Return the angle per position of each pair of dimensions, float32, shape ``(head_dim / 2,)``."""
        plain = 1.0 / self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        if self.kind == "default":
            return plain
        slow = plain / self.factor
        if self.kind == "linear":
            return slow
        wavelength = 2 * math.pi / plain
        low, high = self.low_freq_factor, self.high_freq_factor
        fast = ((self.original_positions / wavelength - low) / (high - low)).clamp(0.0, 1.0)
        return (1 - fast) * slow + fast * plain


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers of a base model, under the names of its ``config.json``, and its family's switches.

    Parameters
    ----------
    qkv_bias, o_bias, mlp_bias : bool
        Which linear layers add a bias.
    qk_norm : bool
        Whether each head of queries and keys is normed before it is turned.
    windows : tuple of (int or None)
        Per layer, how many positions a token sees, its own included; None is all. Empty means None everywhere.
    tied : bool
        Whether the output projection is the embedding.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    max_position_embeddings: int
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    tied: bool = False

    @property
    def query_width(self) -> int:
        """Output width of ``q_proj``."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Output width of ``k_proj`` and of ``v_proj``."""
        return self.num_key_value_heads * self.head_dim

    def window(self, layer: int) -> int | None:
        """Return a layer's attention window in tokens, None for all."""
        return self.windows[layer] if self.windows else None

    def has_bias(self, module: str) -> bool:
        """Whether a projection adds a bias."""
        if module in ("q_proj", "k_proj", "v_proj"):
            return self.qkv_bias
        return self.o_bias if module == "o_proj" else self.mlp_bias

    def projection_shape(self, module: str) -> tuple[int, int]:
        """Return a projection's weight shape ``(out, in)``."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (self.query_width, hidden),
            "k_proj": (self.kv_width, hidden),
            "v_proj": (self.kv_width, hidden),
            "o_proj": (hidden, self.query_width),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }[module]


def read_config(folder: Path) -> LlamaConfig:
    """Read and check ``config.json``.

    Raises
    ------
    BaseUnsupported
        If the folder is not a model that this engine computes exactly.
    """
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseUnsupported(f"{folder} has no readable config.json ({type(error).__name__})") from None
    family = raw.get("model_type") if isinstance(raw, dict) else None
    if family not in FAMILIES:
        raise BaseUnsupported(f"{file}: model_type {family!r}; allowed: {', '.join(FAMILIES)}")
    if raw.get("quantization_config"):
        raise BaseUnsupported(f"{file}: quantised weights; allowed: dense bf16, fp16 or fp32")
    if raw.get("hidden_act", "silu") != "silu":
        raise BaseUnsupported(f"{file}: hidden_act {raw['hidden_act']!r}; allowed: 'silu'")
    heads, layers = _whole(raw, "num_attention_heads", file), _whole(raw, "num_hidden_layers", file)
    kv_heads = _whole(raw, "num_key_value_heads", file, default=heads)
    hidden, positions = _whole(raw, "hidden_size", file), _whole(raw, "max_position_embeddings", file)
    head_dim = _whole(raw, "head_dim", file, default=128 if family == "qwen3" else hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise BaseUnsupported(
            f"{file}: {heads} heads of width {head_dim} over {kv_heads} key-value heads; "
            "allowed: a multiple, and an even width"
        )
    # Mistral's code has no biases, whatever its config says; Qwen2's always has them on q, k and v.
    switch = family in ("llama", "qwen3") and bool(raw.get("attention_bias"))
    return LlamaConfig(
        vocab_size=_whole(raw, "vocab_size", file),
        hidden_size=hidden,
        intermediate_size=_whole(raw, "intermediate_size", file),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_real(raw, "rms_norm_eps", file, default=1e-6),
        rope=_rope(raw, file, positions),
        max_position_embeddings=positions,
        qkv_bias=switch or family == "qwen2",
        o_bias=switch,
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias")),
        qk_norm=family == "qwen3",
        windows=_windows(raw, family, file, layers, positions),
        tied=bool(raw.get("tie_word_embeddings", False)),
    )


def _rope(raw: dict[str, Any], file: Path, positions: int) -> Rope:
    # transformers 5 writes rope_parameters; before, theta stood outside of rope_scaling.
    found = {key: raw[key] for key in ("rope_theta", "partial_rotary_factor") if raw.get(key) is not None}
    found |= raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if found.get("partial_rotary_factor", 1.0) != 1.0:
        raise BaseUnsupported(f"{file}: partial_rotary_factor {found['partial_rotary_factor']!r}; allowed: 1.0")
    kind = found.get("rope_type", found.get("type", "default"))
    theta = _real(found, "rope_theta", file, default=10000.0)
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, _real(found, "factor", file))
    if kind != "llama3":
        raise BaseUnsupported(f"{file}: rope_type {kind!r}; allowed: 'default', 'linear', 'llama3'")
    low, high = _real(found, "low_freq_factor", file), _real(found, "high_freq_factor", file)
    if high <= low:
        raise BaseUnsupported(f"{file}: high_freq_factor {high}; allowed: above low_freq_factor {low}")
    original = raw.get("original_max_position_embeddings") or found.get("original_max_position_embeddings") or positions
    return Rope(theta, kind, _real(found, "factor", file), low, high, float(original))


def _windows(raw: dict[str, Any], family: str, file: Path, layers: int, positions: int) -> tuple[int | None, ...]:
    if family == "llama" or (family != "mistral" and not raw.get("use_sliding_window")):
        return ()
    window = raw.get("sliding_window", 4096)
    if window is None:
        return ()
    if not isinstance(window, int) or window < 1:
        raise BaseUnsupported(f"{file}: sliding_window {window!r}; allowed: null or a positive integer")
    if window >= positions:
        return ()  # no token is ever that far back
    if family == "mistral":
        return (window,) * layers
    first = raw.get("max_window_layers", 28)
    kinds = raw.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(layers)
    ]
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown or len(kinds) != layers:
        raise BaseUnsupported(
            f"{file}: layer_types of length {len(kinds)} with {unknown or 'nothing unknown'}; "
            f"allowed: {layers} of 'full_attention' or 'sliding_attention'"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _whole(raw: dict[str, Any], key: str, file: Path, *, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BaseUnsupported(f"{file}: {key} is {value!r}; allowed: a positive integer")
    return value


def _real(raw: dict[str, Any], key: str, file: Path, *, default: float | None = None) -> float:
    value = raw.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise BaseUnsupported(f"{file}: {key} is {value!r}; allowed: a positive number")
    return float(value)

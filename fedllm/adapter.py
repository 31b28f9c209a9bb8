"""LoRA adapters as plain data: what is adapted, the factors, their canonical order, and the PEFT files.

Shapes follow PEFT: for a linear layer of weight ``(out, in)``, ``lora_A`` is ``(rank, in)`` and ``lora_B`` is
``(out, rank)``; the adapted layer computes ``W x + (alpha / rank) B A x`` (Hu et al. 2021, arXiv 2106.09685).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from fedllm import wire
from fedllm.errors import AdapterInvalid
from fedllm.ids import Digest, sha256
from fedllm.rng import Rng, uniform_floats

F32 = NDArray[np.float32]
Factor = str
"""``A`` or ``B``."""

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
MAX_RANK = 512
_CONFIG_FILE = "adapter_config.json"
_WEIGHTS_FILE = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterSpec:
    """What is adapted, and how. Two specs never mix: the digest of the spec is in every plan.

    Attributes
    ----------
    base : Digest
        Content digest of the base model.
    rank, alpha : int
        LoRA rank and scale numerator.
    modules : dict[str, tuple[int, int]]
        Adapted projections and their weight shape ``(out, in)``, e.g. ``{"q_proj": (576, 576)}``.
    layers : tuple[int, ...]
        Indices of the adapted transformer layers, ascending.
    """

    base: Digest
    rank: int
    alpha: int
    modules: dict[str, tuple[int, int]]
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse specs that no engine could load."""
        unknown = sorted(set(self.modules) - set(ATTENTION_MODULES + MLP_MODULES))
        if unknown or not self.modules:
            raise AdapterInvalid(f"target modules {unknown or 'none'}: allowed {ATTENTION_MODULES + MLP_MODULES}")
        if not 1 <= self.rank <= MAX_RANK:
            raise AdapterInvalid(f"rank {self.rank}: 1 to {MAX_RANK} allowed")
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise AdapterInvalid(f"layers {self.layers}: ascending, unique, at least one")

    @property
    def scaling(self) -> float:
        """``alpha / rank``, the factor of the low-rank product."""
        return self.alpha / self.rank

    @property
    def digest(self) -> Digest:
        """SHA-256 of the canonical encoding."""
        return sha256(wire.encode(self))

    def layout(self, factors: Iterable[Factor] = ("A", "B")) -> Layout:
        """Return the canonical order of the given factors: by layer, module, then A before B."""
        wanted = sorted(set(factors))
        entries: list[tuple[str, tuple[int, int]]] = []
        for layer in self.layers:
            for module in sorted(self.modules):
                out_dim, in_dim = self.modules[module]
                shape = {"A": (self.rank, in_dim), "B": (out_dim, self.rank)}
                entries += [(f"{module_path(layer, module)}.lora_{f}", shape[f]) for f in wanted]
        return Layout(tuple(entries))


def module_path(layer: int, module: str) -> str:
    """Return the Llama-family path of a projection, e.g. ``model.layers.3.self_attn.q_proj``."""
    block = "self_attn" if module in ATTENTION_MODULES else "mlp"
    return f"model.layers.{layer}.{block}.{module}"


@dataclass(frozen=True)
class Layout:
    """Names and shapes in canonical order: how factors lie in one flat vector."""

    entries: tuple[tuple[str, tuple[int, int]], ...]

    @cached_property
    def size(self) -> int:
        """Number of float32 entries in the flat vector."""
        return sum(rows * cols for _, (rows, cols) in self.entries)

    @property
    def digest(self) -> Digest:
        """SHA-256 of the canonical encoding."""
        return sha256(wire.encode(self))

    def flatten(self, factors: Mapping[str, F32]) -> F32:
        """Return the named factors as one float32 vector of shape ``(size,)``.

        Raises
        ------
        AdapterInvalid
            If a name is missing or a shape differs.
        """
        flat = np.empty(self.size, dtype=np.float32)
        at = 0
        for name, shape in self.entries:
            array = factors.get(name)
            if array is None or array.shape != shape:
                found = "missing" if array is None else f"shape {array.shape}"
                raise AdapterInvalid(f"factor {name}: {found}, shape {shape} expected")
            flat[at : at + array.size] = array.ravel()
            at += array.size
        return flat

    def unflatten(self, flat: F32) -> dict[str, F32]:
        """Return the factors of a flat vector; the inverse of `flatten`."""
        if flat.shape != (self.size,):
            raise AdapterInvalid(f"flat adapter of shape {flat.shape}, ({self.size},) expected")
        factors: dict[str, F32] = {}
        at = 0
        for name, shape in self.entries:
            count = shape[0] * shape[1]
            factors[name] = flat[at : at + count].reshape(shape).astype(np.float32)
            at += count
        return factors


@dataclass(frozen=True)
class AdapterState:
    """The factors of one adapter under its spec; finite and complete by construction.

    Attributes
    ----------
    spec : AdapterSpec
    factors : Mapping[str, F32]
        ``<module path>.lora_A`` / ``.lora_B`` to float32 arrays.
    """

    spec: AdapterSpec
    factors: Mapping[str, F32]

    def __post_init__(self) -> None:
        """Refuse missing, misshapen, extra or non-finite factors."""
        layout = self.spec.layout()
        extra = sorted(set(self.factors) - {name for name, _ in layout.entries})
        if extra:
            raise AdapterInvalid(f"factor {extra[0]} is not in the spec ({len(extra)} such)")
        if not np.isfinite(layout.flatten(self.factors)).all():
            raise AdapterInvalid("adapter holds NaN or infinity; finite float32 expected")

    @property
    def flat(self) -> F32:
        """All factors in canonical order, shape ``(size,)``."""
        return self.spec.layout().flatten(self.factors)

    @cached_property
    def digest(self) -> Digest:
        """SHA-256 over the spec's digest and the little-endian float32 bytes."""
        return sha256(bytes.fromhex(self.spec.digest) + self.flat.astype("<f4").tobytes())

    def replace(self, factors: Mapping[str, F32]) -> AdapterState:
        """Return a state with some factors replaced."""
        return AdapterState(self.spec, {**self.factors, **factors})

    def to_bytes(self) -> bytes:
        """Return the flat little-endian float32 bytes."""
        return self.flat.astype("<f4").tobytes()

    @classmethod
    def from_bytes(cls, spec: AdapterSpec, data: bytes) -> AdapterState:
        """Return the state whose `to_bytes` is `data`; raise `AdapterInvalid` on a wrong size or value."""
        layout = spec.layout()
        if len(data) != 4 * layout.size:
            raise AdapterInvalid(f"adapter of {len(data)} bytes, {4 * layout.size} expected")
        return cls(spec, layout.unflatten(np.frombuffer(data, dtype="<f4").astype(np.float32)))

    @classmethod
    def initial(cls, spec: AdapterSpec, rng: Rng) -> AdapterState:
        """Return PEFT's default start: A uniform in ±1/sqrt(in), B zero, so the adapted model is the base."""
        factors: dict[str, F32] = {}
        for name, shape in spec.layout().entries:
            if name.endswith("lora_B"):
                factors[name] = np.zeros(shape, dtype=np.float32)
            else:
                unit = uniform_floats(rng, shape[0] * shape[1]).reshape(shape)
                factors[name] = ((2 * unit - 1) / np.sqrt(shape[1])).astype(np.float32)
        return cls(spec, factors)


def to_peft(state: AdapterState, *, base_name: str) -> dict[str, bytes]:
    """Return the two files that ``peft.PeftModel.from_pretrained`` and vLLM load unchanged.

    Parameters
    ----------
    state : AdapterState
    base_name : str
        What ``base_model_name_or_path`` says; informative, the digest in the manifest is what counts.
    """
    spec = state.spec
    config = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": list(spec.layers),
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": spec.rank,
        "target_modules": sorted(spec.modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = {f"{_PEFT_PREFIX}{name}.weight": np.ascontiguousarray(a) for name, a in state.factors.items()}
    return {
        _CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True).encode() + b"\n",
        _WEIGHTS_FILE: save_safetensors(dict(sorted(tensors.items())), metadata={"format": "pt"}),
    }


def from_peft(files: Mapping[str, bytes], *, base: Digest) -> AdapterState:
    """Read PEFT files into a validated state.

    Parameters
    ----------
    files : Mapping[str, bytes]
        At least ``adapter_config.json`` and ``adapter_model.safetensors``.
    base : Digest
        The base model the adapter was made for, from its manifest.

    Raises
    ------
    AdapterInvalid
        If a file is missing or malformed, or names, shapes, rank or values are unusable.
    """
    missing = sorted({_CONFIG_FILE, _WEIGHTS_FILE} - set(files))
    if missing:
        raise AdapterInvalid(f"adapter has no {missing[0]}")
    try:
        config = json.loads(files[_CONFIG_FILE])
        tensors = load_safetensors(files[_WEIGHTS_FILE])
        rank, alpha = int(config["r"]), int(config["lora_alpha"])
        targets = set(config["target_modules"])
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise AdapterInvalid(f"adapter files are malformed ({type(error).__name__})") from None
    if config.get("use_rslora") or config.get("use_dora") or config.get("bias", "none") != "none":
        raise AdapterInvalid("adapter uses rsLoRA, DoRA or biases; plain LoRA expected")
    factors = {_factor_name(key): array for key, array in tensors.items()}
    modules: dict[str, tuple[int, int]] = {}
    layers: set[int] = set()
    for name, array in factors.items():
        layer, module = _locate(name)
        if module not in targets or array.ndim != 2 or array.dtype != np.float32:
            raise AdapterInvalid(f"factor {name}: {array.dtype} of shape {array.shape} is not in the config")
        out_dim, in_dim = modules.get(module, (0, 0))
        shape = (out_dim, array.shape[1]) if name.endswith("lora_A") else (array.shape[0], in_dim)
        modules[module] = shape
        layers.add(layer)
    spec = AdapterSpec(base, rank, alpha, modules, tuple(sorted(layers)))
    return AdapterState(spec, factors)


def _factor_name(key: str) -> str:
    name = key.removeprefix(_PEFT_PREFIX).removesuffix(".weight")
    if name == key or not name.endswith((".lora_A", ".lora_B")):
        raise AdapterInvalid(f"tensor {key} is not a LoRA factor of a causal language model")
    return name


def _locate(name: str) -> tuple[int, str]:
    parts = name.split(".")
    if len(parts) != 6 or parts[:2] != ["model", "layers"] or not parts[2].isdigit():
        raise AdapterInvalid(f"factor {name} is not of a Llama-family layer")
    layer, module = int(parts[2]), parts[4]
    if name.rsplit(".", 1)[0] != module_path(layer, module):
        raise AdapterInvalid(f"factor {name} is not of a Llama-family layer")
    return layer, module

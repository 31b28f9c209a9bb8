"""An ordinary PEFT folder, trained anywhere, as a version of a line of its own: served, and promised nothing for.

Only safetensors are read: a ``.bin`` is a pickle, which runs what it holds. What is stored is written anew from the
factors that were checked, as float32, so no setting of the folder reaches an engine unread.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as save_safetensors

from fedllm.adapter import F32, AdapterSpec, AdapterState, from_peft
from fedllm.basemodel.inspect import BaseModel
from fedllm.errors import AdapterInvalid, NotFound
from fedllm.identity import SigningIdentity
from fedllm.ids import AliasName, Digest
from fedllm.messages.plan import Recipe
from fedllm.registry.model import AdapterVersion, PrivacyRecord
from fedllm.registry.store import Registry, VersionDraft

METHOD = "import"
"""What the manifest of an imported version says where others name a LoRA method."""
NO_PLAN = Digest("0" * 64)
"""Where others have the digest of a round's plan: no round was planned."""
UNIT_NONE = "none"
_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_INFORMATIVE = frozenset({
    "auto_mapping", "base_model_name_or_path", "bias", "eva_config", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "revision", "target_modules", "task_type", "velora_config",
})  # fmt: skip
"""Settings that change nothing of what finished factors compute, or are checked by name; all others must be unset."""
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base as it was; after any other the factors belong to a base that was changed."""


def import_adapter(
    folder: Path,
    base: BaseModel,
    registry: Registry,
    identity: SigningIdentity,
    *,
    federation: str,
    alias: AliasName | None,
) -> AdapterVersion:
    """Add a PEFT folder to a registry as the next version of a line; the same factors again add nothing.

    Parameters
    ----------
    folder : Path
        Holds ``adapter_config.json`` and ``adapter_model.safetensors``.
    base : BaseModel
        What it was trained for; only its shapes can be checked.
    federation : str
        Name of the line.
    alias : AliasName or None
        Where the line is published to; None if the registry knows it.

    Raises
    ------
    NotFound, AdapterInvalid
        Of the folder; see `read_folder`.
    AliasConflict, DiskFull
        See `Registry.import_state`.
    """
    draft = VersionDraft(
        federation=federation,
        base_name=base.path.resolve().name,
        parent=None,
        round=0,
        method=METHOD,
        recipe=Recipe("unknown", 0.0, 0, 0, 0, 0),
        metrics={},
        privacy=PrivacyRecord(
            unit=UNIT_NONE,
            relation=UNIT_NONE,
            epsilon=None,
            delta=0.0,
            covers="nothing: it was trained elsewhere, and nothing is claimed of the data that it was trained on",
            source=UNIT_NONE,
        ),
        cohort_size=0,
        survivors=0,
        plan=NO_PLAN,
    )
    return registry.import_state(read_folder(folder, base), draft, identity, alias=alias)


def read_folder(folder: Path, base: BaseModel) -> AdapterState:
    """Return the factors of a PEFT folder, checked against a base.

    Raises
    ------
    NotFound
        If the folder or a file is missing.
    AdapterInvalid
        If a file is malformed, the adapter is more than plain LoRA, or names, shapes, rank or values do not fit.
    """
    for name in (_CONFIG_FILE, _WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise NotFound(
                f"no {name} in {folder}",
                hint="only safetensors are read, as PEFT's save_pretrained writes them",
            )
    config = _config((folder / _CONFIG_FILE).read_bytes())
    tensors = _tensors((folder / _WEIGHTS_FILE).read_bytes())
    found = {match[1] for name in tensors if (match := re.search(r"\.(\w+)\.lora_[AB]\.weight$", name))}
    targets = config["target_modules"]
    if isinstance(targets, list) and (lacking := sorted({str(t).rpartition(".")[2] for t in targets} - found)):
        raise AdapterInvalid(f"target module {lacking[0][:64]!r} has no factors in {_WEIGHTS_FILE}")
    plain = {"r": config["r"], "lora_alpha": config["lora_alpha"], "target_modules": sorted(found)}
    files = {_CONFIG_FILE: json.dumps(plain).encode(), _WEIGHTS_FILE: save_safetensors(tensors)}
    state = from_peft(files, base=base.digest)
    _check_fits(state.spec, base)
    return state


def _config(data: bytes) -> dict[str, Any]:
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("target_modules"), list | str):
        raise AdapterInvalid(f"{_CONFIG_FILE} is no JSON object with target_modules")
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind != "LORA" or task not in (None, "CAUSAL_LM"):
        raise AdapterInvalid(f"{_CONFIG_FILE}: {kind!r} for {task!r}: LORA for CAUSAL_LM allowed")
    odd = sorted(key for key in set(config) - _INFORMATIVE if config[key])
    if odd or config.get("bias", "none") != "none":
        raise AdapterInvalid(f"{_CONFIG_FILE}: {(odd or ['bias'])[0][:64]!r} is set: plain LoRA has none of it")
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise AdapterInvalid(
            f"{_CONFIG_FILE}: init_lora_weights {str(start)[:64]!r} changes the base that the factors are added to",
            hint="convert it to plain LoRA first: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    whole = isinstance(alpha, int) or (isinstance(alpha, float) and alpha.is_integer())
    if not isinstance(rank, int) or isinstance(rank, bool) or isinstance(alpha, bool) or not whole:
        raise AdapterInvalid(f"{_CONFIG_FILE}: r {rank!r} and lora_alpha {alpha!r}: whole numbers allowed")
    return config


def _tensors(data: bytes) -> dict[str, F32]:
    try:
        parts = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise AdapterInvalid(f"{_WEIGHTS_FILE} is not safetensors ({type(error).__name__})") from None
    return {name: _float32(name, part["dtype"], part["data"]).reshape(part["shape"]) for name, part in parts}


def _float32(name: str, kind: str, data: bytes) -> F32:
    """Return a tensor's values as float32, which holds those of all three kinds exactly."""
    if kind == "F32":
        return np.frombuffer(data, dtype="<f4").astype(np.float32)
    if kind == "F16":
        return np.frombuffer(data, dtype="<f2").astype(np.float32)
    if kind == "BF16":
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    raise AdapterInvalid(f"tensor {name[:128]!r} holds {kind}: F32, F16 and BF16 allowed")


def _check_fits(spec: AdapterSpec, base: BaseModel) -> None:
    if spec.layers[-1] >= base.num_layers:
        raise AdapterInvalid(f"layer {spec.layers[-1]} is adapted, the base has {base.num_layers}, from 0 on")
    for module, shape in spec.modules.items():
        if shape != base.module_shapes(module):
            raise AdapterInvalid(
                f"{module} is adapted in shape {shape}, the base has {base.module_shapes(module)}",
                hint="name the folder of the base that it was trained for with --base",
            )

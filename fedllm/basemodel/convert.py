"""GGUF to bf16 safetensors, run as a child process so that the caller never loads torch.

``python -m fedllm.basemodel.convert SOURCE.gguf DESTINATION`` writes ``config.json``,
``generation_config.json``, ``model.safetensors``, ``tokenizer.json``, ``tokenizer_config.json`` and
``chat_template.jinja``. Each finished step is one line ``done total`` on stdout.

The quantised weights are expanded once, here: what is trained on and served afterwards is the bf16 file, so
every party that converted the same GGUF holds the same numbers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

STEPS = 4

# config.json is part of the base's digest, so only what shapes the computation is written, in names that
# transformers 4 and 5 and vLLM all read: a dump of the whole config differs between library versions.
_KEPT = (
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "tie_word_embeddings",
    "vocab_size",
)


def stable_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a transformers Llama config that define the model, and nothing volatile.

    Parameters
    ----------
    config : dict
        ``LlamaConfig.to_dict()`` of transformers 4 (``rope_theta``) or 5 (``rope_parameters``).

    Returns
    -------
    dict
        What is written to ``config.json``.

    Raises
    ------
    ValueError
        A rotary scaling other than the default; it would be lost here.
    """
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"rotary embedding type {kind!r} is not supported; allowed: 'default'")
    kept = {key: config[key] for key in _KEPT if config.get(key) is not None}
    # GGUF stores epsilon in float32: 9.999999747378752e-06 is 1e-5 and nothing else.
    kept["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    kept["rope_theta"] = float(config.get("rope_theta") or rope["rope_theta"])
    return kept | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}


def convert(source: Path, destination: Path) -> None:
    """Expand one Llama GGUF into a Hugging Face folder in bf16.

    Parameters
    ----------
    source : Path
        The GGUF file; its tokenizer and chat template are carried over.
    destination : Path
        A new or empty folder.

    Raises
    ------
    ValueError
        Not a GGUF file.
    RuntimeError
        The weights read do not fit the architecture exactly.
    """
    with source.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"{source.name} is not a GGUF file")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, name = str(source.parent), source.name
    _report(0)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
    _report(1)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, local_files_only=True, dtype=torch.float32)
    _report(2)
    config = stable_config(loaded.config.to_dict())
    # transformers refuses to save a model that it read from GGUF (its config stays marked as quantised), though
    # every weight is dense by now: carry the weights over to a clean model, strictly.
    model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.tie_weights()
    del loaded
    model.generation_config = GenerationConfig(
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=config.get("eos_token_id"),
        pad_token_id=config.get("pad_token_id"),
    )
    _report(3)
    destination.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    _write_json(destination / "config.json", config)
    _write_json(
        destination / "tokenizer_config.json",
        {
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "pad_token": tokenizer.pad_token,
            "unk_token": tokenizer.unk_token,
            "model_max_length": config["max_position_embeddings"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    for file in destination.iterdir():
        file.chmod(0o644)
    _report(4)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _report(done: int) -> None:
    sys.stdout.write(f"{done} {STEPS}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))

"""A folder that looks like a Llama base; its weights are never read, only hashed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 384,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "transformers_version": "5.23.0",
}
MakeBase = Callable[..., Path]


@pytest.fixture
def make_base() -> MakeBase:
    """Return a function that writes a base folder, with some config keys replaced."""

    def make(folder: Path, **changes: object) -> Path:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
        (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
        return folder

    return make

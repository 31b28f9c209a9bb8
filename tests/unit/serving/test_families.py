"""Llama, Mistral, Qwen2 and Qwen3 against transformers, and folders that are refused."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from unit.serving.tiny_families import CASES, LLAMA3, VOCAB, HandDriven, make_family, transformers_logits
from unit.serving.tiny_llama import BASE, running_engine

from fedllm.adapter import ATTENTION_MODULES, MLP_MODULES, AdapterSpec, AdapterState, to_peft
from fedllm.errors import BaseUnsupported, ConfigError
from fedllm.serving.engine import GenerationRequest, SamplingParams
from fedllm.serving.native.families import Rope, read_config
from fedllm.serving.native.loader import choose_dtype, pack_adapter
from fedllm.serving.native.runner import Runner

# PEFT still reads an attribute that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

LENGTHS = (1, 2, 15, 16, 17, 33)
TOKENS = np.random.default_rng(4).integers(0, VOCAB, 40).tolist()
FLOAT32 = 3e-5
BFLOAT16 = 6e-2
"""Largest difference of two logits over the largest logit: bfloat16 has 8 bits, and layers add up."""


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Return a case's folder and transformers' model, made once."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(case: str) -> tuple[Path, Any]:
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            made[case] = folder, make_family(folder, case)
        return made[case]

    return get


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the largest difference over the largest logit; NaN if there is one."""
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("attention", ["gathered", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(families, case: str, attention: str) -> None:
    """Prompts of odd lengths in chunks of 7, then all of them decoded in one batch, gathered or in place."""
    folder, model = families(case)
    want = transformers_logits(model, TOKENS)
    driven = HandDriven(folder, attention=attention)
    places = {n: driven.blocks(n + 3) for n in LENGTHS}
    for n, blocks in places.items():
        for begin in range(0, n, 7):
            end = min(begin + 7, n)
            assert off(driven.chunk(TOKENS[begin:end], begin, blocks), want[begin:end]) <= FLOAT32
    for i in range(3):
        got = driven.step([([TOKENS[n + i]], n + i, blocks) for n, blocks in places.items()])
        assert off(got, want[[n + i for n in LENGTHS]]) <= FLOAT32


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_as_near_as_its_digits(families, tmp_path: Path, case: str) -> None:
    """Computed in bfloat16 from bfloat16 on disk, logits stay near transformers' float32 ones, a cached prefix, too."""
    model = make_family(tmp_path, case, dtype=torch.bfloat16)
    want = transformers_logits(model.float(), TOKENS)
    driven = HandDriven(tmp_path, dtype=torch.bfloat16, block_tokens=16)
    blocks = driven.blocks(33)
    first = driven.chunk(TOKENS[:33], 0, blocks)
    assert 0 < off(first, want[:33]) <= BFLOAT16
    # Another sequence that begins alike takes the first two blocks as they are.
    other = [*blocks[:2], *driven.blocks(1)]
    assert off(driven.chunk(TOKENS[32:33], 32, other), want[32:33]) <= BFLOAT16
    assert off(driven.step([([TOKENS[33]], 33, other), ([TOKENS[33]], 33, blocks)]), want[[33, 33]]) <= BFLOAT16


@pytest.mark.parametrize("case", ["qwen2", "qwen3-biases", "mistral-window"])
def test_cached_prefixes_and_whole_prompts(families, case: str) -> None:
    """A prompt at once, and one that finds its first blocks in the cache, have the same logits in float32."""
    folder, model = families(case)
    want = transformers_logits(model, TOKENS)
    driven = HandDriven(folder)
    blocks = driven.blocks(33)
    assert off(driven.chunk(TOKENS[:33], 0, blocks), want[:33]) <= FLOAT32
    for cached in (4, 16, 32):
        rest = driven.blocks(36 - cached)
        got = driven.chunk(TOKENS[cached:36], cached, [*blocks[: cached // 4], *rest])
        assert off(got, want[cached:36]) <= FLOAT32


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("llama-linear", {"rope_parameters": {"rope_theta": 10000.0}}),
        ("llama3", {"rope_parameters": LLAMA3 | {"rope_type": "linear"}}),
        ("llama3", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}}),
        ("mistral-window", {"sliding_window": None}),
        ("mistral-window", {"sliding_window": 7}),
        ("qwen2-window", {"use_sliding_window": False}),
        ("qwen2-window", {"layer_types": ["sliding_attention"] * 2}),
        ("qwen2", {"rms_norm_eps": 1e-2}),
    ],
)
def test_every_number_of_a_config_is_felt(families, tmp_path: Path, case: str, changes: dict[str, Any]) -> None:
    """No case passes because its switch does nothing here: with another one, logits are far off transformers'."""
    folder, model = families(case)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with_config(copy, json.loads((copy / "config.json").read_text()) | changes)
    driven = HandDriven(copy)
    got = driven.chunk(TOKENS[:33], 0, driven.blocks(33))
    assert off(got, transformers_logits(model, TOKENS[:33])) > 30 * FLOAT32


@pytest.mark.parametrize("case", ["qwen2", "mistral-window", "qwen3-biases", "llama3"])
def test_an_adapter_on_all_linears_is_pefts(families, tmp_path: Path, case: str) -> None:
    """Each family's seven projections take LoRA as PEFT applies it, biases included, beside base rows."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, _ = families(case)
    driven = HandDriven(folder)
    config = driven.model.config
    modules = {m: config.projection_shape(m) for m in ATTENTION_MODULES + MLP_MODULES}
    spec = AdapterSpec(BASE, 3, 6, modules, (0, 1))
    draw = np.random.default_rng(8)
    factors = {n: draw.normal(0, 0.3, shape).astype(np.float32) for n, shape in spec.layout().entries}
    state = AdapterState(spec, factors)
    for name, data in to_peft(state, base_name="tiny").items():
        (tmp_path / name).write_bytes(data)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base_logits = transformers_logits(plain, TOKENS)
    want = transformers_logits(PeftModel.from_pretrained(plain, tmp_path).eval(), TOKENS)
    Runner(driven.model).write_adapter(1, pack_adapter(state, config, base=BASE, max_rank=4, device="cpu"))
    mine, base = driven.blocks(36), driven.blocks(36)
    assert off(driven.chunk(TOKENS[:33], 0, mine, slot=1), want[:33]) <= FLOAT32
    driven.chunk(TOKENS[:33], 0, base)
    got = driven.step([([TOKENS[33]], 33, mine), ([TOKENS[33]], 33, base)], slots=[1, -1])
    assert off(got[:1], want[33:34]) <= FLOAT32
    assert off(got[1:], base_logits[33:34]) <= FLOAT32
    assert off(want, base_logits) > 0.1


@pytest.mark.parametrize("case", ["mistral-window", "qwen2-tied", "qwen3", "llama3"])
def test_the_engine_says_what_transformers_says(families, drive, case: str) -> None:
    """Greedy tokens of several requests at once, prompts in chunks, equal those of one at a time in transformers."""
    folder, model = families(case)
    prompts = [TOKENS[:n] for n in (1, 2, 17, 33)]

    async def one(engine: Any, prompt: list[int]) -> list[int]:
        with engine.lease(BASE) as lease:
            stream = engine.generate(lease, GenerationRequest(tuple(prompt), SamplingParams(max_tokens=6)))
            return [token async for chunk in stream for token in chunk.token_ids]

    async def body() -> list[list[int]]:
        async with running_engine(folder, max_step_tokens=17) as engine:
            first = await asyncio.gather(*(one(engine, prompt) for prompt in prompts))
            again = await asyncio.gather(*(one(engine, prompt) for prompt in prompts))
            assert engine.stats().prefix_hit_tokens > 0
            assert again == first
            return first

    want = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(transformers_logits(model, tokens)[-1].argmax()))
        want.append(tokens[len(prompt) :])
    assert drive(body()) == want


def test_frequencies_are_those_of_transformers() -> None:
    """Linear and Llama-3 scaling equal transformers' to the last bit but one, fast, slow and in between."""
    from transformers import LlamaConfig as TheirConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    real = {**LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    for parameters in (LLAMA3, real, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}):
        theirs = TheirConfig(hidden_size=512, num_attention_heads=4, rope_parameters=dict(parameters))
        want, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, torch.device("cpu"))
        found = {**parameters}
        rope = Rope(
            found["rope_theta"],
            found["rope_type"],
            found["factor"],
            found.get("low_freq_factor", 1.0),
            found.get("high_freq_factor", 4.0),
            found.get("original_max_position_embeddings", 8192),
        )
        assert scale == 1.0
        assert torch.allclose(rope.frequencies(128), want, rtol=3e-7, atol=0.0)
        plain = Rope(found["rope_theta"]).frequencies(128)
        assert not torch.allclose(plain, want, rtol=1e-3)


LLAMA_31 = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip


def with_config(folder: Path, config: object) -> Path:
    """Write a ``config.json``."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_published_forms_of_config_are_read(tmp_path: Path) -> None:
    """The keys as Llama 3.1, Mistral 7B v0.1, Qwen2.5 and Qwen3 were published with them."""
    llama = read_config(with_config(tmp_path, LLAMA_31))
    assert (llama.rope, llama.head_dim, llama.tied) == (Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192.0), 128, False)
    assert not (llama.qkv_bias or llama.o_bias or llama.mlp_bias or llama.qk_norm or llama.windows)
    plain = {key: value for key, value in LLAMA_31.items() if key != "rope_scaling"}
    mistral = read_config(with_config(tmp_path, plain | {"model_type": "mistral", "sliding_window": 4096}))
    assert (mistral.windows, mistral.rope) == ((4096,) * 32, Rope(500000.0))
    assert read_config(with_config(tmp_path, plain | {"model_type": "mistral", "sliding_window": None})).windows == ()
    assert read_config(with_config(tmp_path, plain | {"model_type": "mistral"})).window(0) == 4096
    qwen2 = {"model_type": "qwen2", "sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 70}
    found = read_config(with_config(tmp_path, plain | qwen2))
    assert (found.qkv_bias, found.o_bias, found.windows) == (True, False, ())
    found = read_config(with_config(tmp_path, plain | qwen2 | {"use_sliding_window": True, "max_window_layers": 28}))
    assert found.windows == ()
    narrow = {"use_sliding_window": True, "max_window_layers": 28, "sliding_window": 32768}
    assert read_config(with_config(tmp_path, plain | qwen2 | narrow)).windows == (None,) * 28 + (32768,) * 4
    found = read_config(with_config(tmp_path, plain | {"model_type": "qwen3", "hidden_size": 1024}))
    assert (found.head_dim, found.qk_norm, found.qkv_bias) == (128, True, False)


def test_a_window_as_wide_as_the_model_is_none(tmp_path: Path) -> None:
    """What no position can feel costs no mask."""
    config = LLAMA_31 | {"model_type": "mistral", "sliding_window": 131072, "rope_scaling": None}
    assert read_config(with_config(tmp_path, config)).windows == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2'; allowed: llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'; allowed: 'default', 'linear'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is None"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor 1.0; allowed: above"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"num_key_value_heads": 5}, "32 heads of width 128 over 5 key-value heads"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'; allowed: a positive integer"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window 0"),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["chunked"] * 32}, "layer_types of length"),
    ],
)
def test_what_is_not_computed_exactly_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """The key, the value found and the values allowed are named."""
    with pytest.raises(BaseUnsupported, match=message):
        read_config(with_config(tmp_path, LLAMA_31 | changes))


@pytest.mark.parametrize("text", ["[]", "{", '"llama"'])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    """Anything but a JSON object is no config."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BaseUnsupported):
        read_config(tmp_path)


def test_dtypes_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bfloat16 is taken where the device multiplies it; an unknown name is refused."""
    import contextlib

    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    for native, want in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert choose_dtype("bfloat16", "cuda:0") == want
    assert choose_dtype("float32", "cuda") == torch.float32
    with pytest.raises(ConfigError, match="'int8' is not known"):
        choose_dtype("int8", "cpu")

"""Imported adapters: plain LoRA that fits its base, signed with nothing claimed, or a reason why not."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from fedllm.adapter import AdapterSpec, AdapterState, to_peft
from fedllm.basemodel.inspect import BaseModel
from fedllm.clock import FakeClock
from fedllm.errors import AdapterInvalid, AliasConflict, NotFound
from fedllm.identity import SigningIdentity
from fedllm.ids import AliasName, Digest
from fedllm.messages.plan import Recipe
from fedllm.registry.model import AdapterVersion, PrivacyRecord
from fedllm.registry.store import Registry, VersionDraft
from fedllm.rng import SeededRng
from fedllm.server.imports import import_adapter, read_folder

KEY = SigningIdentity.from_seed(b"\x01" * 32)
BASE = BaseModel(
    path=Path("models/tiny"), digest=Digest("ab" * 32), model_type="llama", hidden_size=8, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=4, intermediate_size=12, vocab_size=32, context_length=64, tied_embeddings=True,
)  # fmt: skip
SPEC = AdapterSpec(BASE.digest, 2, 4, {"q_proj": (8, 8), "v_proj": (4, 8)}, (0, 1))
ALIAS = AliasName("acme/support")
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


def factors(seed: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    """Return tensors by the names that PEFT gives them."""
    state = AdapterState.initial(SPEC, SeededRng(seed))
    return {f"base_model.model.{name}.weight": array for name, array in state.factors.items()}


def write(folder: Path, tensors: dict[str, np.ndarray[Any, Any]] | None = None, **config: Any) -> Path:
    """Write a PEFT folder with some settings changed; None takes one away."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads(to_peft(AdapterState.initial(SPEC, SeededRng(1)), base_name="x")["adapter_config.json"])
    settings = {k: v for k, v in {**settings, **config}.items() if v is not None or k not in config}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(save(factors() if tensors is None else tensors))
    return folder


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Return an empty registry."""
    return Registry(tmp_path / "registry", KEY.public, FakeClock())


def add(folder: Path, registry: Registry, *, line: str = "support", alias: AliasName | None = ALIAS) -> AdapterVersion:
    """Import a folder."""
    return import_adapter(folder, BASE, registry, KEY, federation=line, alias=alias)


def test_a_manifest_says_that_nothing_is_known(registry: Registry, tmp_path: Path) -> None:
    """No round, no plan, no cohort, no metrics, no epsilon, unit none: and the signature holds for just that."""
    made = registry.signed(add(write(tmp_path / "a"), registry).digest).open(KEY.public)
    assert (made.federation, made.number, made.round, made.method, made.plan) == ("support", 1, 0, "import", "0" * 64)
    assert (made.parent, made.metrics, made.cohort_size, made.survivors) == (None, {}, 0, 0)
    assert made.recipe == Recipe("unknown", 0.0, 0, 0, 0, 0)
    assert (made.privacy.unit, made.privacy.epsilon, made.privacy.source) == ("none", None, "none")
    assert "nothing is claimed" in made.privacy.covers
    assert (made.base, made.spec) == (BASE.digest, SPEC)
    assert registry.aliases().epoch == 0


def test_numbers_count_up_and_the_same_bytes_are_one_version(registry: Registry, tmp_path: Path) -> None:
    """A second folder is v2; the first one again is v1 still; another line may not hold the same bytes."""
    one, two = write(tmp_path / "a"), write(tmp_path / "b", factors(2))
    assert [add(folder, registry).name for folder in (one, two, one)] == ["support@v1", "support@v2", "support@v1"]
    with pytest.raises(AdapterInvalid, match="made exactly support@v1"):
        add(one, registry, line="other")
    assert [v.name for v in registry.versions()] == ["support@v1", "support@v2"]


def test_what_is_stored_is_what_was_checked(registry: Registry, tmp_path: Path) -> None:
    """The factors come back bit for bit, and nothing of the folder's settings but rank, alpha and modules is kept."""
    version = add(write(tmp_path / "a", lora_dropout=0.3, base_model_name_or_path="/home/me/secret"), registry)
    state = registry.state(version.digest)
    for name, array in factors().items():
        np.testing.assert_array_equal(
            state.factors[name.removeprefix("base_model.model.").removesuffix(".weight")], array
        )
    kept = json.loads(registry.fetch(version.digest).files["adapter_config.json"])
    assert (kept["base_model_name_or_path"], kept["lora_dropout"]) == ("tiny", 0.0)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_half_precision_is_widened_exactly(tmp_path: Path, kind: str) -> None:
    """Known answer, value by value: sixteen bits to thirty-two without loss."""
    folder = write(tmp_path / "a")
    halves = {name: array.astype("<f2") for name, array in factors().items()}
    header: dict[str, Any] = {}
    data, expected = b"", {}
    for name, half in halves.items():
        if kind == "F16":
            raw, wide = half.tobytes(), half.astype(np.float32)
        else:
            values = half.astype("<f4").view("<u4") >> 16
            raw = values.astype("<u2").tobytes()
            flat = [struct.unpack("<f", struct.pack("<I", int(v) << 16))[0] for v in values.ravel()]
            wide = np.array(flat, dtype=np.float32).reshape(half.shape)
        header[name] = {"dtype": kind, "shape": half.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
        expected[name.removeprefix("base_model.model.").removesuffix(".weight")] = wide
    head = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    state = read_folder(folder, BASE)
    for name, array in expected.items():
        np.testing.assert_array_equal(state.factors[name], array)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"something_of_tomorrow": True}, "something_of_tomorrow"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"init_lora_weights": ["loftq"]}, "init_lora_weights"),
        ({"peft_type": "LOHA"}, "LORA"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"r": None}, "r None"),
        ({"r": True}, "r True"),
        ({"r": 4}, "factor"),
        ({"r": 0}, "rank 0"),
        ({"lora_alpha": 4.5}, "lora_alpha 4.5"),
        ({"lora_alpha": float("inf")}, "lora_alpha inf"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "'o_proj' has no factors"),
    ],
    ids=str,
)
def test_more_than_plain_lora_is_refused_by_name(tmp_path: Path, config: dict[str, Any], why: str) -> None:
    """A setting that changes what is computed is never ignored, nor is one that nobody here knows."""
    with pytest.raises(AdapterInvalid, match=why):
        read_folder(write(tmp_path / "a", **config), BASE)


def _with(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    tensors: dict[str, Any] = factors()
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        (_with(lambda t: t.pop(f"{PREFIX}.lora_A.weight")), "missing"),
        (_with(lambda t: t.update({f"{PREFIX}.lora_B.weight": np.full((8, 2), np.nan, np.float32)})), "NaN"),
        (_with(lambda t: t.update({f"{PREFIX}.lora_B.weight": np.full((8, 2), np.inf, np.float32)})), "infinity"),
        (_with(lambda t: t.update({f"{PREFIX}.lora_B.weight": np.zeros((8, 3), np.float32)})), "shape"),
        (_with(lambda t: t.update({f"{PREFIX}.lora_B.weight": np.zeros((8, 2), np.float64)})), "F64"),
        (_with(lambda t: t.update({f"{PREFIX}.lora_magnitude_vector": np.zeros(8, np.float32)})), "not a LoRA factor"),
        (_with(lambda t: t.update({"lm_head.weight": np.zeros((4, 8), np.float32)})), "lm_head"),
        ({}, "no factors"),
    ],
    ids=range(8),
)
def test_factors_that_do_not_fit_are_refused(tmp_path: Path, tensors: dict[str, Any], why: str) -> None:
    """Missing, extra, misshapen, unfinite or wrongly typed: each is named."""
    with pytest.raises(AdapterInvalid, match=why):
        read_folder(write(tmp_path / "a", tensors), BASE)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    """Shapes and layers are held against the base's own."""
    folder = write(tmp_path / "a")
    with pytest.raises(AdapterInvalid, match=r"q_proj is adapted in shape \(8, 8\), the base has \(16, 8\)"):
        read_folder(folder, BaseModel(**{**vars(BASE), "num_heads": 4}))
    with pytest.raises(AdapterInvalid, match="layer 1 is adapted, the base has 1"):
        read_folder(folder, BaseModel(**{**vars(BASE), "num_layers": 1}))


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    """A folder with a .bin only is told what is read instead; so is one that is not there."""
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(NotFound, match=r"adapter_model\.safetensors") as caught:
        read_folder(folder, BASE)
    assert "safetensors" in (caught.value.hint or "")
    with pytest.raises(NotFound, match=r"adapter_config\.json"):
        read_folder(tmp_path / "nowhere", BASE)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("data", [b"", b"[]", b"\xff" * 64, b"[" * 50_000])
def test_torn_files_are_refused(tmp_path: Path, name: str, data: bytes) -> None:
    """Whatever a file holds, it is an invalid adapter and no crash."""
    folder = write(tmp_path / "a")
    (folder / name).write_bytes(data)
    with pytest.raises(AdapterInvalid):
        read_folder(folder, BASE)


def test_what_peft_itself_writes_is_read(tmp_path: Path) -> None:
    """Every setting that PEFT 0.21 writes beside plain LoRA is known here, or unset."""
    written: dict[str, Any] = {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "bias": "none", "corda_config": None,
        "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "kasa_config": None, "layer_replication": None,
        "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 4, "lora_bias": False,
        "lora_dropout": 0.05, "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core",
        "modules_to_save": None, "monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2",
        "qalora_group_size": 16, "r": 2, "rank_pattern": {}, "revision": None, "target_modules": ["v_proj", "q_proj"],
        "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_bdlora": None,
        "use_dora": False, "use_qalora": False, "use_rslora": False, "velora_config": None,
    }  # fmt: skip
    folder = write(tmp_path / "a")
    (folder / "adapter_config.json").write_text(json.dumps(written), encoding="utf-8")
    assert read_folder(folder, BASE).spec == SPEC
    written["target_modules"] = r".*\.(q|v)_proj"
    (folder / "adapter_config.json").write_text(json.dumps(written), encoding="utf-8")
    assert read_folder(folder, BASE).spec == SPEC


def test_a_line_has_one_alias(registry: Registry, tmp_path: Path) -> None:
    """It is said with the first import; another one later, or none at first, is refused and adds nothing."""
    one, two = write(tmp_path / "a"), write(tmp_path / "b", factors(2))
    with pytest.raises(NotFound, match="no alias is known"):
        add(one, registry, alias=None)
    add(one, registry)
    with pytest.raises(AliasConflict, match="published to 'acme/support', not to 'acme/other'"):
        add(two, registry, alias=AliasName("acme/other"))
    assert add(two, registry, alias=None).number == 2
    assert registry.lines() == {"support": ALIAS}


def test_imports_at_the_same_moment_get_numbers_of_their_own(tmp_path: Path) -> None:
    """Eight at once, by registries of their own as processes have them: eight versions, numbered 1 to 8."""
    folders = [write(tmp_path / str(n), factors(n)) for n in range(8)]
    registries = [Registry(tmp_path / "registry", KEY.public, FakeClock()) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: add(folders[n], registries[n % 4]), range(8)))
    assert sorted(v.number for v in made) == list(range(1, 9))


def test_rounds_of_the_same_name_are_not_in_the_way(registry: Registry, tmp_path: Path) -> None:
    """A federation's round 1 and an import under its name have numbers of their own; the round finds its version."""
    add(write(tmp_path / "a"), registry, line="tools")
    draft = VersionDraft(
        federation="tools", base_name="base", parent=None, round=1, method="ffa", metrics={},
        recipe=Recipe("sgd", 1.0, 2, 8, 8, 160), cohort_size=4, survivors=3, plan=Digest("cd" * 32),
        privacy=PrivacyRecord("record", "add-or-remove-one", None, 1e-5, "all", "advisory"),
    )  # fmt: skip
    trained = registry.add(AdapterState.initial(SPEC, SeededRng(9)), draft, KEY)
    assert trained.name == "tools@v2"
    assert registry.of_round("tools", 1) == trained

"""Safetensors on disk: sharded or not, in any float, and every way in which a folder can be broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from unit.serving.tiny_families import make_family

from fedllm.errors import BaseUnsupported
from fedllm.serving.native.families import read_config
from fedllm.serving.native.linear import Linear
from fedllm.serving.native.loader import load_weights
from fedllm.serving.native.model import LlamaWeights


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of several shards and their index."""
    folder = tmp_path_factory.mktemp("sharded")
    make_family(folder, "qwen2", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


def dense(linear: Linear) -> Tensor:
    """Return a layer's weight as checkpoints have it."""
    return linear.weight.to_dense() if linear.weight.is_mkldnn else linear.weight.T


def load(folder: Path) -> LlamaWeights:
    """Load a folder in float32."""
    return load_weights(folder, read_config(folder), dtype=torch.float32, device="cpu")


def test_shards_and_dtypes_are_the_same_model(sharded: Path, tmp_path: Path) -> None:
    """One file or many, and half precision on disk, give the tensors that were saved."""
    make_family(tmp_path / "one", "qwen2")
    one, many = load(tmp_path / "one"), load(sharded)
    assert torch.equal(dense(one.head), dense(many.head))
    for a, b in zip(one.layers, many.layers, strict=True):
        assert all(torch.equal(dense(a.linears[group]), dense(b.linears[group])) for group in a.linears)
        bias, other = a.linears["qkv"].bias, b.linears["qkv"].bias
        assert bias is not None and other is not None and torch.equal(bias, other)
    make_family(tmp_path / "half", "qwen2", dtype=torch.float16)
    half = load(tmp_path / "half")
    assert half.head.weight.dtype == torch.float32
    assert torch.equal(dense(half.head), dense(one.head).half().float())


def spoil(sharded: Path, tmp_path: Path, name: str) -> tuple[Path, Path]:
    """Copy the sharded folder; return the copy and the shard that holds a tensor."""
    folder = tmp_path / "copy"
    shutil.copytree(sharded, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder, folder / index[name]


NAME = "model.layers.1.self_attn.k_proj.bias"


def test_a_broken_set_of_shards_is_refused_by_name(sharded: Path, tmp_path: Path) -> None:
    """A missing shard, tensor or index entry, a duplicate, a wrong shape, a stray tensor, integers: each is named."""

    def missing_shard(shard: Path, folder: Path) -> None:
        shard.unlink()

    def cut_shard(shard: Path, folder: Path) -> None:
        shard.write_bytes(shard.read_bytes()[:-5])

    def missing_tensor(shard: Path, folder: Path) -> None:
        tensors = load_file(shard)
        del tensors[NAME]
        save_file(tensors, shard)

    def wrong_shape(shard: Path, folder: Path) -> None:
        save_file(load_file(shard) | {NAME: torch.zeros(17)}, shard)

    def integers(shard: Path, folder: Path) -> None:
        save_file(load_file(shard) | {NAME: torch.zeros(16, dtype=torch.int8)}, shard)

    def two_shards(shard: Path, folder: Path) -> None:
        other = next(path for path in sorted(folder.glob("*.safetensors")) if path != shard)
        save_file(load_file(other) | {NAME: load_file(shard)[NAME]}, other)

    def outside(shard: Path, folder: Path) -> None:
        listing = folder / "model.safetensors.index.json"
        index = json.loads(listing.read_text())
        index["weight_map"][NAME] = "../model.safetensors"
        listing.write_text(json.dumps(index))

    cases = {
        missing_shard: "shard .* is unreadable",
        cut_shard: "shard .* is unreadable",
        missing_tensor: rf"{NAME} .* is missing",
        wrong_shape: rf"{NAME} .* is of shape \(17,\), \(16,\) expected",
        integers: rf"{NAME} .* is torch.int8; allowed: bf16, fp16, fp32",
        two_shards: rf"{NAME} .*(says|in two shards)",
        outside: rf"{NAME} in '../model.safetensors'",
    }
    for number, (break_it, message) in enumerate(cases.items()):
        where = tmp_path / str(number)
        where.mkdir()
        folder, shard = spoil(sharded, where, NAME)
        break_it(shard, folder)
        with pytest.raises(BaseUnsupported, match=message):
            load(folder)


def test_tensors_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    """A bias that the family does not have, or a second file's copy, is not passed over; old rotary tables are."""
    folder = tmp_path / "llama"
    make_family(folder, "llama")
    tensors = load_file(folder / "model.safetensors")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | old, folder / "model.safetensors")
    load(folder)
    stray = "model.layers.0.self_attn.q_proj.bias"
    save_file(tensors | {stray: torch.ones(32)}, folder / "model.safetensors")
    with pytest.raises(BaseUnsupported, match=f"tensor {stray} in .* is not one"):
        load(folder)
    save_file(tensors, folder / "a.safetensors")
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    with pytest.raises(BaseUnsupported, match=r"is in two shards, b\.safetensors"):
        load(folder)


def test_heads_are_tied_as_transformers_ties_them(tmp_path: Path) -> None:
    """Tied: the embedding, unless another head is on disk; untied: the head must be there."""
    folder = tmp_path / "llama"
    make_family(folder, "llama-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors")
    weights = load(folder)
    assert torch.equal(dense(weights.head), weights.embedding)
    save_file(tensors | {"lm_head.weight": embedding + 1}, folder / "model.safetensors")
    assert torch.equal(dense(load(folder).head), embedding + 1)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(BaseUnsupported, match=r"lm_head.weight .* is missing"):
        load(folder)

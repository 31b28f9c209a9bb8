"""What the tiers benchmark serves: thousands of adapters of one base, each with a token of its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.hotswap_model import F32, HIDDEN, ForcingAdapters, make_tiny_base
from fedllm.adapter import AdapterState
from fedllm.ids import Digest

WIDE_VOCAB = 4096
_CANDIDATES, _AT_ONCE = 4096, 512


def make_wide_base(folder: Path) -> None:
    """Write the tiny base of `hotswap_model` with a vocabulary of 4,096: a token for each of 2,000 adapters."""
    from safetensors.numpy import load_file, save_file

    make_tiny_base(folder)
    tensors = load_file(folder / "model.safetensors")
    rows = np.random.default_rng(6).normal(0, 0.2, (WIDE_VOCAB, HIDDEN)).astype(np.float32)
    save_file(tensors | {"model.embed_tokens.weight": rows}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": WIDE_VOCAB}))


class ManyAdapters(ForcingAdapters):
    """Adapters of rank 1 that each say one token.

    They aim at an embedding's difference to the mean embedding. A trained base has few embeddings that are nearest to
    themselves; of these differences, nine in ten are.

    Parameters
    ----------
    folder : Path
        The base model.
    base : Digest
        Its digest.
    """

    def __init__(self, folder: Path, base: Digest) -> None:
        super().__init__(folder, base, rank=1)
        self._aims: F32 = self._rows - self._rows.mean(axis=0)

    def tokens(self, count: int) -> list[int]:
        """Return the tokens that can be forced by the widest margin.

        Raises
        ------
        ValueError
            If fewer than `count` can be forced.
        """
        candidates = np.random.default_rng(3).permutation(len(self._rows))[: max(_CANDIDATES, 2 * count)]
        margins = np.concatenate(
            [self._margins(candidates[at : at + _AT_ONCE]) for at in range(0, len(candidates), _AT_ONCE)]
        )
        clearest = np.argsort(-margins)[:count]
        able = int((margins[clearest] > 0).sum())
        if able < count:
            raise ValueError(f"{able} tokens can be forced, {count} are needed")
        return [int(token) for token in candidates[clearest]]

    def make(self, token: int) -> AdapterState:
        """Return the adapter that says `token`."""
        name = f"{self._mlp}.down_proj.lora_B"
        down = np.zeros_like(self._factors[name])
        down[:, 0] = 1e5 * self._aims[token]
        return AdapterState(self.spec, {**self._factors, name: down})

    def _margins(self, tokens: np.ndarray) -> F32:
        aims = self._aims[tokens]
        logits = (aims / np.sqrt((aims**2).mean(axis=1, keepdims=True)) * self._norm) @ self._rows.T
        places = np.arange(len(tokens))
        own = logits[places, tokens].copy()
        logits[places, tokens] = -np.inf
        margins: F32 = own - logits.max(axis=1)
        return margins

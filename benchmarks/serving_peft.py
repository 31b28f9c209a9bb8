"""PEFT as a provider: left-padded static batches of ``generate``, one adapter a row through ``adapter_names``."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedllm.adapter import AdapterState, to_peft


class Peft:
    """transformers' model; `add_adapters` wraps it, so base requests are timed before without PEFT's layers.

    Parameters
    ----------
    folder : Path
        The base model.
    dtype : torch.dtype
        What the engine computes in, too.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
        self._model.generation_config.eos_token_id = None  # every request is to have its full length
        self._model.generation_config.pad_token_id = 0

    def add_adapters(self, states: Sequence[AdapterState]) -> None:
        """Load adapters under the names ``a0``, ``a1`` and so on."""
        from peft import PeftModel

        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as root:
            warnings.filterwarnings("ignore", category=FutureWarning)
            for index, state in enumerate(states):
                folder = Path(root) / f"a{index}"
                folder.mkdir()
                for name, data in to_peft(state, base_name="base").items():
                    (folder / name).write_bytes(data)
                if index == 0:
                    self._model = PeftModel.from_pretrained(self._model, folder, adapter_name="a0").eval()
                else:
                    self._model.load_adapter(folder, adapter_name=f"a{index}")

    def generate(self, prompts: Sequence[Sequence[int]], out: int, names: Sequence[str] | None) -> tuple[float, float]:
        """Return wall seconds of the whole batch, and to its first token.

        Parameters
        ----------
        names : Sequence[str], optional
            An adapter for each prompt; None is the model as it is: the base, or its active adapter.
        """
        first: list[float] = []

        def note(_: Tensor, scores: Tensor) -> Tensor:
            first.append(time.perf_counter())
            return scores

        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        extra = {} if names is None else {"adapter_names": list(names)}
        start = time.perf_counter()
        with torch.inference_mode():
            result = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=out,
                do_sample=False,
                logits_processor=[note],
                **extra,
            )
        seconds = time.perf_counter() - start
        assert result.shape[1] == width + out
        return seconds, first[0] - start

    def use(self, name: str) -> None:
        """Make one adapter active for all rows."""
        self._model.set_adapter(name)

    def logits(self, tokens: Sequence[int], name: str) -> Tensor:
        """Return the float32 logits at every position of one sequence, shape ``(tokens, vocab)``."""
        with torch.inference_mode():
            result: Tensor = self._model(input_ids=torch.tensor([list(tokens)]), adapter_names=[name]).logits[0].float()
        return result

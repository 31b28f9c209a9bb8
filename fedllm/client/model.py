"""The base model, loaded once, with LoRA factors that are moved in and out as plain arrays.

The model is cut in two below the first adapted layer. The lower part is frozen and sees every record many times,
so its output is computed once a record and kept in memory (never on disk: it is the private text in another form);
autograd and Opacus see the upper part only.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedllm.adapter import AdapterSpec, AdapterState, Factor
from fedllm.client.dataset import IGNORED, Example
from fedllm.errors import AdapterInvalid, BaseMismatch, BaseUnsupported, IntegrityError
from fedllm.ids import Digest

PREFIX_CACHE_BYTES = 1 << 29
"""Hidden states kept at most; records beyond it are computed again each time."""


class LoraModel:
    """A base model and at most one adapter spec on it.

    Parameters
    ----------
    folder : Path
        Hugging Face folder of a Llama-family causal language model.
    base : Digest
        Its digest, computed by the caller.
    checkpointing : bool
        Recompute activations in the backward pass: about a third more time, much less memory.

    Raises
    ------
    BaseUnsupported
        If the folder holds another kind of model.
    """

    def __init__(self, folder: Path, base: Digest, *, checkpointing: bool = False) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # a daemon's stderr is its log
        self.base = base
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=native_dtype(), local_files_only=True)
        if not (hasattr(model, "model") and hasattr(model.model, "layers") and hasattr(model.model, "norm")):
            raise BaseUnsupported(f"{folder} holds a {type(model).__name__}; a Llama-family model is needed")
        self._causal: Any = model.requires_grad_(False).eval()
        self._checkpointing = checkpointing
        self._peft: Any = None
        self._spec: AdapterSpec | None = None
        self._below: Any = None
        self._tail: Any = None
        self._prefix: dict[Example, Tensor] = {}
        self._prefix_bytes = 0

    @property
    def tail(self) -> nn.Module:
        """The adapted layers and the final norm; takes ``inputs_embeds`` of shape ``(batch, tokens, hidden)``."""
        tail: nn.Module = self._tail
        return tail

    def adapt(self, spec: AdapterSpec) -> None:
        """Put zero-effect LoRA factors of `spec` on the model, removing any other spec's.

        Raises
        ------
        BaseMismatch
            If the spec is for another base model.
        AdapterInvalid
            If the base model has no such projections.
        """
        from peft import LoraConfig, get_peft_model

        if spec == self._spec:
            return
        if spec.base != self.base:
            raise BaseMismatch(
                f"the adapter is for base {spec.base[:16]}, the model here is {self.base[:16]}",
                hint="'fedllm model pull' the base that the federation names",
            )
        if self._peft is not None:
            self._causal = self._peft.unload()
            self._peft = self._spec = None
        layers = self._causal.model.layers
        if spec.layers[-1] >= len(layers):
            raise AdapterInvalid(f"spec adapts layer {spec.layers[-1]}, the base model has {len(layers)}")
        config = LoraConfig(
            r=spec.rank, lora_alpha=spec.alpha, target_modules=sorted(spec.modules),
            layers_to_transform=list(spec.layers), lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        )  # fmt: skip
        with warnings.catch_warnings():
            # peft asks transformers a question that transformers has renamed
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            self._peft = get_peft_model(self._causal, config)
        self._spec = spec
        self._peft.requires_grad_(False)
        for name, shape in spec.layout().entries:
            if tuple(self._parameter(name).shape) != shape:
                raise AdapterInvalid(f"factor {name}: base needs {tuple(self._parameter(name).shape)}, spec {shape}")
        self._cut(spec.layers[0])

    def parameters(self, factors: Sequence[Factor]) -> list[nn.Parameter]:
        """Return the parameters of the given factors in the layout's order, and let only them be trained."""
        spec = self._adapted()
        self._peft.requires_grad_(False)
        chosen = [self._parameter(name) for name, _ in spec.layout(factors).entries]
        for parameter in chosen:
            parameter.requires_grad_(True)
        return chosen

    def load_state(self, state: AdapterState) -> None:
        """Load factors, then read them back: nothing may silently fail to load.

        Raises
        ------
        BaseMismatch, AdapterInvalid
            As `adapt`.
        IntegrityError
            If what is in the model afterwards is not what was to be loaded.
        """
        self.adapt(state.spec)
        with torch.no_grad():
            for name, array in state.factors.items():
                self._parameter(name).copy_(torch.from_numpy(np.ascontiguousarray(array)))
        if self.read_state().digest != state.digest:
            raise IntegrityError(f"adapter {state.digest[:16]} did not load: the model holds other values")

    def read_state(self) -> AdapterState:
        """Return the factors that are in the model, read from PEFT's own modules, never from a wrapper."""
        spec = self._adapted()
        names = [name for name, _ in spec.layout().entries]
        return AdapterState(spec, {n: self._parameter(n).detach().float().numpy().copy() for n in names})

    def answer_losses(self, examples: Sequence[Example], *, upper: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Return each record's summed answer loss and its number of answer tokens, both of shape ``(batch,)``.

        No record's loss depends on its batch mates: rows are padded on the right, attention is causal, and every
        record has a sum of its own. Logits are made at answer positions only.

        Parameters
        ----------
        examples : Sequence[Example]
            At least one.
        upper : nn.Module, optional
            Stands in for `tail`, e.g. a wrapper with hooks.
        """
        states = self._prefix_states(examples)
        if self._checkpointing and torch.is_grad_enabled():
            states.requires_grad_(True)  # re-entrant checkpointing passes gradients only where its input has them
        hidden = (upper or self._tail)(inputs_embeds=states, use_cache=False).last_hidden_state
        rows: list[int] = []
        columns: list[int] = []
        targets: list[int] = []
        for row, example in enumerate(examples):
            for at, label in enumerate(example.labels[1:]):
                if label != IGNORED:
                    rows.append(row)
                    columns.append(at)
                    targets.append(label)
        logits = self._causal.lm_head(hidden[rows, columns]).float()
        losses = nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none")
        index = torch.tensor(rows)
        sums = torch.zeros(len(examples)).index_add(0, index, losses)
        return sums, torch.bincount(index, minlength=len(examples)).clamp(min=1)

    def train_mode(self, on: bool) -> None:
        """Switch training mode; dropout is 0, so only Opacus and checkpointing see a difference."""
        self._tail.train(on)

    def _cut(self, first: int) -> None:
        inner = self._causal.model
        self._below, self._tail = _part(inner, 0, first), _part(inner, first, len(inner.layers))
        self._below.norm = nn.Identity()
        self._prefix.clear()
        self._prefix_bytes = 0
        if self._checkpointing:
            # Non-re-entrant checkpointing loses per-sample gradients under Opacus' hooks. Set by hand: the public
            # switch has another name in each release of transformers.
            for layer in inner.layers:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=True)

    def _prefix_states(self, examples: Sequence[Example]) -> Tensor:
        """Return padded states below the first adapted layer, ``(batch, longest, hidden)``."""
        missing = [example for example in examples if example not in self._prefix]
        fresh: dict[Example, Tensor] = {}
        if missing:
            ids = torch.zeros(len(missing), max(len(e.input_ids) for e in missing), dtype=torch.long)
            for row, example in enumerate(missing):
                ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
            # Scoring runs in inference mode, whose tensors autograd refuses; what is kept may be trained on later.
            with torch.inference_mode(False), torch.no_grad():
                states = self._below(input_ids=ids, use_cache=False).last_hidden_state
                for row, example in enumerate(missing):
                    fresh[example] = states[row, : len(example.input_ids)].clone()
                    self._keep(example, fresh[example])
        found = [fresh[e] if e in fresh else self._prefix[e] for e in examples]
        return nn.utils.rnn.pad_sequence(found, batch_first=True)

    def _keep(self, example: Example, states: Tensor) -> None:
        size = states.numel() * states.element_size()
        if self._prefix_bytes + size <= PREFIX_CACHE_BYTES:
            self._prefix[example] = states
            self._prefix_bytes += size

    def _adapted(self) -> AdapterSpec:
        if self._spec is None:
            raise AdapterInvalid("the model has no adapter yet: load one first")
        return self._spec

    def _parameter(self, name: str) -> nn.Parameter:
        path, _, factor = name.rpartition(".")
        try:
            parameter: nn.Parameter = self._causal.get_submodule(f"{path}.{factor}.default").weight
        except AttributeError:
            raise AdapterInvalid(f"factor {name}: the base model has no projection {path}") from None
        return parameter


def native_dtype() -> torch.dtype:
    """Return bfloat16 where this CPU multiplies it, else float32: emulated bfloat16 is over ten times slower."""
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def _part(inner: Any, start: int, stop: int) -> Any:
    """Return `inner` with only some of its layers; modules are shared, not copied."""
    part = copy.copy(inner)
    part._modules = dict(inner._modules)  # nn.Module has no public shallow copy
    part.layers = nn.ModuleList(inner.layers[start:stop])
    if getattr(inner.config, "layer_types", None):  # a layer's attention window is looked up by its place
        part.config = copy.copy(inner.config)
        part.config.layer_types = inner.config.layer_types[start:stop]
    return part

"""From scheduled work to tensors and back: one forward pass, then sampling or scoring."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedllm.kernels import build_segments, plan_lora, write_slot
from fedllm.serving.engine import TokenScore
from fedllm.serving.native.graphs import DecodeBatch, DecodeGraphs
from fedllm.serving.native.loader import PackedAdapter
from fedllm.serving.native.model import LlamaModel, Span, StepInput
from fedllm.serving.native.sampler import TokenPicker
from fedllm.serving.native.scheduler import Work
from fedllm.serving.native.sequence import Sequence

GRAMMAR_STUCK = "the grammar of this request allows no token of the base's vocabulary at this place"
"""What a sequence fails with when its constraints leave nothing to choose."""

_SCORE_ROWS = 64
"""Rows of float32 logits scored at a time: 64 rows of a 49k vocabulary are 12 MiB."""


class Runner:
    """Runs steps on one model. Belongs to one thread.

    Parameters
    ----------
    model : LlamaModel
        Weights, adapter stacks and KV cache.
    graphs : DecodeGraphs, optional
        Captured decode steps of that model, for steps in which every sequence has one new token.
    """

    def __init__(self, model: LlamaModel, graphs: DecodeGraphs | None = None) -> None:
        self.model = model
        self._graphs = graphs

    def write_adapter(self, slot: int, adapter: PackedAdapter) -> None:
        """Copy an adapter into a slot; call it between steps only."""
        with torch.inference_mode():
            for stacks, factors in zip(self.model.lora, adapter.layers, strict=True):
                for group, stack in stacks.items():
                    write_slot(stack, slot, factors.get(group, []), adapter.rank, adapter.scale)

    def run(self, work: Seq[Work], fresh_blocks: list[int]) -> None:
        """Compute one step; sampled tokens and scores are appended to their sequences."""
        # Decodes first: equal token counts share one attention call.
        ordered = sorted(work, key=lambda item: item.count != 1)
        with torch.inference_mode():
            if fresh_blocks:
                self.model.clear_blocks(fresh_blocks)
            logits_RV, wanted = self._logits(ordered)
            start = 0
            samplers: list[tuple[Work, int]] = []
            for item, rows in zip(ordered, wanted, strict=True):
                if item.sequence.scoring:
                    self._score(item, logits_RV[start : start + rows])
                elif rows:
                    samplers.append((item, start))
                start += rows
            self._sample(samplers, logits_RV)

    def _logits(self, work: Seq[Work]) -> tuple[Tensor, list[int]]:
        """Return the logits of all wanted rows, and how many of them each item wants."""
        # Decodes come first: if the last item has one new token, all have.
        if self._graphs is None or work[-1].count != 1 or not self._graphs.serves(len(work)):
            step, wanted = self._input(work)
            return self.model.forward(step), wanted
        sequences = [item.sequence for item in work]
        logits_BV = self._graphs.forward(
            DecodeBatch(
                tokens=[sequence.tokens[sequence.computed] for sequence in sequences],
                positions=[sequence.computed for sequence in sequences],
                slots=[sequence.slot for sequence in sequences],
                blocks=[sequence.blocks for sequence in sequences],
            )
        )
        wanted = [len(_logit_positions(item)) for item in work]
        if all(wanted):
            return logits_BV, wanted
        rows = [row for row, count in enumerate(wanted) if count]
        return logits_BV.index_select(0, torch.tensor(rows, dtype=torch.int64, device=self.model.device)), wanted

    def _input(self, work: Seq[Work]) -> tuple[StepInput, list[int]]:
        device = self.model.device
        tokens: list[int] = []
        positions: list[int] = []
        cache_rows: list[int] = []
        slots: list[int] = []
        logit_rows: list[int] = []
        wanted: list[int] = []
        size = self.model.block_tokens
        for item in work:
            sequence, begin = item.sequence, item.sequence.computed
            end = begin + item.count
            first = len(tokens)
            tokens += sequence.tokens[begin:end]
            positions += range(begin, end)
            blocks = sequence.blocks
            cache_rows += [blocks[p // size] * size + p % size for p in range(begin, end)]
            slots += [sequence.slot] * item.count
            rows = _logit_positions(item)
            logit_rows += [first + p - begin for p in rows]
            wanted.append(len(rows))
        step = StepInput(
            tokens_T=torch.tensor(tokens, device=device),
            positions_T=torch.tensor(positions, device=device),
            cache_rows_T=torch.tensor(cache_rows, device=device),
            spans=tuple(self._spans(work)),
            lora=plan_lora(build_segments(slots), device=device),
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64, device=device),
        )
        return step, wanted

    def _spans(self, work: Seq[Work]) -> list[Span]:
        decodes = [item for item in work if item.count == 1]
        spans = [self._span(0, decodes)] if decodes else []
        row = len(decodes)
        for item in work[len(decodes) :]:
            spans.append(self._span(row, [item]))
            row += item.count
        return spans

    def _span(self, row: int, work: Seq[Work]) -> Span:
        """Return the attention of decodes together, or of one prompt chunk."""
        size, count = self.model.block_tokens, work[0].count
        ends = [item.sequence.computed + count for item in work]
        width = -(-max(ends) // size)
        blocks = [item.sequence.blocks[:width] for item in work]
        blocks_BN = np.array([b + [b[0]] * (width - len(b)) for b in blocks], dtype=np.int64)
        if self.model.paged and count == 1:
            table = torch.from_numpy(blocks_BN).to(self.model.device)
            return Span(slice(row, row + len(work)), table, None, len(work), 1)
        last_BQ = np.array(ends)[:, None] - count + np.arange(count)[None, :]
        hidden_BQL = np.arange(width * size)[None, None, :] > last_BQ[:, :, None]
        mask_BQL = np.where(hidden_BQL, np.float32("-inf"), np.float32(0.0)).astype(np.float32)
        config = self.model.config
        if count > 1:
            mask_BQL = np.tile(mask_BQL, (1, config.num_attention_heads // config.num_key_value_heads, 1))
        return Span(
            rows=slice(row, row + len(work) * count),
            blocks_BN=torch.from_numpy(blocks_BN).to(self.model.device),
            mask_B1QL=torch.from_numpy(mask_BQL)[:, None].to(self.model.device, self.model.dtype),
            sequences=len(work),
            count=count,
        )

    def _sample(self, samplers: Seq[tuple[Work, int]], logits_RV: Tensor) -> None:
        if not samplers:
            return
        rows = torch.tensor([row for _, row in samplers], device=self.model.device)
        picked_BV = logits_RV if len(samplers) == logits_RV.shape[0] else logits_RV.index_select(0, rows)
        best_B, greedy_B = picked_BV.max(dim=-1)
        finite = torch.isfinite(best_B).tolist()
        greedy = greedy_B.tolist()
        shaped: list[int] = []
        for index, (item, _) in enumerate(samplers):
            sequence = item.sequence
            if not finite[index]:
                sequence.failure = f"adapter version {sequence.version[:8]} gives non-finite logits"
            elif sequence.params.plain:
                sequence.append(greedy[index])
            else:
                shaped.append(index)
        if shaped:
            part_SV = picked_BV[torch.tensor(shaped, device=picked_BV.device)]
            rows_SV = part_SV.to(torch.float32).cpu().numpy()
            for index, row_V in zip(shaped, rows_SV, strict=True):
                _pick(samplers[index][0].sequence, row_V)

    def _score(self, item: Work, logits_RV: Tensor) -> None:
        sequence = item.sequence
        rows = _logit_positions(item)
        targets = torch.tensor([sequence.tokens[p + 1] for p in rows], device=self.model.device)
        for start in range(0, len(rows), _SCORE_ROWS):
            part_NV = logits_RV[start : start + _SCORE_ROWS].to(torch.float32)
            chosen_N = part_NV.gather(1, targets[start : start + _SCORE_ROWS, None])[:, 0]
            regret_N = part_NV.amax(dim=-1) - chosen_N
            logprob_N = chosen_N - part_NV.logsumexp(dim=-1)
            if not bool(torch.isfinite(logprob_N).all()):
                sequence.failure = f"adapter version {sequence.version[:8]} gives non-finite logits"
                return
            pairs = zip(regret_N.tolist(), logprob_N.tolist(), strict=True)
            sequence.scores += [TokenScore(regret, logprob) for regret, logprob in pairs]
        if item.completes:
            sequence.finish_reason = "stop"


def _pick(sequence: Sequence, logits_V: NDArray[np.float32]) -> None:
    """Append the token that a sequence's own parameters choose."""
    if sequence.picker is None:
        sequence.picker = TokenPicker(
            sequence.params, sequence.tokens[: sequence.prompt_length], generator=sequence.generator
        )
    choice = sequence.picker.pick(logits_V)
    if choice is None:
        sequence.failure = GRAMMAR_STUCK
        return
    before = sequence.generated
    sequence.append(choice.token)
    if sequence.generated == before:
        return
    if choice.logprobs is not None:
        sequence.logprobs.append(choice.logprobs)
    try:
        if sequence.picker.accept(choice.token):
            sequence.finish_reason = "stop"
    except (RuntimeError, ValueError):
        # A grammar that contradicts its own mask is one request's bad luck, not the end of the step thread.
        sequence.failure = GRAMMAR_STUCK


def _logit_positions(item: Work) -> range:
    """Return the positions of a work item whose logits are needed."""
    sequence, end = item.sequence, item.sequence.computed + item.count
    if sequence.scoring:
        return range(max(sequence.computed, sequence.prompt_length - 1), min(end, len(sequence.tokens) - 1))
    return range(end - 1, end) if item.completes else range(0)

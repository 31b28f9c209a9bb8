"""Which tokens to compute next: continuous batching with chunked prefill. Pure Python; no torch.

Orca (OSDI '22) for iteration-level batching, Sarathi (arXiv 2308.16369) for chunked prefill. Every step takes
one token of each decoding sequence, then fills the token budget with prompt chunks, oldest first. When blocks
run out the youngest running sequence gives its blocks back and is recomputed later from its tokens.

Clients take turns by tokens (`fedllm.serving.fair`); within a client nothing overtakes: its sequences start in the
order in which they came. A client is charged for each prompt token that is computed, when it is computed, and for each
output token, once: not for what the prefix cache had, nor for what is computed again after a preemption.

The longest running one gets a token or a chunk in every step and is never preempted, so a sequence starts at the
latest after as many steps as those that were taken before it have tokens. Of its own client these are the older ones;
of each other client, no more is served while it waits than its own client is, over weights, and twice the
bound U of `fedllm.serving.fair`. Nobody starves. A sequence whose beginning another is just computing waits until
that is done, and takes the blocks from the cache; so do all that come after it.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.serving.fair import OUTPUT_WEIGHT, PROMPT_WEIGHT, FairQueue
from fedllm.serving.native.blocks import BlockPool
from fedllm.serving.native.sequence import Sequence


@dataclass(frozen=True)
class Work:
    """`count` tokens of one sequence, from its first uncomputed one on."""

    sequence: Sequence
    count: int

    @property
    def completes(self) -> bool:
        """Whether this reaches the sequence's last token, so that a next one can be sampled."""
        return self.count == self.sequence.pending


class Scheduler:
    """Owns the queues and the blocks.

    Parameters
    ----------
    pool : BlockPool
        The KV cache's blocks.
    max_running : int
        Most sequences in a batch.
    max_step_tokens : int
        Most tokens in a step; at least `max_running`.
    """

    def __init__(self, pool: BlockPool, *, max_running: int, max_step_tokens: int) -> None:
        if max_step_tokens < max_running:
            raise ValueError(f"max_step_tokens {max_step_tokens} is below max_running {max_running}")
        self.pool = pool
        self.max_running = max_running
        self.max_step_tokens = max_step_tokens
        self.waiting: FairQueue[Sequence] = FairQueue()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prefix_hit_tokens = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence.

        Raises
        ------
        ValueError
            If it could never run; admission checks first.
        """
        most = len(sequence.tokens) + (0 if sequence.scoring else sequence.params.max_tokens)
        if self.pool.needed(most, 0) > self.pool.count:
            raise ValueError(f"sequence needs {self.pool.needed(most, 0)} blocks, there are {self.pool.count}")
        self.waiting.push(sequence.client, sequence, weight=sequence.weight)

    def cancel(self, sequence: Sequence) -> None:
        """Drop a sequence wherever it is; nothing happens if it has already ended."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Work]:
        """Choose the next step's work and allocate its blocks."""
        budget = self.max_step_tokens
        chosen: list[Work] = []
        preempted = self.preemptions
        decodes = sum(s.pending == 1 for s in self.running)
        index = 0
        # `running` may shrink from its end meanwhile; what has been chosen stays, it is older.
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            decodes -= sequence.pending == 1
            count = min(sequence.pending, max(1, budget - decodes))
            if not self._grow(sequence, count):
                break
            chosen.append(Work(sequence, count))
            budget -= count
            index += 1
        # Charged before anybody is admitted: who comes next is decided by what this step is for.
        for work in chosen:
            self._charge_given(work)
        while budget > 0 and len(self.running) < self.max_running and preempted == self.preemptions:
            head = self.waiting.peek()
            admitted = None if head is None or self._soon_cached(head) else self._admit(head, budget)
            if admitted is None:
                break
            self.running.append(self.waiting.pop())
            self._charge_given(admitted)
            chosen.append(admitted)
            budget -= admitted.count
        return chosen

    def finish(self, done: list[Work]) -> None:
        """Note computed tokens, remember full blocks and free the blocks of ended sequences.

        Call it after the sampled tokens were appended.
        """
        for work in done:
            sequence = work.sequence
            sequence.computed += work.count
            self._charge_generated(sequence)
            self.pool.remember(
                sequence.cache_root,
                sequence.tokens,
                sequence.blocks,
                sequence.block_keys,
                sequence.computed,
            )
            if sequence.ended:
                self.running.remove(sequence)
                self._release(sequence)

    def _soon_cached(self, sequence: Sequence) -> bool:
        """Whether a running sequence is about to compute blocks that this one would compute again."""
        size = self.pool.block_tokens
        usable = (len(sequence.tokens) - 1) // size * size  # one token is left to compute
        if sequence.scoring or not usable:
            return False
        for other in self.running:
            # Decoding ones are left out: what they say next is nobody's beginning.
            left = min(usable, other.prompt_length // size * size)
            if other.cache_root == sequence.cache_root and other.computed < left:
                begin = other.computed // size * size
                if other.tokens[: begin + size] == sequence.tokens[: begin + size]:
                    return True
        return False

    def _admit(self, sequence: Sequence, budget: int) -> Work | None:
        if not sequence.scoring:
            sequence.blocks, sequence.block_keys = self.pool.match(sequence.cache_root, sequence.tokens)
            sequence.computed = sequence.cached = len(sequence.blocks) * self.pool.block_tokens
        # Room for all of it and one more token is asked for, though only a chunk is taken now: admitting a
        # long prompt that cannot finish would only push out others.
        whole = len(sequence.tokens) + (not sequence.scoring)
        if self.pool.needed(whole, len(sequence.blocks)) > self.pool.free:
            self._release(sequence)
            return None
        self.prefix_hit_tokens += sequence.cached
        if sequence.prompt_cached is None:
            sequence.prompt_cached = sequence.cached
        sequence.charged = max(sequence.charged, sequence.cached)
        count = min(sequence.pending, budget)
        sequence.blocks += self.pool.allocate(self.pool.needed(sequence.computed + count, len(sequence.blocks)))
        return Work(sequence, count)

    def _grow(self, sequence: Sequence, count: int) -> bool:
        need = self.pool.needed(sequence.computed + count, len(sequence.blocks))
        while need > self.pool.free:
            victim = self.running.pop()
            self._release(victim)
            self.waiting.push_front(victim.client, victim)
            self.preemptions += 1
            if victim is sequence:
                return False
        sequence.blocks += self.pool.allocate(need)
        return True

    def _charge_given(self, work: Work) -> None:
        sequence = work.sequence
        end = min(sequence.computed + work.count, sequence.given)
        if end > sequence.charged:
            self.waiting.charge(sequence.client, PROMPT_WEIGHT * (end - sequence.charged))
            sequence.charged = end

    def _charge_generated(self, sequence: Sequence) -> None:
        new = len(sequence.tokens) - max(sequence.charged, sequence.given)
        if new > 0:
            self.waiting.charge(sequence.client, OUTPUT_WEIGHT * new)
            sequence.charged = len(sequence.tokens)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.block_keys = []
        if not sequence.ended:
            sequence.scores.clear()
        sequence.computed = sequence.cached = 0

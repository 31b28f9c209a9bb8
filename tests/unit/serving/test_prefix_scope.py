"""The prefix cache between tenants: what one asked, another cannot find."""

from __future__ import annotations

from fedllm.ids import Digest
from fedllm.serving.engine import SamplingParams
from fedllm.serving.native.blocks import BlockPool
from fedllm.serving.native.scheduler import Scheduler
from fedllm.serving.native.sequence import Sequence


def test_another_scope_finds_nothing_in_the_prefix_cache() -> None:
    """One version, one prompt, two tenants: the second computes it again, and the first still hits."""
    pool = BlockPool(64, 4)
    scheduler = Scheduler(pool, max_running=4, max_step_tokens=64)

    def run(scope: str) -> int:
        sequence = Sequence(
            id=len(scope), slot=0, version=Digest("a" * 64), tokens=list(range(13)), prompt_length=13,
            params=SamplingParams(max_tokens=1), scope=scope,
        )  # fmt: skip
        scheduler.add(sequence)
        before = scheduler.prefix_hit_tokens
        work = scheduler.schedule()
        sequence.append(1)
        scheduler.finish(work)
        return scheduler.prefix_hit_tokens - before

    assert [run("acme"), run("acme"), run("other"), run("other"), run("acme")] == [0, 12, 0, 12, 12]

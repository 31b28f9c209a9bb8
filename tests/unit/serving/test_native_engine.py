"""The native engine against transformers and PEFT, and its promises under load."""

from __future__ import annotations

import asyncio

import pytest
import torch
from unit.serving.tiny_llama import BASE, VOCAB, make_adapter, make_forcing_adapter, running_engine

from fedllm.adapter import to_peft
from fedllm.errors import AdapterInvalid, BaseMismatch, NotFound, Overloaded, ProcessDied, RequestInvalid
from fedllm.ids import Digest
from fedllm.serving.engine import GenerationRequest, SamplingParams

# PEFT still reads an attribute that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

PROMPTS = [[5, 9, 2, 77, 30], [1] * 11, list(range(40, 61)), [300, 2], [8, 8, 9, 10, 11, 12, 200]]


async def collect(engine, digest: Digest, prompt: list[int], **params) -> list[int]:
    """Return all tokens of one request."""
    request = GenerationRequest(tuple(prompt), SamplingParams(**{"max_tokens": 12, **params}))
    with engine.lease(digest) as lease:
        stream = engine.generate(lease, request)
        try:
            return [token async for chunk in stream for token in chunk.token_ids]
        finally:
            await stream.aclose()


async def load(engine, state) -> Digest:
    """Load an adapter under its own digest."""
    await engine.load(state.digest, state)
    return state.digest


def oracle(folder, tmp_path, states) -> dict[str, object]:
    """Return transformers' base model and one PEFT model per adapter."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    models = {BASE: LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)}
    for state in states:
        where = tmp_path / state.digest[:8]
        where.mkdir()
        for name, data in to_peft(state, base_name="tiny").items():
            (where / name).write_bytes(data)
        base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        models[state.digest] = PeftModel.from_pretrained(base, where)
    return models


def oracle_greedy(model, prompt: list[int], count: int) -> list[int]:
    """Decode greedily by recomputing everything for every token."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_matches_transformers_and_peft_alone_and_in_one_batch(tiny_folder, tmp_path, drive) -> None:
    """Greedy tokens equal PEFT's for every version, one by one and all at once, with chunked prompts."""
    partial = make_adapter(2, rank=3, modules=("q_proj", "v_proj", "down_proj"), layers=(1,))
    states = [make_adapter(1), partial, make_adapter(3, rank=8)]
    models = oracle(tiny_folder, tmp_path, states)
    cases = [(digest, prompt) for digest in models for prompt in PROMPTS]
    want = [oracle_greedy(models[digest], prompt, 12) for digest, prompt in cases]

    async def body():
        async with running_engine(tiny_folder, max_step_tokens=20, kv_blocks=256) as engine:
            for state in states:
                await load(engine, state)
            single = [await collect(engine, digest, prompt) for digest, prompt in cases]
            batched = await asyncio.gather(*(collect(engine, digest, prompt) for digest, prompt in cases))
            assert engine.stats().prefix_hit_tokens > 0
            return single, batched

    single, batched = drive(body())
    assert single == want
    assert batched == want
    assert len({tuple(tokens) for tokens in want}) > len(want) // 2


def test_scores_are_transformers_logits(tiny_folder, tmp_path, drive) -> None:
    """Regret and logprob of given tokens equal those of transformers to 1e-4, across chunk borders."""
    state = make_adapter(4)
    models = oracle(tiny_folder, tmp_path, [state])
    prompt, tokens = list(range(3, 20)), [7, 1, 300, 44, 44, 2, 9, 120]

    async def body():
        async with running_engine(tiny_folder, max_step_tokens=18) as engine:
            await load(engine, state)
            scores = {}
            for digest in models:
                with engine.lease(digest) as lease:
                    scores[digest] = await engine.score(lease, prompt, tokens)
                    assert await engine.score(lease, prompt, []) == []
            assert engine.stats().free_blocks == 64
            return scores

    for digest, scores in drive(body()).items():
        with torch.inference_mode():
            logits = models[digest](torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1)
        for i, token in enumerate(tokens):
            assert scores[i].logprob == pytest.approx(float(logprobs[i, token]), abs=1e-4)
            assert scores[i].regret == pytest.approx(float(logits[i].max() - logits[i, token]), abs=1e-4)


def test_base_rows_do_not_feel_adapters_in_their_batch(tiny_folder, drive) -> None:
    """A base request gets the same tokens next to adapters as next to other base requests."""

    async def body():
        async with running_engine(tiny_folder) as engine:
            other = await load(engine, make_adapter(9, scale=5.0))
            alone = await asyncio.gather(*(collect(engine, BASE, p) for p in PROMPTS))
            versions = [BASE, other, BASE, other, BASE]
            pairs = zip(versions, PROMPTS, strict=True)
            mixed = await asyncio.gather(*(collect(engine, d, p) for d, p in pairs))
            return alone, mixed

    alone, mixed = drive(body())
    assert mixed[0::2] == alone[0::2]
    assert mixed[1::2] != alone[1::2]


def test_preempted_requests_end_with_the_same_tokens(tiny_folder, drive) -> None:
    """With too few blocks for all, some are recomputed; nobody notices."""

    async def body():
        async with running_engine(tiny_folder) as engine:
            want = [await collect(engine, BASE, p, max_tokens=40) for p in PROMPTS]
        async with running_engine(tiny_folder, kv_blocks=20) as engine:
            got = await asyncio.gather(*(collect(engine, BASE, p, max_tokens=40) for p in PROMPTS))
            assert engine.stats().preemptions > 0
            assert engine.stats().free_blocks == 20
        return want, got

    want, got = drive(body())
    assert got == want


def test_a_stream_keeps_its_version_while_others_are_swapped_in(tiny_folder, drive) -> None:
    """100 versions come and go under streams: each says only its own token, and no slot leaks."""
    states = [make_forcing_adapter(tiny_folder, 20 + i) for i in range(100)]

    async def body():
        async with running_engine(tiny_folder, slots=3) as engine:
            streams = []
            for i, state in enumerate(states):
                digest = await load(engine, state)
                engine.pin(digest)
                streams.append(asyncio.create_task(collect(engine, digest, [1, 2, 3], max_tokens=6)))
                await asyncio.sleep(0)
                if i:
                    engine.unpin(states[i - 1].digest)
                    await engine.unload(states[i - 1].digest)
            outputs = await asyncio.gather(*streams)
            engine.unpin(states[-1].digest)
            await engine.unload(states[-1].digest)
            assert engine.loaded() == ()
            assert engine.stats().slots_used == 0
            assert engine.stats().free_blocks == engine.stats().total_blocks
            return outputs

    assert drive(body()) == [[20 + i] * 6 for i in range(100)]


def test_cancelling_frees_blocks_and_slot(tiny_folder, drive) -> None:
    """A stream closed in the middle, or before its first token, leaves nothing behind."""

    async def body():
        async with running_engine(tiny_folder) as engine:
            digest = await load(engine, make_adapter(1))
            for after in (0, 1, 3):
                with engine.lease(digest) as lease:
                    request = GenerationRequest((1, 2, 3), SamplingParams(max_tokens=200))
                    stream = engine.generate(lease, request)
                    for _ in range(after):
                        await anext(stream)
                    await stream.aclose()
            await engine.unload(digest)
            await collect(engine, BASE, [1], max_tokens=1)
            stats = engine.stats()
            assert (stats.free_blocks, stats.slots_used, stats.running) == (stats.total_blocks, 0, 0)

    drive(body())


def test_a_full_queue_refuses_and_recovers(tiny_folder, drive) -> None:
    """One request more than the limit is refused with a time to retry; after the others it is served."""

    async def body():
        async with running_engine(tiny_folder, max_running=2, max_waiting=1) as engine:
            tasks = [asyncio.create_task(collect(engine, BASE, [i + 1])) for i in range(3)]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded, match="3 requests are in flight") as refused:
                await collect(engine, BASE, [9])
            assert refused.value.retry_after_s > 0
            await asyncio.gather(*tasks)
            assert len(await collect(engine, BASE, [9])) == 12

    drive(body())


def test_unusable_adapters_are_refused_and_take_no_slot(tiny_folder, drive) -> None:
    """Rank, base and layers are checked before a slot is taken; the error names both sides."""

    async def body():
        async with running_engine(tiny_folder, max_rank=4) as engine:
            bad = [
                (make_adapter(1, rank=5), AdapterInvalid, "rank 5.*up to 4"),
                (make_adapter(1, base=Digest("0" * 64)), BaseMismatch, "base 00000000"),
                (make_adapter(1, layers=(0, 2)), AdapterInvalid, "layer 2, the base has 2"),
            ]
            for state, error, message in bad:
                with pytest.raises(error, match=message):
                    await engine.load(state.digest, state)
            assert engine.stats().slots_used == 0
            with pytest.raises(NotFound):
                engine.lease(bad[0][0].digest)

    drive(body())


def test_slots_full_of_pinned_versions_refuse_another(tiny_folder, drive) -> None:
    """A pinned or busy slot is never overwritten; an idle unpinned one is, least recently used first."""

    async def body():
        async with running_engine(tiny_folder, slots=2) as engine:
            first, second = await load(engine, make_adapter(1)), await load(engine, make_adapter(2))
            engine.pin(first)
            with engine.lease(second), pytest.raises(Overloaded, match="2 adapter slots"):
                await load(engine, make_adapter(3))
            third = await load(engine, make_adapter(3))
            assert set(engine.loaded()) == {first, third}

    drive(body())


def test_an_overflowing_adapter_fails_alone(tiny_folder, drive) -> None:
    """An adapter that computes NaN fails its own requests; blocks it poisoned are clean for the next."""
    state = make_adapter(1, scale=1e18)

    async def body():
        async with running_engine(tiny_folder, kv_blocks=8) as engine:
            want = await collect(engine, BASE, PROMPTS[0])
            digest = await load(engine, state)
            results = await asyncio.gather(
                collect(engine, digest, [1, 2, 3]), collect(engine, BASE, PROMPTS[0]), return_exceptions=True
            )
            assert isinstance(results[0], AdapterInvalid)
            assert results[1] == want
            assert await collect(engine, BASE, PROMPTS[0]) == want

    drive(body())


def test_limits_are_named(tiny_folder, drive) -> None:
    """Too long a request, and ids outside the vocabulary, are refused at admission."""

    async def body():
        async with running_engine(tiny_folder) as engine:
            with pytest.raises(RequestInvalid, match="at most 256"):
                await collect(engine, BASE, [1] * 250)
            for prompt in ([], [VOCAB], [-1]):
                with pytest.raises(RequestInvalid, match="0 to 383"):
                    await collect(engine, BASE, prompt)

    drive(body())


def test_sampling_repeats_with_a_seed_and_differs_without(tiny_folder, drive) -> None:
    """A seed makes a request repeatable whatever else is in the batch."""

    async def body():
        async with running_engine(tiny_folder) as engine:
            kwargs = {"temperature": 1.0, "max_tokens": 20}
            alone = await collect(engine, BASE, [1, 2], seed=7, **kwargs)
            seeds = (7, 8, None, None)
            crowd = await asyncio.gather(*(collect(engine, BASE, [1, 2], seed=s, **kwargs) for s in seeds))
            assert crowd[0] == alone
            assert len({tuple(tokens) for tokens in crowd}) == 4

    drive(body())


def test_closing_ends_open_streams_with_an_error(tiny_folder, drive) -> None:
    """A request never hangs because the engine stopped."""

    async def body():
        async with running_engine(tiny_folder) as engine:
            task = asyncio.create_task(collect(engine, BASE, [1], max_tokens=250))
            await asyncio.sleep(0.05)
        with pytest.raises(ProcessDied):
            await task
        with pytest.raises(ProcessDied):
            await collect(engine, BASE, [1])

    drive(body())

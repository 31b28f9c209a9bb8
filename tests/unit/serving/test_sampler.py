"""Choosing tokens: against slow obvious samplers, by distribution, and through the engine."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from unit.serving.tiny_llama import BASE, VOCAB, running_engine

from fedllm.errors import RequestInvalid
from fedllm.rng import SeededRng
from fedllm.serving.engine import Chunk, GenerationRequest, SamplingParams
from fedllm.serving.native.sampler import TokenPicker, new_generator, sample, token_logprobs

ROW = np.random.default_rng(3).normal(size=40).astype(np.float32) * 2


def naive_distribution(logits: list[float], params: SamplingParams) -> list[float]:
    """Return every token's probability, one Python number at a time."""
    largest = max(logits)
    weights = [math.exp((x - largest) / params.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda t: (-weights[t], t))
    if params.top_k:
        order = order[: params.top_k]
    whole, nucleus, mass = sum(weights[t] for t in order), [], 0.0
    for token in order:
        nucleus.append(token)
        mass += weights[token]
        if mass >= params.top_p * whole:
            break
    kept = [t for t in nucleus if weights[t] >= params.min_p]
    total = sum(weights[t] for t in kept)
    return [weights[t] / total if t in kept else 0.0 for t in range(len(logits))]


def naive_shape(logits: list[float], prompt: list[int], output: list[int], params: SamplingParams) -> list[float]:
    """Return the logits after repetition, presence and frequency penalties and bias."""
    made = list(logits)
    for token in set(prompt + output):
        made[token] *= 1 / params.repetition_penalty if made[token] > 0 else params.repetition_penalty
    for token in set(output):
        made[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    for token, bias in params.logit_bias:
        made[token] += bias
    return made


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 12, "top_p": 0.8, "min_p": 0.05, "temperature": 1.5},
    ],
)
def test_draws_have_the_naive_distribution(shape) -> None:
    """Counts of 20,000 draws pass a chi-square test at 1e-6, and no token outside the kept set is ever drawn."""
    params = SamplingParams(**{"temperature": 1.0, **shape})
    want = np.array(naive_distribution(ROW.astype(float).tolist(), params))
    generator = np.random.default_rng(11)
    counts = np.bincount([sample(ROW, params, generator) for _ in range(20_000)], minlength=ROW.size)
    assert counts[want == 0].sum() == 0
    common = want * 20_000 >= 5
    seen = np.append(counts[common], counts[~common].sum())
    expected = np.append(want[common], want[~common].sum()) * 20_000
    seen, expected = seen[expected > 0], expected[expected > 0]
    assert ((seen - expected) ** 2 / expected).sum() < chi2.isf(1e-6, max(1, len(seen) - 1))


def test_a_wrong_distribution_is_noticed() -> None:
    """The chi-square test above can fail: draws at another temperature do not pass it."""
    want = np.array(naive_distribution(ROW.astype(float).tolist(), SamplingParams(temperature=1.0)))
    generator = np.random.default_rng(11)
    counts = np.bincount(
        [sample(ROW, SamplingParams(temperature=1.1), generator) for _ in range(20_000)], minlength=ROW.size
    )
    expected = want * 20_000
    assert ((counts - expected) ** 2 / expected)[expected >= 5].sum() > chi2.isf(1e-6, int((expected >= 5).sum()))


@settings(max_examples=60)
@given(
    st.integers(0, 2**32),
    st.integers(0, 30),
    st.floats(0.05, 1.0),
    st.floats(0.0, 0.5),
    st.floats(0.01, 2.0),
    st.integers(2, 3000),
)
def test_the_kept_set_is_the_naive_one(seed, top_k, top_p, min_p, temperature, size) -> None:
    """What can be drawn at all is what a sorted list gives, also where only the head of the row is sorted."""
    logits = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    want = naive_distribution(logits.astype(float).tolist(), params)
    token = sample(logits, params, np.random.default_rng(seed))
    # The border of the nucleus may fall on either side by rounding: its weight then is at the border too.
    assert want[token] > 0 or token == naive_border(logits, params)


def naive_border(logits, params: SamplingParams) -> int:
    """Return the first token that the naive nucleus leaves out."""
    kept = sum(p > 0 for p in naive_distribution(logits.astype(float).tolist(), params))
    return int(np.argsort(-logits, kind="stable")[min(kept, logits.size - 1)])


def test_extreme_temperatures_and_ties_stay_finite() -> None:
    """A tiny temperature is greedy, and masked tokens are never drawn."""
    tiny = SamplingParams(temperature=1e-300)
    assert sample(ROW, tiny, np.random.default_rng(1)) == int(ROW.argmax())
    masked = ROW.copy()
    masked[5:] = -np.inf
    assert {sample(masked, SamplingParams(temperature=2.0), np.random.default_rng(i)) for i in range(50)} <= set(
        range(5)
    )


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 39), max_size=8),
    st.lists(st.integers(0, 39), max_size=12),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.floats(0.5, 2),
    st.dictionaries(st.integers(0, 39), st.floats(-100, 100), max_size=4),
)
def test_penalties_and_bias_equal_the_naive_twin(prompt, output, presence, frequency, repetition, bias) -> None:
    """Greedy choice after any history is the argmax of naively shaped logits."""
    params = SamplingParams(
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=tuple(bias.items()),
    )
    picker = TokenPicker(params, prompt, generator=None)
    for token in output:
        assert picker.accept(token) is False
    shaped = naive_shape(ROW.astype(float).tolist(), prompt, output, params)
    before = ROW.copy()
    assert shaped[picker.pick(ROW).token] == pytest.approx(max(shaped), abs=1e-4)
    assert (before == ROW).all()


def test_logprobs_are_of_the_models_own_distribution() -> None:
    """They sum to one, come likeliest first, ties by id, and are not touched by bias."""
    got = token_logprobs(ROW, 7, 40)
    assert sum(math.exp(logprob) for _, logprob in got.top) == pytest.approx(1)
    assert [t for t, _ in got.top] == np.lexsort((np.arange(40), -ROW)).tolist()
    assert dict(got.top)[7] == got.logprob
    biased = TokenPicker(SamplingParams(logit_bias=((7, 100.0),), logprobs=2), [], generator=None).pick(ROW)
    assert (biased.token, biased.logprobs.logprob, len(biased.logprobs.top)) == (7, got.logprob, 2)
    assert token_logprobs(ROW, 7, 0).top == ()


def test_each_continuation_has_a_stream_of_its_own() -> None:
    """The same seed gives the same numbers to the same continuation only; greedy requests draw none."""

    def draw(seed: int | None, continuation: int) -> float:
        params = SamplingParams(temperature=1.0, seed=seed, continuation=continuation)
        return new_generator(params, SeededRng(1)).random()

    assert draw(7, 0) == draw(7, 0) != draw(7, 1)
    assert len({draw(s, c) for s in (7, 8, None) for c in range(3)}) == 9
    assert new_generator(SamplingParams(seed=7), SeededRng(1)) is None


async def run(engine, prompt, **params) -> list[Chunk]:
    """Return all chunks of one request to the base."""
    with engine.lease(BASE) as lease:
        stream = engine.generate(lease, GenerationRequest(tuple(prompt), SamplingParams(**params)))
        chunks = [chunk async for chunk in stream]
        await stream.aclose()
        return chunks


def ids(chunks: list[Chunk]) -> list[int]:
    """Return all token ids."""
    return [token for chunk in chunks for token in chunk.token_ids]


def test_a_mixed_batch_gives_everybody_their_own(tiny_folder, drive) -> None:
    """Greedy, seeded, penalised, biased and scored requests get the same tokens together as alone."""
    asked = [
        {},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.8, "seed": 5, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.3, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"logit_bias": ((17, 100.0),)},
        {"logprobs": 3},
        {"temperature": 1.0, "seed": 5, "continuation": 1},
    ]

    async def body():
        async with running_engine(tiny_folder) as engine:
            alone = [await run(engine, [1, 2, 3], max_tokens=16, **params) for params in asked]
            together = await asyncio.gather(*(run(engine, [1, 2, 3], max_tokens=16, **params) for params in asked))
        async with running_engine(tiny_folder, kv_blocks=12) as engine:
            squeezed = await asyncio.gather(*(run(engine, [1, 2, 3], max_tokens=16, **params) for params in asked))
            assert engine.stats().preemptions > 0
        return alone, together, squeezed

    alone, together, squeezed = drive(body())
    assert [ids(c) for c in together] == [ids(c) for c in alone] == [ids(c) for c in squeezed]
    assert ids(alone[4]) == [17] * 16
    penalised = ids(alone[3])
    assert len(set(penalised)) > len(set(ids(alone[0])))
    assert ids(alone[1]) != ids(alone[6])
    assert ids(alone[5]) == ids(alone[0])
    assert not any(chunk.logprobs for chunk in alone[0])


def test_logprobs_equal_the_scores_of_the_same_tokens(tiny_folder, drive) -> None:
    """What is reported while generating is what scoring the tokens afterwards gives, preempted or not."""

    async def body():
        async with running_engine(tiny_folder) as engine:
            chunks = await run(engine, [4, 9], max_tokens=12, temperature=1.0, seed=1, logprobs=VOCAB)
            with engine.lease(BASE) as lease:
                return chunks, await engine.score(lease, [4, 9], ids(chunks))

    chunks, scores = drive(body())
    reported = [logprob for chunk in chunks for logprob in chunk.logprobs]
    assert len(reported) == len(scores) == 12
    for got, want in zip(reported, scores, strict=True):
        assert got.logprob == pytest.approx(want.logprob, abs=1e-4)
        assert got.top[0][1] - got.logprob == pytest.approx(want.regret, abs=1e-4)


def test_a_stop_token_is_neither_delivered_nor_reported(tiny_folder, drive) -> None:
    """It ends the request; logprobs stay one a delivered token."""

    async def body():
        async with running_engine(tiny_folder) as engine:
            free = ids(await run(engine, [4, 9], max_tokens=8, temperature=1.0, seed=1))
            stop = frozenset(free[3:4])
            return free, await run(
                engine, [4, 9], max_tokens=8, temperature=1.0, seed=1, stop_token_ids=stop, logprobs=0
            )

    free, stopped = drive(body())
    assert ids(stopped) == free[: free.index(free[3])]
    assert stopped[-1].finish_reason == "stop"
    assert sum(len(chunk.logprobs) for chunk in stopped) == len(ids(stopped))


class DeadEnd:
    """A grammar that allows nothing from its third token on, or breaks there."""

    def __init__(self, *, breaks: bool = False) -> None:
        self.left = 2
        self.breaks = breaks

    def start(self) -> DeadEnd:
        """Begin anew."""
        return DeadEnd(breaks=self.breaks)

    def allowed(self, vocabulary: int) -> np.ndarray:
        """Allow ten tokens, then none."""
        return np.arange(vocabulary) < 10 * bool(self.left)

    def accept(self, token: int) -> bool:
        """Count down."""
        assert token < 10
        self.left -= 1
        if self.breaks and not self.left:
            raise RuntimeError("broken")
        return False


@pytest.mark.parametrize("breaks", [False, True])
def test_a_grammar_that_allows_nothing_fails_its_own_request_alone(tiny_folder, drive, breaks) -> None:
    """The error is the request's; a neighbour in the batch does not notice."""

    async def body():
        async with running_engine(tiny_folder) as engine:
            want = ids(await run(engine, [1, 2], max_tokens=8))
            results = await asyncio.gather(
                run(engine, [1, 2], max_tokens=8, grammar=DeadEnd(breaks=breaks)),
                run(engine, [1, 2], max_tokens=8),
                return_exceptions=True,
            )
            assert engine.stats().free_blocks == engine.stats().total_blocks
            return want, results

    want, (failed, neighbour) = drive(body())
    assert isinstance(failed, RequestInvalid)
    assert ids(neighbour) == want

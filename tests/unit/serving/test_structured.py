"""Structured output: what comes out fits its schema, whatever the model."""

from __future__ import annotations

import asyncio
import json

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.serving.structured_scene import SCHEMAS, compile_one
from unit.serving.tiny_llama import BASE, make_adapter, running_engine

from fedllm.serving.engine import GenerationRequest, SamplingParams
from fedllm.serving.schema import check_schema
from fedllm.serving.structured import Grammars, Shape, Vocabulary
from fedllm.serving.text import TextCodec


@pytest.fixture(scope="module")
def codec(tiny_folder) -> TextCodec:
    """Return the tiny model's codec."""
    return TextCodec(tiny_folder)


def walk(grammar, codec: TextCodec, generator: np.random.Generator, most: int) -> bytes | None:
    """Return a random text of a grammar, or None if it is longer than `most` tokens."""
    state, text = grammar.start(), b""
    ends = set(codec.stop_token_ids)
    for _ in range(most):
        choices = np.flatnonzero(state.allowed(codec.vocabulary))
        assert choices.size
        token = int(generator.choice(choices))
        if token in ends:
            return text
        text += codec.token_bytes(token)
        if state.accept(token):
            return text
    return None


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_random_texts_of_a_grammar_fit_its_schema(codec, schema) -> None:
    """Uniform walks, the worst model there is: each complete text is UTF-8, parses and is valid."""
    grammar = compile_one(codec, schema)
    validator = jsonschema_rs.validator_for({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
    generator, complete = np.random.default_rng(2), 0
    for _ in range(40):
        text = walk(grammar, codec, generator, 400)
        if text is not None:
            complete += 1
            validator.validate(json.loads(text.decode()))
    assert complete >= 20


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=4)
LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}]),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-99, 99),
        st.integers(0, 50),
    ),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 3),
        st.integers(0, 3),
    ),
    st.builds(
        lambda values: {"enum": values},
        st.lists(st.one_of(NAMES, st.integers(-(2**53), 2**53), st.none()), min_size=1, max_size=3),
    ),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda parts: {"anyOf": parts}, st.lists(inner, min_size=1, max_size=2)),
        st.builds(lambda part: {"type": "array", "items": part, "maxItems": 2}, inner),
        st.builds(
            lambda parts: {"type": "object", "properties": parts, "required": list(parts)[:1]},
            st.dictionaries(NAMES, inner, min_size=1, max_size=3),
        ),
    ),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(schema=TREES, seed=st.integers(0, 2**32))
def test_random_schemas_hold(codec, schema, seed) -> None:
    """Any schema of the supported keywords: a complete text is valid."""
    grammar = compile_one(codec, schema)
    text = walk(grammar, codec, np.random.default_rng(seed), 200)
    if text is not None:
        jsonschema_rs.validate(schema, json.loads(text.decode()))


@settings(max_examples=30, deadline=None)
@given(
    pattern=st.lists(
        st.sampled_from(["a", "é", ".", "[^x]", "[a-c]", "\\d", "\\W", "\\s", "(?:ab|c)", "x{1,3}", "b?", "\\$"]),
        min_size=1,
        max_size=4,
    ).map("".join),
    seed=st.integers(0, 2**32),
)
def test_patterns_hold(codec, pattern, seed) -> None:
    """A text of a pattern parses and matches all of it."""
    grammar = compile_one(codec, {"type": "string", "pattern": pattern})
    text = walk(grammar, codec, np.random.default_rng(seed), 60)
    if text is not None:
        jsonschema_rs.validate({"type": "string", "pattern": f"^(?:{pattern})$"}, json.loads(text.decode()))


def test_a_vocabulary_spells_no_control_characters_and_no_broken_text(codec) -> None:
    """Bytes of one character may be split over tokens; what is in no UTF-8 text at all cannot be chosen."""
    spelled = Vocabulary(codec).spelled
    assert spelled[codec.encode("B")[0]] == b"B"
    assert not any(byte < 0x20 for text in spelled for byte in text)
    assert {0xC0, 0xC1, 0xF5, 0xFF}.isdisjoint(text[0] for text in spelled if text)
    assert {0xC3, 0x80, 0xE2, 0xF0} <= {text[0] for text in spelled if text}


def test_constrained_and_free_requests_share_a_batch(tiny_folder, codec, drive) -> None:
    """A random model fills schemas validly next to free requests, which get the tokens they get alone."""
    grammars = Grammars(codec)
    texts: list[str] = []

    async def ask(engine, digest, prompt, **params) -> tuple[str, str, list[int]]:
        with engine.lease(digest) as lease:
            stream = engine.generate(lease, GenerationRequest(prompt, SamplingParams(**params)))
            chunks = [chunk async for chunk in stream]
            await stream.aclose()
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        return codec.decoder().feed(tokens), chunks[-1].finish_reason, tokens

    async def body():
        shapes = [[Shape(check_schema(schema))] for schema in SCHEMAS]
        compiled = [await grammars.compile(shape) for shape in shapes]
        async with running_engine(tiny_folder, kv_blocks=1024) as engine:
            state = make_adapter(1)
            await engine.load(state.digest, state)
            alone = await ask(engine, BASE, (1, 2), max_tokens=60)
            asked = [
                ask(
                    engine,
                    (BASE, state.digest)[i % 2],
                    (i + 1, 7),
                    max_tokens=200,
                    temperature=1.0,
                    seed=i,
                    grammar=grammar,
                    stop_token_ids=codec.stop_token_ids,
                )
                for i, grammar in enumerate(compiled)
            ]
            *made, free = await asyncio.gather(*asked, ask(engine, BASE, (1, 2), max_tokens=60))
            cut = await ask(engine, BASE, (1,), max_tokens=3, grammar=compiled[0])
        return alone, made, free, cut

    alone, made, free, cut = drive(body())
    assert free == alone
    assert cut[1] == "length"
    for schema, (text, reason, _) in zip(SCHEMAS, made, strict=True):
        if reason == "stop":
            jsonschema_rs.validate(schema, json.loads(text))
            texts.append(text)
    assert len(texts) >= 7

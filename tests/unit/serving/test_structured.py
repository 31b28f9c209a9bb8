"""Structured output: what comes out fits its schema, whatever the model, and what cannot be enforced is refused."""

from __future__ import annotations

import asyncio
import builtins
import json
import threading
from contextlib import suppress

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.serving.tiny_llama import BASE, make_adapter, running_engine

from fedllm.errors import FedllmError, MissingExtra, Overloaded, RequestInvalid
from fedllm.serving.engine import GenerationRequest, SamplingParams
from fedllm.serving.schema import MAX_DEPTH, check_schema
from fedllm.serving.structured import Grammars, Shape, Vocabulary
from fedllm.serving.text import TextCodec

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["C", "F", None]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["city", "days", "unit", "tags"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string", "pattern": "^[a-z]{2,4}$"}},
}
SCHEMAS = [
    WEATHER,
    {"type": "integer", "minimum": -5, "maximum": 120},
    {"anyOf": [{"type": "boolean"}, {"const": {'ä\n"': [1, "\\"]}}]},
    {"oneOf": [{"type": "null"}, {"type": "string", "minLength": 2, "maxLength": 5}]},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False},
    {"type": "string", "format": "uuid"},
    {"type": "string", "pattern": "^(?:ab|c\\.){1,3}$"},
    {"type": "object", "properties": {'a"b\n': {"type": "boolean"}, "é": {"type": "null"}}, "required": ["é"]},
    {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 2}, "minItems": 1, "maxItems": 2},
    {"enum": ["x", 1, True, None, {"k": []}]},
    {"type": "string", "enum": [1, "a", True]},
    {"type": ["integer", "null"], "enum": [1.0, 2.5, None, "a"]},
    {"type": ["string", "null"], "anyOf": [{"$ref": "#/$defs/s"}, {"const": None}], "$defs": {"s": {"type": "string"}}},
    {"oneOf": [{"const": 1}, {"enum": [2, "a"]}, {"const": True}, {"type": "null"}]},
    {"oneOf": [{"const": {"a": 1}}, {"const": {"a": 2}}, {"type": "array", "items": {"type": "null"}, "maxItems": 1}]},
]


@pytest.fixture(scope="module")
def codec(tiny_folder) -> TextCodec:
    """Return the tiny model's codec."""
    return TextCodec(tiny_folder)


def compile_one(codec: TextCodec, schema: object, call: str | None = None):
    """Compile on a loop of its own."""
    return asyncio.run(Grammars(codec).compile([Shape(check_schema(schema), call)]))


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


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ([], "must be an object"),
        ({"type": "objekt"}, "'type' must be one"),
        ({"type": []}, "'type' must be one"),
        ({"not": {}}, "'not' cannot be enforced"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ({"type": "integer", "multipleOf": 2}, "'multipleOf'"),
        ({"mySecretKeyword": 1}, "a keyword of this schema"),
        ({"minLength": 2}, "needs the type 'string'"),
        ({"type": "integer", "enum": [1], "minimum": 0}, "stands alone"),
        ({"allOf": [{}, {}]}, "of exactly one"),
        ({"anyOf": []}, "must be a list"),
        ({"enum": []}, "1 to 1000 values"),
        ({"$ref": "#/$defs/none"}, "definition at the root"),
        ({"$ref": "https://example.org/x"}, "definition at the root"),
        ({"$ref": 5}, "definition at the root"),
        ({"type": "object", "properties": {"a": {"$defs": {}}}}, "at the root"),
        ({"type": "object", "required": ["mySecret"]}, "names that 'properties' has"),
        ({"type": "object", "required": [[]], "properties": {}}, "names that 'properties' has"),
        ({"type": "string", "maxLength": 10**9}, "from 0 to 1000"),
        ({"type": "array", "minItems": True}, "from 0 to 1000"),
        ({"type": "number", "minimum": float("nan")}, "at most 2"),
        ({"type": "integer", "minimum": 5, "maximum": 2}, "cannot be compiled"),
        ({"type": "string", "format": "secret"}, "'format' must be one of"),
        ({"type": "string", "format": []}, "'format' must be one of"),
        ({"type": "string", "pattern": "("}, "construct"),
        ({"type": "string", "pattern": "(?=a)b"}, "construct"),
        ({"type": "string", "pattern": 'a"b'}, "construct"),
        ({"type": "string", "pattern": "a\\\\b"}, "construct"),
        ({"type": "string", "pattern": "a$b"}, "construct"),
        ({"type": "string", "pattern": "(?:a{1,100}){1,100}"}, "product"),
        ({"type": "string", "pattern": ".{1, 1000}"}, "construct"),
        ({"type": "string", "pattern": ".{,1000}"}, "construct"),
        ({"type": "string", "pattern": ".{1,\u0669}"}, "construct"),
        ({"type": "string", "pattern": "a" * 300}, "200 characters"),
        ({"type": "string", "pattern": "a", "minLength": 1}, "without 'minLength'"),
        ({"anyOf": [{"$ref": "#"}]}, "no value fits"),
        ({"enum": ["x" * 70_000]}, "65536 are allowed"),
        ({"type": "string", "enum": [1, None]}, "no value of 'enum' has the 'type'"),
        ({"type": "integer", "const": True}, "no value of 'const' has the 'type'"),
        ({"type": "string", "anyOf": [{"type": "string"}, {"type": "null"}]}, "'type' beside 'anyOf'"),
        ({"type": "object", "oneOf": [{"type": "string"}]}, "'type' beside 'oneOf'"),
        ({"type": "object", "allOf": [{}]}, "'type' beside 'allOf'"),
        ({"type": "string", "$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}, "'type' beside '.ref'"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 2}]}, "two of its branches"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "two of its branches"),
        ({"oneOf": [{"const": 1}, {"enum": [1.0, 2]}]}, "two of its branches"),
        ({"oneOf": [{"const": {"a": 1, "b": 2}}, {"const": {"b": 2, "a": 1}}]}, "two of its branches"),
        ({"oneOf": [{"const": "a"}, {"type": "string"}]}, "two of its branches"),
        ({"oneOf": [{"type": "string"}, {"enum": [1, "a"]}]}, "two of its branches"),
        ({"oneOf": [{"type": "null"}, True]}, "two of its branches"),
        ({"oneOf": [{"type": "null"}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"const": None}}}, "two of its branches"),
        ({"oneOf": [{"$ref": "#"}, {"type": "null"}]}, "two of its branches"),
    ],
)
def test_schemas_that_cannot_be_enforced_are_refused(codec, schema, words, capfd) -> None:
    """The message names the keyword or the limit, and nothing that only the schema's author knows."""
    with pytest.raises(RequestInvalid, match=words) as refused:
        compile_one(codec, schema)
    assert "ecret" not in str(refused.value)
    assert capfd.readouterr() == ("", "")


def array(items: object, most: int) -> dict[str, object]:
    """Return a schema of short arrays."""
    return {"type": "array", "items": items, "maxItems": most}


def patterns(*given: str) -> dict[str, object]:
    """Return a schema of an object with a property a pattern."""
    return {"type": "object", "properties": {str(i): {"type": "string", "pattern": p} for i, p in enumerate(given)}}


@pytest.mark.parametrize(
    ("schema", "work"),
    [
        ({"type": "null"}, 0),
        (array({"type": "null"}, 7), 7),
        (array(array({"type": "null"}, 5), 7), 35),
        ({"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 3}, 12),
        ({"type": "array", "prefixItems": [{"type": "string", "minLength": 4}], "items": False}, 4),
        ({"type": "object", "additionalProperties": {"type": "string", "minLength": 2, "maxLength": 4}}, 4),
        ({"anyOf": [array({}, 2), {"type": "string", "maxLength": 3}]}, 5),
        ({"$defs": {"a": array({}, 9)}, **array({"$ref": "#/$defs/a"}, 9)}, 18),
        (patterns("a{2,5}b{3}c{4,}"), 12),
        (patterns("(?:a{2}b{3}|(c{2}){5}){4}d"), 60),
        (patterns(r"\{7}", r"[\]{7}]", "(?:a{9}){0}", "(?:a{9})?"), 18),
    ],
)
def test_counts_add_up_and_nested_ones_multiply(schema, work, monkeypatch) -> None:
    """Known answers: with a budget of exactly the work a schema passes, with one less it does not."""
    monkeypatch.setattr("fedllm.serving.schema.MAX_WORK", work)
    check_schema(schema)
    monkeypatch.setattr("fedllm.serving.schema.MAX_WORK", work - 1)
    with pytest.raises(RequestInvalid, match=f"more than {work - 1}, which is the budget"):
        check_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        patterns(*(f".{{{i},1000}}" for i in range(8))),
        array(array({"type": "null"}, 1000), 1000),
        patterns("a{0}.{1,1000}.{1,1000}.{1,1000}"),
    ],
)
def test_work_is_bounded_before_anything_is_compiled(codec, drive, schema, monkeypatch) -> None:
    """Small schemas that would keep the only compiling thread busy for seconds are refused; the budget is named."""
    monkeypatch.setattr(Grammars, "_compile", lambda *_: pytest.fail("it was compiled"))
    with pytest.raises(RequestInvalid, match="more than 2000, which is the budget"):
        drive(Grammars(codec).compile([Shape(check_schema(schema))]))


def test_patterns_are_bounded() -> None:
    """Each pattern costs the event loop something: a schema has at most a hundred."""
    check_schema(patterns(*["a"] * 100))
    with pytest.raises(RequestInvalid, match="100 patterns"):
        check_schema(patterns(*["a"] * 101))


def test_comparing_branches_is_bounded() -> None:
    """References that fan out again and again end in a refusal, not in a long look."""
    wide = {"anyOf": [{"type": "string"}] * 900}
    asking = {"type": "string", "$ref": "#/$defs/a"}
    with pytest.raises(RequestInvalid, match="20000 steps"):
        check_schema({"anyOf": [asking] * 900, "$defs": {"a": wide}})


def test_depth_is_bounded() -> None:
    """A schema nested deeper than the limit is refused before anything recurses over it."""
    deep: dict[str, object] = {}
    for _ in range(MAX_DEPTH + 1):
        deep = {"type": "array", "items": deep}
    with pytest.raises(RequestInvalid, match="32 levels"):
        check_schema(deep)


@settings(max_examples=150)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "type",
                        "properties",
                        "required",
                        "items",
                        "enum",
                        "anyOf",
                        "$ref",
                        "$defs",
                        "pattern",
                        "minItems",
                        "allOf",
                    ]
                )
                | st.text(max_size=3),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    )
)
def test_any_json_is_a_schema_or_a_refusal(schema) -> None:
    """Whatever is sent as a schema, the checker says yes or raises its own error."""
    with suppress(FedllmError):
        assert isinstance(json.loads(check_schema(schema)), dict)


def test_grammars_are_compiled_once_and_kept_bounded(codec, drive, monkeypatch) -> None:
    """Two requests share one compilation; the oldest is dropped; a full queue of others refuses."""

    async def body():
        grammars = Grammars(codec)
        shape = Shape(check_schema(WEATHER))
        first, second = await asyncio.gather(grammars.compile([shape]), grammars.compile([shape]))
        assert first is second
        assert await grammars.compile([shape]) is first
        for number in range(64):
            await grammars.compile([Shape(check_schema({"const": number}))])
        assert await grammars.compile([shape]) is not first
        waiting = [asyncio.ensure_future(grammars.compile([Shape(check_schema({"const": -n}))])) for n in range(1, 17)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="16 schemas wait"):
            await grammars.compile([Shape(check_schema({"const": "one more"}))])
        await asyncio.gather(*waiting)

    drive(body())


def test_what_nobody_waits_for_is_not_compiled(codec, drive, monkeypatch) -> None:
    """A queued schema whose last waiter left is skipped and leaves the queue; one with a waiter left is made."""
    gate, begun, made = threading.Event(), threading.Event(), []
    real = Grammars._compile

    def slow(self, shapes):
        made.append(shapes[0].schema)
        begun.set()
        gate.wait(20)
        return real(self, shapes)

    monkeypatch.setattr(Grammars, "_compile", slow)

    async def body():
        grammars = Grammars(codec)

        def ask(value):
            return asyncio.ensure_future(grammars.compile([Shape(check_schema({"const": value}))]))

        running, left, kept, stays = ask(1), ask(2), ask(3), ask(3)
        await asyncio.to_thread(begun.wait, 20)
        for task in (running, left, kept):
            task.cancel()
        await asyncio.gather(running, left, kept, return_exceptions=True)
        assert len(grammars._compiling) == 2
        again = ask(1)
        gate.set()
        await asyncio.gather(stays, again)
        assert made == ['{"const": 1}', '{"const": 3}']
        await ask(2)
        assert not grammars._compiling

    drive(body())


def test_without_xgrammar_the_extra_is_named(codec, drive, monkeypatch) -> None:
    """An install without it still serves; a request that needs it hears what is missing."""
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "xgrammar":
            raise ModuleNotFoundError("no", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match="xgrammar"):
        drive(Grammars(codec).compile([Shape(check_schema({"type": "object"}))]))


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


@pytest.mark.parametrize("schema", [{"enum": [2**63]}, {"const": {"a": [-(2**54)]}}])
def test_whole_numbers_that_would_be_rounded_are_refused(schema) -> None:
    """The compiler writes them as floats, which is another value than the schema asks for."""
    with pytest.raises(RequestInvalid, match="not exact"):
        check_schema(schema)

"""Schemas for structured output: what cannot be enforced, or costs too much, is refused before it is compiled."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.serving.structured_scene import compile_one

from fedllm.errors import FedllmError, RequestInvalid
from fedllm.serving.schema import MAX_DEPTH, check_schema
from fedllm.serving.structured import Grammars, Shape
from fedllm.serving.text import TextCodec


@pytest.fixture(scope="module")
def codec(tiny_folder) -> TextCodec:
    """Return the tiny model's codec."""
    return TextCodec(tiny_folder)


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


@pytest.mark.parametrize("schema", [{"enum": [2**63]}, {"const": {"a": [-(2**54)]}}])
def test_whole_numbers_that_would_be_rounded_are_refused(schema) -> None:
    """The compiler writes them as floats, which is another value than the schema asks for."""
    with pytest.raises(RequestInvalid, match="not exact"):
        check_schema(schema)

"""What the tests of structured output share: schemas of every supported kind, and their compilation."""

from __future__ import annotations

import asyncio

from fedllm.serving.schema import check_schema
from fedllm.serving.structured import Grammars, Shape
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


def compile_one(codec: TextCodec, schema: object):
    """Compile on a loop of its own."""
    return asyncio.run(Grammars(codec).compile([Shape(check_schema(schema))]))

"""Which JSON schemas an output can be held to, checked before anything is compiled. Pure Python.

What the grammar compiler would ignore is refused here, so that an output that is complete always fits its schema:
a keyword is either enforced, a mere annotation, or an error that names it. Limits bound the compiler's work.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

from fedllm.errors import RequestInvalid

MAX_SCHEMA_CHARS = 64 * 1024
MAX_DEPTH = 32
MAX_NODES = 2000
MAX_COUNT = 1000
MAX_PATTERN = 200

FORMATS = frozenset(("date", "time", "date-time", "email", "uuid", "ipv4", "ipv6", "hostname", "uri"))

_ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$id", "$comment")
)
_DEFINITIONS = ("$defs", "definitions")
_OF_TYPE = {
    "properties": "object",
    "required": "object",
    "additionalProperties": "object",
    "items": "array",
    "prefixItems": "array",
    "minItems": "array",
    "maxItems": "array",
    "minLength": "string",
    "maxLength": "string",
    "pattern": "string",
    "format": "string",
    "minimum": "number",
    "maximum": "number",
    "exclusiveMinimum": "number",
    "exclusiveMaximum": "number",
}
_CHOICES = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
_TYPES = frozenset(("object", "array", "string", "number", "integer", "boolean", "null"))
_COUNTS = frozenset(("minItems", "maxItems", "minLength", "maxLength"))
_VOCABULARY = frozenset(
    (
        *("not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "multipleOf"),
        *("patternProperties", "propertyNames", "minProperties", "maxProperties", "dependentRequired"),
        *("dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems", "additionalItems"),
        *("nullable", "discriminator", "contentEncoding", "contentMediaType", "contentSchema", "$anchor"),
    )
)
# No quotation marks or backslashes as such, look-around, references or boundaries.
_PATTERN = re.compile(r"(?:\\[dwsDWS.+*?()\[\]{}|^$/-]|\(\?:|\((?!\?)|[^\\\"(\x00-\x1f])*")
_ATOM = re.compile(r"\\.|\[[^\]]*\]")
_DOUBLE = re.compile(r"[*+?}][*+?{]")
_REPEAT = re.compile(r"\{(\d+)(?:,(\d*))?\}")


def check_schema(schema: object) -> str:
    """Return a schema as the compiler takes it, as JSON text.

    Raises
    ------
    RequestInvalid
        If it is malformed, beyond a limit, or says something that cannot be enforced. The message names keywords
        and limits, never the schema's own words.
    """
    if not isinstance(schema, dict):
        raise RequestInvalid(f"a schema must be an object, {type(schema).__name__} found")
    made = _Check(schema).clean(schema, 0)
    text = json.dumps(made)
    if len(text) > MAX_SCHEMA_CHARS:
        raise RequestInvalid(f"a schema has {len(text)} characters, {MAX_SCHEMA_CHARS} are allowed")
    return text


class _Check:
    """One walk over a schema."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._nodes = 0

    def clean(self, schema: object, depth: int) -> Any:
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise RequestInvalid(f"a schema is at most {MAX_DEPTH} levels deep and {MAX_NODES} subschemas large")
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            raise RequestInvalid("a subschema must be an object or true")
        made = {name: value for name, value in schema.items() if name not in _ANNOTATIONS}
        unknown = [name for name in made if name not in (*_OF_TYPE, *_CHOICES, *_DEFINITIONS, "type", "strict")]
        if unknown:
            named = next((repr(name) for name in unknown if name in _VOCABULARY), "a keyword of this schema")
            raise RequestInvalid(f"{named} cannot be enforced here", hint="leave it out of the schema")
        made.pop("strict", None)
        kinds = _kinds(made)
        chosen = [name for name in _CHOICES if name in made]
        if len(chosen) > 1 or (chosen and any(name in made for name in _OF_TYPE)):
            raise RequestInvalid(f"{chosen[0]!r} stands alone: other constraints beside it cannot be enforced here")
        if chosen:
            return self._choice(chosen[0], made, depth)
        for name, kind in _OF_TYPE.items():
            if name in made and kind not in kinds and not (kind == "number" and "integer" in kinds):
                raise RequestInvalid(f"{name!r} needs the type {kind!r} beside it")
        self._scalars(made)
        self._children(made, depth)
        return self._definitions(made, depth)

    def _choice(self, name: str, made: dict[str, Any], depth: int) -> dict[str, Any]:
        value = made[name]
        if name == "$ref":
            self._resolve(value)
        elif name == "enum" and not (isinstance(value, list) and 0 < len(value) <= MAX_COUNT):
            raise RequestInvalid(f"'enum' must be a list of 1 to {MAX_COUNT} values")
        elif name in ("enum", "const"):
            _check_depth(value)
        else:
            if not isinstance(value, list) or not value or (name == "allOf" and len(value) != 1):
                raise RequestInvalid(f"{name!r} must be a list of subschemas, of exactly one where it is 'allOf'")
            cleaned = [self.clean(part, depth + 1) for part in value]
            made.pop(name)
            # Branches of a oneOf that overlap cannot be told apart by a grammar: any one is accepted.
            made |= {"anyOf": cleaned}
        made.pop("type", None)
        return self._definitions(made, depth)

    def _definitions(self, made: dict[str, Any], depth: int) -> dict[str, Any]:
        for name in _DEFINITIONS:
            if name in made:
                if depth or not isinstance(made[name], dict):
                    raise RequestInvalid(f"{name!r} must be an object at the root of the schema")
                made[name] = {key: self.clean(part, depth + 1) for key, part in made[name].items()}
        return made

    def _children(self, made: dict[str, Any], depth: int) -> None:
        if "properties" in made:
            properties = made["properties"]
            if not isinstance(properties, dict):
                raise RequestInvalid("'properties' must be an object")
            made["properties"] = {key: self.clean(part, depth + 1) for key, part in properties.items()}
        if "required" in made:
            required = made["required"]
            named = made.get("properties", {}).keys()
            if not isinstance(required, list) or not all(isinstance(n, str) and n in named for n in required):
                raise RequestInvalid("'required' must be a list of names that 'properties' has")
        if "prefixItems" in made:
            parts = made["prefixItems"]
            if not isinstance(parts, list) or not parts:
                raise RequestInvalid("'prefixItems' must be a list of subschemas")
            made["prefixItems"] = [self.clean(part, depth + 1) for part in parts]
        for name in ("items", "additionalProperties"):
            if name in made and made[name] is not False:
                made[name] = self.clean(made[name], depth + 1)

    def _scalars(self, made: dict[str, Any]) -> None:
        for name in _COUNTS & made.keys():
            value = made[name]
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
                raise RequestInvalid(f"{name!r} must be a whole number from 0 to {MAX_COUNT}")
        for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            value = made.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 2**53:
                raise RequestInvalid(f"{name!r} must be a number of at most 2^53")
        if "format" in made and not (isinstance(made["format"], str) and made["format"] in FORMATS):
            raise RequestInvalid(f"'format' must be one of {', '.join(sorted(FORMATS))}")
        if "pattern" in made:
            _check_pattern(made)

    def _resolve(self, reference: object) -> None:
        if reference == "#":
            return
        where, _, name = reference.partition("/")[2].partition("/") if isinstance(reference, str) else ("", "", "")
        known = self._root.get(where) if where in _DEFINITIONS else None
        # Names with JSON pointer's escapes are beyond the compiler.
        if (
            not isinstance(known, dict)
            or name not in known
            or reference != f"#/{where}/{name}"
            or set("/~%") & set(name)
        ):
            raise RequestInvalid("'$ref' must be '#', or '#/$defs/NAME' of a definition at the root that is there")


def _check_depth(value: object) -> None:
    """Refuse a value nested deeper than a schema may be, level by level."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level if isinstance(outer, list | dict) for inner in _inner(outer)]
    if level:
        raise RequestInvalid(f"a value in a schema is at most {MAX_DEPTH} levels deep")


def _inner(outer: list[object] | dict[str, object]) -> Iterable[object]:
    return outer if isinstance(outer, list) else outer.values()


def _kinds(made: dict[str, Any]) -> list[str]:
    given = made.get("type", [])
    kinds = given if isinstance(given, list) else [given]
    if not all(isinstance(kind, str) and kind in _TYPES for kind in kinds) or (given == [] and "type" in made):
        raise RequestInvalid(f"'type' must be one or several of {', '.join(sorted(_TYPES))}")
    return kinds


def _check_pattern(made: dict[str, Any]) -> None:
    pattern = made["pattern"]
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN or any(n in made for n in ("minLength", "maxLength")):
        raise RequestInvalid(
            f"'pattern' must be a text of at most {MAX_PATTERN} characters, without 'minLength' or 'maxLength'"
        )
    counts = [int(high or low) for low, high in _REPEAT.findall(pattern)]
    bare = _ATOM.sub("x", pattern).removeprefix("^").removesuffix("$")
    plain = _PATTERN.fullmatch(pattern) and not set("^$") & set(bare) and not _DOUBLE.search(bare)
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        plain = None
    if not plain or math.prod(counts) > MAX_COUNT or "format" in made:
        raise RequestInvalid(
            f"'pattern' has a construct that cannot be enforced here, or counts whose product is above {MAX_COUNT}",
            hint="letters, classes, groups, alternatives and counts are supported, anchors at both ends only",
        )

"""Which JSON schemas an output can be held to, checked before anything is compiled. Pure Python.

What the grammar compiler would ignore is refused here, so that an output that is complete always fits its schema:
a keyword is either enforced, a mere annotation, or an error that names it. Limits bound the compiler's work.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from fedllm.errors import RequestInvalid
from fedllm.serving.patterns import MAX_COUNT, check_pattern, repeats

MAX_SCHEMA_CHARS = 64 * 1024
MAX_DEPTH = 32
MAX_NODES = 2000
MAX_PATTERNS = 100
MAX_WORK = 2000
MAX_STEPS = 20_000

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
_EXACT = 2**53
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
_KNOWN = frozenset((*_OF_TYPE, *_CHOICES, *_DEFINITIONS, "type", "strict"))


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
    _check_work(_work(made))
    text = json.dumps(made)
    if len(text) > MAX_SCHEMA_CHARS:
        raise RequestInvalid(f"a schema has {len(text)} characters, {MAX_SCHEMA_CHARS} are allowed")
    return text


def check_sizes(schemas: Iterable[object]) -> None:
    """Bound the subschemas and patterns of one request, in any form yet, before the dearer checks of each schema."""
    level, nodes, patterns = list(schemas), 0, 0
    while level:
        schema = level.pop()
        if not isinstance(schema, dict):
            continue
        nodes += 1
        patterns += isinstance(schema.get("pattern"), str)
        if nodes > MAX_NODES or patterns > MAX_PATTERNS:
            raise RequestInvalid(
                f"the schemas of a request have at most {MAX_NODES} subschemas and {MAX_PATTERNS} patterns together"
            )
        for name in ("properties", *_DEFINITIONS):
            level += schema[name].values() if isinstance(schema.get(name), dict) else ()
        for name in ("prefixItems", "anyOf", "oneOf", "allOf"):
            level += schema[name] if isinstance(schema.get(name), list) else ()
        level += (schema.get("items"), schema.get("additionalProperties"))


def check_together(texts: Iterable[str]) -> None:
    """Bound the counts of several schemas that become one grammar; `texts` are from `check_schema`."""
    _check_work(sum(_work(json.loads(text)) for text in texts))


class _Check:
    """One walk over a schema."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._nodes = 0
        self._patterns = 0
        self._steps = 0

    def clean(self, schema: object, depth: int) -> Any:
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise RequestInvalid(f"a schema is at most {MAX_DEPTH} levels deep and {MAX_NODES} subschemas large")
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            raise RequestInvalid("a subschema must be an object or true")
        made = {name: value for name, value in schema.items() if name not in _ANNOTATIONS}
        unknown = [name for name in made if name not in _KNOWN]
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
            _check_value(value)
        else:
            if not isinstance(value, list) or not value or (name == "allOf" and len(value) != 1):
                raise RequestInvalid(f"{name!r} must be a list of subschemas, of exactly one where it is 'allOf'")
            cleaned = [self.clean(part, depth + 1) for part in value]
            made.pop(name)
            if name == "oneOf":
                self._check_disjoint(cleaned)
            made |= {"anyOf": cleaned}
        if "type" in made:
            self._keep_type(name, made)
        return self._definitions(made, depth)

    def _keep_type(self, name: str, made: dict[str, Any]) -> None:
        """Make the type beside a choice hold, for the compiler ignores it there."""
        types = _widened(_kinds(made))
        del made["type"]
        if name in ("enum", "const"):
            fitting = [value for value in _values(made) if _kind(value) in types]
            if not fitting:
                raise RequestInvalid(f"no value of {name!r} has the 'type' beside it")
            if name == "enum":
                made["enum"] = fitting
        elif not self._possible(made) <= types:
            raise RequestInvalid(f"'type' beside {name!r} cannot be enforced here", hint="put it into the subschemas")

    def _check_disjoint(self, branches: list[dict[str, Any]]) -> None:
        """Refuse branches of which two may hold at once: a grammar accepts what any of them accepts."""
        kinds, listed, values = set[str](), set[str](), set[str]()
        for branch in branches:
            of = self._possible(branch)
            if "enum" in branch or "const" in branch:
                own = {_canonical(value) for value in _values(branch)}
                overlap = own & values or of & kinds
                values |= own
                listed |= of
            else:
                overlap = of & (kinds | listed)
                kinds |= of
            if overlap:
                raise RequestInvalid(
                    "'oneOf' cannot be enforced here: two of its branches may hold at once",
                    hint="use anyOf, or branches of different types or of different constants",
                )

    def _possible(self, schema: object) -> set[str]:
        """Return the types that values of a schema may have: too many rather than too few."""
        found, seen, left = set[str](), set[str](), [schema]
        while left:
            part = left.pop()
            self._steps += 1
            if self._steps > MAX_STEPS:
                raise RequestInvalid(f"the types of a schema's branches take more than {MAX_STEPS} steps to compare")
            if not isinstance(part, dict):
                return _widened(_TYPES)
            branches = next((part[name] for name in ("anyOf", "oneOf", "allOf") if name in part), None)
            if "$ref" in part:
                target = self._resolve(part["$ref"])
                if part["$ref"] not in seen:
                    seen.add(part["$ref"])
                    left.append(target)
            elif isinstance(branches, list):
                left += branches
            elif "const" in part or isinstance(part.get("enum"), list):
                values = _values(part)
                self._steps += len(values)
                found |= {_kind(value) for value in values}
            else:
                found |= _widened(_kinds(part) or _TYPES)
        return found

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
            self._patterns += 1
            if self._patterns > MAX_PATTERNS:
                raise RequestInvalid(f"a schema has at most {MAX_PATTERNS} patterns")
            made["pattern"] = check_pattern(made)

    def _resolve(self, reference: object) -> object:
        if reference == "#":
            return self._root
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
        return known[name]


def _check_value(value: object) -> None:
    """Refuse a value nested too deep, or with a number that the compiler would round, level by level."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        if any(isinstance(each, int) and abs(each) > _EXACT for each in level):
            raise RequestInvalid(f"whole numbers in a schema go up to {_EXACT}, above which they are not exact")
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


def _widened(kinds: Iterable[str]) -> set[str]:
    """Return types as sets are compared: a whole number is a number too."""
    return {*kinds, "integer"} if "number" in kinds else set(kinds)


def _kind(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "integer" if isinstance(value, int) or value.is_integer() else "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def _values(made: dict[str, Any]) -> list[object]:
    return [made["const"]] if "const" in made else list(made["enum"])


def _canonical(value: object) -> str:
    """Return a text that equal JSON values share: 1.0 is 1, and objects have no order."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{_canonical(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_canonical, value)) + "]"
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def _check_work(work: int) -> None:
    if work > MAX_WORK:
        raise RequestInvalid(
            f"the counts of items, characters and repeats add up to more than {MAX_WORK}, which is the budget of a "
            "request (nested ones multiply)",
            hint="lower maxItems, maxLength or the counts in patterns",
        )


def _work(made: dict[str, Any]) -> int:
    """Return the sum of all counts in a checked schema, nested ones multiplied.

    A definition counts once: it is compiled once, however often it is used.
    """
    if not made:
        return 0
    total: int = max(made.get("minLength", 0), made.get("maxLength", 0)) + repeats(made.get("pattern", ""))
    for name in ("properties", *_DEFINITIONS):
        total += sum(map(_work, made.get(name, {}).values()))
    total += sum(map(_work, [*made.get("anyOf", ()), *made.get("prefixItems", ())]))
    total += _work(made.get("additionalProperties") or {})
    inner, count = _work(made.get("items") or {}), max(made.get("minItems", 0), made.get("maxItems", 0))
    return total + (count * max(1, inner) if count else inner)

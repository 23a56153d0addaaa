"""Words between tags as JSON, by the function's schema: a tag says no type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ktx.chat_formats.json_repair import strict

_ALL = frozenset(("string", "integer", "number", "boolean", "null", "object", "array"))
_KINDS: dict[type, frozenset[str]] = {
    bool: frozenset(("boolean",)),
    int: frozenset(("integer", "number")),
    float: frozenset(("number",)),
    type(None): frozenset(("null",)),
    dict: frozenset(("object",)),
    list: frozenset(("array",)),
    str: frozenset(("string",)),
}


def property_schema(parameters: Mapping[str, Any] | None, key: str) -> Any:
    """The schema of one argument; True (anything) where the function's schema says nothing about it."""
    if not isinstance(parameters, Mapping):
        return True
    properties = parameters.get("properties")
    if isinstance(properties, Mapping) and key in properties:
        return _followed(properties[key], parameters)
    return _followed(parameters.get("additionalProperties", True), parameters)


def _followed(schema: Any, root: Mapping[str, Any]) -> Any:
    """The schema behind a local "$ref"; a few steps, for references can run in circles."""
    for _ in range(8):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return schema
        schema = root
        for step in reference[2:].split("/"):
            schema = schema.get(step) if isinstance(schema, Mapping) else None
    return True


def kinds(schema: Any, depth: int = 4) -> frozenset[str]:
    """The JSON types that a schema lets through."""
    if not isinstance(schema, Mapping):
        return frozenset(("string",)) if schema is False else _ALL  # False: no such argument, so no reason to convert
    allowed = _ALL
    kind = schema.get("type")
    if isinstance(kind, str):
        allowed = frozenset((kind,))
    elif isinstance(kind, list):
        allowed = frozenset(k for k in kind if isinstance(k, str))
    elif isinstance(schema.get("properties"), Mapping):
        allowed = frozenset(("object",))
    values = (
        schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else None
    )
    if values is not None and kind is None:
        allowed &= frozenset().union(*(_KINDS.get(type(value), _ALL) for value in values))
    for word in ("anyOf", "oneOf") if depth else ():
        if isinstance(schema.get(word), list):
            allowed &= frozenset().union(*(kinds(part, depth - 1) for part in schema[word]))
    if depth and isinstance(schema.get("allOf"), list):
        allowed = allowed.intersection(*(kinds(part, depth - 1) for part in schema["allOf"]))
    return allowed | {"integer"} if "number" in allowed else allowed


def only_string(schema: Any) -> bool:
    """Whether a word can be nothing but a string, so that it may flow before its end is known."""
    return kinds(schema) <= {"string"}


def convert(text: str, schema: Any) -> str:
    """The JSON text of one argument."""
    allowed = kinds(schema)
    if allowed - {"string"}:
        word = text.strip()
        found = strict(word) if word else None
        if word.lower() in ("true", "false", "null", "none"):
            found = {"none": "null"}.get(word.lower(), word.lower())
        if found is not None and found[0] != '"' and _fits(found, allowed):
            return found
    return json.dumps(text, ensure_ascii=False)


def _fits(found: str, allowed: frozenset[str]) -> bool:
    value = json.loads(found)
    if isinstance(value, float) and value.is_integer() and "integer" in allowed:
        return True
    return bool(_KINDS[type(value)] & allowed)

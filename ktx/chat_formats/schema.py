"""Converts the text between tags to JSON by the function's schema, because a tag has no type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ktx.chat_formats.json_repair import repair_json

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
    """Returns the schema of one argument; True (anything) where the function's schema does not define it."""
    if not isinstance(parameters, Mapping):
        return True
    properties = parameters.get("properties")
    if isinstance(properties, Mapping) and key in properties:
        return _resolve_ref(properties[key], parameters)
    return _resolve_ref(parameters.get("additionalProperties", True), parameters)


def _resolve_ref(schema: Any, root: Mapping[str, Any]) -> Any:
    """Resolves a local "$ref", in at most eight steps, because references can be circular."""
    for _ in range(8):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return schema
        schema = root
        for key in reference[2:].split("/"):
            schema = schema.get(key) if isinstance(schema, Mapping) else None
    return True  # the schema that allows everything


def allowed_types(schema: Any, depth: int = 4) -> frozenset[str]:
    """Returns the JSON types that a schema allows; all of them where it does not restrict the type. They decide whether
    the text of an argument is a string.

    Args:
        schema: a JSON schema, True or False.
        depth: how many levels of anyOf, oneOf and allOf are followed; deeper ones do not restrict the types.
    """
    if not isinstance(schema, Mapping):
        return frozenset(("string",)) if schema is False else _ALL  # False: an undefined argument is not converted
    allowed = _ALL
    kind = schema.get("type")
    if isinstance(kind, str):
        allowed = frozenset((kind,))
    elif isinstance(kind, list):
        allowed = frozenset(type_name for type_name in kind if isinstance(type_name, str))
    elif isinstance(schema.get("properties"), Mapping):
        allowed = frozenset(("object",))
    values = (
        schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else None
    )
    if values is not None and kind is None:
        allowed &= frozenset().union(*(_KINDS.get(type(value), _ALL) for value in values))
    for keyword in ("anyOf", "oneOf") if depth else ():
        if isinstance(schema.get(keyword), list):
            allowed &= frozenset().union(*(allowed_types(part, depth - 1) for part in schema[keyword]))
    if depth and isinstance(schema.get("allOf"), list):
        allowed = allowed.intersection(*(allowed_types(part, depth - 1) for part in schema["allOf"]))
    return allowed | {"integer"} if "number" in allowed else allowed


def is_string_only(schema: Any) -> bool:
    """Whether a value can only be a string, so that it can be streamed before its end is known."""
    return allowed_types(schema) <= {"string"}


def to_json(text: str, schema: Any) -> str:
    """Returns the JSON text of one argument: the text as JSON if the schema allows the type that it then has, else as a
    string.
    """
    allowed = allowed_types(schema)
    if allowed - {"string"}:
        stripped = text.strip()
        json_text = repair_json(stripped) if stripped else None
        if stripped.lower() in ("true", "false", "null", "none"):
            json_text = {"none": "null"}.get(stripped.lower(), stripped.lower())
        if json_text is not None and json_text[0] != '"' and _has_type(json_text, allowed):
            return json_text
    return json.dumps(text, ensure_ascii=False)


def _has_type(json_text: str, allowed: frozenset[str]) -> bool:
    """Whether a JSON value has one of the allowed types."""
    value = json.loads(json_text)
    if isinstance(value, float) and value.is_integer() and "integer" in allowed:
        return True
    return bool(_KINDS[type(value)] & allowed)

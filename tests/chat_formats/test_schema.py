"""Words between tags become what the function's schema says."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktx.chat_formats.schema import allowed_types, property_schema, to_json

CASES = (
    ("75001", {"type": "string"}, '"75001"'),
    ("75001", {"type": "integer"}, "75001"),
    ("3.0", {"type": "integer"}, "3.0"),
    ("3.5", {"type": "integer"}, '"3.5"'),
    ("3", {"type": "number"}, "3"),
    (" 3 ", {"type": "number"}, "3"),
    ("true", {"type": "boolean"}, "true"),
    ("TRUE", {"type": "boolean"}, "true"),
    ("yes", {"type": "boolean"}, '"yes"'),
    ("1", {"type": "boolean"}, '"1"'),
    ("None", {"type": "null"}, "null"),
    ("null", {"type": ["string", "null"]}, "null"),
    ("x", {"type": ["string", "null"]}, '"x"'),
    ("null", {"type": "string"}, '"null"'),
    ("[1, 2]", {"type": "array"}, "[1, 2]"),
    ("('a',)", {"type": "array"}, "\"('a',)\""),
    ("['a', True]", {"type": "array"}, '["a", true]'),
    ('{"a": 1,}', {"type": "object"}, '{"a": 1}'),
    ("[1", {"type": "array"}, "[1]"),
    ("text", {"type": "object"}, '"text"'),
    ("7", {"enum": ["7", "8"]}, '"7"'),
    ("7", {"enum": [7, 8]}, "7"),
    ("7", {"const": 7}, "7"),
    ("7", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "7"),
    ("7", {"oneOf": [{"type": "string"}]}, '"7"'),
    ("7", {"allOf": [{"type": ["string", "integer"]}, {"type": "integer"}]}, "7"),
    ("7", {}, "7"),
    ("7", True, "7"),
    ("7", False, '"7"'),
    ('"quoted"', {"type": "string"}, '"\\"quoted\\""'),
    ('"quoted"', {}, '"\\"quoted\\""'),
    ("", {"type": "integer"}, '""'),
    ("é\n", {"type": "string"}, '"é\\n"'),
)


@pytest.mark.parametrize(("text", "schema", "want"), CASES)
def test_convert(text, schema, want):
    assert to_json(text, schema) == want
    json.loads(want)


def test_the_schema_of_an_argument():
    root = {
        "properties": {"a": {"$ref": "#/$defs/n"}, "b": {"$ref": "#/$defs/round"}},
        "additionalProperties": {"type": "integer"},
        "$defs": {"n": {"type": "number"}, "round": {"$ref": "#/$defs/round"}},
    }
    assert property_schema(root, "a") == {"type": "number"}
    assert property_schema(root, "b") is True  # a reference to itself says nothing
    assert property_schema(root, "c") == {"type": "integer"}
    assert property_schema({"additionalProperties": False}, "c") is False
    assert property_schema(None, "c") is True


NONSENSE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["string", "integer", "#/a", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "enum", "const", "anyOf", "allOf", "oneOf", "$ref", "properties", "a"]), inner
        )
    ),
)


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(["1", "[1]", "{", "None"]),
    NONSENSE,
)
def test_no_schema_is_too_odd(text, schema):
    assert json.loads(to_json(text, schema)) is not ...
    assert allowed_types(schema) is not None
    property_schema(schema if isinstance(schema, dict) else None, "a")

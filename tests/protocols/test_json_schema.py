"""Schemas that clients write are bounded before anything walks them."""

from typing import Any

import pytest

from mlx_manager.core.errors import InvalidField
from mlx_manager.protocols.json_schema import MAX_BYTES, MAX_DEPTH, MAX_ENUM_VALUES, MAX_PROPERTIES, check_schema


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


CLOSED: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "object", "properties": {}, "required": [], "additionalProperties": False}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        (nested(MAX_DEPTH + 1), "deeper"),
        ({"properties": {f"p{i}": {} for i in range(MAX_PROPERTIES + 1)}}, "properties"),
        ({"enum": list(range(MAX_ENUM_VALUES + 1))}, "'enum' at the root"),
        ({"properties": {"a": {"enum": list(range(MAX_ENUM_VALUES + 1))}}}, "'enum' at properties.a"),
        ({"description": "x" * MAX_BYTES}, "256 kB"),
        ({"$ref": "http://example.com/schema"}, "points outside"),
        ({"anyOf": [{}, {"$ref": "file:///etc/passwd"}]}, r"anyOf\[1\] points outside"),
    ],
)
def test_a_schema_beyond_a_limit_is_refused_with_the_limit(schema: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidField, match=told) as refused:
        check_schema(schema, "tools[0].function.parameters")
    assert refused.value.param == "tools[0].function.parameters"


def test_what_is_within_the_limits_passes() -> None:
    check_schema(nested(MAX_DEPTH - 2), "s")
    check_schema({"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {}}}, "s")
    check_schema(CLOSED, "s", strict=True)
    check_schema({}, "s", strict=True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"additionalProperties": True}, "additionalProperties.*at the root"),
        ({"required": []}, "'a' is missing"),
        ({"required": None}, "'a' is missing"),
        ({"properties": {"a": {"type": "object", "properties": {}}}}, "additionalProperties.*at properties.a"),
    ],
)
def test_strict_wants_every_object_closed_and_its_properties_required(change: dict[str, Any], told: str) -> None:
    check_schema(CLOSED | change, "s")
    with pytest.raises(InvalidField, match=told):
        check_schema(CLOSED | change, "s", strict=True)

"""Values that models write as bare text, as JSON, by what the tool's schema declares. No format of its own."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import cast

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.tool_formats.json_arguments import read_arguments
from mlx_manager.inference.families.tool_formats.json_call import NOT_A_VALUE, read_json, read_literal

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_TYPE_NAMES: tuple[tuple[type, str], ...] = (
    *((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string")),
    *((list, "array"), (dict, "object"), (type(None), "null")),
)
TEXT_ONLY = frozenset({"string"})


def types_of(name: str, key: str, tools: Sequence[ToolSpec]) -> frozenset[str]:
    """The types that the schema of a tool's parameter allows; none where it says nothing."""
    for tool in tools:
        properties: object = tool.parameters.get("properties")
        if tool.name == name and isinstance(properties, Mapping):
            return _types(cast(Mapping[str, object], properties).get(key), 0)
    return frozenset()


def _types(schema: object, depth: int) -> frozenset[str]:
    if not isinstance(schema, Mapping) or depth > 5:
        return frozenset()
    record = cast(Mapping[str, object], schema)
    match record.get("type"):
        case str(one):
            return frozenset({one})
        case list():
            return frozenset(each for each in cast(list[object], record["type"]) if isinstance(each, str))
        case _:
            pass
    types: set[str] = set()
    for choices in (record.get("anyOf"), record.get("oneOf"), record.get("allOf")):
        if isinstance(choices, list):
            types.update(*(_types(choice, depth + 1) for choice in cast(list[object], choices)))
    values = record.get("enum", [record["const"]] if "const" in record else None)
    if isinstance(values, list):
        types.update(name for value in cast(list[object], values) for kind, name in _TYPE_NAMES if type(value) is kind)
    return frozenset(types)


def json_value(text: str, types: frozenset[str]) -> str:
    """A value as JSON text: as the model spelt it where that is JSON of a declared type, or nothing is declared; else as a string."""
    bare = text.strip()
    word = bare.lower()
    if "null" in types and word in ("null", "none"):
        return "null"
    if "boolean" in types and word in ("true", "false"):
        return word
    if types & {"integer", "number"} and _NUMBER.fullmatch(bare) and (number := _as_written(bare)):
        return number
    if types & {"object", "array"} and bare[:1] in ("{", "["):
        if written := _as_written(bare):
            return written
        literal = read_literal(bare)
        try:
            return json_string(text) if literal is NOT_A_VALUE else json.dumps(literal, ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, RecursionError):
            return json_string(text)
    if "string" in types:
        return json_string(text)
    return _as_written(bare) or json_string(text)


def json_string(text: str) -> str:
    plain = json.dumps(text, ensure_ascii=False)
    try:
        plain.encode()
    except UnicodeEncodeError:
        return json.dumps(text)
    return plain


def _as_written(text: str) -> str | None:
    """The text of one JSON value, if it is that."""
    if read_json(text) is NOT_A_VALUE:
        return None
    member = read_arguments('{"":' + text + "}")
    return None if member is None else member[4:-1]

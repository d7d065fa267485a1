"""Which JSON Schemas are taken at all, whatever is made of them. Walked without recursion: a client wrote them."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

from mlx_manager.core.errors import InvalidField

MAX_BYTES = 256 << 10
MAX_DEPTH = 32
MAX_PROPERTIES = 5_000
MAX_ENUM_VALUES = 1_000


def check_schema(schema: Mapping[str, Any], where: str, *, strict: bool = False) -> None:
    """Raises `InvalidField`, naming `where`, for a schema beyond the limits or with a reference to elsewhere; and, with `strict`, where
    upstream's rules for it are broken: every object closed, and all of its properties required."""
    if len(json.dumps(schema, default=dict)) > MAX_BYTES:
        raise _invalid(where, f"a schema has {MAX_BYTES >> 10} kB at most")
    num_properties = 0
    for node, path, depth in _nodes(schema):
        if depth > MAX_DEPTH:
            raise _invalid(where, f"it is nested deeper than {MAX_DEPTH} levels")
        reference = node.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            raise _invalid(where, f"'$ref' at {path} points outside of the schema")
        enum = node.get("enum")
        if isinstance(enum, list) and len(cast(list[object], enum)) > MAX_ENUM_VALUES:
            raise _invalid(where, f"'enum' at {path} has more than {MAX_ENUM_VALUES:,} values")
        properties = node.get("properties")
        if not isinstance(properties, Mapping):
            continue
        names = list(cast(Mapping[str, object], properties))
        num_properties += len(names)
        if num_properties > MAX_PROPERTIES:
            raise _invalid(where, f"it has more than {MAX_PROPERTIES:,} properties")
        if strict:
            _check_closed(node, names, where, path)


def _check_closed(node: Mapping[str, Any], names: list[str], where: str, path: str) -> None:
    if node.get("additionalProperties") is not False:
        raise _invalid(where, f"with 'strict', 'additionalProperties' must be given and be false at {path}")
    required: object = node.get("required")
    missing = [name for name in names if not isinstance(required, list) or name not in required]
    if missing:
        raise _invalid(where, f"with 'strict', 'required' must name every property at {path}: '{missing[0][:64]}' is missing")


def _nodes(schema: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str, int]]:
    """Every object in a schema, with the path to it and its depth."""
    left: list[tuple[object, str, int]] = [(schema, "the root", 1)]
    while left:
        value, path, depth = left.pop()
        if isinstance(value, Mapping):
            node = cast(Mapping[str, Any], value)
            yield node, path, depth
            if depth <= MAX_DEPTH:
                left += [(inner, f"{'' if depth == 1 else path + '.'}{key[:64]}", depth + 1) for key, inner in node.items()]
        elif isinstance(value, list):
            left += [(inner, f"{path}[{i}]", depth) for i, inner in enumerate(cast(list[object], value))]


def _invalid(where: str, why: str) -> InvalidField:
    return InvalidField(f"Invalid schema for '{where}': {why}.", param=where)

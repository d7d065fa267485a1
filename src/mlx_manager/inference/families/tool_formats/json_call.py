"""Calls written as JSON objects, in the spellings that models use."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from mlx_manager.inference.families.family import Call

_NOT_JSON = object()


def read_json(text: str) -> Any:
    """The value, or a marker that is no call when `text` is not JSON."""
    try:
        return json.loads(text.strip())
    except ValueError:
        return _NOT_JSON


def write_json(arguments: Mapping[str, Any]) -> str:
    """Arguments as the JSON text that goes to the client: keys in the model's order, text unescaped."""
    return json.dumps(arguments, ensure_ascii=False)


def calls_in(values: Sequence[Any]) -> list[Call] | None:
    """A call for each value; None unless every one of them is a call."""
    calls = [_call(value) for value in values]
    return [c for c in calls if c is not None] if calls and all(calls) else None


def _call(value: Any) -> Call | None:
    if not isinstance(value, dict):
        return None
    record = cast(dict[str, Any], value)
    name = record.get("name")
    arguments = record.get("arguments", record.get("parameters", {}))
    if isinstance(arguments, str):  # some models quote the object
        arguments = read_json(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return Call(name, cast(dict[str, Any], arguments))

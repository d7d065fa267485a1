"""`<tool_call>name` and an `<arg_key>`, `<arg_value>` pair for each argument, then `</tool_call>` (GLM 4.5 and later)."""

import re
from collections.abc import Sequence
from typing import Any

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.family import Call
from mlx_manager.inference.families.tool_formats.json_call import read_json

start = "<tool_call>"
end = "</tool_call>"
_NAME = re.compile(r"^\s*([\w.:-]+)\s*(.*)$", re.DOTALL)
_PAIR = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)


def may_begin(text: str) -> bool:
    return re.match(r"\s*[\w.:-]*", text) is not None


def parse(text: str, tools: Sequence[ToolSpec]) -> list[Call] | None:
    named = _NAME.match(text)
    if named is None:
        return None
    name, rest = named[1], named[2]
    strings = _string_parameters(name, tools)
    arguments: dict[str, Any] = {}
    while rest:
        pair = _PAIR.match(rest)
        if pair is None:
            return None
        key, value = pair[1].strip(), pair[2]
        arguments[key] = value if key in strings else _value(value)
        rest = rest[pair.end() :]
    return [Call(name, arguments)]


def _value(text: str) -> Any:
    """Values are JSON, except that strings come bare."""
    value = read_json(text)
    return value if isinstance(value, str | int | float | bool | dict | list | None) else text


def _string_parameters(name: str, tools: Sequence[ToolSpec]) -> set[str]:
    for tool in tools:
        if tool.name == name:
            properties = tool.parameters.get("properties", {})
            return {key for key, schema in properties.items() if schema.get("type") == "string"}
    return set()

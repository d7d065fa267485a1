"""`<tool_call>name` and an `<arg_key>`, `<arg_value>` pair for each argument, then `</tool_call>` (GLM 4.5 and later)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.family import Section
from mlx_manager.inference.families.tool_formats import json_tags
from mlx_manager.inference.families.tool_formats.json_call import NOT_A_VALUE, make_call, read_json

start = "<tool_call>"
end = "</tool_call>"
streams = ()
_OPENING = re.compile(r"\s*[\w.:-]+\s*(<|\Z)|\s*\Z")
_NAME = re.compile(r"\s*([\w.:-]+)\s*")
_PAIR = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)


def may_begin(text: str) -> bool:
    return _OPENING.match(text) is not None or json_tags.may_begin(text)


def is_open(text: str) -> bool:
    if text.lstrip().startswith("{"):
        return json_tags.is_open(text)
    return text.rfind("<arg_value>") > text.rfind("</arg_value>")


def parse(text: str, tools: Sequence[ToolSpec]) -> Section | None:
    named = _NAME.match(text)
    if named is None:
        return json_tags.parse(text, tools)  # they fall back on it at times
    name, at = named[1], named.end()
    strings = _string_parameters(name, tools)
    arguments: dict[str, Any] = {}
    while at < len(text):
        pair = _PAIR.match(text, at)
        if pair is None:
            return None
        key, value = pair[1].strip(), pair[2]
        arguments[key] = value if key in strings else _value(value)
        at = pair.end()
    if not arguments and name not in {tool.name for tool in tools}:
        return None  # a single word between the marks: prose, more likely
    call = make_call(name, arguments)
    return Section((call,), len(text)) if call else None


def _value(text: str) -> Any:
    """Values are JSON, except that strings come bare."""
    value = read_json(text)
    return text if value is NOT_A_VALUE else value


def _string_parameters(name: str, tools: Sequence[ToolSpec]) -> set[str]:
    for tool in tools:
        properties: object = tool.parameters.get("properties")
        if tool.name == name and isinstance(properties, Mapping):
            schemas = cast(Mapping[str, object], properties).items()
            return {
                key for key, schema in schemas if isinstance(schema, Mapping) and cast(Mapping[str, object], schema).get("type") == "string"
            }
    return set()

"""`{"name": …, "parameters": {…}}` as the whole reply, several joined by `;`, perhaps after `<|python_tag|>` (Llama 3.1 to 3.3);
or, as the same models do when a prompt shows it, `<function=name>{…}</function>` or Python calls in a list."""

import re
from collections.abc import Sequence
from typing import Any

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.family import Section
from mlx_manager.inference.families.tool_formats import pythonic
from mlx_manager.inference.families.tool_formats.json_call import NOT_A_VALUE, begin_json, calls_in, read_json

start = ""
end = ""
_TAG = "<|python_tag|>"
_JSON_BEGINNINGS = ('{"name":', '{"type":')
_FUNCTION = "<function="
_NEXT_OBJECT = re.compile(r"[\s;,]*(?=\{)")
_FUNCTION_CALL = re.compile(r"<function=([\w.:-]+)>(.*?)</function>", re.DOTALL)


def may_begin(text: str) -> bool:
    text = text.lstrip()
    if _TAG.startswith(text) or text.startswith(_TAG):
        return True
    if _FUNCTION.startswith(text) or text.startswith(_FUNCTION):
        return True
    squeezed = re.sub(r"\s+", "", text)
    return any(squeezed.startswith(b) or b.startswith(squeezed) for b in _JSON_BEGINNINGS) or pythonic.may_begin(text)


def is_open(text: str) -> bool:
    return False


def parse(text: str, tools: Sequence[ToolSpec]) -> Section | None:
    bare = text.strip().removeprefix(_TAG)
    begin = text.find(bare)
    section = _objects(bare, tools) or _function(bare, tools) or pythonic.parse(bare, tools)
    return Section(section.calls, begin + section.num_chars) if section else None


def _objects(text: str, tools: Sequence[ToolSpec]) -> Section | None:
    values: list[Any] = []
    used = 0
    while beginning := _NEXT_OBJECT.match(text, used):
        value, end_of_value = begin_json(text, beginning.end())
        if value is NOT_A_VALUE:
            break
        values.append(value)
        used = end_of_value
    return _offered(Section(calls, used) if (calls := calls_in(values)) else None, tools)


def _function(text: str, tools: Sequence[ToolSpec]) -> Section | None:
    match = _FUNCTION_CALL.match(text.lstrip())
    if match is None:
        return None
    calls = calls_in([{"name": match[1], "arguments": read_json(match[2])}])
    return _offered(Section(calls, text.find(match[0]) + len(match[0])) if calls else None, tools)


def _offered(section: Section | None, tools: Sequence[ToolSpec]) -> Section | None:
    """An object with a name can be an answer in JSON: it is a call only if it names a tool."""
    offered = {tool.name for tool in tools}
    return section if section and all(call.name in offered for call in section.calls) else None

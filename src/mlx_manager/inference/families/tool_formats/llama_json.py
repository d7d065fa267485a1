"""`{"name": …, "parameters": {…}}` as the whole reply, several joined by `;`, perhaps after `<|python_tag|>` (Llama 3.1 to 3.3);
or, as the same models do when a prompt shows it, `<function=name>{…}</function>` or Python calls in a list."""

import re
from collections.abc import Sequence

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.family import ArgumentStream, Call, Section
from mlx_manager.inference.families.tool_formats import pythonic
from mlx_manager.inference.families.tool_formats.json_arguments import alone, in_record, read_arguments
from mlx_manager.inference.families.tool_formats.json_call import BEGUN, begin_call, record_head

start = ""
end = ""
_TAG = "<|python_tag|>"
_JSON_BEGINNINGS = ('{"name":', '{"type":')
_FUNCTION = "<function="
_NEXT_OBJECT = re.compile(r"[\s;,]*(?=\{)")
_FUNCTION_CALL = re.compile(r"<function=([\w.:-]+)>(.*?)</function>", re.DOTALL)
_TAGGED = rf"(?:{re.escape(_TAG)}\s*)?"
streams = (
    ArgumentStream(record_head(_TAGGED), in_record, more=(";", ",")),
    ArgumentStream(re.compile(rf"\s*{_TAGGED}<function=([\w.:-]+)>\s*{BEGUN}"), alone, end="</function>"),
)


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
    calls: list[Call] = []
    used = 0
    while beginning := _NEXT_OBJECT.match(text, used):
        call, end_of_call = begin_call(text, beginning.end())
        if call is None:
            break
        calls.append(call)
        used = end_of_call
    return _offered(Section(tuple(calls), used), tools) if calls else None


def _function(text: str, tools: Sequence[ToolSpec]) -> Section | None:
    match = _FUNCTION_CALL.match(text.lstrip())
    arguments = None if match is None else read_arguments(match[2])
    if match is None or arguments is None:
        return None
    return _offered(Section((Call(match[1], arguments),), text.find(match[0]) + len(match[0])), tools)


def _offered(section: Section, tools: Sequence[ToolSpec]) -> Section | None:
    """An object with a name can be an answer in JSON: it is a call only if it names a tool."""
    offered = {tool.name for tool in tools}
    return section if all(call.name in offered for call in section.calls) else None

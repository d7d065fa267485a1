"""`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, one call a section (Qwen 2.5 and 3, Hermes)."""

from collections.abc import Sequence

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.family import Section
from mlx_manager.inference.families.tool_formats.json_call import NOT_A_VALUE, calls_in, is_in_string, read_json, read_single_quoted

start = "<tool_call>"
end = "</tool_call>"


def may_begin(text: str) -> bool:
    return "{".startswith(text.lstrip()[:1])


def is_open(text: str) -> bool:
    return is_in_string(text)


def parse(text: str, tools: Sequence[ToolSpec]) -> Section | None:
    value = read_json(text)
    calls = calls_in([read_single_quoted(text) if value is NOT_A_VALUE else value])
    return Section(calls, len(text)) if calls else None

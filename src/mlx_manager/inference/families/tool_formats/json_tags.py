"""`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, one call a section (Qwen 2.5 and 3, Hermes)."""

from collections.abc import Sequence

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.family import ArgumentStream, Section
from mlx_manager.inference.families.tool_formats.json_arguments import in_record
from mlx_manager.inference.families.tool_formats.json_call import (
    NOT_A_VALUE,
    begin_call,
    calls_in,
    is_in_string,
    read_single_quoted,
    record_head,
)

start = "<tool_call>"
end = "</tool_call>"
streams = (ArgumentStream(record_head(), in_record, end=end),)


def may_begin(text: str) -> bool:
    return "{".startswith(text.lstrip()[:1])


def is_open(text: str) -> bool:
    return is_in_string(text)


def parse(text: str, tools: Sequence[ToolSpec]) -> Section | None:
    call, used = begin_call(text, 0)
    if call and not text[used:].strip():
        return Section((call,), len(text))
    value = read_single_quoted(text)
    calls = None if value is NOT_A_VALUE else calls_in([value])
    return Section(calls, len(text)) if calls else None

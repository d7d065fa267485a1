"""`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, one call a section (Qwen 2.5 and 3, Hermes)."""

from collections.abc import Sequence

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.family import Call
from mlx_manager.inference.families.tool_formats.json_call import calls_in, read_json

start = "<tool_call>"
end = "</tool_call>"


def may_begin(text: str) -> bool:
    return "{".startswith(text.lstrip()[:1])


def parse(text: str, tools: Sequence[ToolSpec]) -> list[Call] | None:
    return calls_in([read_json(text)])

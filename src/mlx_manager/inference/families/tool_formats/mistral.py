"""`[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or `[TOOL_CALLS]name[ARGS]{…}` for each call in newer models (Mistral)."""

import re
from collections.abc import Sequence

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.family import Call
from mlx_manager.inference.families.tool_formats.json_call import calls_in, read_json

start = "[TOOL_CALLS]"
end = ""
_NAMED = re.compile(r"^\s*([\w.:-]+)(?:\[CALL_ID\]\w+)?\[ARGS\](.*)$", re.DOTALL)


def may_begin(text: str) -> bool:
    return True


def parse(text: str, tools: Sequence[ToolSpec]) -> list[Call] | None:
    if "[ARGS]" not in text:
        value = read_json(text)
        return calls_in(value if isinstance(value, list) else [value])  # pyright: ignore[reportUnknownArgumentType]
    values: list[object] = []
    for section in text.split(start):
        match = _NAMED.match(section)
        if match is None:
            return None
        values.append({"name": match[1], "arguments": read_json(match[2])})
    return calls_in(values)

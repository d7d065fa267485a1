"""`[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or `[TOOL_CALLS]name[ARGS]{…}` for each call in newer models (Mistral)."""

import re
from collections.abc import Sequence
from typing import Any, cast

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.family import Section
from mlx_manager.inference.families.tool_formats.json_call import NOT_A_VALUE, begin_json, calls_in, make_call, read_single_quoted

start = "[TOOL_CALLS]"
end = ""
# `[ARGS]` is a special token, which some servers of these models do not show; with an id between in Small 3.2.
_NAMED = re.compile(r"\s*([\w.:-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")


def may_begin(text: str) -> bool:
    return True


def is_open(text: str) -> bool:
    return False


def parse(text: str, tools: Sequence[ToolSpec]) -> Section | None:
    if named := _NAMED.match(text):
        value, used = begin_json(text, named.end())
        call = make_call(named[1], value)
        return Section((call,), used) if call else None
    value, used = begin_json(text, 0)
    if value is NOT_A_VALUE:
        value, used = read_single_quoted(text), len(text)
    calls = calls_in(cast(list[Any], value) if isinstance(value, list) else [value])
    return Section(calls, used) if calls else None

"""`{"name": …, "parameters": {…}}` as the whole reply, several joined by `;`, perhaps after `<|python_tag|>` (Llama 3.1 to 3.3)."""

import json
import re
from collections.abc import Sequence
from typing import Any

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.family import Call
from mlx_manager.inference.families.tool_formats.json_call import calls_in

start = ""
end = ""
_TAG = "<|python_tag|>"
_BEGINNING = re.compile(r'\{\s*"(type|name)"\s*:')


def may_begin(text: str) -> bool:
    text = text.lstrip()
    if _TAG.startswith(text) or text.startswith(_TAG):
        return True
    head = text[:40]
    return bool(_BEGINNING.match(head)) or (len(head) < 40 and _is_beginning_of_beginning(head))


def _is_beginning_of_beginning(head: str) -> bool:
    squeezed = re.sub(r"\s+", "", head)
    return any(full.startswith(squeezed) for full in ('{"name":', '{"type":'))


def parse(text: str, tools: Sequence[ToolSpec]) -> list[Call] | None:
    text = text.strip().removeprefix(_TAG).strip()
    values: list[Any] = []
    decoder = json.JSONDecoder()
    while text:
        try:
            value, used = decoder.raw_decode(text)
        except ValueError:
            return None
        values.append(value)
        text = text[used:].lstrip(" \n\t;,")
    calls = calls_in(values)
    offered = {tool.name for tool in tools}
    # An object with a name can be an answer in JSON: it is a call only if it names a tool.
    return calls if calls and all(call.name in offered for call in calls) else None

"""`[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or `[TOOL_CALLS]name[ARGS]{…}` for each call in newer models (Mistral)."""

import re
from collections.abc import Sequence
from typing import Any, cast

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.family import ArgumentStream, Call, Section
from mlx_manager.inference.families.tool_formats.json_arguments import JsonArguments, alone, in_record
from mlx_manager.inference.families.tool_formats.json_call import (
    BEGUN,
    NOT_A_VALUE,
    begin_call,
    calls_in,
    read_single_quoted,
    record_head,
)

start = "[TOOL_CALLS]"
end = ""
# `[ARGS]` is a special token, which some servers of these models do not show; with an id between in Small 3.2.
_NAMED = re.compile(rf"\s*([\w.:-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*{BEGUN}")
_OPENING = re.compile(r"\s*(?:\Z|\{|\[\s*(?:\Z|\{)|[\w.:-]+\s*(?:\Z|[\[{]))")
_NEXT = re.compile(r"\s*(,\s*(?=\{)|\])")
streams = (
    ArgumentStream(_NAMED, alone),
    ArgumentStream(record_head(r"\[\s*"), in_record, more=(",",), resume="[", end="]"),
    ArgumentStream(record_head(), in_record),
)


def may_begin(text: str) -> bool:
    return _OPENING.match(text) is not None


def is_open(text: str) -> bool:
    return False


def parse(text: str, tools: Sequence[ToolSpec]) -> Section | None:
    if named := _NAMED.match(text):
        reader = JsonArguments()
        arguments, used = reader.read(text[named.end() :])
        return Section((Call(named[1], arguments),), named.end() + used) if reader.state == "done" else None
    if section := _list(text):
        return section
    value = read_single_quoted(text)
    calls = None if value is NOT_A_VALUE else calls_in(cast(list[Any], value) if isinstance(value, list) else [value])
    return Section(calls, len(text)) if calls else None


def _list(text: str) -> Section | None:
    """Calls in brackets; or one, without."""
    at = len(text) - len(text.lstrip())
    if not text.startswith("[", at):
        call, used = begin_call(text, at)
        return Section((call,), used) if call else None
    calls: list[Call] = []
    at += 1
    while True:
        call, at = begin_call(text, at)
        follows = _NEXT.match(text, at)
        if call is None or follows is None:
            return None
        calls.append(call)
        at = follows.end()
        if follows[1] == "]":
            return Section(tuple(calls), at)

"""Sections of calls that each have marks of their own, a name and arguments in JSON (DeepSeek V3 to V3.1 and R1, Kimi K2)."""

import re
from collections.abc import Sequence

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.family import ArgumentStream, Call, Section
from mlx_manager.inference.families.tool_formats.json_arguments import JsonArguments, alone
from mlx_manager.inference.families.tool_formats.json_call import BEGUN


class MarkedCalls:
    """`call_start` begins each call of a section, `call_head` leads from there to its arguments (the group that takes part is the
    name), and `closers` follow them."""

    def __init__(self, start: str, end: str, *, call_start: str, call_head: str, closers: tuple[str, ...]) -> None:
        self.start = start
        self.end = end
        self._call_start = call_start
        self._head = re.compile(rf"\s*{re.escape(call_start)}\s*(?:{call_head})\s*{BEGUN}")
        self._closing = re.compile(rf"(?:\s*(?:{'|'.join(map(re.escape, closers))}))*")
        self.streams = (ArgumentStream(self._head, alone, (call_start,), call_start, closers, end, bare=call_start),)

    def may_begin(self, text: str) -> bool:
        text = text.lstrip()
        return text.startswith(self._call_start) or self._call_start.startswith(text)

    def is_open(self, text: str) -> bool:
        return False

    def parse(self, text: str, tools: Sequence[ToolSpec]) -> Section | None:
        calls: list[Call] = []
        at = 0
        while match := self._head.match(text, at):
            reader = JsonArguments()
            arguments, used = reader.read(text[match.end() :])
            if reader.state != "done":
                return None
            calls.append(Call(match[match.lastindex or 0], arguments))
            closing = self._closing.match(text, match.end() + used)
            assert closing is not None
            at = closing.end()
        return Section(tuple(calls), len(text)) if calls and not text[at:].strip() else None


# `function<｜tool▁sep｜>name`, then a fence, in V3 and R1; name and JSON alone in V3.1
DEEPSEEK = MarkedCalls(
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    call_start="<｜tool▁call▁begin｜>",
    call_head=r"function<｜tool▁sep｜>([\w.:-]+)\s*```(?:json)?|([\w.:-]+)<｜tool▁sep｜>",
    closers=("```", "<｜tool▁call▁end｜>"),
)
# `functions.name:0`
KIMI = MarkedCalls(
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    call_start="<|tool_call_begin|>",
    call_head=r"(?:functions\.)?([\w.-]+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>",
    closers=("<|tool_call_end|>",),
)

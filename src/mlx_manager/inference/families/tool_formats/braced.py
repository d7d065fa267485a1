"""`call:name{key:value, …}`: bare keys, and text in quotation marks that are tokens of their own (FunctionGemma, Gemma 4)."""

import re
from collections.abc import Sequence
from typing import Any

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.family import ArgumentStream, Call, Section
from mlx_manager.inference.families.tool_formats.json_call import NOT_A_VALUE, make_call, read_json

_CALL = re.compile(r"\s*call:([\w.:-]+?)\s*\{")
_OPENING = re.compile(r"\s*call:[\w.:-]*\s*(?:\{|\Z)")
_SPACE = re.compile(r"\s*")
_BARE = re.compile(r"[^,{}\[\]]*")
_MAX_DEPTH = 100


class BracedCalls:
    """`quote` opens and closes text; a key may be quoted too."""

    def __init__(self, start: str, end: str, *, quote: str) -> None:
        self.start = start
        self.end = end
        self.streams: tuple[ArgumentStream, ...] = ()
        self._quote = quote
        self._key = re.compile(rf"\s*(?:{re.escape(quote)}(.*?){re.escape(quote)}|([^:,{{}}\[\]]*?))\s*:", re.DOTALL)

    def may_begin(self, text: str) -> bool:
        return "call:".startswith(text.lstrip()) or _OPENING.match(text) is not None

    def is_open(self, text: str) -> bool:
        return text.count(self._quote) % 2 == 1

    def parse(self, text: str, tools: Sequence[ToolSpec]) -> Section | None:
        calls: list[Call] = []
        at = 0
        while match := _CALL.match(text, at):
            try:
                arguments, at = self._object(text, match.end(), 0)
            except ValueError:
                return None
            call = make_call(match[1], arguments)
            if call is None:
                return None
            calls.append(call)
        return Section(tuple(calls), len(text)) if calls and not text[at:].strip() else None

    # Each of these reads what begins at `at` and says where it ends; ValueError if it is none.

    def _object(self, text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
        """After the opening brace."""
        members: dict[str, Any] = {}
        at = _after_space(text, at)
        while text[at : at + 1] != "}":
            key = self._key.match(text, at)
            if key is None:
                raise ValueError("no key")
            members[key[1] if key[1] is not None else key[2]], at = self._value(text, key.end(), depth + 1)
            at = _after_comma(text, at, "}")
        return members, at + 1

    def _list(self, text: str, at: int, depth: int) -> tuple[list[Any], int]:
        items: list[Any] = []
        at = _after_space(text, at)
        while text[at : at + 1] != "]":
            item, at = self._value(text, at, depth + 1)
            items.append(item)
            at = _after_comma(text, at, "]")
        return items, at + 1

    def _value(self, text: str, at: int, depth: int) -> tuple[Any, int]:
        at = _after_space(text, at)
        if depth > _MAX_DEPTH:
            raise ValueError("too deep")
        if text.startswith(self._quote, at):
            begin = at + len(self._quote)
            end = text.find(self._quote, begin)
            if end < 0:
                raise ValueError("text that does not end")
            return text[begin:end], end + len(self._quote)
        if text[at : at + 1] == "{":
            return self._object(text, at + 1, depth)
        if text[at : at + 1] == "[":
            return self._list(text, at + 1, depth)
        bare = _BARE.match(text, at)
        assert bare is not None
        value = read_json(bare[0])
        return (bare[0].strip() if value is NOT_A_VALUE else value), bare.end()


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _after_comma(text: str, at: int, closer: str) -> int:
    at = _after_space(text, at)
    match text[at : at + 1]:
        case ",":
            return _after_space(text, at + 1)
        case char if char == closer:
            return at
        case _:
            raise ValueError("neither a comma nor the end")


FUNCTION_GEMMA = BracedCalls("<start_function_call>", "<end_function_call>", quote="<escape>")
GEMMA4 = BracedCalls("<|tool_call>", "<tool_call|>", quote='<|"|>')

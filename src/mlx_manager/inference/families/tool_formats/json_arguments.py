"""The text of a JSON object, passed on while it is written, as the model wrote it.

Only what no JSON text may hold is changed: control characters inside strings are escaped, and a backslash that begins no escape
stands for itself. What is not certain yet is held back: numbers and words until they end, commas and keys until their value begins.
"""

import math
import re
from collections.abc import Sequence
from enum import Enum, auto
from typing import Literal

from mlx_manager.core.requests import ToolSpec

_SPACE = re.compile(r"[ \t\n\r]+")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_OPEN_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_SCALAR = re.compile(r'[^\s,:"\[\]{}]+')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_WORDS = ("true", "false", "null")
_MAX_SCALAR = 400  # characters: longer numbers are refused by many readers
_MAX_DEPTH = 200
_CLOSER = {"{": "}", "[": "]"}


class _Expects(Enum):
    OBJECT = auto()  # the arguments themselves
    FIRST_KEY = auto()
    KEY = auto()
    COLON = auto()
    FIRST_ITEM = auto()
    VALUE = auto()
    NEXT = auto()  # a comma, or the end of what is open
    TEXT = auto()  # inside a string


class JsonArguments:
    """An `ArgumentReader` that begins at the object's brace. With `in_record`, the object is a member of another one, whose rest
    belongs to the call as well and is passed over."""

    def __init__(self, *, in_record: bool = False) -> None:
        self.state: Literal["open", "done", "broken"] = "open"
        self._open = ["{"] if in_record else []
        self._base = len(self._open)
        self._expects = _Expects.OBJECT
        self._is_key = False
        self._given = False  # whether the object is complete
        self._unread = ""  # the beginning of a token
        self._pending = ""  # certain only with what follows
        self._raw = 0  # characters that were read, but not accounted for
        self._out: list[str] = []
        self._used = 0

    def read(self, text: str) -> tuple[str, int]:
        self._out, self._used = [], 0
        text = self._unread + text
        at = 0
        while self.state == "open" and at < len(text):
            step = self._string(text, at) if self._expects is _Expects.TEXT else self._token(text, at)
            if step == 0:
                break
            at += step
        self._unread = text[at:] if self.state == "open" else ""
        return "".join(self._out), self._used

    def close(self) -> str:
        if self._given:
            return ""
        if self._expects is _Expects.OBJECT:
            return "{}"
        quote = '"' if self._expects is _Expects.TEXT and not self._is_key else ""
        return quote + "".join(_CLOSER[bracket] for bracket in reversed(self._open[self._base :]))

    # Each of these takes one token and returns its length: 0 if it has not ended.

    def _token(self, text: str, at: int) -> int:
        if space := _SPACE.match(text, at):
            return self._hold(space[0])
        char = text[at]
        match self._expects, char:
            case _Expects.OBJECT, "{":
                return self._begin(char)
            case ((_Expects.FIRST_KEY | _Expects.KEY), '"'):
                self._is_key, self._expects = True, _Expects.TEXT
                return self._hold(char)
            case _Expects.COLON, ":":
                self._expects = _Expects.VALUE
                return self._hold(char)
            case ((_Expects.VALUE | _Expects.FIRST_ITEM), '"'):
                self._is_key, self._expects = False, _Expects.TEXT
                return self._pass(char)
            case ((_Expects.VALUE | _Expects.FIRST_ITEM), ("{" | "[")):
                return self._begin(char)
            case _Expects.NEXT, ",":
                self._expects = _Expects.KEY if self._open[-1] == "{" else _Expects.VALUE
                return self._hold(char)
            case ((_Expects.NEXT | _Expects.FIRST_KEY), "}") if self._open[-1] == "{":
                return self._end(char)
            case ((_Expects.NEXT | _Expects.FIRST_ITEM), "]") if self._open[-1] == "[":
                return self._end(char)
            case ((_Expects.VALUE | _Expects.FIRST_ITEM), _):
                return self._scalar(text, at)
            case _:
                return self._break()

    def _scalar(self, text: str, at: int) -> int:
        match = _SCALAR.match(text, at)
        if match is None or len(match[0]) > _MAX_SCALAR:
            return self._break()
        if match.end() == len(text):
            return 0
        if match[0] not in _WORDS and not (_NUMBER.fullmatch(match[0]) and math.isfinite(float(match[0]))):
            return self._break()
        self._expects = _Expects.NEXT
        return self._pass(match[0])

    def _string(self, text: str, at: int) -> int:
        if plain := _PLAIN.match(text, at):
            return self._spell(plain[0], plain[0])
        if text[at] == '"':
            self._expects = _Expects.COLON if self._is_key else _Expects.NEXT
            return self._spell('"', '"')
        if text[at] != "\\":
            return self._spell(f"\\u{ord(text[at]):04x}", text[at])
        if escape := _ESCAPE.match(text, at):
            return self._spell(escape[0], escape[0])
        return 0 if _OPEN_ESCAPE.match(text, at) else self._spell("\\\\", "\\")

    def _begin(self, bracket: str) -> int:
        if len(self._open) >= _MAX_DEPTH:
            return self._break()
        self._open.append(bracket)
        self._expects = _Expects.FIRST_KEY if bracket == "{" else _Expects.FIRST_ITEM
        return self._pass(bracket)

    def _end(self, bracket: str) -> int:
        self._open.pop()
        self._expects = _Expects.NEXT
        self._pass(bracket)
        self._given = self._given or len(self._open) == self._base
        if not self._open:
            self.state = "done"
            self._used, self._raw = self._used + self._raw, 0
        return 1

    def _spell(self, text: str, raw: str) -> int:
        return self._hold(raw, text) if self._is_key else self._pass(raw, text)

    def _hold(self, raw: str, text: str | None = None) -> int:
        self._pending += raw if text is None else text
        self._raw += len(raw)
        return len(raw)

    def _pass(self, raw: str, text: str | None = None) -> int:
        """Gives out what was held, and this."""
        self._raw += len(raw)
        if not self._given:
            self._out += self._pending, raw if text is None else text
            self._used, self._raw = self._used + self._raw, 0
        self._pending = ""
        return len(raw)

    def _break(self) -> int:
        self.state = "broken"
        return 0


def read_arguments(text: str) -> str | None:
    """The whole text of an object, as `JsonArguments` passes it on; None if it is none."""
    reader = JsonArguments()
    text = text.strip()
    arguments, used = reader.read(text)
    return arguments if reader.state == "done" and used == len(text) else None


def alone(name: str, tools: Sequence[ToolSpec]) -> JsonArguments:
    """For formats that write arguments by themselves."""
    return JsonArguments()


def in_record(name: str, tools: Sequence[ToolSpec]) -> JsonArguments:
    """For formats that write `{"name": …, "arguments": {…}}`."""
    return JsonArguments(in_record=True)

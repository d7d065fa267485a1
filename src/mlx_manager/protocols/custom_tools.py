"""Custom tools, which take one text: shown to the model as functions with one parameter, `input`, and read back from its JSON arguments."""

import json
import re
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, Literal, cast

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.requests import Grammar, JsonObject, Regex, ToolSpec

PARAMETER = "input"
_OPENING = re.compile(r'\s*\{\s*"' + PARAMETER + r'"\s*:\s*"')
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_PLAIN = re.compile(r'[^"\\]+')
_UNICODE = re.compile(r"\\u([0-9a-fA-F]{4})")
_NO_CHARACTER = "\ufffd"
_PARAMETERS: JsonObject = MappingProxyType(
    {
        "type": "object",
        "properties": {PARAMETER: {"type": "string", "description": "Free text"}},
        "required": [PARAMETER],
        "additionalProperties": False,
    }
)


def custom_tool(name: str, said: Sequence[str | None], form: Regex | Grammar | None) -> ToolSpec:
    """`said` is what the client says of it; the form is told too, because not every model can be held to it."""
    lines = [line for line in said if line is not None]
    match form:
        case Regex(definition):
            lines.append(f"The {PARAMETER} follows this grammar (regex):\n{definition}")
        case Grammar(definition):
            lines.append(f"The {PARAMETER} follows this grammar (lark):\n{definition}")
        case None:
            pass
    return ToolSpec(name, "\n".join(lines) if lines else None, _PARAMETERS, form=form)


def form_of(syntax: Literal["lark", "regex"] | None, definition: str | None, where: str) -> Regex | Grammar:
    """Raises `InvalidField` if one of them is missing."""
    if syntax is None or definition is None:
        missing = f"{where}.{'syntax' if syntax is None else 'definition'}"
        raise InvalidField(f"Missing required parameter: '{missing}'.", param=missing, code="missing_required_parameter")
    return Regex(definition) if syntax == "regex" else Grammar(definition)


def write_input(text: str) -> str:
    """The arguments of a call with this input."""
    return json.dumps({PARAMETER: text}, ensure_ascii=False)


def read_input(arguments: str) -> str:
    """The input that arguments hold."""
    reader = InputReader()
    return reader.feed(arguments) + reader.finish()


class InputReader:
    """Give it the pieces of the arguments in their order. Holds what has been read, and what cannot be read yet.

    Arguments of another shape than `{"input": "…"}` tell nothing before their end; then a lone text in them is the input, else they
    are it themselves."""

    def __init__(self) -> None:
        self._arguments = ""
        self._at: int | None = None  # how far the text has been read; None: it has not begun
        self._ended = False
        self._read = ""

    def feed(self, piece: str) -> str:
        """The next piece of the input."""
        self._arguments += piece
        if self._at is None:
            opening = _OPENING.match(self._arguments)
            if opening is None:
                return ""
            self._at = opening.end()
        text, self._at = self._decode(self._at)
        self._read += text
        return text

    def finish(self) -> str:
        """What is left of the input."""
        if self._at is not None:
            return ""
        texts = {key: value for key, value in _object(self._arguments).items() if isinstance(value, str)}
        lone = next(iter(texts.values())) if len(texts) == 1 else self._arguments
        self._at, self._ended, self._read = 0, True, _as_text(texts.get(PARAMETER, lone))
        return self._read

    @property
    def input(self) -> str:
        """All that has been read."""
        return self._read

    def _decode(self, at: int) -> tuple[str, int]:
        """The text from `at` up to its end, or to where an escape is cut, and where that is."""
        source, out = self._arguments, list[str]()
        while not self._ended and at < len(source):
            if plain := _PLAIN.match(source, at):
                out.append(plain[0])
                at = plain.end()
            elif source[at] == '"':
                self._ended = True
                at += 1
            else:
                character, length = _escaped(source, at)
                if length == 0:
                    break
                out.append(character)
                at += length
        return _as_text("".join(out)), at


def _escaped(source: str, at: int) -> tuple[str, int]:
    """The character that an escape stands for, and the escape's length; 0 if it is cut."""
    if len(source) < at + 2:
        return "", 0
    if source[at + 1] != "u":
        return _ESCAPES.get(source[at + 1], source[at + 1]), 2
    first = _UNICODE.match(source, at)
    if first is None:
        return (_NO_CHARACTER, 2) if len(source) >= at + 6 else ("", 0)
    code = int(first[1], 16)
    if not 0xD800 <= code < 0xDC00:
        return chr(code), 6
    second = _UNICODE.match(source, at + 6)
    if second is not None and 0xDC00 <= int(second[1], 16) < 0xE000:
        return chr(0x10000 + ((code - 0xD800) << 10) + int(second[1], 16) - 0xDC00), 12
    rest = source[at + 6 : at + 12]
    may_follow = len(rest) < 6 and ("\\u".startswith(rest[:2]) if len(rest) < 2 else rest.startswith("\\u"))
    return ("", 0) if may_follow else (_NO_CHARACTER, 6)


def _as_text(text: str) -> str:
    """Half a surrogate pair, which JSON can escape, is no text."""
    return re.sub(r"[\ud800-\udfff]", _NO_CHARACTER, text)


def _object(text: str) -> dict[str, Any]:
    """What JSON says, if it is an object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}

"""Calls written as JSON objects, in the spellings that models use."""

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

from mlx_manager.inference.families.family import Call
from mlx_manager.inference.families.tool_formats.json_arguments import read_arguments

NOT_A_VALUE = object()
BEGUN = r'(?=\{\s*["}])'  # an object, without doubt
# A line end inside a string is the model's way of writing one.
_DECODER = json.JSONDecoder(strict=False)
_SPACE = re.compile(r"\s*")
_ESCAPED = re.compile(r"\\.", re.DOTALL)
# Characters: Python's parser is slow, and a model in a loop can write text on which it is tried a thousand times.
_MAX_SINGLE_QUOTED = 10_000
_SINGLE_QUOTED = re.compile(r"\s*(\[\s*)?\{\s*'")


def read_json(text: str) -> Any:
    """The value, or `NOT_A_VALUE` when `text` is not JSON."""
    value, used = begin_json(text, 0)
    return value if not text[used:].strip() else NOT_A_VALUE


def begin_json(text: str, start: int) -> tuple[Any, int]:
    """The JSON value at `start`, white space aside, and where it ends; `NOT_A_VALUE` and `start` if there is none."""
    try:
        return _DECODER.raw_decode(text, _after_space(text, start))
    except (ValueError, RecursionError):
        return NOT_A_VALUE, start


def read_single_quoted(text: str) -> Any:
    """JSON as Python prints it (single quotes, True, None), which some models write; `NOT_A_VALUE` if it is none."""
    text = text.strip()
    is_likely = len(text) <= _MAX_SINGLE_QUOTED and _SINGLE_QUOTED.match(text) is not None and text[-1] in "]}"
    return read_literal(text) if is_likely else NOT_A_VALUE


def read_literal(source: str | ast.expr) -> Any:
    """A Python literal; `NOT_A_VALUE` if it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python has opinions on the strings of models
            return ast.literal_eval(source)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return NOT_A_VALUE


def write_json(arguments: Mapping[str, Any]) -> str:
    """Arguments of a format that is not JSON as the text that goes to the client: text unescaped where UTF-8 can hold it."""
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return text if _is_text(text) else json.dumps(arguments, allow_nan=False)


def make_call(name: object, arguments: object) -> Call | None:
    """A call, if these are a name and arguments that JSON can say (Python's sets are none)."""
    if not isinstance(name, str) or not name or not _is_text(name) or not isinstance(arguments, dict):
        return None
    try:
        return Call(name, write_json(cast(dict[str, Any], arguments)))
    except (ValueError, TypeError, RecursionError):
        return None


def calls_in(values: Sequence[Any]) -> tuple[Call, ...] | None:
    """A call for each value; None unless every one of them is a call."""
    calls = [_call(value) for value in values]
    whole = tuple(call for call in calls if call is not None)
    return whole if whole and len(whole) == len(calls) else None


def begin_call(text: str, start: int) -> tuple[Call | None, int]:
    """The call that a JSON object at `start` is, its arguments as they are written there, and where it ends."""
    members, end = _members(text, start)
    if members is None:
        return None, start
    name = read_json(members.get("name", "null"))
    written = members.get("arguments", members.get("parameters", "{}"))
    if written.startswith('"'):  # some models quote the object
        written = read_json(written)
    arguments = read_arguments(written)
    if not isinstance(name, str) or not name or not _is_text(name) or arguments is None:
        return None, start
    return Call(name, arguments), end


def _members(text: str, start: int) -> tuple[dict[str, str] | None, int]:
    """The members of the object at `start`, the first of each name, as they are written; and where it ends."""
    members: dict[str, str] = {}
    at = _after_space(text, start)
    if text[at : at + 1] != "{":
        return None, start
    at = _after_space(text, at + 1)
    while text[at : at + 1] != "}":
        key, at = begin_json(text, at)
        at = _after_space(text, at)
        if not isinstance(key, str) or text[at : at + 1] != ":":
            return None, start
        begin = _after_space(text, at + 1)
        value, at = begin_json(text, begin)
        if value is NOT_A_VALUE:
            return None, start
        members.setdefault(key, text[begin:at])
        at = _after_space(text, at)
        if text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
            if text[at : at + 1] == "}":
                return None, start
        elif text[at : at + 1] != "}":
            return None, start
    return members, at + 1


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _call(value: Any) -> Call | None:
    if not isinstance(value, dict):
        return None
    record = cast(dict[str, Any], value)
    return make_call(record.get("name"), record.get("arguments", record.get("parameters", {})))


def record_head(before: str = "") -> re.Pattern[str]:
    """`{"name": …, "arguments": {` after what `before` matches: a name comes first, perhaps with an id or a type."""
    field = r'"(?:id|type)"\s*:\s*"[^"\\<]*"\s*,\s*'
    return re.compile(rf'\s*{before}\{{\s*(?:{field})*"name"\s*:\s*"([\w.:-]+)"\s*,\s*(?:{field})*"(?:arguments|parameters)"\s*:\s*{BEGUN}')


def is_in_string(text: str) -> bool:
    """Whether JSON that is cut here stops inside a string."""
    return _ESCAPED.sub("", text).count('"') % 2 == 1


def _is_text(text: str) -> bool:
    """Half a surrogate pair, which JSON can escape, is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

"""Calls written as JSON objects, in the spellings that models use."""

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

from mlx_manager.inference.families.family import Call

NOT_A_VALUE = object()
# A line end inside a string is the model's way of writing one.
_DECODER = json.JSONDecoder(strict=False)
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
        return _DECODER.raw_decode(text, len(text) - len(text[start:].lstrip()))
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
    """Arguments as the JSON text that goes to the client: keys in the model's order, text unescaped where UTF-8 can hold it."""
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return text if _is_text(text) else json.dumps(arguments, allow_nan=False)


def make_call(name: object, arguments: object) -> Call | None:
    """A call, if these are a name and arguments that JSON can say (1e999 and Python's sets are none)."""
    if not isinstance(name, str) or not name or not _is_text(name) or not isinstance(arguments, dict):
        return None
    call = Call(name, cast(dict[str, Any], arguments))
    try:
        write_json(call.arguments)
    except (ValueError, TypeError, RecursionError):
        return None
    return call


def calls_in(values: Sequence[Any]) -> tuple[Call, ...] | None:
    """A call for each value; None unless every one of them is a call."""
    calls = [_call(value) for value in values]
    whole = tuple(call for call in calls if call is not None)
    return whole if whole and len(whole) == len(calls) else None


def _call(value: Any) -> Call | None:
    if not isinstance(value, dict):
        return None
    record = cast(dict[str, Any], value)
    arguments = record.get("arguments", record.get("parameters", {}))
    if isinstance(arguments, str):  # some models quote the object
        arguments = read_json(arguments)
    return make_call(record.get("name"), arguments)


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

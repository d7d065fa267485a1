"""The field rule: nothing is ignored in silence.

Every field that a protocol documents has one rule, in one table. Honoured fields are those of the schema; noted ones are
accepted and named in `x-ignored-fields` when they had no effect; refused ones are a 400. A field that no table knows is
accepted and named, so that a new SDK does not break a client.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mlx_manager.core.errors import InvalidField

RuleClass = Literal["honoured", "noted", "refused"]
_HEADER_BYTES = 512
# A client's own words in a message or a path: enough to recognise them.
_QUOTED_CHARS = 64


@dataclass(frozen=True, slots=True)
class Rule:
    """`note` says what it does, or why it does nothing; it stands in the published matrix and in the refusal."""

    kind: RuleClass
    note: str


def honoured(note: str = "") -> Rule:
    return Rule("honoured", note)


def noted(note: str) -> Rule:
    return Rule("noted", note)


def refused(note: str) -> Rule:
    return Rule("refused", note)


class Schema(BaseModel):
    """Base of the wire schemas: strict about types, since a wrong type is a client's mistake and never ours to guess.
    Fields that a schema does not know are kept, to be named (`unknown_inside`)."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


def without_nulls(body: Mapping[str, Any]) -> dict[str, Any]:
    """An explicit null is the same as an absent field."""
    return {k: v for k, v in body.items() if v is not None}


def ignored_fields(body: Mapping[str, Any], rules: Mapping[str, Rule]) -> tuple[str, ...]:
    """Names of the fields that have no effect. Raises `InvalidField` for one that is refused."""
    ignored: list[str] = []
    for name in body:
        rule = rules.get(name)
        if rule is None or rule.kind == "noted":
            ignored.append(name)
        elif rule.kind == "refused":
            raise InvalidField(f"'{name}' is not supported: {rule.note}.", param=name, code="unsupported_parameter")
    return tuple(ignored)


def unknown_inside(wire: Schema) -> tuple[str, ...]:
    """Dotted paths of the unknown fields below the top level (`messages.cache_control`), each once however many have it."""
    return tuple(dict.fromkeys(path for name in type(wire).model_fields for path in _unknown(getattr(wire, name), name)))


def _unknown(value: object, path: str) -> Iterator[str]:
    if isinstance(value, Schema):
        yield from (f"{path}.{name}" for name, extra in (value.model_extra or {}).items() if extra is not None)
        for name in type(value).model_fields:
            yield from _unknown(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, list):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            yield from _unknown(item, path)  # pyright: ignore[reportUnknownArgumentType]


def ignored_header(names: tuple[str, ...]) -> str:
    """The value of `x-ignored-fields`: comma-separated, harmless characters only, 512 bytes at most."""
    clean = ",".join(re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:_QUOTED_CHARS] for name in names)
    return clean if len(clean) <= _HEADER_BYTES else clean[:_HEADER_BYTES].rsplit(",", 1)[0]


# ---- mistakes, in the words and codes of the upstream API, which clients know

_TYPES = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "text_or_array_type": "a string or an array",
}
_SIDES = {"ge": ("below min", ">="), "gt": ("below min", ">"), "le": ("above max", "<=")}


@dataclass(frozen=True, slots=True)
class _Mistake:
    path: str
    kind: str
    given: Any
    context: Mapping[str, Any]
    text: str


def invalid_field(error: ValidationError, body: Mapping[str, Any]) -> InvalidField:
    """The first mistake in a body, by the path that the client wrote.

    Where a value may be of several types there is a mistake for each of them: what is wrong inside a value of the right
    type tells more than that the other types do not fit, and if none fits, all are named."""
    mistakes = [
        _Mistake(_path(e["loc"], body, is_missing=e["type"] == "missing"), e["type"], e["input"], e.get("ctx", {}), e["msg"])
        for e in error.errors(include_url=False)
    ]
    first = mistakes[0]
    related = [m for m in mistakes if m.path == first.path or m.path.startswith((f"{first.path}.", f"{first.path}["))]
    precise = next((m for m in related if m.path != first.path or m.kind not in _TYPES), first)
    if precise.kind not in _TYPES:
        message, code = _describe(precise)
        return InvalidField(message, param=precise.path, code=code)
    expected = list(dict.fromkeys(_TYPES[m.kind] for m in related if m.path == precise.path and m.kind in _TYPES))
    message = f"Invalid type for '{precise.path}': expected {' or '.join(expected)}, but got {_type_name(precise.given)} instead."
    return InvalidField(message, param=precise.path, code="invalid_type")


def _describe(mistake: _Mistake) -> tuple[str, str]:
    """Message and code."""
    path, given, context = mistake.path, mistake.given, mistake.context
    match mistake.kind:
        case "missing":
            return f"Missing required parameter: '{path}'.", "missing_required_parameter"
        case "greater_than_equal" | "greater_than" | "less_than_equal":
            ((name, bound),) = context.items()
            number, side, sign = "decimal" if isinstance(bound, float) else "integer", *_SIDES[name]
            message = (
                f"Invalid '{path}': {number} {side}imum value. Expected a value {sign} {quoted(bound)}, but got {quoted(given)} instead."
            )
            return message, f"{number}_{side.replace(' ', '_')}_value"
        case "string_too_long" | "string_too_short" | "too_long" | "too_short":
            return _describe_length(mistake)
        case "literal_error":
            return f"Invalid value for '{path}': {quoted(given)}. Supported values are: {context['expected']}.", "invalid_value"
        case "string_pattern_mismatch":
            return f"Invalid '{path}': expected a string that matches the pattern '{context['pattern']}'.", "invalid_value"
        case _:
            return f"Invalid '{path}': {mistake.text.removeprefix('Value error, ')}.", "invalid_value"


def _describe_length(mistake: _Mistake) -> tuple[str, str]:
    is_text = mistake.kind.startswith("string")
    kind = "string" if is_text else _type_name(mistake.given).removeprefix("an ")
    length = len(mistake.given)
    got = f"{'an empty' if length == 0 else 'a' if is_text else 'an'} {kind}" + (f" with length {length}" if length else "")
    if mistake.kind.endswith("long"):
        limit = mistake.context["max_length"]
        message = f"Invalid '{mistake.path}': {kind} too long. Expected a maximum length of {limit}, but got {got} instead."
        return message, f"{kind}_above_max_length"
    limit = mistake.context["min_length"]
    message = f"Invalid '{mistake.path}': {kind} too short. Expected a minimum length of {limit}, but got {got} instead."
    return message, "empty_array" if kind == "array" and length == 0 else f"{kind}_below_min_length"


def quoted(value: object) -> str:
    """A client's value as JSON, cut short."""
    if isinstance(value, int) and value.bit_length() > 128:
        return _type_name(value)
    text = json.dumps(value if isinstance(value, str | int | float) else _type_name(value), ensure_ascii=False)
    return text if len(text) <= _QUOTED_CHARS else text[: _QUOTED_CHARS - 2] + '…"'


def _type_name(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int():
            return "an integer" if value.bit_length() <= 128 else "an integer of very many digits"
        case float():
            return "a decimal"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"


def _path(location: tuple[int | str, ...], body: Mapping[str, Any], *, is_missing: bool) -> str:
    """`("messages", 2, "content")` → `messages[2].content`. The location also has names for the members of unions: what is
    no step into the body is one of these, but for the last part of what is missing."""
    path = ""
    value: Any = body
    for i, part in enumerate(location):
        if isinstance(part, int) and isinstance(value, list):
            path += f"[{part}]"
            value = value[part]  # pyright: ignore[reportUnknownVariableType]
        elif isinstance(part, str) and isinstance(value, dict) and part in value:
            path += f".{part[:_QUOTED_CHARS]}" if path else part[:_QUOTED_CHARS]
            value = value[part]  # pyright: ignore[reportUnknownVariableType]
        elif is_missing and i == len(location) - 1:
            path += f".{part}" if path else f"{part}"
    return path

"""The field rule: nothing is ignored in silence.

Every field that a protocol documents has one rule, in one table. Honoured fields are those of the schema; noted ones are
accepted and named in `x-ignored-fields` when they had no effect; refused ones are a 400. A field that no table knows is
accepted and named, so that a new SDK does not break a client.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mlx_manager.core.errors import InvalidField

RuleClass = Literal["honoured", "noted", "refused"]
_HEADER_BYTES = 512


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
    """Base of the wire schemas: strict about types, since a wrong type is a client's mistake and never ours to guess."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


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


def ignored_header(names: tuple[str, ...]) -> str:
    """The value of `x-ignored-fields`: comma-separated, harmless characters only, 512 bytes at most."""
    clean = ",".join(re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:64] for name in names)
    return clean if len(clean) <= _HEADER_BYTES else clean[:_HEADER_BYTES].rsplit(",", 1)[0]


_CODES = {
    "missing": "missing_required_parameter",
    "greater_than_equal": "integer_below_min_value",
    "greater_than": "integer_below_min_value",
    "less_than_equal": "integer_above_max_value",
    "less_than": "integer_above_max_value",
    "string_too_long": "string_above_max_length",
    "string_too_short": "string_below_min_length",
    "too_long": "array_above_max_length",
    "too_short": "empty_array",
}


def invalid_field(error: ValidationError, model: type[BaseModel]) -> InvalidField:
    """The first mistake in a body, by the path that the client wrote."""
    first = min(error.errors(include_url=False, include_context=True), key=lambda e: -len(e["loc"]))
    path = _path(first["loc"])
    kind = first["type"]
    code = _CODES.get(kind, "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value")
    what = first["msg"].removeprefix("Value error, ")
    return InvalidField(f"Invalid '{path}': {what[:1].lower()}{what[1:]}.", param=path or None, code=code)


def _path(location: tuple[int | str, ...]) -> str:
    """`("messages", 2, "content")` → `messages[2].content`; names that pydantic adds for union members are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif re.fullmatch(r"[a-z][a-z0-9_]*", part) and part not in _UNION_MEMBERS:
            path += f".{part}" if path else part
    return path


_UNION_MEMBERS = frozenset({"str", "int", "float", "bool", "list", "dict"})

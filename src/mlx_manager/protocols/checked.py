"""Bytes of a request → its schema, by the field rule."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from mlx_manager.protocols.body import read_json_object
from mlx_manager.protocols.fields import Rule, Schema, ignored_fields, invalid_field, unknown_inside, without_nulls

S = TypeVar("S", bound=Schema)


def checked(body: bytes, model: type[S], rules: Mapping[str, Rule]) -> tuple[S, tuple[str, ...]]:
    """What was sent, and the names of the fields that have no effect. Raises `InvalidField`."""
    return checked_object(without_nulls(read_json_object(body)), model, rules)


def checked_object(given: Mapping[str, Any], model: type[S], rules: Mapping[str, Rule]) -> tuple[S, tuple[str, ...]]:
    """The same of an object that has been read and has no nulls."""
    ignored = ignored_fields(given, rules)
    try:
        wire = model.model_validate(given)
    except ValidationError as error:
        raise invalid_field(error, given) from None
    return wire, ignored + unknown_inside(wire)

"""The body of a request to `/api`: all of it is meant, so a field that nobody knows is an error."""

from typing import TypeVar

from pydantic import ValidationError

from mlx_manager.core.errors import InvalidField
from mlx_manager.protocols.body import read_json_object
from mlx_manager.protocols.fields import Schema, invalid_field, without_nulls

S = TypeVar("S", bound=Schema)


def read_body(body: bytes, schema: type[S]) -> S:
    """Raises `InvalidField`, also for a field that is not known: what is misspelt would silently not be said."""
    given = without_nulls(read_json_object(body))
    for name in given:
        if name not in schema.model_fields:
            raise InvalidField(f"There is no field '{name[:64]}' here.", param=name[:64], code="unknown_field")
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        raise invalid_field(error, given) from None

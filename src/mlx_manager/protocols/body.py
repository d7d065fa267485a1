"""Bytes of a request → a JSON object that holds only what JSON and Unicode allow."""

import json
import math
from typing import Any, NoReturn

from mlx_manager.core.errors import InvalidField

MAX_DEPTH = 64
JsonDict = dict[str, Any]


def read_json_object(body: bytes) -> JsonDict:
    """Raises `InvalidField` for anything but an object: NaN and infinities, numbers beyond float64, lone surrogates and
    nesting deeper than `MAX_DEPTH` are refused here, so that nothing behind has to look again."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise _malformed(f"it is nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeDecodeError:
        raise _malformed("it is not UTF-8") from None
    except ValueError as error:
        raise _malformed(str(error)) from None
    if not isinstance(value, dict):
        raise _malformed("it must be a JSON object")
    _check(value)  # pyright: ignore[reportUnknownArgumentType]
    return value  # pyright: ignore[reportUnknownVariableType]


def _check(root: JsonDict) -> None:
    level: list[Any] = [root]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            match value:
                case str():
                    _check_text(value)
                case dict():
                    for key in value:  # pyright: ignore[reportUnknownVariableType]
                        _check_text(key)  # pyright: ignore[reportUnknownArgumentType]
                    inner += value.values()  # pyright: ignore[reportUnknownArgumentType]
                case list():
                    inner += value  # pyright: ignore[reportUnknownArgumentType]
                case _:
                    pass
        if not inner:
            return
        level = inner
    raise _malformed(f"it is nested deeper than {MAX_DEPTH} levels")


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _malformed("it has a lone surrogate") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _malformed(why: str) -> InvalidField:
    return InvalidField(f"The request body could not be read: {why}.", param=None, code="invalid_json")

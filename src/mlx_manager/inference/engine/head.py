"""Logits of the tokens that are followed by a sampled one, and not of all, without a line of a model changed: what it multiplies with its
vocabulary is cut down on the way in. A vocabulary of 150,000 tokens can be half of what a small model computes."""
# pyright: basic

from collections.abc import Callable, Generator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

_PROMPT = (3, 14, 15, 92)
_AT = 2
_TOLERANCE = 1e-2  # of the largest logit: another token's are another matter altogether

_cut: Callable[[mx.array], mx.array] | None = None  # set while a pass is described, on the device thread


@contextmanager
def only(positions: Items[int] | None) -> Generator[None]:
    """Models that `install` said yes to give logits [B, 1, V] of the token at its position in each of B rows. None: of all."""
    if positions is None:
        yield
        return
    at = mx.array(list(positions), dtype=mx.int32)[:, None]
    with _cutting_down(lambda x: x[mx.arange(x.shape[0])[:, None], at]):
        yield


@contextmanager
def of_rows(rows: mx.array) -> Generator[None]:
    """They give logits [R, L, V] of these `rows` [R] of B."""
    with _cutting_down(lambda x: x[rows]):
        yield


@contextmanager
def _cutting_down(cut: Callable[[mx.array], mx.array]) -> Generator[None]:
    global _cut  # noqa: PLW0603 - between the pass and the innermost of the model's modules there is only the model
    _cut = cut
    try:
        yield
    finally:
        _cut = None


def install(model: Any) -> bool:
    """Prepares a model; whether `only` and `of_rows` work with it."""
    if not hasattr(model, "named_modules"):
        return False
    if (known := vars(model).get("gives_some_logits")) is not None:
        return known
    model.gives_some_logits = _is_cut(model)
    return model.gives_some_logits


def _is_cut(model: Any) -> bool:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "lm_head":
            module.__class__ = _cutting(type(module), "__call__")
        elif hasattr(module, "as_linear"):
            module.__class__ = _cutting(type(module), "as_linear")
    tokens = mx.array([_PROMPT], dtype=mx.int32)
    expected = model(tokens, cache=make_prompt_cache(model))
    with only([_AT]):
        given = model(tokens, cache=make_prompt_cache(model))
    both = mx.concatenate([tokens, tokens[:, ::-1]])
    with of_rows(mx.array([1, 0], dtype=mx.int32)):
        _, first = model(both, cache=make_prompt_cache(model))
    if given.shape[1] != 1 or first.shape != expected.shape[1:]:
        return False
    return _are_close(given[0, 0], expected[0, _AT]) and _are_close(first, expected[0])


def _are_close(given: mx.array, expected: mx.array) -> bool:
    given, expected = given.astype(mx.float32), expected.astype(mx.float32)
    return bool((mx.max(mx.abs(given - expected)) <= _TOLERANCE * mx.max(mx.abs(expected))).item())


@cache
def _cutting(kind: type, method: str) -> type:
    if getattr(kind, "cuts", False):
        return kind

    def cut(self: Any, x: mx.array) -> mx.array:
        return getattr(kind, method)(self, x if _cut is None else _cut(x))

    return type(kind.__name__, (kind,), {method: cut, "cuts": True})

"""Products of few rows: what goes through the kernel and what stays with MLX. The kernel itself needs a GPU."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_manager.inference.engine import few_rows, head
from mlx_manager.inference.engine.few_rows import FewRows, install
from mlx_manager.inference.engine.paged_attention import backend


class Stand:
    """Stands for `mx.fast.cuda_kernel`: multiplies with MLX, and counts."""

    def __init__(self, error: float = 0.0) -> None:
        self.error = error
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **_: Any) -> Callable[..., list[mx.array]]:
        return self.run

    def run(self, *, inputs: list[mx.array], template: list[tuple[str, Any]], **_: Any) -> list[mx.array]:
        x, weights, bias = inputs
        self.calls.append(dict(template))
        product = mx.addmm(bias, x, weights.T) if dict(template)["HAS_BIAS"] else x @ weights.T
        return [product + self.error]


class Model(nn.Module):
    def __init__(self, dtype: mx.Dtype, *, bias: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(96, 128)
        self.up = nn.Linear(128, 192, bias=bias)
        self.odd = nn.Linear(192, 100, bias=False)
        self.down = nn.Linear(192, 128, bias=bias)
        self.set_dtype(dtype)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = nn.relu(self.up(self.embed_tokens(tokens)))
        self.odd(x)
        return self.embed_tokens.as_linear(self.down(x))


def tokens(*shape: int) -> mx.array:
    return mx.random.randint(0, 96, shape, key=mx.random.key(1))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_up_to_32_rows_go_through_the_kernel(dtype: mx.Dtype, bias: bool) -> None:
    model, stand = Model(dtype, bias=bias), Stand()
    expected = {shape: model(tokens(*shape)) for shape in ((1, 1), (2, 1), (1, 17), (32, 1), (11, 3))}
    install(model, FewRows(stand))
    for shape, before in expected.items():
        stand.calls.clear()
        assert mx.array_equal(model(tokens(*shape)), before)
        is_few = 1 < shape[0] * shape[1] <= few_rows.MOST_ROWS
        assert [call["HAS_BIAS"] for call in stand.calls] == ([bias, bias, False] if is_few else [])


def test_a_kernel_that_multiplies_wrongly_is_not_used() -> None:
    model, stand = Model(mx.bfloat16), Stand(error=1.0)
    install(model, FewRows(stand))
    stand.calls.clear()
    model(tokens(4, 1))
    assert stand.calls == []


def test_a_layer_that_multiplies_in_a_way_of_its_own_goes_on_so() -> None:
    class Parted(nn.Linear):
        def __call__(self, x: mx.array) -> Any:
            return mx.split(super().__call__(x), 3, axis=-1)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = Parted(64, 96, bias=False)
            self.set_dtype(mx.bfloat16)

    model, stand = Attention(), Stand()
    install(model, FewRows(stand))
    assert [part.shape for part in model.projection(mx.zeros((1, 4, 64), mx.bfloat16))] == [(1, 4, 32)] * 3


def test_weights_that_are_kept_the_other_way_round_are_turned_once() -> None:
    model = Model(mx.bfloat16)
    model.up.weight = mx.contiguous(model.up.weight.T).T  # type: ignore[reportUnknownMemberType]
    expected = model(tokens(4, 1))
    install(model, FewRows(Stand()))
    assert np.array(model.up.weight.view(mx.uint16), copy=False).flags.c_contiguous  # type: ignore[reportUnknownMemberType]
    assert mx.allclose(model(tokens(4, 1)), expected, atol=1e-2)


def test_weights_of_the_same_shape_are_tried_once() -> None:
    stand = Stand()
    few = FewRows(stand)
    install(Model(mx.bfloat16), few)
    assert stand.calls
    stand.calls.clear()
    install(Model(mx.bfloat16), few)
    assert stand.calls == []


def test_float32_stays_with_mlx() -> None:
    model, stand = Model(mx.float32), Stand()
    install(model, FewRows(stand))
    model(tokens(4, 1))
    assert stand.calls == []


def test_a_model_may_be_prepared_twice_and_logits_are_still_of_some_tokens() -> None:
    model, stand = Model(mx.bfloat16), Stand()
    few = FewRows(stand)
    install(model, few)
    model.embed_tokens.__class__ = head._cutting(type(model.embed_tokens), "as_linear")  # type: ignore[reportPrivateUsage]
    install(model, few)
    everything = model(tokens(8, 1))
    with head.of_rows(mx.array([3, 5])):
        some = model(tokens(8, 1))
    assert mx.array_equal(some, everything[mx.array([3, 5])])


@pytest.mark.skipif(backend() != "cuda", reason="there is no CUDA device")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((32, 64), mx.float16),
        ((32, 64), mx.bfloat16),
        ((2128, 1536), mx.bfloat16),
        ((10000, 192), mx.bfloat16),
        ((4096, 14336), mx.bfloat16),
    ],
)
def test_the_kernel_gives_the_products_of_mlx(shape: tuple[int, int], dtype: mx.Dtype) -> None:
    weights = (mx.random.normal(shape, key=mx.random.key(1)) * 0.02).astype(dtype)
    bias = mx.random.normal(shape[:1], key=mx.random.key(2)).astype(dtype)
    few = FewRows()
    for given in (None, bias):
        assert few_rows.self_test(few, weights, given) is None
    for num_rows in (1, 2, 8, 9, 16, 17, 31, 32):
        x = mx.random.normal((1, num_rows, shape[1]), key=mx.random.key(num_rows)).astype(dtype)
        expected = x.astype(mx.float32) @ weights.astype(mx.float32).T
        found = few.multiply(x, weights, None).astype(mx.float32)
        assert mx.all(mx.abs(found - expected) <= 0.02 * mx.max(mx.abs(expected))).item()

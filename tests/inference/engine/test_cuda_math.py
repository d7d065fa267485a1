"""Rotary positions in parts, where MLX's CUDA backend would fail at once."""

import mlx.core as mx
import pytest

from mlx_manager.inference.engine.cuda_math import most_rows, rope
from mlx_manager.inference.engine.paged_attention import backend


@pytest.mark.parametrize(
    ("shape", "dims", "rows"),
    [
        ((300, 4, 1, 32), 16, 127),
        ((300, 32, 1, 64), 16, 15),
        ((300, 6, 1, 64), 8, 63),
        ((300, 32, 1, 128), 128, None),
        ((300, 4, 1, 32), 32, None),
        ((1, 32, 300, 64), 16, None),
    ],
)
def test_few_dimensions_and_many_rows_are_too_many_threads(shape: tuple[int, ...], dims: int, rows: int | None) -> None:
    assert most_rows(shape, dims) == rows


@pytest.mark.parametrize("is_vector", [True, False])
def test_parts_are_turned_as_the_whole_is(is_vector: bool) -> None:
    with mx.stream(mx.cpu):
        x = mx.random.normal((300, 4, 1, 32), key=mx.random.key(0))
        offset = mx.arange(300) * 3 if is_vector else 7
        given = {"traditional": True, "base": 10_000.0, "scale": 1.0, "offset": offset}
        assert mx.array_equal(rope(mx.fast.rope)(x, 16, **given), mx.fast.rope(x, 16, **given))


@pytest.mark.skipif(backend() != "cuda", reason="there is no CUDA device")
@pytest.mark.parametrize("dims", [4, 8, 16, 32])
def test_as_many_rows_as_a_pass_may_have_can_be_turned(dims: int) -> None:
    x = mx.random.normal((2048, 8, 1, 64), key=mx.random.key(0))
    given = {"traditional": True, "base": 10_000.0, "scale": 1.0}
    found = rope(mx.fast.rope)(x, dims, offset=mx.arange(2048), **given)
    one = mx.fast.rope(x[1500:1501], dims, offset=1500, **given)
    assert mx.allclose(found[1500:1501], one, atol=1e-4)

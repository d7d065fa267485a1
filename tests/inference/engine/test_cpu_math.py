"""What is computed in place of MLX's own must be what MLX computes."""

import subprocess
import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_manager.inference.engine import cpu_math

pytestmark = pytest.mark.skipif(mx.default_device().type != mx.DeviceType.cpu, reason="it is for the CPU")


@pytest.fixture(params=["as loops", "by operations"], autouse=True)
def _either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_math._Fused, "preparing", None)
    monkeypatch.setattr(cpu_math._Fused, "are_ready", request.param == "as loops")


def test_loops_are_compiled_by_another_process_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_math._Fused, "are_ready", False)
    subprocess.run([sys.executable, "-m", cpu_math.__name__], check=True)
    monkeypatch.setattr(subprocess, "Popen", None)
    cpu_math.prepare()
    assert cpu_math._Fused.are_ready


def test_the_activation_is_that_of_the_model() -> None:
    gate = mx.concatenate([mx.random.normal((31, 1000)) * 8, mx.linspace(-100, 100, 1000)[None]])
    x = mx.random.normal(gate.shape)
    exact = np.array(gate, np.float64) / (1 + np.exp(-np.array(gate, np.float64))) * np.array(x, np.float64)
    np.testing.assert_allclose(np.array(cpu_math.swiglu(None)(gate, x)), exact, rtol=1e-6, atol=1e-30)


def test_what_is_no_number_stays_so() -> None:
    gate = mx.broadcast_to(mx.array([0.0, np.nan, np.inf]), (2000, 3))
    assert np.isnan(np.array(cpu_math.swiglu(None)(gate, mx.ones_like(gate)))).any(axis=0).tolist() == [False, True, False]


def test_few_numbers_and_other_types_are_left_to_the_model() -> None:
    for gate in (mx.ones((10,)), mx.ones((5000,), mx.bfloat16)):
        assert cpu_math.swiglu(lambda gate, x: "theirs")(gate, gate) == "theirs"


def test_what_is_masked_weighs_nothing() -> None:
    scores = mx.where(mx.arange(512) < 300, mx.random.normal((64, 512)) * 10, -mx.inf)
    weights = np.array(cpu_math.softmax(scores))
    assert (weights[:, 300:] == 0).all()
    np.testing.assert_allclose(weights, np.array(mx.softmax(scores, axis=-1, precise=True)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mask", ["causal", None, "boolean", "added", "of rows", "of heads"])
@pytest.mark.parametrize(("num_rows", "length", "num_keys"), [(1, 48, 48), (3, 40, 64), (2, 1, 700)])
def test_attention_is_what_mlx_attends_to(mask: str | None, num_rows: int, length: int, num_keys: int) -> None:
    queries = mx.random.normal((num_rows, 8, length, 32))
    keys, values = (mx.random.normal((num_rows, 2, num_keys, 32)) for _ in range(2))
    made = {
        "boolean": mx.arange(num_keys) <= mx.arange(num_keys - length, num_keys)[:, None],
        "added": mx.random.normal((length, num_keys)),
        "of rows": mx.random.normal((num_rows, 1, length, num_keys)),
        "of heads": mx.random.normal((num_rows, 8, length, num_keys)),
    }
    given = made.get(mask, mask) if mask is not None else None
    ours = cpu_math.attention(queries, keys, values, 0.2, given, None)
    theirs = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.2, mask=given)
    np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=2e-6)


@pytest.mark.parametrize("offset", [0, 700, mx.array([3, 700, 90], dtype=mx.int32), mx.array([5], dtype=mx.int32)], ids=str)
@pytest.mark.parametrize("freqs", [None, mx.arange(1.0, 17.0) ** 3])
def test_rotated_positions_are_those_of_mlx_to_the_bit(offset: mx.array | int, freqs: mx.array | None) -> None:
    x = mx.random.normal((3, 4, 5, 32), key=mx.random.key(0))
    given: dict[str, Any] = {
        "traditional": False,
        "base": None if freqs is not None else 1e4,
        "scale": 0.5,
        "offset": offset,
        "freqs": freqs,
    }
    with cpu_math.one_pass():
        found = cpu_math.rope(None)(x, 32, **given)
    assert mx.array_equal(found, mx.fast.rope(x, 32, **given)).item()


def test_angles_are_computed_once_a_pass_and_never_kept_for_another() -> None:
    rope, x = cpu_math.rope(mx.fast.rope), mx.random.normal((2, 1, 1, 8), key=mx.random.key(0))
    given: dict[str, Any] = {"traditional": False, "base": 1e4, "scale": 1.0}
    offsets = mx.array([3, 9])
    calls: list[int] = []
    cos = mx.cos

    def counted(angles: mx.array) -> mx.array:
        calls.append(1)
        return cos(angles)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "cos", counted)
        for expected in (1, 2):
            with cpu_math.one_pass():
                found = [rope(x, 8, offset=offsets, **given) for _ in range(6)]
            assert len(calls) == expected
            assert mx.array_equal(found[-1], mx.fast.rope(x, 8, offset=offsets, **given)).item()
            offsets += 1  # the same object, as caches of mlx-lm's own do it
        rope(x, 8, offset=offsets, **given)
    assert len(calls) == 2, "outside of a pass MLX does it"

from pathlib import Path

import pytest

from mlx_manager.bench.pool_cost import PoolCost, measure_pool
from mlx_manager.bench.processes import PeerError

MODELS = Path(__file__).parents[1] / "fixtures" / "models"

COST = PoolCost(
    hot_s=(3e-6, 6e-6),
    cold_s={"first": (1.0, 3.0, 2.0), "again": (0.5, 0.5, 0.4), "mlx_lm": (0.5, 1.0, 0.5)},
    loaded_bytes=64_000_000,
    mlx_bytes=(0, 2_000_000),
    resident_bytes=(150_000_000, 155_000_000),
)


def test_ratios_are_taken_in_each_turn() -> None:
    assert COST.ratio("first") == 3.0
    assert COST.ratio("again") == 0.8


def test_the_table_says_what_it_costs_and_what_comes_back() -> None:
    text = COST.markdown()
    assert "| a hot model, lent and taken back | 3.0 us (p99 6.0 us) |" in text
    assert "| the same again, after it was unloaded | 0.50 s | 0.50 s | 0.80 |" in text
    assert "2 times: MLX holds 64.0 MB with the model and, after it has left, at most 2.0 MB" in text


def test_a_model_is_really_loaded_and_unloaded() -> None:
    cost = measure_pool(MODELS / "qwen3", num_cold=1, num_cycles=2, limit_s=300)
    assert len(cost.mlx_bytes) == len(cost.resident_bytes) == 2
    assert 0 < cost.hot_s[0] < min(cost.cold_s["again"])
    assert max(cost.mlx_bytes) < cost.loaded_bytes / 10


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="the pool cannot be measured"):
        measure_pool(tmp_path, num_cold=1, num_cycles=1, limit_s=300)

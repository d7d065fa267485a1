from pathlib import Path

import pytest

from mlx_manager.bench.ceiling import batch_loop
from mlx_manager.bench.processes import PeerError
from mlx_manager.bench.random_model import Shape, write_model
from mlx_manager.bench.results import Workload
from mlx_manager.inference.blas import use_fast_blas


async def test_the_ceiling_is_measured_with_the_real_batch_generator(tmp_path: Path) -> None:
    write_model(Shape(32, 1, 2, 1, 16, 64, "float32"), tmp_path / "model")
    workload = Workload(8, 5, 2, 3)
    async with batch_loop(tmp_path / "model", blas_path=use_fast_blas().path) as ceiling:
        first = await ceiling.measure(workload, ["not sent", "one", "two"], 0)
        again = await ceiling.measure(workload, ["not sent", "one", "two"], 1)
    assert (first.workload, first.repeat, again.repeat) == (workload, 0, 1)
    assert first.output_tok_s > 1
    assert again.output_tok_s > 1


async def test_a_model_that_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"(?s)the batch loop ended with status 1: .*config\.json"):
        async with batch_loop(tmp_path):
            pass

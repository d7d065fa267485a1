"""python -m tests.bench.models_in_turn [FOLDER]: what the pool costs, and what it gives back.

How long a request waits for a hot model; how long a cold one takes to its first token, for the first time and again after it was
unloaded, beside mlx-lm's own loading, each in turn in one process; then fifty times loaded, used and unloaded, with the memory after
each. Without a folder a model of 15 M parameters is made.
"""

# ruff: noqa: T201, E402 - it prints what it measures, and MLX comes after its BLAS

from mlx_manager.inference.blas import keep_freed_memory, use_fast_blas

use_fast_blas()

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import mlx.core as mx
import psutil
from mlx_lm.generate import generate_step
from mlx_lm.utils import load

from mlx_manager.bench.random_model import SHAPES, write_model
from mlx_manager.cli.terminal import leave
from mlx_manager.hub.local import find_models
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.sequence import SequenceSpec, Token, TokenSampling
from mlx_manager.inference.loader import EngineLimits, import_libraries
from mlx_manager.inference.pool import Pool

HOT = 20_000
COLD = 9
CYCLES = 50
PROMPT = tuple(range(300, 364))
GREEDY = TokenSampling(seed=0, temperature=0.0)


async def first_token(pool: Pool, name: str) -> None:
    async with pool.lend(name) as model:
        async for item in model.engine.submit([SequenceSpec(PROMPT, 1, GREEDY)]):
            if isinstance(item, Token):
                return


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


def by_mlx_lm(path: Path) -> None:
    model, _ = load(str(path))
    next(generate_step(mx.array(PROMPT), model, max_tokens=1))


async def measure(folder: Path, name: str) -> None:
    device = Device()
    device.start()
    pool = Pool(device, lambda: list(find_models([folder], None).models), EngineLimits(kv_bytes=256 << 20))
    import_libraries()
    await first_token(pool, name)

    waits: list[float] = []
    for _ in range(HOT):
        began = time.perf_counter()
        async with pool.lend(name):
            pass
        waits.append(time.perf_counter() - began)
    waits.sort()
    print(f"a hot model, lent and taken back: {1e6 * statistics.median(waits):.1f} us, p99 {1e6 * waits[HOT * 99 // 100]:.1f} us")
    await pool.unload(name)

    ours: list[float] = []
    theirs: list[float] = []
    fresh: list[float] = []
    for _ in range(COLD):
        ours.append(await timed(lambda: first_token(pool, name)))
        await pool.unload(name)
        new = Pool(device, lambda: list(find_models([folder], None).models), EngineLimits(kv_bytes=256 << 20))
        fresh.append(await timed(lambda new=new: first_token(new, name)))
        await new.close()
        theirs.append(await timed(lambda: device.run(lambda: by_mlx_lm(folder / name))))
    for label, times in (("mlx-lm, load and one token", theirs), ("ours for the first time", fresh), ("ours again", ours)):
        ratio = statistics.median(mine / their for mine, their in zip(times, theirs, strict=True))
        print(f"{label}: {statistics.median(times):.3f} s ({min(times):.3f}-{max(times):.3f}), {ratio:.2f} of mlx-lm's")

    process = psutil.Process()
    active: list[int] = []
    resident: list[int] = []
    for _ in range(CYCLES):
        await first_token(pool, name)
        await pool.unload(name)
        active.append(await device.run(mx.get_active_memory))
        resident.append(process.memory_info().rss)
    for label, seen in (("MLX", active), ("resident", resident)):
        at = (0, 9, CYCLES // 2 - 1, CYCLES - 1)
        print(f"{label} after unload {', '.join(str(i + 1) for i in at)}: {', '.join(f'{seen[i] / 1e6:.1f}' for i in at)} MB")
    print(f"with the model loaded: {await loaded(pool, device, name) / 1e6:.1f} MB of MLX's")
    device.stop()


async def loaded(pool: Pool, device: Device, name: str) -> int:
    await first_token(pool, name)
    return await device.run(mx.get_active_memory)


def main() -> None:
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as made:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(made) / "llama-15m"
        if len(sys.argv) == 1:
            write_model(SHAPES["llama-15m"], path)
        asyncio.run(measure(path.parent, path.name))
    leave()


if __name__ == "__main__":
    main()

"""What the pool of models costs a request, and what it gives back, beside mlx-lm's own loading; all in turn in one process.

A program, not a module: it runs in a process of its own. Its arguments are the folder of a model, how often it is loaded cold, and how
often it is loaded, used and unloaded after that. It writes one line of JSON to standard output (`PoolCost`).
"""
# ruff: noqa: E402 - MLX comes after its BLAS
# pyright: basic

from mlx_manager.inference.blas import keep_freed_memory, use_fast_blas

use_fast_blas()

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from os import dup, fdopen
from pathlib import Path

import mlx.core as mx
import psutil
from mlx_lm.generate import generate_step
from mlx_lm.utils import load

from mlx_manager.cli.terminal import leave
from mlx_manager.hub.local import find_models
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.sequence import SequenceSpec, Token, TokenSampling
from mlx_manager.inference.loader import EngineLimits, import_libraries
from mlx_manager.inference.pool import Pool

HOT = 20_000
PROMPT = tuple(range(300, 364))
LIMITS = EngineLimits(kv_bytes=256 << 20)
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
    model, *_ = load(str(path))
    next(generate_step(mx.array(PROMPT), model, max_tokens=1))


async def measure(path: Path, num_cold: int, num_cycles: int) -> dict[str, object]:
    folder, name = path.parent, path.name
    device = Device()
    device.start()

    def new_pool() -> Pool:
        return Pool(device, lambda: list(find_models([folder], None).models), LIMITS)

    pool = new_pool()
    import_libraries()
    await first_token(pool, name)
    loaded_bytes = await device.run(mx.get_active_memory)

    waits: list[float] = []
    for _ in range(HOT):
        began = time.perf_counter()
        async with pool.lend(name):
            pass
        waits.append(time.perf_counter() - began)
    waits.sort()
    await pool.unload(name)

    again: list[float] = []
    theirs: list[float] = []
    first: list[float] = []
    for _ in range(num_cold):
        again.append(await timed(lambda: first_token(pool, name)))
        await pool.unload(name)
        new = new_pool()
        first.append(await timed(lambda new=new: first_token(new, name)))
        await new.close()
        theirs.append(await timed(lambda: device.run(lambda: by_mlx_lm(path))))

    process = psutil.Process()
    active: list[int] = []
    resident: list[int] = []
    for _ in range(num_cycles):
        await first_token(pool, name)
        await pool.unload(name)
        active.append(await device.run(mx.get_active_memory))
        resident.append(process.memory_info().rss)
    device.stop()
    return {
        "hot_s": [statistics.median(waits), waits[HOT * 99 // 100]],
        "cold_s": {"first": first, "again": again, "mlx_lm": theirs},
        "loaded_bytes": loaded_bytes,
        "mlx_bytes": active,
        "resident_bytes": resident,
    }


def main() -> None:
    answer = fdopen(dup(1), "w")
    sys.stdout = sys.stderr  # what libraries print is no answer
    keep_freed_memory()
    found = asyncio.run(measure(Path(sys.argv[1]).absolute(), int(sys.argv[2]), int(sys.argv[3])))
    answer.write(json.dumps(found) + "\n")
    answer.flush()
    leave()


if __name__ == "__main__":
    main()

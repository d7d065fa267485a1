"""What the machine gives without a server: the same prompts through mlx-lm's batch generator, in a process without HTTP."""

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

from mlx_manager.bench.processes import PeerError, check_blas, end, environment, tail
from mlx_manager.bench.results import CeilingCell, Workload

PROGRAM = Path(__file__).with_name("programs") / "batch_loop.py"


class Ceiling:
    """The process that does it, and the only one who talks to it. It sleeps while nothing is asked of it."""

    def __init__(self, process: asyncio.subprocess.Process, log: IO[bytes]) -> None:
        self._process = process
        self._log = log

    async def measure(self, workload: Workload, prompts: Sequence[str], repeat: int) -> CeilingCell:
        """Of `prompts` all but the first, in turn, as the targets get them. Raises PeerError."""
        measured = prompts[1:]
        asked = {
            "prompts": [measured[number % len(measured)] for number in range(workload.requests)],
            "concurrency": workload.concurrency,
            "max_tokens": workload.max_tokens,
        }
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            await self._process.stdin.drain()
        except ConnectionError:
            pass  # the answer says that it has ended, and why
        done = await self.answer()
        return CeilingCell(workload, repeat, done["num_tokens"] / done["wall_s"])

    async def answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise PeerError(f"the batch loop ended with status {await self._process.wait()}: {tail(self._log)}")
        return json.loads(line)


@asynccontextmanager
async def batch_loop(
    model_path: Path, *, blas_path: Path | None = None, python: str = sys.executable, start_s: float = 120.0
) -> AsyncGenerator[Ceiling]:
    """mlx-lm's batch generator with a model, once that is loaded. Raises PeerError."""
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            python,
            str(PROGRAM),
            str(model_path),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env=environment(blas_path),
        )
        ceiling = Ceiling(process, log)
        try:
            try:
                async with asyncio.timeout(start_s):
                    await ceiling.answer()
            except TimeoutError:
                raise PeerError(f"the batch loop is not ready after {start_s:.0f} s: {tail(log)}") from None
            check_blas(process.pid, blas_path)
            yield ceiling
        finally:
            await end(process)

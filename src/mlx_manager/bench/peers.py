"""Other servers to be compared with, started under the same conditions as ours and ended when the comparison is over."""

import asyncio
import os
import socket
import sys
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

from mlx_manager.bench.load import Limits, measure
from mlx_manager.bench.results import Target, Workload

HOST = "127.0.0.1"
POLL_S = 0.25
END_S = 10.0
DEFAULT_MODEL = "default_model"
"""What mlx_lm.server calls the model it was started with. Any other name is loaded, or downloaded, in its place."""


class PeerError(Exception):
    """The peer cannot be measured: not started, not answering, or not under our conditions. Says which."""


@asynccontextmanager
async def mlx_lm_server(
    model_path: Path,
    port: int,
    *,
    blas_path: Path | None = None,
    name: str = "mlx-lm",
    options: Sequence[str] = (),
    python: str = sys.executable,
    start_s: float = 120.0,
) -> AsyncGenerator[Target]:
    """`python -m mlx_lm server` on a port of this machine, as a target, once it has answered a request.

    `blas_path` is the BLAS that our own process uses in place of the wheel's (Linux on CPU); the peer gets it preloaded, and is
    not measured without it: a comparison of two BLAS libraries says nothing about two servers. Raises PeerError.
    """
    environment = _environment(blas_path)
    if _is_open(port):
        raise PeerError(f"port {port} is in use; what answers there is not the peer")
    arguments = ["-m", "mlx_lm", "server", "--model", str(model_path), "--host", HOST, "--port", str(port), *options]
    flags = f"python {' '.join(arguments)}" + ("" if blas_path is None else f" with {blas_path.name} preloaded")
    target = Target(name, f"http://{HOST}:{port}", DEFAULT_MODEL, flags=flags)
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            python, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        try:
            await _until_it_answers(target, process, log, start_s)
            if blas_path is not None and not _has_mapped(process.pid, blas_path):
                raise PeerError(f"the peer runs without {blas_path.name}")
            yield target
        finally:
            await _end(process)


def _environment(blas_path: Path | None) -> dict[str, str]:
    environment = dict(os.environ)
    if blas_path is not None:
        if not blas_path.is_file():  # the dynamic linker only warns, and goes on with the slow one
            raise PeerError(f"there is no BLAS at {blas_path}")
        preloaded = environment.get("LD_PRELOAD", "")
        environment["LD_PRELOAD"] = f"{blas_path}:{preloaded}" if preloaded else str(blas_path)
    return environment


async def _until_it_answers(target: Target, process: asyncio.subprocess.Process, log: IO[bytes], start_s: float) -> None:
    """By a completion, not by its health page, which is up before the model is."""
    hello = Workload(prompt_tokens=1, max_tokens=1, concurrency=1, requests=1)
    error = "nothing was tried"
    try:
        async with asyncio.timeout(start_s):
            while process.returncode is None:
                cell = await measure(target, hello, ["Hello", "Hello"], limits=Limits(request_s=start_s))
                if cell.completed:
                    return
                error = cell.samples[0].error
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise PeerError(f"{target.name} does not answer within {start_s:.0f} s ({error}): {_tail(log)}") from None
    raise PeerError(f"{target.name} ended with status {process.returncode}: {_tail(log)}")


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            async with asyncio.timeout(END_S):
                await process.wait()
        except TimeoutError:
            process.kill()
    await process.wait()


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0


def _has_mapped(pid: int, library: Path) -> bool:
    """Whether a process really has the library loaded. Only Linux can say; elsewhere nothing is preloaded."""
    maps = Path(f"/proc/{pid}/maps")
    return not maps.exists() or library.resolve().name in maps.read_text(errors="replace")


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read()[-2000:].decode("utf-8", errors="replace").strip()

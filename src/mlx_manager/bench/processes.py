"""Processes that are measured: started under our conditions, ended when it is over."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

END_S = 10.0


class PeerError(Exception):
    """The peer cannot be measured: not started, not answering, or not under our conditions. Says which."""


def environment(blas_path: Path | None) -> dict[str, str]:
    """Ours, with the BLAS that our own process uses in place of the wheel's put in front. Raises PeerError."""
    variables = dict(os.environ)
    if blas_path is not None:
        if not blas_path.is_file():  # the dynamic linker only warns, and goes on with the slow one
            raise PeerError(f"there is no BLAS at {blas_path}")
        preloaded = variables.get("LD_PRELOAD", "")
        variables["LD_PRELOAD"] = f"{blas_path}:{preloaded}" if preloaded else str(blas_path)
    return variables


def check_blas(pid: int, blas_path: Path | None) -> None:
    """A comparison of two BLAS libraries says nothing about two programs. Raises PeerError. Only Linux can say what a process has
    loaded; elsewhere nothing is preloaded."""
    maps = Path(f"/proc/{pid}/maps")
    if blas_path is not None and maps.exists() and blas_path.resolve().name not in maps.read_text(errors="replace"):
        raise PeerError(f"the peer runs without {blas_path.name}")


async def versions(python: str, packages: Sequence[str]) -> str:
    """ "mlx-lm 0.32.2, mlx 0.32.4": of those that are installed there. Empty if that Python cannot say."""
    program = (
        "import sys; from importlib.metadata import distributions as d; v = {x.name: x.version for x in d()};"
        "print(', '.join(f'{n} {v[n]}' for n in sys.argv[1:] if n in v))"
    )
    try:
        process = await asyncio.create_subprocess_exec(
            python,
            "-c",
            program,
            *packages,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError as error:
        raise PeerError(f"{python} cannot be started: {error.strerror}") from None
    said, _ = await process.communicate()
    return said.decode("utf-8", errors="replace").strip() if process.returncode == 0 else ""


async def end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            async with asyncio.timeout(END_S):
                await process.wait()
        except TimeoutError:
            process.kill()
    await process.wait()


def tail(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read()[-2000:].decode("utf-8", errors="replace").strip()

"""Other servers to be compared with, started under the same conditions as ours and ended when the comparison is over."""

import asyncio
import socket
import sys
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mlx_manager.bench.client import Limits
from mlx_manager.bench.load import measure
from mlx_manager.bench.processes import PeerError, check_blas, end, environment, tail, versions
from mlx_manager.bench.results import Target, Workload

HOST = "127.0.0.1"
POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Peer:
    """How to start one. `{model}`, `{host}` and `{port}` in the arguments are filled in."""

    name: str
    arguments: tuple[str, ...]
    packages: tuple[str, ...]
    """Whose versions belong to its figures."""
    model: str = "{model}"
    """What it calls the model it was started with. Any other name is loaded, or downloaded, in its place."""


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "mlx-lm",
            ("-m", "mlx_lm", "server", "--model", "{model}", "--host", "{host}", "--port", "{port}"),
            ("mlx-lm", "mlx"),
            model="default_model",
        ),
        Peer(
            "mlx-vlm",
            ("-m", "mlx_vlm.server", "--model", "{model}", "--host", "{host}", "--port", "{port}"),
            ("mlx-vlm", "mlx-lm", "mlx"),
        ),
        Peer(  # without the flag it serves one request at a time
            "vllm-mlx",
            ("-m", "vllm_mlx.cli", "serve", "{model}", "--host", "{host}", "--port", "{port}", "--continuous-batching", "--offline"),
            ("vllm-mlx", "mlx-lm", "mlx"),
        ),
    )
}


@asynccontextmanager
async def peer_server(
    peer: Peer,
    model_path: Path,
    port: int,
    *,
    blas_path: Path | None = None,
    options: Sequence[str] = (),
    python: str = sys.executable,
    start_s: float = 120.0,
) -> AsyncGenerator[Target]:
    """A peer on a port of this machine, run by `python`, as a target, once it has answered a request.

    `blas_path` is the BLAS that our own process uses in place of the wheel's (Linux on CPU); the peer gets it preloaded, and is
    not measured without it. Raises PeerError.
    """
    variables = environment(blas_path)
    if _is_open(port):
        raise PeerError(f"port {port} is in use; what answers there is not the peer")
    filled = {"model": str(model_path), "host": HOST, "port": str(port)}
    arguments = [*(argument.format_map(filled) for argument in peer.arguments), *options]
    installed = await versions(python, peer.packages)
    flags = f"python {' '.join(arguments)}" + ("" if blas_path is None else f" with {blas_path.name} preloaded")
    target = Target(
        peer.name, f"http://{HOST}:{port}", peer.model.format_map(filled), flags=f"{flags} ({installed})" if installed else flags
    )
    # A home of its own: vllm-mlx keeps its prefix cache there, and would bring the prompts of one comparison into the next.
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        variables["HOME"] = home
        process = await asyncio.create_subprocess_exec(
            python, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=variables
        )
        try:
            await _until_it_answers(target, process, log, start_s)
            check_blas(process.pid, blas_path)
            yield target
        finally:
            await end(process)


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
        raise PeerError(f"{target.name} does not answer within {start_s:.0f} s ({error}): {tail(log)}") from None
    raise PeerError(f"{target.name} ended with status {process.returncode}: {tail(log)}")


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0

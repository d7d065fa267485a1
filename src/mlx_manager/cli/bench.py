"""`bench`: load on a server, and on others beside it for comparison."""
# ruff: noqa: PLC0415 - the load generator brings an HTTP client and pydantic: `--help` does without

import asyncio
import socket
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mlx_manager.cli.configuration import configured
from mlx_manager.cli.terminal import INTERRUPTED, USAGE, errors, fail, screen

if TYPE_CHECKING:
    from mlx_manager.bench.results import Cell, Results, Target, Workload

Prefix = Literal["unique", "shared"]
SUBJECT = "mlx-manager"
PEER = "mlx-lm"


def bench(
    model: Annotated[str, typer.Option(help="The model, as that server calls it.")],
    url: Annotated[str, typer.Option(help="The server: its root or its base URL.")] = "http://127.0.0.1:10242",
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Length of the prompts that are made up.")] = 128,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of a reply, at most.")] = 128,
    concurrency: Annotated[str, typer.Option(metavar="N,N,…", help="Requests in flight; each number is a row.")] = "1,4,8,16",
    requests: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Requests a row and repeat. [default: twice those in flight, at least 4]")
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="How often everything is measured.")] = 3,
    prefix: Annotated[Prefix, typer.Option(help="Whether prompts begin alike.")] = "unique",
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Sent as it is in place of made-up prompts; can be repeated.")
    ] = None,
    versus: Annotated[
        list[str] | None, typer.Option(metavar="NAME=URL,MODEL", help="Another server to measure in turn; can be repeated.")
    ] = None,
    versus_mlx_lm: Annotated[
        Path | None,
        typer.Option(metavar="DIR", exists=True, file_okay=False, help="Start mlx_lm.server with this model and measure it in turn."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every observation there.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Write the tables there.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same seed makes the same prompts. [default: the time]")] = None,
) -> None:
    """Measure a server under load; its key, if it has one, is taken from MLX_MANAGER_API_KEY."""
    from mlx_manager.bench import report
    from mlx_manager.bench.peers import PeerError
    from mlx_manager.bench.results import Target, Workload

    for file in (json_file, markdown_file):
        if file is not None and not file.absolute().parent.is_dir():
            fail(f"There is no folder {file.absolute().parent} to write {file.name} to.", USAGE)
    key = configured().api_key
    try:
        subject = Target(SUBJECT, url, model, api_key=key.get_secret_value() if key else None)
        targets = [subject, *map(_peer, versus or [])]
        workloads = [
            Workload(
                prompt_tokens=prompt_tokens,
                max_tokens=max_tokens,
                concurrency=at_once,
                requests=max(4, 2 * at_once) if requests is None else requests,
                prefix=prefix,
                prompts=tuple(prompt or ()),
            )
            for at_once in _numbers(concurrency)
        ]
        results = asyncio.run(_measure(targets, workloads, repeats, int(time.time()) if seed is None else seed, versus_mlx_lm))
    except ValueError as error:
        fail(f"{error}.", USAGE)
    except PeerError as error:
        fail(f"{PEER} cannot be measured: {error}")
    except KeyboardInterrupt:
        fail("Stopped: nothing is reported of half a comparison.", INTERRUPTED)
    screen().print(report.table(results))
    if json_file is not None:
        json_file.write_text(report.to_json(results), encoding="utf-8")
    if markdown_file is not None:
        markdown_file.write_text(report.markdown(results), encoding="utf-8")
    if not any(cell.completed for cell in results.cells if cell.target == SUBJECT):
        fail(f"No request to {url} completed.")


def _peer(text: str) -> "Target":
    """`NAME=URL,MODEL`. It is sent no key of ours."""
    from mlx_manager.bench.results import Target

    name, _, rest = text.partition("=")
    url, _, model = rest.partition(",")
    if not (name and url and model):
        raise ValueError(f"--versus {text}: it must be NAME=URL,MODEL")
    return Target(name, url, model)


def _numbers(text: str) -> list[int]:
    try:
        numbers = sorted({int(number) for number in text.split(",")})
    except ValueError:
        raise ValueError(f"--concurrency {text}: it must be numbers with commas between them") from None
    if numbers[0] < 1:
        raise ValueError("--concurrency: the numbers must be 1 or more")
    return numbers


async def _measure(targets: "list[Target]", workloads: "list[Workload]", repeats: int, seed: int, mlx_lm_model: Path | None) -> "Results":
    from mlx_manager.bench.load import compare
    from mlx_manager.bench.peers import mlx_lm_server
    from mlx_manager.inference.blas import use_fast_blas

    async with AsyncExitStack() as stack:
        progress = stack.enter_context(errors().status("starting …"))
        if mlx_lm_model is not None:
            progress.update(f"starting {PEER} …")
            blas_path = use_fast_blas().path
            targets = [*targets, await stack.enter_async_context(mlx_lm_server(mlx_lm_model, _free_port(), blas_path=blas_path, name=PEER))]
        num_cells = len(targets) * len(workloads) * repeats
        num_done = 0

        def show(cell: "Cell") -> None:
            nonlocal num_done
            num_done += 1
            rate = "no reply completed" if cell.output_tok_s is None else f"{cell.output_tok_s:.1f} tok/s"
            progress.update(f"{num_done} of {num_cells}: {cell.target}, {cell.workload.concurrency} at once: {rate}")

        progress.update(f"warming up, then {num_cells} measurements …")
        return await compare(targets, workloads, repeats, seed=seed, on_cell=show)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

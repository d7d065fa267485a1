"""`bench`: load on a server, and on others beside it for comparison; the models that this is done with."""
# ruff: noqa: PLC0415 - the load generator brings an HTTP client and pydantic: `--help` does without

import asyncio
import socket
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from mlx_manager.cli.configuration import configured
from mlx_manager.cli.terminal import INTERRUPTED, USAGE, errors, fail, say, screen

if TYPE_CHECKING:
    from mlx_manager.bench.peers import Peer
    from mlx_manager.bench.results import CeilingCell, Cell, Results, Target, Workload
    from mlx_manager.bench.scenarios import Scenario, Trial

Prefix = Literal["unique", "shared"]
SUBJECT = "mlx-manager"
SERVED = "served"
POOL = "pool"
CYCLES = 50  # of loading, using and unloading


def bench(
    model: Annotated[str | None, typer.Option(help="The model, as that server calls it.")] = None,
    url: Annotated[str, typer.Option(help="The server: its root or its base URL.")] = "http://127.0.0.1:10242",
    scenario: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:FIELD=N,…]",
            help="What to measure: served, join, stall, shared-prefix, overhead, prefix-hit, priority; can be repeated; without it served. "
            "Or pool alone: loading and unloading, with --model-dir and without a server.",
        ),
    ] = None,
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
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=PYTHON]",
            help="Start mlx-lm, mlx-vlm or vllm-mlx with that Python and measure it in turn; can be repeated; without PYTHON with ours.",
        ),
    ] = None,
    ceiling: Annotated[bool, typer.Option("--ceiling", help="Measure mlx-lm's batch loop without a server in turn.")] = False,
    model_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", exists=True, file_okay=False, help="The model, for --peer, --ceiling and the pool.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every observation there.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Write the tables there.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same seed makes the same prompts. [default: the time]")] = None,
    limit_s: Annotated[float, typer.Option(metavar="SECONDS", min=1, help="Stop then, and report what there is.")] = 1800.0,
    make_model: Annotated[
        tuple[str, Path] | None,
        typer.Option(metavar="SHAPE DIR", help="Write a model of random weights there, and do nothing else: llama-15m or llama-8b."),
    ] = None,
) -> None:
    """Measure a server under load; its key, if it has one, is taken from MLX_MANAGER_API_KEY."""
    if make_model is not None:
        _make_model(*make_model)
        return
    for file in (json_file, markdown_file):
        if file is not None and not file.absolute().parent.is_dir():
            fail(f"There is no folder {file.absolute().parent} to write {file.name} to.", USAGE)
    if POOL in (scenario or ()):
        _measure_pool(scenario or [], model_dir, repeats, limit_s, json_file, markdown_file)
        return
    if model is None:
        fail("--model is missing: the model to ask for, as the server calls it.", USAGE)
    if (peer or ceiling) and model_dir is None:
        fail("--peer and --ceiling need --model-dir: the folder of the model that they load.", USAGE)

    from mlx_manager.bench import report
    from mlx_manager.bench.processes import PeerError
    from mlx_manager.bench.results import Target, Workload
    from mlx_manager.bench.scenarios import parsed

    key = configured().api_key
    try:
        subject = Target(SUBJECT, url, model, api_key=key.get_secret_value() if key else None)
        targets = [subject, *map(_other, versus or [])]
        wanted = list(dict.fromkeys(scenario or [SERVED]))
        scenarios = tuple(dict.fromkeys(one for text in wanted if text != SERVED for one in parsed(text)))
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
            if SERVED in wanted
        ]
        started = Started([_peer(text) for text in peer or []], ceiling, model_dir)
        seed = int(time.time()) if seed is None else seed
        results = asyncio.run(_measure(targets, workloads, scenarios, repeats, seed, started, limit_s))
    except ValueError as error:
        fail(f"{error}.", USAGE)
    except PeerError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("Stopped: nothing is reported of half a comparison.", INTERRUPTED)
    screen().print(report.table(results))
    if json_file is not None:
        json_file.write_text(report.to_json(results), encoding="utf-8")
    if markdown_file is not None:
        markdown_file.write_text(report.markdown(results), encoding="utf-8")
    seen = (sample for one in (*results.cells, *results.trials) if one.target == SUBJECT for sample in one.samples)
    if all(sample.error is not None for sample in seen):
        fail(f"No request to {url} completed.")


class Started(NamedTuple):
    """What is started here to be measured beside the server."""

    peers: "list[tuple[Peer, str]]"
    """(what, with which Python)."""
    ceiling: bool
    model_dir: Path | None


def _measure_pool(
    scenarios: list[str], model_dir: Path | None, repeats: int, limit_s: float, json_file: Path | None, markdown_file: Path | None
) -> None:
    from mlx_manager.bench.pool_cost import measure_pool
    from mlx_manager.bench.processes import PeerError

    if scenarios != [POOL]:
        fail("--scenario pool is measured alone: it needs no server, and the others do.", USAGE)
    if model_dir is None:
        fail("--scenario pool needs --model-dir: the folder of the model that is loaded and unloaded.", USAGE)
    try:
        with errors().status(f"loading and unloading {model_dir.name} …"):
            cost = measure_pool(model_dir, num_cold=repeats, num_cycles=CYCLES, limit_s=limit_s)
    except PeerError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("Stopped: nothing is reported of half a comparison.", INTERRUPTED)
    say(cost.markdown())
    if json_file is not None:
        json_file.write_text(cost.model_dump_json(indent=2), encoding="utf-8")
    if markdown_file is not None:
        markdown_file.write_text(cost.markdown(), encoding="utf-8")


def _make_model(shape: str, folder: Path) -> None:
    from mlx_manager.bench.random_model import SHAPES, write_model

    if shape not in SHAPES:
        fail(f"--make-model {shape}: the shapes are {', '.join(SHAPES)}.", USAGE)
    try:
        with errors().status(f"writing {folder} …"):
            num_parameters = write_model(SHAPES[shape], folder)
    except OSError as error:
        fail(f"{folder} cannot be written: {error.strerror}.")
    say(f"{folder}: {num_parameters / 1e6:.1f} million parameters of random weights. Serve it with --models-dir {folder.absolute().parent}")


def _other(text: str) -> "Target":
    """`NAME=URL,MODEL`. It is sent no key of ours."""
    from mlx_manager.bench.results import Target

    name, _, rest = text.partition("=")
    url, _, model = rest.partition(",")
    if not (name and url and model):
        raise ValueError(f"--versus {text}: it must be NAME=URL,MODEL")
    return Target(name, url, model)


def _peer(text: str) -> "tuple[Peer, str]":
    """`NAME[=PYTHON]`."""
    from mlx_manager.bench.peers import PEERS

    name, _, python = text.partition("=")
    if name not in PEERS:
        raise ValueError(f"--peer {text}: the peers are {', '.join(PEERS)}")
    return PEERS[name], python or sys.executable


def _numbers(text: str) -> list[int]:
    try:
        numbers = sorted({int(number) for number in text.split(",")})
    except ValueError:
        raise ValueError(f"--concurrency {text}: it must be numbers with commas between them") from None
    if numbers[0] < 1:
        raise ValueError("--concurrency: the numbers must be 1 or more")
    return numbers


async def _measure(
    targets: "list[Target]",
    workloads: "list[Workload]",
    scenarios: "tuple[Scenario, ...]",
    repeats: int,
    seed: int,
    started: Started,
    limit_s: float,
) -> "Results":
    from mlx_manager.bench.ceiling import batch_loop
    from mlx_manager.bench.client import Limits
    from mlx_manager.bench.load import compare
    from mlx_manager.bench.peers import peer_server
    from mlx_manager.bench.processes import PeerError
    from mlx_manager.inference.blas import use_fast_blas

    async with AsyncExitStack() as stack:
        progress = stack.enter_context(errors().status("starting …"))
        ceiling = None
        if started.model_dir is not None:
            blas_path = use_fast_blas().path
            for peer, python in started.peers:
                progress.update(f"starting {peer.name} …")
                server = peer_server(peer, started.model_dir, _free_port(), blas_path=blas_path, python=python)
                try:
                    targets = [*targets, await stack.enter_async_context(server)]
                except PeerError as error:
                    raise PeerError(f"{peer.name} cannot be measured: {error}") from None
            if started.ceiling and workloads:
                progress.update("loading the model for the ceiling …")
                ceiling = await stack.enter_async_context(batch_loop(started.model_dir, blas_path=blas_path))
        began = time.monotonic()

        def show(one: "Cell | Trial | CeilingCell") -> None:
            progress.update(f"{time.monotonic() - began:.0f} s: {_progress(one)}")

        progress.update("warming up …")
        return await compare(
            targets,
            workloads,
            repeats,
            scenarios=scenarios,
            seed=seed,
            limits=Limits(total_s=limit_s),
            ceiling=ceiling,
            on_done=show,
        )


def _progress(one: "Cell | Trial | CeilingCell") -> str:
    from mlx_manager.bench.results import Cell
    from mlx_manager.bench.scenarios import Trial

    if isinstance(one, Trial):
        return f"{one.target}, {one.scenario.name}, repeat {one.repeat + 1}"
    rate = "no reply completed" if one.output_tok_s is None else f"{one.output_tok_s:.1f} tok/s"
    name = one.target if isinstance(one, Cell) else "the ceiling"
    return f"{name}, {one.workload.concurrency} at once, repeat {one.repeat + 1}: {rate}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

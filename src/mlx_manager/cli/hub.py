"""`search`, `pull` and `rm`: models on the Hub, on their way, and away again."""
# ruff: noqa: PLC0415 - the Hub's client and the database take a while to import: `--help` does without

import asyncio
import logging
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from mlx_manager.cli.configuration import AsJson, ModelsDir, address, asked, catalogue, configured, hub
from mlx_manager.cli.terminal import FAILED, INTERRUPTED, USAGE, count, errors, fail, print_json, print_table, say, size, tokens, warn

if TYPE_CHECKING:
    from mlx_manager.config import Config
    from mlx_manager.hub.characteristics import Filter
    from mlx_manager.hub.downloads import Download
    from mlx_manager.hub.search import Inspection, Listed, Query
    from mlx_manager.inference.memory import Fit

ANY = "any"
_LOOK_S = 0.2


@dataclass(frozen=True)
class Found:
    """`fit` None: it is not known what the model is; `inspection` says why."""

    listed: "Listed"
    inspection: "Inspection"
    fit: "Fit | None"


def search(
    text: Annotated[str, typer.Argument(help="Part of the name.", show_default=False)] = "",
    organisation: Annotated[str, typer.Option(metavar="NAME", help=f"Whose models; '{ANY}': everybody's.")] = "mlx-community",
    every: Annotated[bool, typer.Option("--all", help="Also what is not marked as made for MLX.")] = False,
    sort: Annotated[Literal["downloads", "likes", "updated", "trending"], typer.Option(help="What comes first.")] = "downloads",
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=100, help="Models that are looked at.")] = 20,
    architecture: Annotated[str | None, typer.Option(metavar="NAME", help="As qwen3 or llama.")] = None,
    can: Annotated[
        list[str] | None,
        typer.Option(metavar="WHAT", help="text, vision, embedding, reranker, tools or thinking; can be repeated."),
    ] = None,
    bits: Annotated[int | None, typer.Option(metavar="N", min=0, help="Of its weights; 0: not quantised.")] = None,
    max_gb: Annotated[float | None, typer.Option(metavar="GB", min=0, help="Size of its weights, at most.")] = None,
    min_context: Annotated[int | None, typer.Option(metavar="TOKENS", min=0, help="Length of its context, at least.")] = None,
    fits: Annotated[bool | None, typer.Option("--fits/--too-large", help="Whether it fits the memory for models.")] = None,
    as_json: AsJson = False,
) -> None:
    """Search the Hub for models, by name and by what they are."""
    from mlx_manager.core.errors import MLXManagerError
    from mlx_manager.hub.characteristics import Capability, Filter, emptied_by
    from mlx_manager.hub.search import Query

    if unknown := [what for what in can or () if what not in get_args(Capability)]:
        fail(f"--can {unknown[0]}: a model can be asked for {', '.join(get_args(Capability))}.", USAGE)

    config = configured()
    query = Query(text, None if organisation == ANY else organisation, not every, sort, limit)
    capability = cast(tuple[Capability, ...], tuple(can or ()))
    max_bytes = None if max_gb is None else int(max_gb * 1e9)
    wanted = Filter(
        architecture=architecture, capability=capability, bits=bits, max_bytes=max_bytes, min_context=min_context, fits=fits
    )  # fmt: skip
    try:
        with errors().status("searching …"):
            found = asyncio.run(_search(config, query))
    except MLXManagerError as error:
        fail(error.message)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    failed = [_fails(wanted, one) for one in found]
    shown = [one for one, names in zip(found, failed, strict=True) if not names]
    if as_json:
        print_json({"results": [_as_json(one) for one in shown], "emptied_by": None if shown else emptied_by(wanted, failed)})
    elif shown:
        _print_found(shown)
    elif taken := emptied_by(wanted, failed):
        options = {"capability": "--can", "max_bytes": "--max-gb", "fits": "--fits" if fits else "--too-large"}
        say(f"None of {len(found)} models is left: {options.get(taken, f'--{taken}'.replace('_', '-'))} took the last.")
    else:
        say(f"There is no model like '{text}' on the Hub" + ("." if organisation == ANY else f" of {organisation}: --organisation {ANY}?"))


async def _search(config: "Config", query: "Query") -> list[Found]:
    from mlx_manager.hub.search import Search
    from mlx_manager.inference.families.detect import calls_and_thinks
    from mlx_manager.inference.loader import memory_limit
    from mlx_manager.inference.memory import fit_of

    client = hub(config)
    searching = Search(client, calls_and_thinks)
    try:
        page = await searching.find(query)
        looking = asyncio.gather(*(searching.inspect(model.id) for model in page.models))
        limit, told = await asyncio.to_thread(memory_limit, config.max_memory), await looking
    finally:
        await searching.close()
        await client.close()
    return [
        Found(
            model,
            one,
            None
            if one.told is None
            else fit_of(one.told.checkpoint, limit=limit, kv_bytes=config.kv_cache_bytes, prefill_tokens=config.prefill_budget),
        )
        for model, one in zip(page.models, told, strict=True)
    ]


def _fails(wanted: "Filter", found: Found) -> tuple[str, ...]:
    from mlx_manager.hub.characteristics import fails

    if found.inspection.told is None or found.fit is None:
        return wanted.active
    return fails(wanted, found.inspection.told, found.fit.verdict != "too large")


def _print_found(shown: list[Found]) -> None:
    rows: list[tuple[str, ...]] = []
    for one in shown:
        told, fit = one.inspection.told, one.fit
        if told is None or fit is None:
            rows.append((one.listed.id, one.inspection.reason or "", "", "", "", "", str(one.listed.downloads), ""))
            continue
        c = told.checkpoint
        bits = "-" if c.quantization_bits is None else str(c.quantization_bits)
        can = ", ".join(told.capabilities) or c.kind
        rows.append(
            (c.id, can, count(c.num_parameters), bits, size(c.size_bytes), tokens(c.context_length), str(one.listed.downloads), _fit(fit))
        )
    columns = ("Model", "Can", "Parameters", "Bits", "Size", "Context", "Downloads", "Memory")
    print_table(rows, columns=columns, numbers=("Parameters", "Bits", "Size", "Context", "Downloads"))


def _fit(fit: "Fit") -> str:
    """The verdict with its sum."""
    return f"{fit.verdict}: {size(fit.need.weights)} + {size(fit.need.own)} of {size(fit.limit)}"


def _as_json(found: Found) -> dict[str, Any]:
    told = found.inspection.told
    about = None
    if told is not None:
        about = asdict(told.checkpoint) | {"capabilities": told.capabilities, "download_bytes": told.download_bytes}
        about.pop("path")
    return asdict(found.listed) | {
        "characteristics": about,
        "reason": found.inspection.reason,
        "fit": None if found.fit is None else asdict(found.fit),
    }


def pull(
    model: Annotated[str, typer.Argument(help="As the Hub names it: organisation/name.")],
    revision: Annotated[str, typer.Option(metavar="NAME", help="A branch, a tag or a commit.")] = "main",
    as_json: AsJson = False,
) -> None:
    """Download a model from the Hub: by the server, if one runs here, else by this command. What is there is not fetched again."""
    from mlx_manager.cli.remote import is_us

    config = configured()
    url = address(config.host, config.port)
    done = _pull_by_server(model, revision, as_json) if is_us(url) else _pull_here(config, model, revision, as_json)
    if done["state"] != "done":
        again = f" Then go on with: mlx-manager pull {model}" if done["state"] == "paused" else ""
        fail((done["error"] or f"The download of {model} was paused by somebody else.") + again)
    if as_json:
        print_json(done)
    else:
        say(f"{model} is here ({size(done['total_bytes'])}). Talk to it with: mlx-manager run {model}")


def _pull_by_server(model: str, revision: str, as_json: bool) -> dict[str, Any]:
    with asked(None) as server:
        now = server.download(model, revision)
        try:
            with _bar(model, as_json) as show:
                while now["state"] in ("queued", "downloading"):
                    show(now)
                    time.sleep(_LOOK_S)
                    now = server.download_now(now["id"])
        except KeyboardInterrupt:
            warn(f"The server goes on with {model}. To follow it again: mlx-manager pull {model}")
            raise typer.Exit(INTERRUPTED) from None
        return now


def _pull_here(config: "Config", model: str, revision: str, as_json: bool) -> dict[str, Any]:
    from mlx_manager.core.errors import MLXManagerError
    from mlx_manager.storage.database import DatabaseUnusable

    logging.disable(logging.WARNING)  # what matters of it is said below
    try:
        return asdict(asyncio.run(_pull(config, model, revision, as_json)))
    except MLXManagerError as error:
        fail(error.message)
    except DatabaseUnusable as error:
        fail(f"The database cannot be used. {error}.")
    except KeyboardInterrupt:
        warn(f"Stopped. What has come of {model} is kept: mlx-manager pull {model} goes on where it stopped.")
        raise typer.Exit(INTERRUPTED) from None


async def _pull(config: "Config", model: str, revision: str, as_json: bool) -> "Download":
    """The same code as the server's, for one model."""
    from mlx_manager.hub.downloads import Downloads
    from mlx_manager.hub.local import hub_cache_folder
    from mlx_manager.hub.store import DownloadStore
    from mlx_manager.storage.database import Database

    async def on_done(_: str) -> None:
        pass

    client, database = hub(config), Database(config.database_path)
    await database.open()
    downloads = Downloads(client, DownloadStore(database), hub_cache_folder(), at_once=1, on_done=on_done)
    try:
        await downloads.open(goes_on=False)
        now = await downloads.start(model, revision)
        with _bar(model, as_json) as show:
            try:
                while now.state in ("queued", "downloading"):
                    show(asdict(now))
                    await asyncio.sleep(_LOOK_S)
                    now = downloads.get(now.id)
            except asyncio.CancelledError:
                await downloads.pause(now.id)
                raise
        return now
    finally:
        await downloads.close()
        await client.close()
        await database.close()


class _Show:
    def __init__(self, progress: Progress, model: str) -> None:
        self._progress = progress
        self._task = progress.add_task(model, total=None, doing="")

    def __call__(self, now: Mapping[str, Any]) -> None:
        doing = "waits for its turn" if now["state"] == "queued" else "checks" if now["is_checking"] else ""
        self._progress.update(self._task, total=now["total_bytes"], completed=now["done_bytes"], doing=f"{doing} {now['file'] or ''}")


@contextmanager
def _bar(model: str, as_json: bool) -> "Generator[_Show]":
    """On a terminal only."""
    console = errors()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[doing]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=as_json or not console.is_terminal) as progress:
        yield _Show(progress, model)


def rm(
    model: Annotated[str, typer.Argument(help="As `list` names it.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    models_dir: ModelsDir = None,
    as_json: AsJson = False,
) -> None:
    """Delete a model from this machine. Says what would go, and asks."""
    from mlx_manager.cli.remote import is_us

    config = configured(models_dir=models_dir)
    done = _rm_by_server(model, yes) if is_us(address(config.host, config.port)) else _rm_here(config, model, yes)
    if as_json:
        print_json(done)
    else:
        say(f"{model} is deleted; {size(done['freed_bytes'])} are free again.")


def _rm_by_server(model: str, yes: bool) -> dict[str, Any]:
    with asked(None) as server:
        told = server.deletion(model)
        _confirm(told, yes)
        return server.delete(model, told["confirmation"])


def _rm_here(config: "Config", model: str, yes: bool) -> dict[str, Any]:
    from mlx_manager.core.errors import MLXManagerError
    from mlx_manager.hub.deletion import Places, carry_out, plan

    places = Places.of(config)
    found = catalogue(config)
    wanted = found.find(model)
    if wanted is None:
        fail(f"There is no model '{model}' here. There is: {', '.join(one.id for one in found.models)}.")
    try:
        told = plan(wanted, places)
        _confirm(asdict(told), yes)
        return asdict(carry_out(wanted, places, told.confirmation))
    except MLXManagerError as error:
        fail(error.message, FAILED)


def _confirm(told: Mapping[str, Any], yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        fail("There is nobody to ask whether that is meant: --yes says so.", USAGE)
    what = "only the link" if told["is_link"] else f"{told['num_files']} files, {size(told['freed_bytes'])}"
    say(f"{told['folder']}: {what}")
    if not typer.confirm("Delete that?"):
        raise typer.Exit(FAILED)

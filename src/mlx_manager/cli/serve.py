"""`serve`: looks whether it can, says where it is, and runs the server until a signal."""
# ruff: noqa: PLC0415 - the server takes seconds to import: `--help` does without

import asyncio
import logging
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_manager.cli.configuration import AdaptersDir, ModelsDir, address, catalogue, configured, hub, is_starter
from mlx_manager.cli.terminal import FAILED, USAGE, fail, leave, say, warn

if TYPE_CHECKING:
    from mlx_manager.config import Config

NUM_NAMED = 5
"""Models that are named at the start; of more, only the number is told."""


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; beyond loopback MLX_MANAGER_API_KEY must be set.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one. [default: 10242]")] = None,
    data_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the database.")] = None,
    models_dir: ModelsDir = None,
    adapters_dir: AdaptersDir = None,
    lm_studio_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="LM Studio's folder of models. [default: where LM Studio keeps it]")
    ] = None,
    hub_endpoint: Annotated[str | None, typer.Option(metavar="URL", help="The Hub. [default: HF_ENDPOINT, or huggingface.co]")] = None,
    hub_timeout_s: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="The Hub must answer, or send more of a file, within this time. [default: 20]")
    ] = None,
    max_downloads: Annotated[int | None, typer.Option(metavar="N", help="Models downloaded at a time. [default: 2]")] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Another name that this server is called by; can be repeated.")
    ] = None,
    allowed_origin: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="A web origin that may call the API from a browser; can be repeated.")
    ] = None,
    remote_media_host: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="A host that pictures are fetched from; '*' is any; can be repeated.")
    ] = None,
    remote_media_http: Annotated[bool | None, typer.Option("--remote-media-http", help="Fetch pictures by plain http too.")] = None,
    max_concurrent_requests: Annotated[
        int | None, typer.Option(metavar="N", help="More than these at a time are answered 503. [default: 256]")
    ] = None,
    max_batch: Annotated[int | None, typer.Option(metavar="N", help="Sequences that one model decodes together. [default: 32]")] = None,
    prefill_budget: Annotated[
        int | None, typer.Option(metavar="N", help="Prompt tokens that a model computes at most between two decode steps. [default: 2048]")
    ] = None,
    step_ms: Annotated[float | None, typer.Option(metavar="MS", help="What a step aims at while replies run. [default: 40]")] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of all models together: 32GB, 80% or bytes. [default: most of the machine's]")
    ] = None,
    kv_cache_gib: Annotated[
        float | None, typer.Option(metavar="GIB", help="Memory of one model for keys and values. [default: a sixth of what is left]")
    ] = None,
    eviction: Annotated[str | None, typer.Option(metavar="POLICY", help="Who leaves for another model: lru or lfu. [default: lru]")] = None,
    when_full: Annotated[
        str | None, typer.Option(metavar="WHAT", help="What happens if nobody can leave: queue or refuse. [default: queue]")
    ] = None,
    memory_wait_s: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="How long a request waits for memory. [default: 120]")
    ] = None,
    keep_alive: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long a model stays that nobody uses: 5m, 0, or -1 for ever. [default: -1]")
    ] = None,
    preload: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="A model that is loaded at the start and stays; can be repeated.")
    ] = None,
    prefix_disk_gib: Annotated[
        float | None, typer.Option(metavar="GIB", help="Disk for prefixes that left memory, for each model. [default: 0]")
    ] = None,
    endpoint_priority: Annotated[
        list[str] | None, typer.Option(metavar="PATH=CLASS", help="high, normal or low for a path; can be repeated.")
    ] = None,
    ageing_s: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Waiting time that outweighs a class of priority. [default: 10]")
    ] = None,
    request_timeout_s: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="A reply that takes longer is ended with an error. [default: 3600]")
    ] = None,
    drain_s: Annotated[float | None, typer.Option(metavar="SECONDS", help="How long replies may go on after Ctrl-C. [default: 30]")] = None,
    log_level: Annotated[str | None, typer.Option(metavar="LEVEL", help="debug, info, warning or error. [default: info]")] = None,
) -> None:
    """Start the server. Ctrl-C lets replies finish; Ctrl-C again ends them.

    Every option but the API key, which other users of the machine would see, can be given as one; all can be given in the
    environment, as MLX_MANAGER_HOST, MLX_MANAGER_PORT and so on.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # also while it starts, and once the server has put its own handlers away
        signal.signal(number, _end)
    config = configured(
        host=host,
        port=port,
        data_dir=data_dir,
        models_dir=models_dir,
        adapters_dir=adapters_dir,
        lm_studio_dir=lm_studio_dir,
        hub_endpoint=hub_endpoint,
        hub_timeout_s=hub_timeout_s,
        max_downloads=max_downloads,
        allowed_hosts=allowed_host,
        allowed_origins=allowed_origin,
        remote_media_hosts=remote_media_host,
        remote_media_http=remote_media_http,
        max_concurrent_requests=max_concurrent_requests,
        max_batch=max_batch,
        prefill_budget=prefill_budget,
        step_ms=step_ms,
        max_memory=max_memory,
        kv_cache_gib=kv_cache_gib,
        eviction=eviction,
        when_full=when_full,
        memory_wait_s=memory_wait_s,
        keep_alive=keep_alive,
        preload=preload,
        prefix_disk_gib=prefix_disk_gib,
        endpoint_priority=endpoint_priority,
        ageing_s=ageing_s,
        request_timeout_s=request_timeout_s,
        drain_s=drain_s,
        log_level=log_level,
    )
    _check_exposure(config)
    _check_names(config)
    config = _on_a_free_port(config)
    _check_database(config)
    _greet(config)

    import logfire

    from mlx_manager import app

    code = 0
    try:
        app.serve(config)
    except SystemExit as end:  # of the signal that ended it, or of a start that failed and has been logged
        code = FAILED if end.code else 0
    logfire.shutdown(timeout_millis=5_000)
    leave(code)


def _end(_number: int, _frame: object) -> None:
    raise SystemExit(0)


def _check_exposure(config: "Config") -> None:
    if not config.is_loopback and config.api_key is None:
        fail(
            f"Not started: {config.host} can be reached from other machines, and there is no API key. "
            "Set MLX_MANAGER_API_KEY to a secret of your choice, or listen on 127.0.0.1.",
            USAGE,
        )


def _check_names(config: "Config") -> None:
    from mlx_manager.api.middleware import Authority, Origin
    from mlx_manager.gateway.remote_media import parse_entry

    for host in config.allowed_hosts:
        if Authority.parse(host) is None:
            fail(f"--allowed-host: '{host}' is not a name, or a name and a port: mac.local or nas:9000.", USAGE)
    for origin in config.allowed_origins:
        if Origin.parse(origin) is None:
            fail(f"--allowed-origin: '{origin}' is not a web origin such as https://chat.example.", USAGE)
    for host in config.remote_media_hosts:
        if parse_entry(host) is None:
            fail(f"--remote-media-host: '{host}' is not a host, a host and a port, or '*'.", USAGE)
    hub(config)  # ends the command if its address is none


def _on_a_free_port(config: "Config") -> "Config":
    """Port 0 becomes a port that is free now. A taken one ends the command with who has it."""
    from mlx_manager.cli.remote import is_us
    from mlx_manager.doctor import port_check

    url = address(config.host, config.port)
    if config.port == 0:
        family, kind, _, _, where = socket.getaddrinfo(config.host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(where)
            return config.model_copy(update={"port": probe.getsockname()[1]})
    check = port_check(config.host, config.port)
    if check.status == "ok":
        return config
    if is_us(url):
        fail(f"Not started: an MLX Manager is already running at {url}. Stop it, or choose another --port.")
    fail(f"Not started: {check.found}. To go on, {check.fix}.")


def _check_database(config: "Config") -> None:
    """Here, because inside the server a sentence would come out as the traceback of a failed start."""
    from mlx_manager.storage.database import Database, DatabaseUnusable

    async def open_once() -> None:
        database = Database(config.database_path)
        try:
            await database.open()
        finally:
            await database.close()

    logging.disable(logging.WARNING)  # the server says it again
    try:
        asyncio.run(open_once())
    except DatabaseUnusable as error:
        fail(f"Not started: the database cannot be used. {error}. Another --data-dir starts with an empty one.")
    finally:
        logging.disable(logging.NOTSET)


def _greet(config: "Config") -> None:
    from mlx_manager.hub.local import hub_cache_folder
    from mlx_manager.inference.blas import use_fast_blas

    models = [model for model in catalogue(config).models if model.kind == "text" and model.adapter is None]
    url = address(config.host, config.port)
    names = ", ".join(model.id for model in models[:NUM_NAMED]) + (" …" if len(models) > NUM_NAMED else "")
    say(f"MLX Manager at {url}")
    say(f"  {len(models)} model{'' if len(models) == 1 else 's'}{': ' if models else ''}{names}")
    if toy := next((model.id for model in models if is_starter(model)), None):
        say(f"  {toy} is a toy: it shows that everything works, and knows next to nothing")
    say(f"  More models: mlx-manager search and pull, folders in --models-dir, and what is in {hub_cache_folder()}")
    say(f"  How to connect an app: {url}/   What is running: mlx-manager status   Talk: mlx-manager run")
    if use_fast_blas().name == "reference" and _computes_on_cpu():
        warn("  MLX computes with its reference BLAS here, which is slow: mlx-manager doctor says what to do.")


def _computes_on_cpu() -> bool:
    import mlx.core as mx

    return mx.default_device() == mx.Device(mx.cpu)

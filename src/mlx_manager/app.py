"""The composition root: builds every long-lived object, connects them and mounts the routes."""

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware

from mlx_manager import telemetry
from mlx_manager.api import anthropic, embeddings, failures, openai, prefix, responses, system, tokens, web
from mlx_manager.api.dependencies import Services
from mlx_manager.api.manage import catalogue, downloads, hub_search, models, probe, profiles
from mlx_manager.api.middleware import ApiKey, BodyLimit, RequestId, SecurityHeaders, TrustedOrigin
from mlx_manager.api.server_protocol import ReceiptDeadlines
from mlx_manager.config import Config
from mlx_manager.core.errors import EngineFault
from mlx_manager.gateway.documents import Documents
from mlx_manager.gateway.gateway import Gateway
from mlx_manager.gateway.local import LocalBackend
from mlx_manager.gateway.remote_media import RemoteMedia
from mlx_manager.hub.checkpoint import Checkpoint
from mlx_manager.hub.client import Hub
from mlx_manager.hub.downloads import Downloads
from mlx_manager.hub.local import UnusableModel, all_models, hub_cache_folder
from mlx_manager.hub.search import Search
from mlx_manager.hub.store import DownloadStore
from mlx_manager.inference.blas import keep_freed_memory
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.families.detect import calls_and_thinks
from mlx_manager.inference.loader import EngineLimits, import_libraries, memory_limit
from mlx_manager.inference.pool import Pool, PoolPolicy
from mlx_manager.protocols.responses.history import History
from mlx_manager.protocols.seal import Seal
from mlx_manager.settings.findings import Findings
from mlx_manager.settings.store import Register
from mlx_manager.storage.database import Database
from mlx_manager.storage.key_file import read_or_make_key

log = logging.getLogger(__name__)


def build_services(config: Config, *, remembers_loads: bool = True) -> Services:
    """Everything that lives as long as the process; started by `running`. `remembers_loads`: what is being loaded is written down, so that
    a start after a crash knows."""
    device = Device()
    limits = EngineLimits(
        max_sequences=config.max_batch,
        prefill_budget=config.prefill_budget,
        step_s=config.step_ms / 1000,
        kv_bytes=config.kv_cache_bytes,
        disk_bytes=int(config.prefix_disk_gib * 2**30),
        disk_folder=config.prefix_dir,
        ageing_s=config.ageing_s,
        check_every=256 if config.log_level == "debug" else 0,
    )
    policy = PoolPolicy(
        eviction=config.eviction,
        when_full=config.when_full,
        keep_alive_s=config.keep_alive,
        memory_wait_s=config.memory_wait_s,
    )
    pool = Pool(
        device,
        _finder(config),
        limits,
        policy,
        limit=lambda: memory_limit(config.max_memory),
        marks_folder=config.load_marks_dir if remembers_loads else None,
    )
    media = RemoteMedia(config.remote_media_hosts, allows_http=config.remote_media_http)
    documents = Documents()
    metrics = telemetry.Metrics(pool.engines, [telemetry.PoolCollector(pool)])
    database = Database(config.database_path)
    register = Register(database)
    gateway = Gateway(
        LocalBackend(pool, media, documents),
        max_requests=config.max_concurrent_requests,
        names=lambda: register.names,
        listeners=(metrics.record, telemetry.trace_exchange),
    )
    seal = Seal(lambda: read_or_make_key(config.reasoning_key_path))
    hub = Hub.of(config.hub_endpoint, timeout_s=config.hub_timeout_s)

    async def on_download(model: str) -> None:
        await pool.refresh()

    return Services(
        config=config,
        device=device,
        pool=pool,
        media=media,
        documents=documents,
        gateway=gateway,
        database=database,
        register=register,
        findings=Findings(database),
        metrics=metrics,
        seal=seal,
        responses=History(time.monotonic),
        hub=hub,
        search=Search(hub, calls_and_thinks),
        downloads=Downloads(hub, DownloadStore(database), hub_cache_folder(), at_once=config.max_downloads, on_done=on_download),
    )


def _finder(config: Config) -> Callable[[], list[Checkpoint]]:
    """Looks for models; an adapter that cannot be used is told of once, since nobody who asks for it is told why."""
    told: set[UnusableModel] = set()

    def find() -> list[Checkpoint]:
        found = all_models(config)
        for broken in found.unusable:
            if broken.is_adapter and broken not in told:
                told.add(broken)
                log.warning("the adapter %s cannot be used: %s", broken.id, broken.reason)
        return list(found.models)

    return find


@asynccontextmanager
async def running(services: Services) -> AsyncGenerator[Services]:
    """Starts what has to be started, and ends it in the opposite order."""
    await services.database.open()
    await services.register.open()
    await services.findings.open()
    await asyncio.to_thread(services.seal.prepare)
    services.device.start()
    await services.downloads.open()
    importing = asyncio.create_task(asyncio.to_thread(import_libraries))  # ahead of the first request, which would wait for it
    watching = asyncio.create_task(services.pool.watch())
    preloading = asyncio.create_task(services.pool.preload(services.config.preload))
    try:
        yield services
    finally:
        for task in (watching, preloading):
            task.cancel()
        await asyncio.gather(importing, watching, preloading, return_exceptions=True)
        await services.downloads.close()
        await services.search.close()
        await services.hub.close()
        await services.pool.close()
        await asyncio.to_thread(services.device.stop)
        await services.database.close()


def build(config: Config) -> FastAPI:
    """The application: one process, one port."""
    return application(build_services(config))


def application(services: Services) -> FastAPI:
    """The routes and what stands before them, with these services behind."""
    config = services.config

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with running(services):
            yield

    key = config.api_key.get_secret_value() if config.api_key else None
    app = FastAPI(
        title="MLX Manager",
        lifespan=lifespan,
        docs_url=None,  # its page fetches scripts from elsewhere
        redoc_url=None,
        # Its log records of failures have messages, which quote what a client sent, and its spans have an operation for each step.
        telemetry={"logs": False, "operation_spans": False},
        redirect_slashes=False,  # a redirected POST loses its body or its credentials
        strict_content_type=False,
        middleware=[
            Middleware(RequestId),
            Middleware(SecurityHeaders),
            Middleware(TrustedOrigin, allowed_hosts=config.allowed_hosts, allowed_origins=config.allowed_origins),
            Middleware(ApiKey, key=key),
            Middleware(BodyLimit),
        ],
    )
    app.state.services = services
    failures.install(app)
    app.include_router(openai.router)
    app.include_router(anthropic.router)
    app.include_router(embeddings.router)
    app.include_router(tokens.router)
    app.include_router(responses.router)
    app.include_router(prefix.router)
    app.include_router(profiles.router)
    app.include_router(probe.router)
    app.include_router(hub_search.router)
    app.include_router(downloads.router)
    app.include_router(catalogue.router)
    app.include_router(system.router)
    app.include_router(models.router)
    app.include_router(web.router)
    return app


class Server(uvicorn.Server):
    """A server that lets replies finish: on a signal it takes no more requests, waits `drain_s`, and ends what is left with an
    error that its client can read."""

    def __init__(self, app: FastAPI, config: Config) -> None:
        self._services: Services = app.state.services
        self._drain_s = config.drain_s
        self._draining: asyncio.Task[None] | None = None
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                http=ReceiptDeadlines,
                ws="none",
                proxy_headers=False,  # any local process could say who it is
                loop="uvloop",
                log_level=config.log_level,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=int(config.drain_s) + 5,
                server_header=False,
                date_header=False,
                lifespan="on",
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None and not self._draining.done():
            self._draining.get_loop().call_soon_threadsafe(self._draining.cancel)  # the second signal: no more waiting
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._services.downloads.end_watching()
        self._draining = asyncio.create_task(self._drain())
        await super().shutdown(sockets)

    async def _drain(self) -> None:
        if self._services.gateway.num_in_flight:
            log.info("waiting up to %g s for %d replies; Ctrl-C again ends them", self._drain_s, self._services.gateway.num_in_flight)
        try:
            async with asyncio.timeout(self._drain_s):
                await self._services.gateway.drain()
        except (TimeoutError, asyncio.CancelledError):
            self._services.pool.abort(EngineFault("The server is shutting down."))


# How long the event loop and the device thread keep the interpreter from each other: a step of a small model takes a few milliseconds.
_SWITCH_INTERVAL_S = 0.001


def serve(config: Config) -> None:
    """Runs until a signal."""
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of every start that it did nothing
    for name in ("httpx2", "httpcore2"):  # they write addresses down, and some of these are secrets
        logging.getLogger(name).setLevel(logging.WARNING)
    if telemetry.has_destination(os.environ):
        telemetry.configure_logfire()
    keep_freed_memory()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    Server(build(config), config).run()

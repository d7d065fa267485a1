"""How the server is: health, readiness, version, metrics, and what is running."""

from importlib.metadata import version

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from mlx_manager.api.dependencies import ServicesDep
from mlx_manager.inference.engine.engine import CacheState
from mlx_manager.inference.entry import State
from mlx_manager.inference.pool import ModelStatus

router = APIRouter(tags=["System"])


class KVCache(BaseModel):
    """How a loaded model keeps keys and values: `kind` (paged, slots, slots gathered, single), blocks of 32 tokens that sequences hold, and
    that are kept for whoever comes with the same prefix; `allocated_bytes` of memory, `disk_bytes` and `disk_blocks` on the disk."""

    kind: str
    block_bytes: int
    num_blocks: int
    num_held: int
    num_cached: int
    allocated_bytes: int
    disk_blocks: int
    disk_bytes: int

    @classmethod
    def of(cls, state: CacheState) -> "KVCache":
        return cls(
            kind=state.kind,
            block_bytes=state.block_bytes,
            num_blocks=state.num_blocks,
            num_held=state.num_held,
            num_cached=state.num_cached,
            allocated_bytes=state.allocated_bytes,
            disk_blocks=state.disk.blocks if state.disk else 0,
            disk_bytes=state.disk.bytes if state.disk else 0,
        )


class ModelState(BaseModel):
    """`size_bytes` is that of the weights on disk; `load_s` how long the last load took, in seconds."""

    id: str
    kind: str
    architecture: str
    context_length: int | None
    size_bytes: int
    num_parameters: int
    quantization_bits: int | None
    state: State
    error: str | None
    load_s: float | None
    num_running: int
    num_waiting: int
    kv_cache: KVCache | None

    @classmethod
    def of(cls, status: ModelStatus) -> "ModelState":
        c = status.checkpoint
        return cls(
            id=c.id,
            kind=c.kind,
            architecture=c.architecture,
            context_length=c.context_length,
            size_bytes=c.size_bytes,
            num_parameters=c.num_parameters,
            quantization_bits=c.quantization_bits,
            state=status.state,
            error=status.error,
            load_s=status.load_s,
            num_running=status.num_running,
            num_waiting=status.num_waiting,
            kv_cache=KVCache.of(status.cache) if status.cache else None,
        )


class ServerStatus(BaseModel):
    version: str
    draining: bool
    num_in_flight: int
    models: list[ModelState]


@router.get("/health")
async def health() -> dict[str, str]:
    """The process answers. Nothing else is looked at."""
    return {"status": "ok"}


@router.get("/health/ready")
async def ready(services: ServicesDep) -> JSONResponse:
    """200 if new requests are served, else 503 with the reason."""
    if services.gateway.is_draining:
        return JSONResponse({"status": "draining"}, 503)
    if not services.device.is_alive:
        return JSONResponse({"status": "engine down"}, 503)
    if services.pool.is_preloading:
        return JSONResponse({"status": "loading"}, 503)
    return JSONResponse({"status": "ready"})


@router.get("/version")
async def get_version() -> dict[str, str]:
    return {"version": version("mlx-manager")}


@router.get("/metrics")
async def metrics(services: ServicesDep) -> Response:
    """Prometheus text format."""
    return Response(services.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/api/status")
async def status(services: ServicesDep) -> ServerStatus:
    """What is running: every model with its state, and the requests under way."""
    await services.pool.refresh()
    return ServerStatus(
        version=version("mlx-manager"),
        draining=services.gateway.is_draining,
        num_in_flight=services.gateway.num_in_flight,
        models=[ModelState.of(s) for s in services.pool.statuses()],
    )

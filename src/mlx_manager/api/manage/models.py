"""The models in memory: load one and watch it, unload it, pin it, say how long it stays, and see who takes what."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from mlx_manager.api import sse
from mlx_manager.api.answer import documented_body
from mlx_manager.api.dependencies import ServicesDep
from mlx_manager.api.failures import failure
from mlx_manager.config import parse_duration
from mlx_manager.core.errors import InvalidField
from mlx_manager.inference.entry import Phase, State
from mlx_manager.inference.memory import Fit, Relief, Verdict
from mlx_manager.inference.pool import MemoryStatus, ModelStatus, Pool
from mlx_manager.protocols.body import read_json_object

router = APIRouter(tags=["Models"])

_LOOK_S = 0.1


class Memory(BaseModel):
    """In bytes. `weights`, `adapters`, `kv` and `prefill` are what the loaded models may take, together `taken` of `limit`; `in_use` is
    what they take now, `kv_in_use` of it for keys and values, and `cached` what is held for reuse. Null: not measured yet. `relief`: what
    is done because there is little left."""

    limit: int | None
    taken: int
    weights: int
    adapters: int
    kv: int
    prefill: int
    kv_in_use: int
    in_use: int | None
    cached: int | None
    relief: list[Relief]

    @classmethod
    def of(cls, memory: MemoryStatus) -> "Memory":
        return cls(
            limit=memory.limit,
            taken=memory.taken,
            weights=memory.weights,
            adapters=memory.adapters,
            kv=memory.kv,
            prefill=memory.prefill,
            kv_in_use=memory.kv_in_use,
            in_use=memory.in_use,
            cached=memory.cached,
            relief=list(memory.relief),
        )


class ModelMemory(BaseModel):
    """What one model may take, in bytes, and what its keys and values take now. Its weights may be those of others as well."""

    weights: int
    adapter: int
    kv: int
    prefill: int
    kv_in_use: int


class ModelFit(BaseModel):
    """Whether a model would fit all by itself, with the sum, in bytes: `needed` of `limit`. `tight`: hardly anything is left, or `kv` is
    less than a prompt of the whole context takes (`kv_for_context`; null where it is not known)."""

    verdict: Verdict
    limit: int
    needed: int
    weights: int
    adapter: int
    kv: int
    prefill: int
    kv_for_context: int | None

    @classmethod
    def of(cls, fit: Fit) -> "ModelFit":
        return cls(
            verdict=fit.verdict,
            limit=fit.limit,
            needed=fit.need.total,
            weights=fit.need.weights,
            adapter=fit.need.adapter,
            kv=fit.need.kv,
            prefill=fit.need.prefill,
            kv_for_context=fit.kv_for_context,
        )


class PooledModel(BaseModel):
    """`memory` is null while it takes none. `busy`: how many requests have it now. `last_used` and `expires_at` are Unix times;
    `keep_alive_s` null: it never expires."""

    id: str
    kind: str
    state: State
    phase: Phase | None
    error: str | None
    load_s: float | None
    size_bytes: int
    context_length: int | None
    fit: ModelFit | None
    memory: ModelMemory | None
    pinned: bool
    busy: int
    uses: int
    last_used: float | None
    keep_alive_s: float | None
    expires_at: float | None

    @classmethod
    def of(cls, status: ModelStatus) -> "PooledModel":
        now, need = time.time(), status.need
        return cls(
            id=status.checkpoint.id,
            kind=status.checkpoint.kind,
            state=status.state,
            phase=status.phase,
            error=status.error,
            load_s=status.load_s,
            size_bytes=status.checkpoint.size_bytes,
            context_length=status.checkpoint.context_length,
            fit=None if status.fit is None else ModelFit.of(status.fit),
            memory=None
            if need is None
            else ModelMemory(
                weights=need.weights,
                adapter=need.adapter,
                kv=need.kv,
                prefill=need.prefill,
                kv_in_use=0 if status.cache is None else status.cache.allocated_bytes,
            ),
            pinned=status.pinned,
            busy=status.num_lent,
            uses=status.num_uses,
            last_used=None if status.idle_s is None else now - status.idle_s,
            keep_alive_s=status.keep_alive_s,
            expires_at=None if status.expires_in_s is None else now + status.expires_in_s,
        )


class PoolState(BaseModel):
    memory: Memory
    models: list[PooledModel]


class ModelOptions(BaseModel):
    """`keep_alive`: a time such as `5m`, seconds, -1 for ever, or null for what the server is set to. What is absent stays as it is."""

    pinned: bool | None = None
    keep_alive: str | float | None = None


@router.get("/api/models")
async def models(services: ServicesDep) -> PoolState:
    """Every model with what it takes, and what all of them take of the limit."""
    await services.pool.refresh()
    await services.pool.limit()
    return PoolState(memory=Memory.of(services.pool.memory()), models=[PooledModel.of(s) for s in services.pool.statuses()])


@router.patch("/api/models/{model_id:path}", openapi_extra=documented_body(ModelOptions))
async def configure(model_id: str, request: Request, services: ServicesDep) -> PooledModel:
    """Pins a model or lets it go again, and says how long it stays when nobody uses it. Loads nothing."""
    await _configure(services.pool, model_id, await request.body())
    return PooledModel.of(services.pool.status(model_id))


@router.post("/api/models/{model_id:path}/load", openapi_extra=documented_body(ModelOptions))
async def load(model_id: str, request: Request, services: ServicesDep) -> Response:
    """Loads a model and tells how far it is, as events: `progress` with the phase (`queued`, `evicting`, `loading`), then `ready` or
    `failed`. The load goes on if the client leaves, once it has begun."""
    await _configure(services.pool, model_id, await request.body())
    return sse.EventStream(_progress(services.pool, model_id, request.url.path))


@router.post("/api/models/{model_id:path}/unload")
async def unload(model_id: str, request: Request, services: ServicesDep) -> PooledModel:
    """Unloads a model, after the replies that it is writing; whoever wants it meanwhile waits, and it is loaded anew."""
    await sse.until_disconnect(request.receive, services.pool.unload(model_id))
    return PooledModel.of(services.pool.status(model_id))


async def _configure(pool: Pool, model_id: str, body: bytes) -> None:
    """Raises `InvalidField`, and `ModelNotFound`."""
    said = read_json_object(body) if body.strip() else {}
    for name in said:
        if name not in ModelOptions.model_fields:
            raise InvalidField(f"There is no field '{name}'; there are: {', '.join(ModelOptions.model_fields)}.", param=f"/{name}")
    pinned: Any = said.get("pinned")
    if not (pinned is None or isinstance(pinned, bool)):
        raise InvalidField("'pinned' is true or false.", param="/pinned")
    keep_alive_s = _keep_alive(said["keep_alive"]) if "keep_alive" in said else "same"
    await pool.configure(model_id, pinned=pinned, keep_alive_s=keep_alive_s)


def _keep_alive(said: Any) -> float | Literal["default"] | None:
    match said:
        case None:
            return "default"
        case str():
            try:
                return parse_duration(said)
            except ValueError as error:
                raise InvalidField(f"'keep_alive': {error}.", param="/keep_alive") from None
        case int() | float() if not isinstance(said, bool):
            return None if said < 0 else float(said)
        case _:
            raise InvalidField("'keep_alive' is a time such as '5m', a number of seconds, -1 or null.", param="/keep_alive")


async def _progress(pool: Pool, model_id: str, path: str) -> AsyncGenerator[bytes]:
    loading = asyncio.create_task(pool.load(model_id))
    told: dict[str, Any] | None = None
    try:
        while not loading.done():
            await asyncio.wait({loading}, timeout=0 if told is None else _LOOK_S)
            now = _far(pool.status(model_id))
            if now != told and not loading.done():
                told = now
                yield _event("progress", now)
        loading.result()
    except Exception as error:  # noqa: BLE001 - the status is out: whatever it is, the client is told in-band
        f = failure(error, path)
        yield _event("failed", {"model": model_id, "status": f.status, "code": f.code, "detail": f.message})
    else:
        yield _event("ready", PooledModel.of(pool.status(model_id)).model_dump())
    finally:
        loading.cancel()
        await asyncio.wait({loading})


def _far(status: ModelStatus) -> dict[str, Any]:
    """How far a load is."""
    told: dict[str, Any] = {"model": status.checkpoint.id, "phase": status.phase}
    if status.phase == "loading":
        told |= {"read_bytes": status.read_bytes, "total_bytes": status.checkpoint.size_bytes}
    if status.phase == "queued" and status.no_room is not None:
        told |= {"needed_bytes": status.no_room.needed, "available_bytes": status.no_room.available}
    return told


def _event(name: str, value: dict[str, Any]) -> bytes:
    return sse.event(name, json.dumps(value, separators=(",", ":")).encode())

"""Asking a model what it can do, and keeping what came of it."""

import asyncio
import time

from fastapi import APIRouter, Request

from mlx_manager.api import sse
from mlx_manager.api.abilities import AbilitiesView, abilities_of
from mlx_manager.api.dependencies import Services, ServicesDep
from mlx_manager.core.capabilities import Finding
from mlx_manager.core.errors import Conflict
from mlx_manager.core.requests import GenerationRequest
from mlx_manager.gateway.probe import probe as ask
from mlx_manager.hub.fingerprint import files_fingerprint
from mlx_manager.settings.findings import Found

router = APIRouter(tags=["Models"])


@router.post("/api/models/{model_id:path}/probe")
async def probe(model_id: str, request: Request, services: ServicesDep) -> AbilitiesView:
    """Asks the model for a tool call, a thought and what it sees in a picture, and keeps the answers. Loads it if need be; a profile or an
    alias is that of its model."""
    return await sse.until_disconnect(request.receive, _probe(services, services.register.names.resolve(model_id).model))


async def _probe(services: Services, model: str) -> AbilitiesView:
    await services.pool.dialect(model)  # raises for one that is not here, or that does not write
    if model in services.probing:
        raise Conflict(f"The model '{model}' is being probed already.", param=None)
    services.probing.add(model)
    try:
        checkpoint = next(status.checkpoint for status in services.pool.statuses() if status.checkpoint.id == model)
        fingerprint = await asyncio.to_thread(files_fingerprint, checkpoint)
        asking = GenerationRequest(model, (), priority="low", timeout_s=services.config.request_timeout_s)
        answers = await ask(services.gateway.stream, asking)
        now = int(time.time())
        found: Found = {c: Finding(a.verified, a.detail, fingerprint, now) for c, a in answers.items()}
        await asyncio.shield(services.findings.keep(model, found))  # whoever leaves now leaves something whole behind
    finally:
        services.probing.discard(model)
    return (await abilities_of(services, [checkpoint]))[model]

"""`/v1` as OpenAI clients know it."""

import secrets
import time
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from mlx_manager.api.answer import answer, documented_body
from mlx_manager.api.dependencies import ServicesDep
from mlx_manager.core.errors import ModelNotFound
from mlx_manager.hub.checkpoint import Kind
from mlx_manager.inference.pool import ModelStatus
from mlx_manager.protocols.openai import schema
from mlx_manager.protocols.openai.requests import read_chat, read_completion
from mlx_manager.protocols.openai.responses import ChatWriter, CompletionWriter

router = APIRouter(tags=["OpenAI"])

# Not `capabilities`: Anthropic has an object of that name.
_FEATURES: dict[Kind, list[str]] = {
    "text": ["chat", "completions"],
    "embedding": ["embeddings", "rerank"],
    "reranker": ["rerank"],
    "vision": ["chat", "completions", "images"],
}
_FINGERPRINT = f"mlx-manager-{version('mlx-manager')}"


@router.post("/v1/chat/completions", openapi_extra=documented_body(schema.ChatRequest))
async def chat_completions(request: Request, services: ServicesDep) -> Response:
    """A reply to a conversation, whole or streamed."""
    wanted = read_chat(await request.body())
    writer = ChatWriter(
        id=f"chatcmpl-{secrets.token_urlsafe(18)}",
        model=wanted.request.model,
        created=int(time.time()),
        fingerprint=_FINGERPRINT,
        num_choices=wanted.request.num_replies,
        include_usage=wanted.include_usage,
    )
    return await answer(request, services, wanted, writer)


@router.post("/v1/completions", openapi_extra=documented_body(schema.CompletionRequest))
async def completions(request: Request, services: ServicesDep) -> Response:
    """What follows a raw prompt, or each of several, whole or streamed."""
    wanted = read_completion(await request.body())
    writer = CompletionWriter(
        id=f"cmpl-{secrets.token_urlsafe(18)}",
        model=wanted.request.model,
        created=int(time.time()),
        fingerprint=_FINGERPRINT,
        num_replies=wanted.request.num_replies,
        echo=wanted.echo,
        include_usage=wanted.include_usage,
    )
    return await answer(request, services, wanted, writer)


@router.get("/v1/models")
async def models(services: ServicesDep) -> JSONResponse:
    """Every model that can be asked, loaded or not."""
    await services.pool.refresh()
    entries = [_model(status) for status in services.pool.statuses()]
    ids = [entry["id"] for entry in entries]
    return JSONResponse(
        {"object": "list", "data": entries, "has_more": False, "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
    )


@router.get("/v1/models/{model_id:path}")
async def model(model_id: str, services: ServicesDep) -> JSONResponse:
    """One model."""
    await services.pool.refresh()
    statuses = {status.checkpoint.id: status for status in services.pool.statuses()}
    if model_id not in statuses:
        raise ModelNotFound(model_id, sorted(statuses))
    return JSONResponse(_model(statuses[model_id]))


def _model(status: ModelStatus) -> dict[str, Any]:
    """An entry that satisfies the SDKs of both vendors. One with an adapter says on what."""
    checkpoint = status.checkpoint
    adapter = checkpoint.adapter
    created = datetime.fromtimestamp(checkpoint.created, UTC)
    return {
        "id": checkpoint.id,
        "object": "model",
        "created": checkpoint.created,
        "owned_by": checkpoint.id.split("/")[0] if "/" in checkpoint.id else "local",
        "type": "model",
        "display_name": checkpoint.id,
        "created_at": created.isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": checkpoint.context_length,
        "max_tokens": checkpoint.context_length,
        "context_length": checkpoint.context_length,
        "state": status.state,
        "kind": checkpoint.kind,
        "features": _FEATURES[checkpoint.kind],
    } | ({} if adapter is None else {"base": checkpoint.base_id, "adapter": adapter.name})

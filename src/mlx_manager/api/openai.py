"""`/v1` as OpenAI clients know it."""

import secrets
import time
from datetime import UTC, datetime
from importlib.metadata import version

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from mlx_manager.api.abilities import AbilitiesView, abilities_of
from mlx_manager.api.answer import answer, documented_body
from mlx_manager.api.dependencies import Services, ServicesDep
from mlx_manager.core.errors import ModelNotFound
from mlx_manager.hub.checkpoint import Kind
from mlx_manager.inference.pool import ModelStatus
from mlx_manager.protocols.openai import schema
from mlx_manager.protocols.openai.requests import read_chat, read_completion
from mlx_manager.protocols.openai.responses import ChatWriter, CompletionWriter
from mlx_manager.protocols.wire import Json
from mlx_manager.settings.profiles import Profile

router = APIRouter(tags=["OpenAI"])

# Neither these nor `abilities` are called `capabilities`: Anthropic has an object of that name.
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
        custom_tools=wanted.custom_tools,
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
    """Every name that can be asked for: models, loaded or not, profiles and aliases."""
    entries = await _entries(services)
    ids = list(entries)
    return JSONResponse(
        {
            "object": "list",
            "data": list(entries.values()),
            "has_more": False,
            "first_id": ids[0] if ids else None,
            "last_id": ids[-1] if ids else None,
        }
    )


@router.get("/v1/models/{model_id:path}")
async def model(model_id: str, services: ServicesDep) -> JSONResponse:
    """One model, profile or alias."""
    entries = await _entries(services)
    if model_id not in entries:
        raise ModelNotFound(model_id, list(entries))
    return JSONResponse(entries[model_id])


async def _entries(services: Services) -> dict[str, Json]:
    """By id. A profile or an alias whose model is not here cannot be asked for, and is left out."""
    await services.pool.refresh()
    statuses = services.pool.statuses()
    abilities = await abilities_of(services, [status.checkpoint for status in statuses])
    names = services.register.names
    models = {s.checkpoint.id: _model(s, abilities.get(s.checkpoint.id)) for s in statuses}
    asked = models | {id: _preset(models[p.target], p) for id, p in names.profiles.items() if p.target in models}
    aliased = {
        name: asked[a.target] | {"id": name, "display_name": name, "alias_of": a.target}
        for name, a in names.aliases.items()
        if a.target in asked
    }
    return dict(sorted((asked | aliased).items()))


def _preset(model: Json, profile: Profile) -> Json:
    """The entry of a profile, from that of its model."""
    limits = [limit for limit in (model["max_input_tokens"], profile.context_limit) if limit is not None]
    limit = min(limits, default=None)
    said = {"base": profile.model, "profile": profile.name, "description": profile.description}
    return model | {"id": profile.id, "display_name": profile.id, "max_input_tokens": limit, "max_tokens": limit} | said


def _model(status: ModelStatus, abilities: AbilitiesView | None) -> Json:
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
        "abilities": None if abilities is None else abilities.model_dump(),
    } | ({} if adapter is None else {"base": checkpoint.base_id, "adapter": adapter.name})

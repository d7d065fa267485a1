"""`/v1` as OpenAI clients know it."""

import json
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from mlx_manager.api.dependencies import Services, ServicesDep
from mlx_manager.api.failures import failure
from mlx_manager.api.sse import DONE, KEEP_ALIVE, EventStream, data, until_disconnect
from mlx_manager.config import Config
from mlx_manager.core.errors import ModelNotFound
from mlx_manager.core.events import Event, Reply, Started, collect
from mlx_manager.core.requests import GenerationRequest
from mlx_manager.gateway.gateway import Gateway
from mlx_manager.inference.pool import ModelStatus
from mlx_manager.protocols.fields import ignored_header
from mlx_manager.protocols.openai import schema
from mlx_manager.protocols.openai.requests import Wanted, read_chat, read_completion
from mlx_manager.protocols.openai.responses import ChatWriter, CompletionWriter, Writer

router = APIRouter(tags=["OpenAI"])

_FINGERPRINT = f"mlx-manager-{version('mlx-manager')}"


def _body(model: type[schema.Sampling]) -> dict[str, Any]:
    """The documented body. It is read by `protocols`, which knows the dialect's errors, and not by the framework."""
    document = model.model_json_schema()
    content = {"application/json": {"schema": _inlined(document, document.pop("$defs", {}))}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(value: Any, definitions: dict[str, Any]) -> Any:
    """A JSON Schema without references: inside an OpenAPI document they would point elsewhere."""
    match value:
        case {"$ref": str(reference)}:
            return _inlined(definitions[reference.rsplit("/", 1)[-1]], definitions)
        case dict():
            return {key: _inlined(inner, definitions) for key, inner in value.items()}  # pyright: ignore[reportUnknownVariableType]
        case list():
            return [_inlined(inner, definitions) for inner in value]  # pyright: ignore[reportUnknownVariableType]
        case _:
            return value


@router.post("/v1/chat/completions", openapi_extra=_body(schema.ChatRequest))
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
    return await _answer(request, services, wanted, writer)


@router.post("/v1/completions", openapi_extra=_body(schema.CompletionRequest))
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
    return await _answer(request, services, wanted, writer)


async def _answer(request: Request, services: Services, wanted: Wanted, writer: Writer) -> Response:
    gateway, generation = services.gateway, _as_served(request, services.config, wanted.request)
    if not wanted.stream:
        reply = await until_disconnect(request.receive, _collect(gateway, generation))
        return _json(writer.whole(reply), _headers(wanted, reply.unused_options))
    opening: list[Started] = []
    frames = _frames(gateway.stream(generation), writer, opening)
    # What can be refused is refused with a status; the reply is opened before anything slow begins.
    await until_disconnect(request.receive, _open(frames))
    return EventStream(frames, headers=_headers(wanted, opening[0].unused_options))


def _as_served(request: Request, config: Config, generation: GenerationRequest) -> GenerationRequest:
    """With what the server decides and no client can say."""
    return replace(
        generation,
        priority=config.priority_of(request.url.path),
        client=request.client.host if request.client else "",
        timeout_s=config.request_timeout_s,
    )


def _headers(wanted: Wanted, unused_options: tuple[str, ...]) -> dict[str, str]:
    headers = {"x-backend": "local"}
    if ignored := wanted.without_effect(unused_options):
        headers["x-ignored-fields"] = ignored_header(ignored)
    return headers


async def _collect(gateway: Gateway, request: GenerationRequest) -> Reply:
    async with aclosing(gateway.stream(request)) as events:
        return await collect(events, len(request.prompts) * request.num_replies)


async def _open(frames: AsyncGenerator[bytes]) -> None:
    await anext(frames)


async def _frames(events: AsyncGenerator[Event], writer: Writer, opening: list[Started]) -> AsyncGenerator[bytes]:
    """The stream as bytes, ending in `[DONE]` or in one error. The first item is empty: once it is there, `opening` holds how the
    reply began, nothing can be refused with a status any more, and closing this closes `events`."""
    async with aclosing(events):
        started = await anext(events)
        assert isinstance(started, Started), "every stream begins so"
        opening.append(started)
        yield b""
        try:
            yield b"".join(_frame(chunk) for chunk in writer.chunks(started)) or KEEP_ALIVE
            async for event in events:
                for chunk in writer.chunks(event):
                    yield _frame(chunk)
        except Exception as error:  # noqa: BLE001 - the status is out: whatever it is, the client is told in-band
            yield _frame({"error": failure(error).openai})
        else:
            yield DONE


def _frame(chunk: dict[str, Any]) -> bytes:
    # ASCII: some clients cut lines at U+2028, which JSON allows in a string.
    return data(json.dumps(chunk, separators=(",", ":")).encode())


def _json(content: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content, ensure_ascii=False, separators=(",", ":")), media_type="application/json", headers=headers)


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
    """An entry that satisfies the SDKs of both vendors."""
    checkpoint = status.checkpoint
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
        "state": status.state,
    }

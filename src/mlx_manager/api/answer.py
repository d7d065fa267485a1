"""One way from a request that was read to a reply on the wire, whole or streamed, whatever the protocol."""

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from mlx_manager.api import sse
from mlx_manager.api.dependencies import Services
from mlx_manager.api.failures import failure
from mlx_manager.config import Config
from mlx_manager.core.events import Event, Reply, Started, collect
from mlx_manager.core.requests import GenerationRequest, ReasoningOption
from mlx_manager.gateway.gateway import Gateway
from mlx_manager.protocols.fields import ignored_header
from mlx_manager.protocols.wire import Frame, Json, Wanted, Writer


async def answer(request: Request, services: Services, wanted: Wanted, writer: Writer) -> Response:
    """Raises `core.errors` while nothing is on the wire yet."""
    gateway, generation = services.gateway, as_served(request, services.config, wanted.request)
    if not wanted.stream:
        reply = await sse.until_disconnect(request.receive, _collect(gateway, generation))
        return json_reply(writer.whole(reply), headers_of(wanted, reply.unused))
    opening: list[Started] = []
    frames = _frames(gateway.stream(generation), writer, opening, request.url.path)
    # What can be refused is refused with a status; the reply is opened before anything slow begins.
    await sse.until_disconnect(request.receive, _open(frames))
    return sse.EventStream(frames, keep_alive=lambda: frame_bytes(writer.keep_alive()), headers=headers_of(wanted, opening[0].unused))


def as_served(request: Request, config: Config, generation: GenerationRequest) -> GenerationRequest:
    """With what the server decides and no client can say."""
    return replace(
        generation,
        priority=config.priority_of(request.url.path),
        client=client_of(request),
        timeout_s=config.request_timeout_s,
    )


def client_of(request: Request) -> str:
    """Who asks, as far as the server can tell them apart."""
    return request.client.host if request.client else ""


def headers_of(wanted: Wanted, unused: tuple[ReasoningOption, ...] = ()) -> dict[str, str]:
    """The headers of a reply."""
    headers = {"x-backend": "local"}
    if ignored := wanted.without_effect(unused):
        headers["x-ignored-fields"] = ignored_header(ignored)
    return headers


async def _collect(gateway: Gateway, request: GenerationRequest) -> Reply:
    async with aclosing(gateway.stream(request)) as events:
        return await collect(events, len(request.prompts) * request.num_replies)


async def _open(frames: AsyncGenerator[bytes]) -> None:
    await anext(frames)


async def _frames(events: AsyncGenerator[Event], writer: Writer, opening: list[Started], path: str) -> AsyncGenerator[bytes]:
    """The stream as bytes. The first item is empty: once it is there, `opening` holds how the reply began, nothing can be refused with
    a status any more, and closing this closes `events`."""
    async with aclosing(events):
        started = await anext(events)
        assert isinstance(started, Started), "every stream begins so"
        opening.append(started)
        yield b""
        try:
            yield b"".join(map(frame_bytes, writer.frames(started)))
            async for event in events:
                for frame in writer.frames(event):
                    yield frame_bytes(frame)
        except Exception as error:  # noqa: BLE001 - the status is out: whatever it is, the client is told in-band
            for frame in writer.failed(failure(error, path)):
                yield frame_bytes(frame)


def event_stream(frames: Sequence[Frame], headers: dict[str, str]) -> Response:
    """A stream of what is known already."""

    async def content() -> AsyncGenerator[bytes]:
        for frame in frames:
            yield frame_bytes(frame)

    return sse.EventStream(content(), headers=headers)


def frame_bytes(frame: Frame) -> bytes:
    if frame.data is None:
        return sse.KEEP_ALIVE
    # ASCII: some clients cut lines at U+2028, which JSON allows in a string.
    content = frame.data if isinstance(frame.data, str) else json.dumps(frame.data, separators=(",", ":"))
    return sse.data(content.encode()) if frame.event is None else sse.event(frame.event, content.encode())


def json_reply(content: Json, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content, ensure_ascii=False, separators=(",", ":")), media_type="application/json", headers=headers)


def documented_body(model: type[BaseModel]) -> dict[str, Any]:
    """For `openapi_extra`: a body that is read by `protocols`, which knows the dialect's errors, and not by the framework."""
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

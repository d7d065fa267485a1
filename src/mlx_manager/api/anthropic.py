"""`/v1/messages` as Anthropic clients know it. What they say of versions and betas is accepted: what is built needs no switch."""

import secrets

from fastapi import APIRouter, Request
from starlette.responses import Response

from mlx_manager.api.answer import answer, documented_body, headers_of, json_reply
from mlx_manager.api.dependencies import ServicesDep
from mlx_manager.core.errors import ContextTooLong
from mlx_manager.gateway.local import prepare
from mlx_manager.protocols.anthropic import schema
from mlx_manager.protocols.anthropic.requests import read_count_tokens, read_messages
from mlx_manager.protocols.anthropic.responses import MessagesWriter

router = APIRouter(tags=["Anthropic"])


@router.post("/v1/messages", openapi_extra=documented_body(schema.MessagesRequest))
async def messages(request: Request, services: ServicesDep) -> Response:
    """A reply to a conversation, whole or streamed."""
    wanted = read_messages(await request.body(), services.seal)
    writer = MessagesWriter(
        id=f"msg_{secrets.token_urlsafe(18)}",
        model=wanted.request.model,
        seal=services.seal,
        omits_thinking=wanted.omits_thinking,
    )
    return await answer(request, services, wanted, writer)


@router.post("/v1/messages/count_tokens", openapi_extra=documented_body(schema.CountRequest))
async def count_tokens(request: Request, services: ServicesDep) -> Response:
    """How many tokens the prompt of a message has. No weights are loaded for it."""
    wanted = read_count_tokens(await request.body(), services.seal)
    try:
        num_tokens = (
            await prepare(services.pool, services.media, services.documents, services.gateway.served(wanted.request))
        ).prompt_tokens
    except ContextTooLong as error:  # to learn this is what a client counts for
        num_tokens = error.tokens
    return json_reply({"input_tokens": num_tokens}, headers_of(wanted))

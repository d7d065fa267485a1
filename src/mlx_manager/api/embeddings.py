"""`/v1` for texts that are measured: vectors of them, and documents ranked by a query. Bodies are large: they are read and written beside
the event loop."""

import asyncio
import secrets
from dataclasses import replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from mlx_manager.api import sse
from mlx_manager.api.answer import documented_body, json_reply
from mlx_manager.api.dependencies import ServicesDep
from mlx_manager.protocols.fields import ignored_header
from mlx_manager.protocols.openai.embeddings import EmbeddingSchema, read_embeddings, write_embeddings
from mlx_manager.protocols.openai.rerank import RerankSchema, read_rerank, write_ranking

router = APIRouter(tags=["Embeddings"])


@router.post("/v1/embeddings", openapi_extra=documented_body(EmbeddingSchema))
async def embeddings(request: Request, services: ServicesDep) -> Response:
    """A vector of length 1 for each input."""
    wanted = await asyncio.to_thread(read_embeddings, await request.body())
    asked = replace(wanted.request, timeout_s=services.config.request_timeout_s)
    made = await sse.until_disconnect(request.receive, services.gateway.embed(asked))
    return await asyncio.to_thread(lambda: json_reply(write_embeddings(made, wanted), _headers(wanted.ignored)))


@router.post("/v1/rerank", openapi_extra=documented_body(RerankSchema))
async def rerank(request: Request, services: ServicesDep) -> Response:
    """The documents, the one that answers the query best first."""
    wanted = await asyncio.to_thread(read_rerank, await request.body())
    asked = replace(wanted.request, timeout_s=services.config.request_timeout_s)
    ranking = await sse.until_disconnect(request.receive, services.gateway.rerank(asked))
    id = f"rerank-{secrets.token_urlsafe(18)}"
    return await asyncio.to_thread(lambda: json_reply(write_ranking(ranking, wanted, id), _headers(wanted.ignored)))


def _headers(ignored: tuple[str, ...]) -> dict[str, str]:
    return {"x-backend": "local"} | ({"x-ignored-fields": ignored_header(ignored)} if ignored else {})

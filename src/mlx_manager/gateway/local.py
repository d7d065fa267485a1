"""The models on this machine as a backend."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager

from mlx_manager.core.errors import TimedOut
from mlx_manager.core.events import Event, Started
from mlx_manager.core.requests import EmbeddingRequest, GenerationRequest, RerankRequest
from mlx_manager.core.vectors import Embeddings, Ranking
from mlx_manager.gateway.remote_media import RemoteMedia
from mlx_manager.inference.dialect import Prepared
from mlx_manager.inference.pool import Pool


async def prepare(pool: Pool, media: RemoteMedia, request: GenerationRequest) -> Prepared:
    """A request as a model takes it, with the pictures that it only names; none is fetched for a model that could not look at it.
    Raises `core.errors`."""
    targets = media.targets(request)
    dialect = await pool.dialect(request.model)
    if dialect.pictures is not None:
        request = await media.fetched(request, targets)
    return await asyncio.to_thread(dialect.prepare, request)


class LocalBackend:
    name = "local"

    def __init__(self, pool: Pool, media: RemoteMedia) -> None:
        self._pool = pool
        self._media = media

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        prepared = await prepare(self._pool, self._media, request)
        yield Started(prepared.prompt_tokens, prepared.unused)
        deadline = prepared.specs[0].deadline
        async with (
            self._pool.lend(request.model, priority=request.priority, deadline=deadline) as model,
            aclosing(model.generate(prepared)) as events,
        ):
            async for event in events:
                yield event

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        async with _within(request.timeout_s):
            reader = await self._pool.text_reader(request.model)
            prepared = await asyncio.to_thread(reader.prepare, request)
            async with self._pool.lend_embedder(request.model) as model:
                return await model.embed(prepared)

    async def rerank(self, request: RerankRequest) -> Ranking:
        async with _within(request.timeout_s):
            reader = await self._pool.text_reader(request.model)
            prepared = await asyncio.to_thread(reader.prepare_ranking, request)
            async with self._pool.lend_embedder(request.model) as model:
                return await model.rank(prepared)


@asynccontextmanager
async def _within(timeout_s: float | None) -> AsyncGenerator[None]:
    """Raises `TimedOut` for what takes longer."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        raise TimedOut("The request took longer than it may.") from None

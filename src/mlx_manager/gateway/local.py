"""The models on this machine as a backend."""

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager

from mlx_manager.core.errors import TimedOut
from mlx_manager.core.events import Event, Started
from mlx_manager.core.requests import Conversation, EmbeddingRequest, GenerationRequest, RerankRequest
from mlx_manager.core.vectors import Embeddings, Ranking
from mlx_manager.gateway.documents import Documents
from mlx_manager.gateway.remote_media import RemoteMedia
from mlx_manager.inference.dialect import Prepared
from mlx_manager.inference.pool import Pool

# A form may take seconds until it is refused, and its thread only waits for that: the threads that all else needs are others.
_FORMS = ThreadPoolExecutor(64, thread_name_prefix="forms")


async def prepare(pool: Pool, media: RemoteMedia, documents: Documents, request: GenerationRequest) -> Prepared:
    """A request as a model takes it, with the text of its documents and the pictures that it only names; none is fetched for a model that
    could not look at it. Raises `core.errors`."""
    targets = media.targets(request)
    dialect = await pool.dialect(request.model)
    request = await documents.read(request)
    if dialect.pictures is not None:
        request = await media.fetched(request, targets)
    if _may_have_a_form(request):
        return await asyncio.get_running_loop().run_in_executor(_FORMS, dialect.prepare, request)
    return await asyncio.to_thread(dialect.prepare, request)


def _may_have_a_form(request: GenerationRequest) -> bool:
    return request.output is not None or any(isinstance(p, Conversation) and p.tools for p in request.prompts)


class LocalBackend:
    name = "local"

    def __init__(self, pool: Pool, media: RemoteMedia, documents: Documents) -> None:
        self._pool = pool
        self._media = media
        self._documents = documents

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        prepared = await prepare(self._pool, self._media, self._documents, request)
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

"""The models on this machine as a backend."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from mlx_manager.core.events import Event, Started
from mlx_manager.core.requests import GenerationRequest
from mlx_manager.inference.pool import Pool


class LocalBackend:
    name = "local"

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        dialect = await self._pool.dialect(request.model)
        prepared = await asyncio.to_thread(dialect.prepare, request)
        yield Started(prepared.prompt_tokens, prepared.unused)
        async with self._pool.lend(request.model) as model, aclosing(model.generate(prepared)) as events:
            async for event in events:
                yield event

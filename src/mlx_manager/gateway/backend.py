"""What can answer a request."""

from collections.abc import AsyncGenerator
from typing import Protocol

from mlx_manager.core.events import Event
from mlx_manager.core.requests import EmbeddingRequest, GenerationRequest, RerankRequest
from mlx_manager.core.vectors import Embeddings, Ranking


class Backend(Protocol):
    @property
    def name(self) -> str:
        """As it stands in `x-backend` and in the audit log."""
        ...

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        """`Started` as soon as the cheap checks are done, then the reply. Raises `core.errors`; closing it frees everything."""
        ...

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """Raises `core.errors`; cancelling it frees everything."""
        ...

    async def rerank(self, request: RerankRequest) -> Ranking:
        """As `embed`."""
        ...

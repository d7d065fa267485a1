"""The one door to every model: admits, times and reports each request."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace

from mlx_manager.core.errors import EngineFault, Overloaded, RequestError
from mlx_manager.core.events import Event, Finished, Started, Timing, Usage
from mlx_manager.core.exchange import Exchange, ExchangeListener, Operation, Outcome
from mlx_manager.core.requests import EmbeddingRequest, GenerationRequest, RerankRequest
from mlx_manager.core.vectors import Embeddings, Ranking
from mlx_manager.gateway.backend import Backend
from mlx_manager.settings.names import Names


@dataclass(slots=True)
class _Account:
    """What is known of a request so far. It is cancelled until something else is known: whoever goes away closes us in between."""

    outcome: Outcome = "cancelled"
    backend: str | None = None
    usage: Usage = field(default_factory=Usage)
    timing: Timing | None = None
    error: str | None = None

    def ended(self, backend: str, usage: Usage) -> None:
        self.outcome, self.backend, self.usage = "ok", backend, usage


class Gateway:
    """At most `max_requests` at a time; each listener hears of every request once, at its end."""

    def __init__(
        self,
        backend: Backend,
        *,
        max_requests: int,
        names: Callable[[], Names] = Names,
        listeners: Sequence[ExchangeListener] = (),
    ) -> None:
        """`names` gives those of the moment; without it there are only models."""
        self._backend = backend
        self._names = names
        self._max_requests = max_requests
        self._listeners = tuple(listeners)
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self.num_in_flight = 0

    def served(self, request: GenerationRequest) -> GenerationRequest:
        """The request as a backend gets it: under the name of a model, with what the profile that was asked for says. For whoever wants to
        know something of a request without making it."""
        return self._names().served(request)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        """The events of the reply. Raises `core.errors`; closing the iterator early cancels the request."""
        asked, request = request.model, self.served(request)
        with self._told(asked, request.model, "generate") as account, self._place():
            async with aclosing(self._backend.stream(request)) as events:
                async for event in events:
                    account.backend = self._backend.name
                    if isinstance(event, Started):
                        account.usage = Usage(prompt=event.prompt_tokens)
                    elif isinstance(event, Finished):
                        account.usage, account.timing, account.outcome = event.usage, event.timing, "ok"
                    yield event
            if account.outcome != "ok":
                raise EngineFault("The reply ended before it was complete.")

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """Raises `core.errors`; cancelling it cancels the request."""
        asked, request = request.model, replace(request, model=self._names().resolve(request.model).model)
        with self._told(asked, request.model, "embeddings") as account, self._place():
            made = await self._backend.embed(request)
            account.ended(self._backend.name, Usage(prompt=made.prompt_tokens))
            return made

    async def rerank(self, request: RerankRequest) -> Ranking:
        """As `embed`."""
        asked, request = request.model, replace(request, model=self._names().resolve(request.model).model)
        with self._told(asked, request.model, "rerank") as account, self._place():
            ranking = await self._backend.rerank(request)
            account.ended(self._backend.name, Usage(prompt=ranking.prompt_tokens))
            return ranking

    @contextmanager
    def _told(self, asked: str, model: str, operation: Operation) -> Generator["_Account"]:
        """Tells each listener, at the end, what became of a request."""
        began = time.monotonic()
        account = _Account()
        try:
            yield account
        except RequestError as error:
            account.outcome, account.error = "client_error", type(error).__name__
            raise
        except Exception as error:
            account.outcome, account.error = "server_error", type(error).__name__
            raise
        finally:
            exchange = Exchange(
                asked=asked,
                model=model,
                backend=account.backend,
                outcome=account.outcome,
                duration_s=time.monotonic() - began,
                usage=account.usage,
                timing=account.timing,
                error=account.error,
                operation=operation,
            )
            for listen in self._listeners:
                listen(exchange)

    @contextmanager
    def _place(self) -> Generator[None]:
        """One of the places for requests under way. Raises `Overloaded` if there is none to be had."""
        if self._draining:
            raise Overloaded("The server is shutting down.", retry_after_s=5)
        if self.num_in_flight >= self._max_requests:
            raise Overloaded(f"The server is working on {self._max_requests} requests already. Please try again.")
        self.num_in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_in_flight -= 1
            if self.num_in_flight == 0:
                self._idle.set()

    async def drain(self) -> None:
        """Admits nobody any more and waits until the last reply is out."""
        self._draining = True
        await self._idle.wait()

    @property
    def is_draining(self) -> bool:
        return self._draining

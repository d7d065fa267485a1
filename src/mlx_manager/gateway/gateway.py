"""The one door to every model: admits, times and reports each request."""

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, contextmanager

from mlx_manager.core.errors import EngineFault, Overloaded, RequestError
from mlx_manager.core.events import Event, Finished, Started, Usage
from mlx_manager.core.exchange import Exchange, ExchangeListener, Outcome
from mlx_manager.core.requests import GenerationRequest
from mlx_manager.gateway.backend import Backend


class Gateway:
    """At most `max_requests` at a time; each listener hears of every request once, at its end."""

    def __init__(self, backend: Backend, *, max_requests: int, listeners: Sequence[ExchangeListener] = ()) -> None:
        self._backend = backend
        self._max_requests = max_requests
        self._listeners = tuple(listeners)
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self.num_in_flight = 0

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        """The events of the reply. Raises `core.errors`; closing the iterator early cancels the request."""
        began = time.monotonic()
        outcome: Outcome = "cancelled"  # until something else is known: whoever goes away closes us in between
        backend: str | None = None
        error_name: str | None = None
        usage, end = Usage(), None
        try:
            with self._place():
                async with aclosing(self._backend.stream(request)) as events:
                    async for event in events:
                        backend = self._backend.name
                        if isinstance(event, Started):
                            usage = Usage(prompt=event.prompt_tokens)
                        elif isinstance(event, Finished):
                            end, usage, outcome = event, event.usage, "ok"
                        yield event
                if end is None:
                    raise EngineFault("The reply ended before it was complete.")
        except RequestError as error:
            outcome, error_name = "client_error", type(error).__name__
            raise
        except Exception as error:
            outcome, error_name = "server_error", type(error).__name__
            raise
        finally:
            exchange = Exchange(
                model=request.model,
                backend=backend,
                outcome=outcome,
                duration_s=time.monotonic() - began,
                usage=usage,
                timing=end.timing if end else None,
                error=error_name,
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

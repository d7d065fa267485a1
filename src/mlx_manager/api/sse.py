"""Event streams that notice when nobody reads them. Knows framing and connections; what the events mean is decided elsewhere."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from .server_protocol import reset_connection

KEEP_ALIVE = b": keep-alive\n\n"
_TURN = 8  # events

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


class ClientGone(Exception):
    """The client left before its reply was complete. There is nobody to tell."""


def data(json_bytes: bytes) -> bytes:
    """An event without a name. JSON of one line, as our encoder writes it, needs no further framing."""
    return b"data: %b\n\n" % json_bytes


def event(name: str, json_bytes: bytes, *, id: str | None = None) -> bytes:
    """With an id a client that comes back says what it saw last."""
    return (b"" if id is None else b"id: %b\n" % id.encode("ascii")) + b"event: %b\ndata: %b\n\n" % (name.encode("ascii"), json_bytes)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, which is cancelled, to the end of its `finally` blocks, as soon as the client goes away."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        has_left = leaving.done()
    finally:
        await _stop(working, leaving)
    if has_left and working.cancelled():
        raise ClientGone
    return working.result()


class EventStream(Response):
    """A reply made of events, framed by whoever yields them.

    The generator is run by one task from its first event to its last, and is closed before the response returns: at its
    end, when the client disconnects, when one write takes longer than `send_timeout_s`, or when the server stops.
    What `keep_alive` gives is written whenever nothing else was for `keep_alive_s`.

    The generator turns its failures into events. One that escapes all the same reaches the server, which logs it and closes
    the connection without the last chunk, so that the client cannot take it for a finished answer.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        *,
        keep_alive: Callable[[], bytes] = lambda: KEEP_ALIVE,
        keep_alive_s: float = 10.0,
        send_timeout_s: float = 30.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        self._events = events
        self._keep_alive = keep_alive
        self._keep_alive_s = keep_alive_s
        self._send_timeout_s = send_timeout_s
        self._last_write = 0.0  # both in seconds of the event loop's clock
        self._write_began: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._last_write = asyncio.get_running_loop().time()
        writing = asyncio.create_task(self._write_events(send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            try:
                await self._watch(writing, leaving, send)
            finally:
                await _stop(writing)
                await self._events.aclose()
            if not writing.cancelled():
                writing.result()
                await self._send_in_time(send, _body(b"", more=False))
        except ClientGone as reason:
            logger.info("Event stream dropped: %s", reason)
            reset_connection(scope)
            await asyncio.wait({leaving}, timeout=1.0)  # the server hears of it first, and expects no end from us
        finally:
            await _stop(leaving)

    async def _write_events(self, send: Send) -> None:
        """Run the generator. The only task that touches it until it is closed."""
        clock = asyncio.get_running_loop().time
        start: Message = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await self._send_timed(send, start, clock())
        num_written = 0
        async for framed in self._events:
            await self._send_timed(send, _body(framed, more=True), clock())
            self._last_write = clock()
            num_written += 1
            if num_written % _TURN == 0:  # neither a ready event nor a write need wait, and then nobody else would run
                await asyncio.sleep(0)

    async def _send_timed(self, send: Send, message: Message, now: float) -> None:
        """Send, with the time noted for `_watch`: a timer of its own for every token would be dearer."""
        self._write_began = now
        try:
            await send(message)
        except OSError as error:
            raise ClientGone("the connection is closed") from error
        finally:
            self._write_began = None

    async def _send_in_time(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await send(message)
        except OSError as error:  # a TimeoutError is one
            raise ClientGone("the connection is closed or the client has stopped reading") from error

    async def _watch(self, writing: asyncio.Task[None], leaving: asyncio.Task[None], send: Send) -> None:
        """Return when the events are at their end or the client is; meanwhile keep the line alive."""
        clock = asyncio.get_running_loop().time
        while True:
            due = self._last_write + self._keep_alive_s
            if self._write_began is not None:
                due = self._write_began + self._send_timeout_s
            # A write may begin, and block, just after this look.
            timeout = min(max(due - clock(), 0), self._send_timeout_s)
            done, _ = await asyncio.wait({writing, leaving}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return
            now = clock()
            if self._write_began is not None:
                if now - self._write_began >= self._send_timeout_s:
                    raise ClientGone("the client has stopped reading")
            elif now - self._last_write >= self._keep_alive_s:
                await self._send_in_time(send, _body(self._keep_alive(), more=True))
                self._last_write = clock()


async def _disconnected(receive: Receive) -> None:
    """Return when the client has gone. What is left of a request body is passed over."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stop(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def _body(content: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}

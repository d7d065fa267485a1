"""A real HTTP server that says exactly these bytes at these times, and remembers what it was asked."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Script:
    pieces: tuple[tuple[float, bytes], ...] = ()
    """(seconds to wait, bytes to send) in turn."""
    status: int = 200
    content_type: str = "text/event-stream; charset=utf-8"
    cut: bool = False
    """Ends by dropping the connection inside the body."""
    linger_s: float = 0.0
    """How long the body stays open after its last piece."""


@dataclass
class Scripted:
    url: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def until_open(self, count: int) -> None:
        async with asyncio.timeout(5), self.changed:
            await self.changed.wait_for(lambda: self.num_open == count)

    async def now_open(self, change: int) -> None:
        async with self.changed:
            self.num_open += change
            self.most_open = max(self.most_open, self.num_open)
            self.changed.notify_all()


def chunk(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def delta(finish_reason: str | None = None, **fields: Any) -> bytes:
    return chunk(choices=[{"index": 0, "delta": fields, "finish_reason": finish_reason}])


def usage(prompt: int, completion: int, cached: int | None = None) -> bytes:
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return chunk(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": completion, **details})


def answer(num_events: int = 3, tokens: int = 6, gap_s: float = 0.0, prompt: int = 10, cached: int | None = None) -> Script:
    """A good reply: an opening event without content, the content events, the end, the usage."""
    opening = (0.0, delta(role="assistant", content=""))
    content = tuple((gap_s, delta(content="two words")) for _ in range(num_events))
    return Script((opening, *content, (0.0, delta("length")), (0.0, usage(prompt, tokens, cached)), (0.0, DONE)))


@asynccontextmanager
async def serving(script: Callable[[dict[str, Any], int], Script]) -> AsyncGenerator[Scripted]:
    """`script` gets the request's body and its number."""
    served = Scripted("")

    connections: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if task := asyncio.current_task():
            connections.add(task)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
            body = json.loads(await reader.readexactly(int(headers["content-length"])))
            number = len(served.asked)
            served.asked.append({"path": head[0].split()[1], **body})
            served.headers.append(headers)
            await served.now_open(+1)
            try:
                await _say(writer, script(body, number))
            finally:
                await served.now_open(-1)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has gone, or the test has ended
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    served.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield served
    finally:
        server.close()
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


async def _say(writer: asyncio.StreamWriter, script: Script) -> None:
    writer.write(f"HTTP/1.1 {script.status} -\r\ncontent-type: {script.content_type}\r\n".encode())
    writer.write(b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n")
    for delay_s, piece in script.pieces:
        await asyncio.sleep(delay_s)
        writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        await writer.drain()
    await asyncio.sleep(script.linger_s)
    if not script.cut:
        writer.write(b"0\r\n\r\n")
        await writer.drain()

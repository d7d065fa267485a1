"""An application behind a real uvicorn on a loopback port, and a client that is only a socket."""

import asyncio
import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_manager.api.server_protocol import ReceiptDeadlines

T = TypeVar("T")


@dataclass
class Served:
    """Where the server listens, and a way to ask its event loop something."""

    address: str
    port: int
    server: uvicorn.Server
    loop: asyncio.AbstractEventLoop | None = field(default=None)

    def connect(self, *, receive_buffer: int | None = None) -> socket.socket:
        client = socket.socket(socket.AF_INET6 if ":" in self.address else socket.AF_INET)
        client.settimeout(5)
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.connect((self.address, self.port))
        return client

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        assert self.loop is not None
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout=5)

    def num_tasks(self) -> int:
        async def count() -> int:
            return len(asyncio.all_tasks()) - 1

        return self.run(count())

    def num_connections(self) -> int:
        return len(self.server.server_state.connections)


@contextmanager
def serve(
    app: ASGIApp, *, http: type[ReceiptDeadlines] = ReceiptDeadlines, loop: str = "auto", address: str = "127.0.0.1", **options: Any
) -> Iterator[Served]:
    async def observed(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            served.loop = asyncio.get_running_loop()
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await app(scope, receive, send)

    config = uvicorn.Config(
        observed,
        http=http,
        loop=loop,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
        **options,
    )
    server = uvicorn.Server(config)
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
        if address == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((address, 0))
        served = Served(address, listener.getsockname()[1], server)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="uvicorn")
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive(), within_s=10)
            assert server.started
            yield served
        finally:
            server.should_exit = True
            thread.join(timeout=10)
            assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], *, within_s: float) -> float:
    """Seconds until the condition held."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within_s, "waited in vain"
        time.sleep(0.005)
    return time.monotonic() - began


@dataclass(frozen=True)
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes


def read_reply(client: socket.socket, method: str = "GET") -> Reply:
    with http.client.HTTPResponse(client, method=method) as response:
        response.begin()
        return Reply(response.status, response.headers, response.read())


def ask(served: Served, request: bytes) -> Reply:
    with served.connect() as client:
        client.sendall(request)
        return read_reply(client, request.split(b" ", 1)[0].decode())


def request(method: str = "GET", target: str = "/", *, host: str | None = "localhost", body: bytes = b"", **headers: str) -> bytes:
    """A request as bytes; `x_api_key=...` is the header `x-api-key`."""
    lines = [f"{method} {target} HTTP/1.1"]
    lines += [f"Host: {host}"] if host is not None else []
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def is_closed(client: socket.socket) -> bool:
    """Whether the server has ended the connection, cleanly or not; what it still had to say is thrown away."""
    try:
        while client.recv(65536):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def cut(client: socket.socket) -> None:
    """Close with RST, as a client that dies does."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()

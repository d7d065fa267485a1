"""How long a client may take to send a request, and what is refused before there is a request to route.

uvicorn has an idle time-out and nothing else: one byte a second holds a connection, and a header block may grow without end.
This is the only module that knows uvicorn's inside.
"""

import asyncio
import re
import socket
import struct
from asyncio import TimerHandle
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import ClassVar, Literal

from starlette.types import Scope
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from .errors import envelope
from .middleware import literal_address, new_request_id

_RESET = "mlx_manager.reset"
_CODES = {400: "invalid_http_request", 408: "request_timeout", 431: "headers_too_large"}
_MAX_PIPELINED = 8
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_ABSOLUTE_TARGET = re.compile(rb"https?://([^/?#]*)", re.IGNORECASE)


class BadRequest(Exception):
    """A message that nobody should act on. The client can fix it; its connection is not used again."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def check_headers(http_version: str, target: bytes, headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Raise `BadRequest` where two readers of the same bytes could disagree about the host or the length of the body."""
    if http_version not in {"1.0", "1.1"}:
        raise BadRequest("Only HTTP/1.0 and HTTP/1.1 are served.")
    if any(_CONTROL.search(value) for _, value in headers):
        raise BadRequest("A header value holds a control character.")
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1:
        raise BadRequest("More than one Host header.")
    if not hosts and http_version == "1.1":
        raise BadRequest("The Host header is missing.")
    codings = [value.strip().lower() for name, value in headers if name == b"transfer-encoding"]
    lengths = [value for name, value in headers if name == b"content-length"]
    if codings and (lengths or http_version == "1.0"):
        raise BadRequest("Transfer-Encoding together with Content-Length, or on HTTP/1.0.")
    if len(lengths) > 1:
        raise BadRequest("More than one Content-Length header.")
    if codings not in ([], [b"chunked"]):
        raise BadRequest("The only transfer coding is chunked.")
    if not target.startswith(b"/"):
        absolute = _ABSOLUTE_TARGET.match(target)
        # The application sees the Host header only, so a target that names another host must not pass under it.
        if absolute is None or [absolute[1].lower()] != [host.strip().lower() for host in hosts]:
            raise BadRequest("The request target is not a path on this host.")


def is_loopback(address: str) -> bool:
    peer = literal_address(address)
    return peer is not None and peer.is_loopback


@dataclass(frozen=True, slots=True)
class ReceiptLimits:
    headers_s: float = 15.0
    """From the first byte of a message to the end of its headers."""

    body_s: float = 60.0
    """From the end of the headers to the end of the body. Time in which the server is the one that does not read is free."""

    stall_s: float = 30.0
    """How long a client may take nothing of what waits for it. Without this, closing would wait for it for ever."""

    max_header_bytes: int = 64 * 1024

    max_connections_per_peer: int = 512

    may_exceed_connections: Callable[[str], bool] = is_loopback
    """Peers to which the line above does not apply: the operator, and proxies with many clients behind them."""


class ReceiptDeadlines(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with deadlines on receipt (408, close), strict framing (400, close), and bounds on what a peer holds.

    A connection before its first byte is idle, and idle connections end after uvicorn's `timeout_keep_alive`.
    """

    limits: ClassVar[ReceiptLimits] = ReceiptLimits()

    _receiving: Literal["nothing", "headers", "body"] = "nothing"
    _deadline: TimerHandle | None = None
    _stall: TimerHandle | None = None
    _running: RequestResponseCycle | None = None
    _num_header_bytes = 0
    _refusal = BadRequest("Invalid HTTP request.")

    # Connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        if self.client is not None and not self.limits.may_exceed_connections(self.client[0]):
            peer = self.client[0]
            clients = (getattr(held, "client", None) for held in self.connections)  # WebSockets are in there, too
            num_held = sum(1 for client in clients if client is not None and client[0] == peer)
            if num_held > self.limits.max_connections_per_peer:
                transport.abort()
                return
        # Whatever the client does not take at once shows in `pause_writing`, so nothing waits unwatched.
        transport.set_write_buffer_limits(high=0)
        self._close_if_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_timers()
        if self._running is not None and not self._running.response_complete:
            # uvicorn tells the newest request only, which on a pipelined connection waits behind this one.
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self) -> None:
        self._forget_timers()
        super().handle_websocket_upgrade()

    # Receiving

    def data_received(self, data: bytes) -> None:
        if self._receiving == "nothing" and self._deadline is None:
            self._expect_within(self.limits.headers_s)
        receiving = self._receiving
        super().data_received(data)
        if receiving == self._receiving == "headers":
            self._num_header_bytes += len(data)
            if self._num_header_bytes > self.limits.max_header_bytes:
                self._refuse(431, "The request headers are too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {_RESET: {"reset": self.reset}}
        self._receiving = "headers"
        self._num_header_bytes = 0
        if self._deadline is None:
            self._expect_within(self.limits.headers_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        # After the body come trailers. Nobody has checked them, so they do not join the headers of a running request.
        if self._receiving == "headers":
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        assert self.parser is not None  # it is the caller
        try:
            check_headers(self.parser.get_http_version(), self.url, self.headers)
            if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > self.limits.max_header_bytes:
                raise BadRequest("The request headers are too large.", status=431)
            if self.parser.should_upgrade() and not self._should_upgrade() and self._has_body():
                raise BadRequest("A request that asks for an upgrade cannot have a body.")  # the parser would skip it
        except BadRequest as error:
            self._refusal = error
            raise  # the parser stops here and uvicorn calls send_400_response
        super().on_headers_complete()
        self._receiving = "body"
        self._expect_within(self.limits.body_s)
        if 0 < len(self.pipeline) <= _MAX_PIPELINED:
            # uvicorn stops reading here, and would not see the client of the running request leave.
            self.flow.resume_reading()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_message_complete(self) -> None:
        self._receiving = "nothing"
        self._forget_deadline()
        super().on_message_complete()
        if self.cycle is not None and self.cycle.response_complete:  # pyright: ignore[reportUnnecessaryComparison]
            # Answered before its body was here. uvicorn's idle timer began with the answer and ended with the next byte.
            self._close_if_idle()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal.status, str(self._refusal))

    def _has_body(self) -> bool:
        return any(name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in self.headers)

    # Deadlines

    def _close_if_idle(self) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _expect_within(self, limit_s: float) -> None:
        self._forget_deadline()
        self._deadline = self.loop.call_later(limit_s, self._on_deadline, limit_s)

    def _on_deadline(self, limit_s: float) -> None:
        self._deadline = None
        if self.transport.is_closing():
            return
        if self.flow.read_paused or self._is_answering_an_earlier_request():
            self._expect_within(limit_s)
        elif self._receiving == "nothing":
            self.transport.close()  # line ends, but never a request line
        else:
            self._refuse(408, f"The request was not complete within {limit_s:g} seconds.")

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _forget_timers(self) -> None:
        self._forget_deadline()
        self._forget_stall()
        self._unset_keepalive_if_required()

    # Refusing

    def _is_answering_an_earlier_request(self) -> bool:
        if self._receiving == "body":
            return bool(self.pipeline)
        return self.cycle is not None and not self.cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]

    def _refuse(self, status: int, message: str) -> None:
        """Answer, unless that would land in the middle of another reply, and close."""
        in_body = self._receiving == "body"
        can_answer = not self._is_answering_an_earlier_request() and not (in_body and self.cycle.response_started)
        path = self.scope["path"] if in_body else "/v1"
        self._receiving = "nothing"
        self._forget_deadline()
        if can_answer:
            request_id = new_request_id()
            body, content_type = envelope(
                path, status, message=message, type_="invalid_request_error", code=_CODES[status], param=None, request_id=request_id
            )
            headers = [
                *self.server_state.default_headers,
                (b"content-type", content_type.encode()),
                (b"content-length", b"%d" % len(body)),
                (b"x-request-id", request_id.encode()),
                (b"request-id", request_id.encode()),
                (b"connection", b"close"),
            ]
            lines = [b"HTTP/1.1 %d %s" % (status, HTTPStatus(status).phrase.encode())]
            lines += [name + b": " + value for name, value in headers]
            self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        self.transport.close()

    # Sending

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_stall()

    def resume_writing(self) -> None:
        self._forget_stall()
        super().resume_writing()

    def _watch_stall(self) -> None:
        self._forget_stall()
        self._stall = self.loop.call_later(self.limits.stall_s, self._on_stall, self.transport.get_write_buffer_size())

    def _on_stall(self, num_unsent_before: int) -> None:
        self._stall = None
        if self.transport.get_write_buffer_size() < num_unsent_before:
            self._watch_stall()
        else:
            self.reset()

    def _forget_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def reset(self) -> None:
        """End the connection with RST: what is unsent is dropped, and the client cannot take the end for a clean one."""
        connection: socket.socket | None = self.transport.get_extra_info("socket")
        if connection is not None:
            with suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


def receipt_deadlines(limits: ReceiptLimits) -> type[ReceiptDeadlines]:
    """`ReceiptDeadlines` with other limits, for `uvicorn.Config(http=...)`, which takes a class."""
    return type("ReceiptDeadlines", (ReceiptDeadlines,), {"limits": limits})


def reset_connection(scope: Scope) -> None:
    """Cut the connection of this request, where the server offers it. Afterwards `receive` gives `http.disconnect`."""
    extension = scope.get("extensions", {}).get(_RESET)
    if extension is not None:
        extension["reset"]()

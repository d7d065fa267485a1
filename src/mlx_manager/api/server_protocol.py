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
from http import HTTPStatus
from ipaddress import ip_address
from typing import ClassVar, Literal

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import envelope
from .middleware import new_request_id

_RESET = "mlx_manager.reset"
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_ABSOLUTE_TARGET = re.compile(rb"https?://([^/?#]*)", re.IGNORECASE)


class BadRequest(Exception):
    """A header block that nobody should act on. The client can fix it; the connection is not used again."""


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
    if codings and lengths:
        raise BadRequest("Content-Length together with Transfer-Encoding.")
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
    """Whether a peer is on this machine; also in the form that a dual-stack socket reports."""
    try:
        peer = ip_address(address)
    except ValueError:
        return False
    return peer.is_loopback or bool(getattr(peer, "ipv4_mapped", None) and peer.ipv4_mapped.is_loopback)  # pyright: ignore


class ReceiptDeadlines(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with deadlines on receipt, strict framing, and a bound on what one peer can hold.

    A message must have its headers within `headers_s` of its first byte and its body within `body_s` of its headers; else
    408 and close. The clock does not count against the client while the server is the one that is not reading. Output of
    which the client takes nothing for `stall_s` is thrown away with the connection, else closing would wait for it for ever.
    A connection without a first byte is idle, and idle connections end after uvicorn's `timeout_keep_alive`.
    """

    headers_s: ClassVar[float] = 15.0
    body_s: ClassVar[float] = 60.0
    stall_s: ClassVar[float] = 30.0
    max_header_bytes: ClassVar[int] = 64 * 1024
    max_pipelined: ClassVar[int] = 8
    max_connections_per_peer: ClassVar[int] = 512

    _receiving: Literal["nothing", "headers", "body"] = "nothing"
    _deadline: TimerHandle | None = None
    _stall: TimerHandle | None = None
    _num_header_bytes = 0
    _refusal = "Invalid HTTP request."

    @staticmethod
    def may_exceed_connections(address: str) -> bool:
        """Peers behind which there are many clients, or the operator."""
        return is_loopback(address)

    # Connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        if self.client is not None and not self.may_exceed_connections(self.client[0]):
            peer = self.client[0]
            num_held = sum(1 for held in self.connections if held.client is not None and held.client[0] == peer)
            if num_held > self.max_connections_per_peer:
                transport.abort()
                return
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_timers()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self) -> None:
        self._forget_timers()
        super().handle_websocket_upgrade()

    # Receiving

    def data_received(self, data: bytes) -> None:
        if self._receiving == "nothing" and self._deadline is None:
            self._expect_within(self.headers_s)
        receiving = self._receiving
        super().data_received(data)
        if receiving == self._receiving == "headers":
            self._num_header_bytes += len(data)
            if self._num_header_bytes > self.max_header_bytes:
                self._refuse(431, "The request headers are too large.", "headers_too_large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {_RESET: {"reset": self.reset}}
        self._receiving = "headers"
        self._num_header_bytes = 0
        if self._deadline is None:
            self._expect_within(self.headers_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        # After the body come trailers. Nobody has checked them, so they do not join the headers of a running request.
        if self._receiving == "headers":
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        try:
            check_headers(self.parser.get_http_version(), self.url, self.headers)
            if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > self.max_header_bytes:
                raise BadRequest("The request headers are too large.")
            if self.parser.should_upgrade() and not self._should_upgrade() and self._has_body():
                raise BadRequest("A request that asks for an upgrade cannot have a body.")  # the parser would skip it
            if len(self.pipeline) >= self.max_pipelined:
                raise BadRequest("Too many requests at once on one connection.")
        except BadRequest as error:
            self._refusal = str(error)
            raise  # the parser stops here and uvicorn calls send_400_response
        super().on_headers_complete()
        self._receiving = "body"
        self._expect_within(self.body_s)
        if self.pipeline:
            # uvicorn stops reading here, and would not see the client of the running request leave.
            self.flow.resume_reading()

    def on_message_complete(self) -> None:
        self._receiving = "nothing"
        self._forget_deadline()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, self._refusal, "invalid_http_request")

    def _has_body(self) -> bool:
        return any(name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in self.headers)

    # Deadlines

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
            self._refuse(408, f"The request was not complete within {limit_s:g} seconds.", "request_timeout")

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

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer, unless that would land in the middle of another reply, and close."""
        in_body = self._receiving == "body"
        can_answer = not self._is_answering_an_earlier_request() and not (in_body and self.cycle.response_started)
        path = self.scope["path"] if in_body else "/v1"
        self._receiving = "nothing"
        self._forget_deadline()
        if can_answer:
            request_id = new_request_id()
            body, content_type = envelope(
                path, status, message=message, type_="invalid_request_error", code=code, param=None, request_id=request_id
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
        self._stall = self.loop.call_later(self.stall_s, self._on_stall, self.transport.get_write_buffer_size())

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


def receipt_deadlines(
    headers_s: float = 15.0,
    body_s: float = 60.0,
    *,
    stall_s: float = 30.0,
    max_connections_per_peer: int = 512,
    may_exceed_connections: Callable[[str], bool] = is_loopback,
) -> type[HttpToolsProtocol]:
    """The protocol class for `uvicorn.Config(http=...)`. Listed proxies belong in `may_exceed_connections`."""
    return type(
        "ReceiptDeadlines",
        (ReceiptDeadlines,),
        {
            "headers_s": headers_s,
            "body_s": body_s,
            "stall_s": stall_s,
            "max_connections_per_peer": max_connections_per_peer,
            "may_exceed_connections": staticmethod(may_exceed_connections),
        },
    )


def reset_connection(scope: Scope) -> None:
    """Cut the connection of this request, where the server offers it. Afterwards `receive` gives `http.disconnect`."""
    extension = scope.get("extensions", {}).get(_RESET)
    if extension is not None:
        extension["reset"]()

"""What holds for every request before it is routed: an id, who may ask, from where, and how much.

Plain ASGI. From the outside in: `RequestId`, `SecurityHeaders`, `TrustedOrigin`, `ApiKey`, `BodyLimit`, application.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TypeVar

from pydantic import SecretStr
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ErrorResponse

_T = TypeVar("_T")

RawHeaders = Sequence[tuple[bytes, bytes]]


def new_request_id() -> str:
    """Random, so that neither the time nor the number of requests can be read from it."""
    return "req_" + secrets.token_urlsafe(18)


def _values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


def _is_request(scope: Scope) -> bool:
    return scope["type"] in {"http", "websocket"}


def _is_reply_start(message: Message) -> bool:
    """Also of the reply that refuses a WebSocket."""
    return message["type"] in {"http.response.start", "websocket.http.response.start"}


def _with_headers(message: Message, headers: RawHeaders) -> Message:
    """The start of a reply with these headers in place of its own of the same names."""
    replaced = {name for name, _ in headers}
    kept = [(name, value) for name, value in message.get("headers", ()) if name.lower() not in replaced]
    return {**message, "headers": [*kept, *headers]}


class RequestId:
    """A name for every request, in `scope["state"]["request_id"]` and in every reply, also the one to a fault of ours."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_request(scope):
            await self.app(scope, receive, send)
            return
        request_id = new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        value = request_id.encode()
        has_started = False

        async def send_named(message: Message) -> None:
            nonlocal has_started
            if _is_reply_start(message):
                has_started = True
                message = _with_headers(message, [(b"x-request-id", value), (b"request-id", value)])
            has_started = has_started or message["type"] == "websocket.accept"
            await send(message)

        try:
            await self.app(scope, receive, send_named)
        except Exception:
            if not has_started:
                fault = ErrorResponse(scope, 500, "The server failed to answer this request.", type_="server_error")
                await fault(scope, receive, send_named)
            raise  # for the server to log


class SecurityHeaders:
    """What a browser may do with our replies: no script or style but from our files, no frames, nothing guessed or leaked."""

    HEADERS = (
        (
            b"content-security-policy",
            b"default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
            b"frame-ancestors 'none'; base-uri 'none'",
        ),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"cross-origin-resource-policy", b"same-origin"),
    )

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_request(scope):
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            await send(_with_headers(message, self.HEADERS) if _is_reply_start(message) else message)

        await self.app(scope, receive, send_guarded)


def literal_address(text: str) -> IPv4Address | IPv6Address | None:
    """The address that `text` spells, or None for a name. A dual-stack socket's `::ffff:127.0.0.1` is 127.0.0.1.

    A socket names the interface of a link-local address (`fe80::1%eth0`); a `Host` header does not.
    """
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


_AUTHORITY = re.compile(r"(?P<host>[A-Za-z0-9_.-]*[A-Za-z0-9_-]|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[1-9][0-9]{0,4}))?")
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Authority:
    """`host[:port]` as one comparable value. Nothing that two parsers could read in two ways is one."""

    host: str | IPv4Address | IPv6Address
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Authority | None":
        match = _AUTHORITY.fullmatch(text)
        if match is None:
            return None
        host = match["host"].lower()
        address = literal_address(host.strip("[]"))
        if host.startswith("[") and (address is None or ":" not in host):
            return None
        return cls(address or host, int(match["port"]) if match["port"] else None)


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port as browsers compare them: a port that goes without saying counts as said."""

    scheme: str
    authority: Authority

    @classmethod
    def parse(cls, text: str) -> "Origin | None":
        """None for anything a browser does not send for a page: `null`, a path, a foreign scheme."""
        scheme, separator, rest = text.partition("://")
        authority = Authority.parse(rest)
        if not separator or scheme not in _DEFAULT_PORTS or authority is None:
            return None
        return cls.of(scheme, authority)

    @classmethod
    def of(cls, scheme: str, authority: Authority) -> "Origin":
        return cls(scheme, Authority(authority.host, authority.port or _DEFAULT_PORTS[scheme]))


class TrustedOrigin:
    """Refuses requests that a web page was tricked or scripted into sending (403), and lets listed origins in (CORS).

    `Host` must be `localhost`, one of `allowed_hosts`, or the address that the connection came to; its port, if any, ours or
    that of an allowed origin. `allowed_hosts` holds names, or `name:port` where a mapped port differs from ours. An `Origin`
    must be that of the host itself or one of `allowed_origins`. Anything listed that is not well-formed is a `ValueError`.
    """

    METHODS = b"GET, POST, PUT, PATCH, DELETE"
    EXPOSED = b"x-request-id, request-id, x-backend, x-ignored-fields, x-should-retry, retry-after"
    ALLOWED = re.compile(
        r"accept|authorization|cache-control|content-type|idempotency-key|last-event-id|x-api-key|x-client-request-id|x-requested-with"
        r"|(x-stainless|anthropic|openai)-[a-z0-9-]{1,64}"
    )

    def __init__(self, app: ASGIApp, *, allowed_hosts: Iterable[str] = (), allowed_origins: Iterable[str] = ()) -> None:
        self.app = app
        self._hosts = frozenset({Authority("localhost"), *(_valid(Authority.parse(host), host) for host in allowed_hosts)})
        self._origins = frozenset(_valid(Origin.parse(origin), origin) for origin in allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_request(scope):
            await self.app(scope, receive, send)
            return
        host = self._trusted_host(scope)
        if host is None:
            await _forbidden(scope, "This server does not answer to the name in the Host header.", "host_not_allowed")(scope, receive, send)
            return
        given = _values(scope, b"origin")
        if not given:
            await self.app(scope, receive, send)
            return
        origin = Origin.parse(given[0].decode("latin-1")) if len(given) == 1 else None
        scheme = scope["scheme"].replace("ws", "http")
        if origin is not None and origin in self._origins:
            await self._answer_across_origins(given[0], scope, receive, send)
        elif origin is not None and origin == Origin.of(scheme, host):
            await self.app(scope, receive, send)
        else:
            await _forbidden(scope, "Pages of this origin may not use this server.", "origin_not_allowed")(scope, receive, send)

    def _trusted_host(self, scope: Scope) -> Authority | None:
        given = _values(scope, b"host")
        authority = Authority.parse(given[0].decode("latin-1")) if len(given) == 1 else None
        if authority is None:
            return None
        if authority in self._hosts:
            return authority
        address, own_port = scope.get("server") or ("", None)
        is_ours = Authority(authority.host) in self._hosts or authority.host == literal_address(address)
        ports = {None, own_port, *(origin.authority.port for origin in self._origins)}
        return authority if is_ours and authority.port in ports else None

    async def _answer_across_origins(self, origin: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """`origin` is in our list: only there is it repeated to the browser. Cookies are not let through."""
        grants = [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", self.EXPOSED)]

        async def send_granted(message: Message) -> None:
            if _is_reply_start(message):
                message = _with_headers(message, grants)
                message["headers"].append((b"vary", b"origin"))
            await send(message)

        if scope.get("method") == "OPTIONS" and _values(scope, b"access-control-request-method"):
            wanted = b",".join(_values(scope, b"access-control-request-headers")).decode("latin-1").lower()
            names = [name for name in map(str.strip, wanted.split(",")) if self.ALLOWED.fullmatch(name)]
            headers = {"access-control-allow-methods": self.METHODS.decode(), "access-control-max-age": "600"}
            if names:
                headers["access-control-allow-headers"] = ", ".join(names)
            await Response(status_code=204, headers=headers)(scope, receive, send_granted)
        else:
            await self.app(scope, receive, send_granted)


def _valid(parsed: _T | None, text: str) -> _T:
    if parsed is None:
        raise ValueError(f"not a host or origin: {text!r}")
    return parsed


def _forbidden(scope: Scope, message: str, code: str) -> Response:
    return ErrorResponse(scope, 403, message, code=code, retry=False)


class ApiKey:
    """With a key, every path needs it but a short public list. Without one, the server must be bound to loopback only.

    The path is the one that routing sees, and whatever is not on the list is closed: an odd spelling of a path opens nothing.
    """

    PUBLIC_PATHS = frozenset({"/", "/health", "/health/ready"})
    PUBLIC_FILE = re.compile(r"/static(/(?!\.{1,2}(/|\Z))[A-Za-z0-9._-]+)+")

    def __init__(self, app: ASGIApp, *, key: SecretStr | str | None = None) -> None:
        self.app = app
        secret = key.get_secret_value() if isinstance(key, SecretStr) else key
        if secret == "":
            raise ValueError("the API key is empty: set one, or none")
        self._digest = None if secret is None else hashlib.sha256(secret.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._digest is None or not _is_request(scope) or self._is_public(scope["path"]):
            await self.app(scope, receive, send)
            return
        presented = presented_key(scope["headers"])
        # Digests have one length and no order that a timing could follow.
        if presented is not None and hmac.compare_digest(hashlib.sha256(presented).digest(), self._digest):
            await self.app(scope, receive, send)
            return
        message = "You didn't provide an API key." if presented is None else "Incorrect API key provided."
        refusal = ErrorResponse(scope, 401, message, code="invalid_api_key", retry=False)
        await refusal(scope, receive, send)

    def _is_public(self, path: str) -> bool:
        return path in self.PUBLIC_PATHS or self.PUBLIC_FILE.fullmatch(path) is not None


def presented_key(headers: RawHeaders) -> bytes | None:
    """The credential of a request, or None. An `Authorization` header counts even if it is useless; `x-api-key` comes second."""
    bearers = [value for name, value in headers if name == b"authorization"]
    if bearers:
        scheme, _, credential = bearers[0].partition(b" ")
        is_usable = len(bearers) == 1 and scheme.lower() == b"bearer"
        return (credential.strip() or None) if is_usable else None
    keys = [value for name, value in headers if name == b"x-api-key"]
    return (keys[0] or None) if len(keys) == 1 else None


class BodyLimit:
    """Counts the body while it is read and answers 413 at the first byte too many; a coded body, which could grow, is 415.

    The application then sees a client that has left. What the client still sends is thrown away for a moment, because a
    connection closed over unread bytes is reset, and the reply may be lost with it.
    """

    LINGER_S = 1.0

    def __init__(self, app: ASGIApp, *, max_bytes: int = 32 * 2**20) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        too_large = ErrorResponse(
            scope,
            413,
            f"The request body is larger than {self.max_bytes} bytes.",
            code="request_too_large",
            retry=False,
            headers={"connection": "close"},
        )
        codings = {coding.strip().lower() for value in _values(scope, b"content-encoding") for coding in value.split(b",")}
        if codings - {b"identity", b""}:
            message = "The request body must not be compressed: send it without Content-Encoding."
            coded = ErrorResponse(scope, 415, message, code="unsupported_content_encoding", retry=False, headers={"connection": "close"})
            await self._answer_early(coded, receive, send)
            return
        if any(int(length) > self.max_bytes for length in _values(scope, b"content-length")):
            await self._answer_early(too_large, receive, send)
            return

        num_bytes = 0
        has_started = is_refused = False

        async def receive_counted() -> Message:
            nonlocal num_bytes, is_refused
            if is_refused:
                return {"type": "http.disconnect"}
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes <= self.max_bytes:
                return message
            is_refused = True
            if not has_started:
                await self._answer_early(too_large, receive, send, is_all_here=not message.get("more_body", False))
            return {"type": "http.disconnect"}

        async def send_once(message: Message) -> None:
            nonlocal has_started
            if is_refused and not has_started:
                return  # the application's answer to a request that is answered already
            has_started = True
            await send(message)

        with suppress(ClientDisconnect):  # refused above or really gone: either way there is nobody left to answer
            await self.app(scope, receive_counted, send_once)

    async def _answer_early(self, refusal: Response, receive: Receive, send: Send, *, is_all_here: bool = False) -> None:
        await send({"type": "http.response.start", "status": refusal.status_code, "headers": refusal.raw_headers})
        await send({"type": "http.response.body", "body": refusal.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(self.LINGER_S):
                while not is_all_here:
                    is_all_here = not (await receive()).get("more_body", False)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

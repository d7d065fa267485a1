"""The one way out: whatever this server fetches goes through here, with limits of bytes and of time.

`HttpClient` goes where a stranger's request points. A name is resolved once, all its addresses must be such as the caller allows, and
the connection goes to one of these. So what was checked is what is reached, whatever the name means a moment later. The certificate is
still that of the name.

`OriginClient` goes to one origin that the operator chose, with a credential that no other origin is shown.
"""

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Literal
from urllib.parse import urljoin

import httpx2

Resolve = Callable[[str, int], Sequence[str]]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

DEFAULT_PORTS = {"http": 80, "https": 443}
_MAX_URL = 8192
_CONNECT_S = 5.0
_MAX_TRIED = 4
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::(?P<port>[1-9][0-9]{0,4}))?(?P<path>/[^?#]*)?(?P<query>\?[^#]*)?(?:#.*)?",
    re.IGNORECASE,
)
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


class FetchFailed(Exception):
    """Why, as the end of a sentence for the client. It says nothing of what is behind an address that is refused."""


@dataclass(frozen=True, slots=True)
class Url:
    """`host` is a name in small letters or an address as it is usually written; `target` is the rest as it was given, sent as it is."""

    scheme: Literal["http", "https"]
    host: str
    port: int
    target: str

    @classmethod
    def parse(cls, text: str) -> "Url | None":
        """None for all that is not plainly one: what two readers could take for two hosts is taken for none."""
        if len(text) > _MAX_URL or not re.fullmatch(r"[!-\[\]-~]+", text):  # visible ASCII without the backslash
            return None
        match = _URL.fullmatch(text)
        if match is None:
            return None
        host = parse_host(match["host"])
        scheme: Literal["http", "https"] = "https" if match["scheme"].lower() == "https" else "http"
        port = DEFAULT_PORTS[scheme] if match["port"] is None else int(match["port"])
        if host is None or port > 65535:
            return None
        return cls(scheme, host, port, (match["path"] or "/") + (match["query"] or ""))

    @property
    def is_literal(self) -> bool:
        """Whether the host is an address."""
        return _address(self.host) is not None

    @property
    def authority(self) -> str:
        """As the `Host` header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def parse_host(text: str) -> str | None:
    """A name, or an address in its one usual spelling (IPv6 in brackets, which are taken off). None for anything else: `127.1`,
    `0x7f.1` and `2130706433` are addresses to some and names to others."""
    host = text.lower()
    if host.startswith("["):
        address = _address(host[1:-1])
        return host[1:-1] if isinstance(address, ipaddress.IPv6Address) and str(address) == host[1:-1] else None
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        return host if _address(host) is not None else None
    return host if len(host) <= 253 and all(_LABEL.fullmatch(label) for label in labels) else None


def _address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_UNICAST = ipaddress.IPv6Network("2000::/3")


def is_public(text: str) -> bool:
    """Whether an address belongs to the internet at large, and not to this machine, its network, or nobody."""
    address = _address(text)
    if isinstance(address, ipaddress.IPv6Address):
        nat64 = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None
        inner = address.ipv4_mapped or address.sixtofour or nat64
        if inner is None:
            return address in _UNICAST and address.is_global and address.teredo is None
        address = inner
    return address is not None and address.is_global and not address.is_multicast and not address.is_reserved


def resolve(host: str, port: int) -> Sequence[str]:
    """The system's own answer. Raises `OSError`."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return tuple(dict.fromkeys(str(where[0]) for *_, where in found))


class HttpClient:
    """Keeps no connection, no cookie and no credential; knows no proxy."""

    def __init__(self, *, resolve: Resolve = resolve, tls: ssl.SSLContext | None = None) -> None:
        self._resolve = resolve
        self._tls = tls
        # A resolver may hang: it has threads of its own.
        self._resolvers = ThreadPoolExecutor(8, thread_name_prefix="resolve")

    async def get(self, url: Url, *, max_bytes: int, deadline: float, may_reach: Callable[[str], bool], accept: str, agent: str) -> bytes:
        """The body of a reply with status 200. `deadline` is a time of the event loop's clock. Raises `FetchFailed`."""
        try:
            async with asyncio.timeout_at(deadline):
                addresses = await self._addresses(url, may_reach)
                headers = {"host": url.authority, "accept": accept, "accept-encoding": "identity", "user-agent": agent}
                async with self._reply(url, addresses, headers) as reply:
                    return await _body(reply, max_bytes)
        except TimeoutError:
            raise FetchFailed("it took too long") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError):
            raise FetchFailed("its host did not answer as it should") from None

    async def _addresses(self, url: Url, may_reach: Callable[[str], bool]) -> Sequence[str]:
        if url.is_literal:
            addresses: Sequence[str] = (url.host,)
        else:
            try:
                addresses = await asyncio.get_running_loop().run_in_executor(self._resolvers, self._resolve, url.host, url.port)
            except (OSError, UnicodeError):
                addresses = ()
        if not addresses or not all(may_reach(address) for address in addresses):
            raise FetchFailed("its host cannot be reached from here")  # the same for both: nobody learns what names there are
        return addresses[:_MAX_TRIED]

    @asynccontextmanager
    async def _reply(self, url: Url, addresses: Sequence[str], headers: dict[str, str]) -> AsyncGenerator[httpx2.Response]:
        """From the first of the addresses that takes a connection."""
        if self._tls is None:
            self._tls = await asyncio.to_thread(httpx2.create_ssl_context, trust_env=False)
        transport = httpx2.AsyncHTTPTransport(verify=self._tls, trust_env=False)
        timeout = httpx2.Timeout(None, connect=_CONNECT_S)
        async with httpx2.AsyncClient(transport=transport, trust_env=False, follow_redirects=False, timeout=timeout) as client:
            for i, address in enumerate(addresses):
                place = httpx2.URL(scheme=url.scheme, host=address, port=url.port, path="/")
                extensions = {"sni_hostname": url.host, "target": url.target.encode("ascii")}
                request = client.build_request("GET", place, headers=headers, extensions=extensions)
                try:
                    reply = await client.send(request, stream=True)
                except (httpx2.ConnectError, httpx2.ConnectTimeout):
                    if i == len(addresses) - 1:
                        raise
                    continue
                try:
                    yield reply
                finally:
                    await reply.aclose()
                return


async def _body(reply: httpx2.Response, max_bytes: int) -> bytes:
    if 300 <= reply.status_code < 400:
        raise FetchFailed("it is elsewhere, and redirects are not followed")
    if reply.status_code != 200:
        raise FetchFailed(f"its host answered with status {reply.status_code}")
    if reply.headers.get("content-encoding", "identity") != "identity":
        raise FetchFailed("its host compressed it")
    body = bytearray()
    async for piece in reply.aiter_raw():
        body += piece
        if len(body) > max_bytes:
            raise FetchFailed(f"it has more than {max_bytes >> 20} MB")
    return bytes(body)


class Unreachable(Exception):
    """No reply, or one that broke off: another try may succeed. Its text is the end of a sentence."""


class BodyTooLong(Exception):
    """A reply has more bytes than were allowed for."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Its body has not been read yet. `headers` are by their names in small letters; `is_elsewhere`: another origin than the asked one
    answered."""

    status: int
    headers: Mapping[str, str]
    is_elsewhere: bool
    _response: httpx2.Response

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises `Unreachable`."""
        try:
            async for piece in self._response.aiter_raw():
                yield piece
        except (httpx2.HTTPError, OSError) as error:
            raise Unreachable(_reason(error)) from error

    async def body(self, *, max_bytes: int) -> bytes:
        """The whole of it. Raises `Unreachable` and `BodyTooLong`."""
        body = bytearray()
        async for piece in self.pieces():
            body += piece
            if len(body) > max_bytes:
                raise BodyTooLong
        return bytes(body)


def _reason(error: Exception) -> str:
    match error:
        case httpx2.TimeoutException():
            return "it did not answer in time"
        case httpx2.ConnectError():
            return "no connection to it could be made"
        case _:
            return "it broke off its answer"


class OriginClient:
    """Asks one origin, and follows its redirects: to wherever they lead, but never from https to http, and the token stays with the
    origin. Keeps connections, and no cookies. Proxies of the environment hold, except on the way to this machine itself.

    `stall_s` is how long a reply may take to begin, and how long nothing may come of it, in seconds.
    """

    MAX_REDIRECTS = 5

    def __init__(self, base: Url, *, token: str | None, agent: str, connect_s: float = 10.0, stall_s: float = 30.0) -> None:
        self.base = base
        self._token = token
        self._agent = agent
        self._timeout = httpx2.Timeout(stall_s, connect=connect_s, pool=None)
        self._client: httpx2.AsyncClient | None = None
        self._making = asyncio.Lock()

    @property
    def has_token(self) -> bool:
        return self._token is not None

    @asynccontextmanager
    async def get(self, target: str, headers: Mapping[str, str] | None = None) -> AsyncGenerator[Reply]:
        """`target` begins with a slash and goes after the base's own path. Any status but a redirect is a reply. Raises `Unreachable`."""
        url = self.base
        target = url.target.rstrip("/") + target
        response = await self._send(url, target, headers or {})
        try:
            for _ in range(self.MAX_REDIRECTS):
                if response.status_code not in (301, 302, 303, 307, 308) or "location" not in response.headers:
                    break
                goal = Url.parse(urljoin(f"{url.scheme}://{url.authority}{target}", response.headers["location"]))
                if goal is None or (url.scheme == "https" and goal.scheme != "https"):
                    raise Unreachable("it redirects to a place that is not gone to")
                await response.aclose()
                url, target = goal, goal.target
                response = await self._send(url, target, headers or {})
            else:
                raise Unreachable("it redirects too often")
            headers_told = {name.lower(): value for name, value in response.headers.items()}
            yield Reply(response.status_code, headers_told, not self._is_own(url), response)
        finally:
            await response.aclose()

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    def _is_own(self, url: Url) -> bool:
        return (url.scheme, url.host, url.port) == (self.base.scheme, self.base.host, self.base.port)

    async def _send(self, url: Url, target: str, headers: Mapping[str, str]) -> httpx2.Response:
        async with self._making:
            if self._client is None:
                self._client = await asyncio.to_thread(self._new_client)  # reading the certificates takes a while
        sent = {"host": url.authority, "accept-encoding": "identity", "user-agent": self._agent, **headers}
        if self._token is not None and self._is_own(url):
            sent["authorization"] = f"Bearer {self._token}"
        host = f"[{url.host}]" if ":" in url.host else url.host
        place = httpx2.URL(scheme=url.scheme, host=host, port=url.port, path="/")
        request = self._client.build_request("GET", place, headers=sent, extensions={"target": target.encode("ascii")})
        try:
            return await self._client.send(request, stream=True)
        except (httpx2.HTTPError, OSError) as error:
            raise Unreachable(_reason(error)) from error

    def _new_client(self) -> httpx2.AsyncClient:
        is_here = self.base.host == "localhost" or (self.base.is_literal and ipaddress.ip_address(self.base.host).is_loopback)
        cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=16)
        return httpx2.AsyncClient(trust_env=not is_here, follow_redirects=False, timeout=self._timeout, cookies=cookies, limits=limits)

"""Pictures that a request only names → the same request with the pictures in it. Off unless the operator names hosts."""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.messages import Content, Image, RemoteImage
from mlx_manager.core.requests import Conversation, GenerationRequest, Prompt
from mlx_manager.http_client import DEFAULT_PORTS, FetchFailed, HttpClient, Url, is_public, parse_host
from mlx_manager.protocols.media import IMAGE_TYPES, MAX_IMAGE_BYTES

MAX_TOTAL_BYTES = 64 << 20
TIMEOUT_S = 20.0
# At a time, of all requests together: each may hold a whole picture.
_MAX_FETCHES = 16
_AGENT = f"mlx-manager/{version('mlx-manager')}"
_ENTRY = re.compile(r"(?P<host>[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::(?P<port>[1-9][0-9]{0,4}))?", re.IGNORECASE)


def parse_entry(text: str) -> tuple[str, int | None] | None:
    """A host and a port, None for the usual one, of a list of hosts; None for what is neither `*`, a name nor an address."""
    if text == "*":
        return "*", None
    match = _ENTRY.fullmatch(text)
    host = None if match is None else parse_host(match["host"])
    return None if match is None or host is None else (host, None if match["port"] is None else int(match["port"]))


class RemoteMedia:
    """`hosts` are names, with a port if it is not the usual one; `*` is every name. A name counts only as long as all its addresses are
    `may_reach`: an address that is not of the internet at large is reached only by listing that very address."""

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        allows_http: bool = False,
        client: HttpClient | None = None,
        may_reach: Callable[[str], bool] = is_public,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Raises `ValueError` for a host that is none."""
        parsed = {host: parse_entry(host) for host in hosts}
        if wrong := [host for host, entry in parsed.items() if entry is None]:
            raise ValueError(f"'{wrong[0]}' is not a host, a host and a port, or '*'")
        self._hosts = frozenset(parsed.values())
        self._allows_http = allows_http
        self._client = HttpClient() if client is None else client
        self._may_reach = may_reach
        self._timeout_s = timeout_s
        self._places = asyncio.Semaphore(_MAX_FETCHES)

    def targets(self, request: GenerationRequest) -> Mapping[str, Url]:
        """What has to be fetched for a request, by its spelling there. Raises `InvalidField` for what this server does not fetch."""
        return {part.url: self._target(part) for part in _remote(request)}

    async def fetched(self, request: GenerationRequest, targets: Mapping[str, Url]) -> GenerationRequest:
        """Each URL once, all of them side by side. Raises `InvalidField`, naming the field of the first that cannot be had."""
        if not targets:
            return request
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        wanted = {part.url: part.where for part in reversed(_remote(request))}  # the first of several
        room = _Room(MAX_TOTAL_BYTES)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {url: group.create_task(self._fetch(targets[url], where, deadline, room)) for url, where in wanted.items()}
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        found = {url: task.result() for url, task in tasks.items()}
        return replace(request, prompts=tuple(_with(prompt, found) for prompt in request.prompts))

    def _target(self, part: RemoteImage) -> Url:
        if not self._hosts:
            text = "pictures are taken from 'data:' URLs only; this server fetches none"
            raise InvalidField(f"Invalid '{part.where}': {text}.", param=part.where)
        url = Url.parse(part.url)
        if url is None:
            raise InvalidField(f"Invalid '{part.where}': it is not a URL that this server fetches from.", param=part.where)
        if url.scheme != "https" and not self._allows_http:
            raise InvalidField(f"Invalid '{part.where}': this server fetches by 'https' only.", param=part.where)
        if not self._is_listed(url):
            raise InvalidField(f"Invalid '{part.where}': this server does not fetch from that host.", param=part.where)
        return url

    def _is_listed(self, url: Url) -> bool:
        is_usual = url.port == DEFAULT_PORTS[url.scheme]
        if (url.host, url.port) in self._hosts or (is_usual and (url.host, None) in self._hosts):
            return True
        return is_usual and not url.is_literal and ("*", None) in self._hosts

    async def _fetch(self, url: Url, where: str, deadline: float, room: "_Room") -> bytes:
        # A listed address is one that the operator spelt out.
        may_reach = {url.host}.__contains__ if url.is_literal else self._may_reach
        try:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._places.acquire()
            except TimeoutError:
                raise FetchFailed("it took too long") from None
            try:
                data = await self._client.get(
                    url, max_bytes=MAX_IMAGE_BYTES, deadline=deadline, may_reach=may_reach, accept=", ".join(IMAGE_TYPES), agent=_AGENT
                )
            finally:
                self._places.release()
            room.take(len(data))
        except FetchFailed as error:
            raise InvalidField(f"Invalid '{where}': it could not be fetched: {error}.", param=where) from None
        return data


class _Room:
    """What is left of the bytes that a request may fetch."""

    def __init__(self, num_bytes: int) -> None:
        self._total = self._left = num_bytes

    def take(self, num_bytes: int) -> None:
        """Raises `FetchFailed`."""
        self._left -= num_bytes
        if self._left < 0:
            raise FetchFailed(f"the pictures of a request have {self._total >> 20} MB together at most")


def _remote(request: GenerationRequest) -> list[RemoteImage]:
    conversations = (prompt for prompt in request.prompts if isinstance(prompt, Conversation))
    shown = (part for conversation in conversations for message in conversation.messages for part in message.media)
    return [part for part in shown if isinstance(part, RemoteImage)]


def _with(prompt: Prompt, found: Mapping[str, bytes]) -> Prompt:
    if not isinstance(prompt, Conversation):
        return prompt
    return replace(prompt, messages=tuple(replace(m, content=_content(m.content, found)) for m in prompt.messages))


def _content(content: Content, found: Mapping[str, bytes]) -> Content:
    if isinstance(content, str):
        return content
    return tuple(Image(found[part.url], part.where) if isinstance(part, RemoteImage) else part for part in content)

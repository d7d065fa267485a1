"""Asking a server that runs: ours, or whatever else answers there."""

from typing import Any, cast
from urllib.parse import urlsplit

import httpx2

TIMEOUT_S = 5.0


class NoAnswer(Exception):
    """Nobody of ours listens there. Its text is a sentence."""


class Refused(Exception):
    """A server answered, and not with what was asked for. Its text is a sentence."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


def read_status(url: str, key: str | None) -> dict[str, Any]:
    """What `/api/status` says. Raises `NoAnswer` and `Refused`."""
    status = call(url, key, "GET", "/api/status")
    if "models" not in status:
        raise NoAnswer(f"What answers at {url} is not MLX Manager.")
    return status


def call(url: str, key: str | None, method: str, path: str, body: Any = None, *, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """The object that a path of the server answers with, {} where it has nothing to say. Raises `NoAnswer` and `Refused`."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    try:
        with _client(url, timeout_s) as client:
            reply = client.request(method, url.rstrip("/") + path, headers=headers, json=body)
    except httpx2.InvalidURL as error:
        raise NoAnswer(f"{url} is no address of a server: {error}.") from error
    except httpx2.HTTPError as error:
        raise NoAnswer(f"No server answers at {url}. Start one with: mlx-manager serve") from error
    if reply.status_code == 401:
        raise Refused(f"The server at {url} wants its API key: set MLX_MANAGER_API_KEY to it.", 401)
    try:
        told: Any = reply.json() if reply.content else {}
    except ValueError:
        told = None
    if reply.is_success and isinstance(told, dict):
        return cast(dict[str, Any], told)
    if not _is_ours(reply):
        raise NoAnswer(f"What answers at {url} is not MLX Manager.")
    why = cast(dict[str, Any], told).get("detail") if isinstance(told, dict) else None
    raise Refused(str(why) if why else f"The server at {url} answered with status {reply.status_code}.", reply.status_code)


def is_us(url: str) -> bool:
    """Whether an MLX Manager answers there; no key is needed to ask."""
    try:
        with _client(url) as client:
            return _is_ours(client.get(f"{url}/health"))
    except (httpx2.HTTPError, httpx2.InvalidURL):
        return False


def _is_ours(reply: httpx2.Response) -> bool:
    return reply.headers.get("x-request-id", "").startswith("req_")


def _client(url: str, timeout_s: float = TIMEOUT_S) -> httpx2.Client:
    is_here = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    return httpx2.Client(timeout=timeout_s, trust_env=not is_here)  # a proxy has no business on the way to ourselves

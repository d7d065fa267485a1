"""Asking a server that runs: ours, or whatever else answers there."""

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from urllib.parse import quote, urlsplit

import httpx2

TIMEOUT_S = 5.0
_HUB_S = 300.0
"""Of what asks the Hub first, which has time limits of its own."""


class NoAnswer(Exception):
    """Nobody of ours listens there. Its text is a sentence."""


class Refused(Exception):
    """A server answered, and not with what was asked for. Its text is a sentence."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


class Server:
    """A server at an address, with its key if it has one. Everything raises `NoAnswer` and `Refused`."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url.rstrip("/")
        self._headers = {} if key is None else {"authorization": f"Bearer {key}"}

    def ask(self, method: str, path: str, body: Any = None, *, timeout_s: float | None = TIMEOUT_S) -> dict[str, Any]:
        """The object that a path answers with, {} where it has nothing to say."""
        with self._reached(), _client(self.url, timeout_s) as client:
            reply = client.request(method, f"{self.url}{path}", headers=self._headers, json=body)
        try:
            told: Any = reply.json() if reply.content else {}
        except ValueError:
            told = None
        if not reply.is_success or not isinstance(told, dict) or not _is_ours(reply):
            raise self._refused(reply)
        return cast(dict[str, Any], told)

    def status(self) -> dict[str, Any]:
        """What `/api/status` says."""
        return self.ask("GET", "/api/status")

    def models(self) -> dict[str, Any]:
        """What `/api/models` says."""
        return self.ask("GET", "/api/models")

    def unload(self, model: str) -> dict[str, Any]:
        """The model afterwards. Waits for the replies that it is writing."""
        return self.ask("POST", f"/api/models/{quote(model)}/unload", timeout_s=None)

    def download(self, model: str, revision: str) -> dict[str, Any]:
        """Started, or joined if it is under way."""
        return self.ask("POST", "/api/downloads", {"model": model, "revision": revision}, timeout_s=_HUB_S)

    def download_now(self, id: str) -> dict[str, Any]:
        """How it stands."""
        return self.ask("GET", f"/api/downloads/{quote(id)}")

    def deletion(self, model: str) -> dict[str, Any]:
        """What deleting a model would do."""
        return self.ask("GET", f"/api/models/{quote(model)}/deletion", timeout_s=None)

    def delete(self, model: str, confirmation: str) -> dict[str, Any]:
        return self.ask("DELETE", f"/api/models/{quote(model)}?confirmation={quote(confirmation)}", timeout_s=None)

    def load(self, model: str, options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events of a load, by name, until it is over."""
        with self._reached(), _client(self.url, None) as client:
            request = client.build_request("POST", f"{self.url}/api/models/{quote(model)}/load", headers=self._headers, json=dict(options))
            reply = client.send(request, stream=True)
            try:
                if reply.status_code != 200:
                    reply.read()
                    raise self._refused(reply)
                name = ""
                for line in reply.iter_lines():
                    field, _, value = line.partition(": ")
                    if field == "event":
                        name = value
                    elif field == "data":
                        yield name, json.loads(value)
            finally:
                reply.close()

    @contextmanager
    def _reached(self) -> Generator[None]:
        try:
            yield
        except httpx2.InvalidURL as error:
            raise NoAnswer(f"{self.url} is no address of a server: {error}.") from error
        except httpx2.HTTPError as error:
            raise NoAnswer(f"No server answers at {self.url}. Start one with: mlx-manager serve") from error

    def _refused(self, reply: httpx2.Response) -> NoAnswer | Refused:
        if not _is_ours(reply):
            return NoAnswer(f"What answers at {self.url} is not MLX Manager.")
        if reply.status_code == 401:
            return Refused(f"The server at {self.url} wants its API key: set MLX_MANAGER_API_KEY to it.", 401)
        try:
            detail: Any = reply.json().get("detail")
        except (ValueError, AttributeError):
            detail = None
        why = detail if isinstance(detail, str) else f"The server at {self.url} answered with status {reply.status_code}."
        return Refused(why, reply.status_code)


def is_us(url: str) -> bool:
    """Whether an MLX Manager answers there; no key is needed to ask."""
    try:
        with _client(url, TIMEOUT_S) as client:
            return _is_ours(client.get(f"{url}/health"))
    except (httpx2.HTTPError, httpx2.InvalidURL):
        return False


def _is_ours(reply: httpx2.Response) -> bool:
    return reply.headers.get("x-request-id", "").startswith("req_")


def _client(url: str, timeout_s: float | None) -> httpx2.Client:
    """`timeout_s` None: a reply may take as long as it likes, but not the connection to it."""
    is_here = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    timeout = httpx2.Timeout(timeout_s, connect=TIMEOUT_S)
    return httpx2.Client(timeout=timeout, trust_env=not is_here)  # a proxy has no business on the way to ourselves

"""Asking the Hub: lists, descriptions and files, with a time limit on all of it. What is asked for is decided elsewhere."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import cast
from urllib.parse import quote, unquote, urlencode

from huggingface_hub import constants, get_token

from mlx_manager.core.errors import HubRefused, HubUnavailable, InvalidField, MLXManagerError, NotFound
from mlx_manager.http_client import BodyTooLong, OriginClient, Reply, Unreachable, Url
from mlx_manager.hub.checkpoint import is_valid_id

AGENT = f"mlx-manager/{version('mlx-manager')}"
MAX_LIST_BYTES = 32 << 20
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


def stored_token() -> str | None:
    """HF_TOKEN, else what `hf auth login` left. Reads files."""
    return None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()


class Hub:
    """One endpoint. `timeout_s` is how long a list or a small file may take, in seconds; of a large file it is how long nothing may come.

    Every method raises `HubUnavailable`, `HubRefused` and `NotFound`, in words for whoever asked.
    """

    def __init__(
        self, endpoint: str, *, timeout_s: float = 20.0, is_offline: bool = False, token: Callable[[], str | None] = stored_token
    ) -> None:
        """Raises `ValueError` for an endpoint that is no address."""
        base = Url.parse(endpoint.rstrip("/"))
        if base is None or "?" in base.target:
            raise ValueError(f"'{endpoint}' is not an address such as https://huggingface.co")
        self.endpoint = endpoint.rstrip("/")
        self.name = base.authority
        self.is_offline = is_offline
        self._base = base
        self._timeout_s = timeout_s
        self._token = token
        self._client: OriginClient | None = None

    @classmethod
    def of(cls, endpoint: str | None, *, timeout_s: float) -> "Hub":
        """The one that is configured, else Hugging Face's own variables hold: HF_ENDPOINT, HF_HUB_OFFLINE. Raises `ValueError`."""
        return cls(constants.ENDPOINT if endpoint is None else endpoint, timeout_s=timeout_s, is_offline=constants.HF_HUB_OFFLINE)

    async def models(self, query: Mapping[str, str | list[str]]) -> tuple[object, str | None]:
        """A page of the list of models, and the cursor of what follows."""
        async with self._asked(f"/api/models?{urlencode(query, doseq=True)}", None) as reply:
            link = re.search(r'<[^>]*[?&]cursor=([^&>]+)[^>]*>\s*;\s*rel="?next', reply.headers.get("link", ""))
            return _parsed(await reply.body(max_bytes=MAX_LIST_BYTES), self.name), None if link is None else unquote(link[1])

    async def describe(self, repo: str, revision: str) -> object:
        """A revision with all its files, for `listing.read_listing`."""
        return _parsed(
            await self._body(f"/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true", MAX_LIST_BYTES, repo), self.name
        )

    async def small_file(self, repo: str, commit: str, path: str, *, max_bytes: int) -> bytes:
        return await self._body(_resolve(repo, commit, path), max_bytes, repo)

    async def beginning(self, repo: str, commit: str, path: str, num_bytes: int) -> bytes:
        """The first bytes of a file, of one that is as long as that at least."""
        headers = {"range": f"bytes=0-{num_bytes - 1}"}
        try:
            async with asyncio.timeout(self._timeout_s), self._get(_resolve(repo, commit, path), headers, repo) as reply:
                got = bytearray()
                async for piece in reply.pieces():  # of a server that knows no ranges, no more is read than was asked for
                    got += piece
                    if len(got) >= num_bytes:
                        break
                return bytes(got[:num_bytes])
        except (TimeoutError, Unreachable) as error:
            raise self._unavailable(error) from error

    @asynccontextmanager
    async def file(self, repo: str, commit: str, path: str, *, start: int = 0, validator: str | None = None) -> AsyncGenerator[Reply]:
        """A file from byte `start` on, if it still is what `validator` names: 206, or 200 from its beginning, or 416. `Unreachable` can
        be raised while it is read."""
        headers = {} if start == 0 else {"range": f"bytes={start}-"} | ({} if validator is None else {"if-range": validator})
        try:
            async with self._get(_resolve(repo, commit, path), headers, repo) as reply:
                yield reply
        except Unreachable as error:
            raise self._unavailable(error) from error

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    async def has_token(self) -> bool:
        return not self.is_offline and (await self._origin()).has_token

    async def _body(self, target: str, max_bytes: int, about: str | None) -> bytes:
        async with self._asked(target, about) as reply:
            return await reply.body(max_bytes=max_bytes)

    @asynccontextmanager
    async def _asked(self, target: str, about: str | None) -> AsyncGenerator[Reply]:
        """Within the time limit, the reading of the reply included."""
        try:
            async with asyncio.timeout(self._timeout_s), self._get(target, {}, about) as reply:
                yield reply
        except BodyTooLong:
            raise HubUnavailable(f"The Hub at {self.name} answered with more than could be meant.") from None
        except (TimeoutError, Unreachable) as error:
            raise self._unavailable(error) from error

    @asynccontextmanager
    async def _get(self, target: str, headers: Mapping[str, str], about: str | None) -> AsyncGenerator[Reply]:
        if self.is_offline:
            raise HubUnavailable("This machine is offline: HF_HUB_OFFLINE is set, so the Hub is not asked.", is_offline=True)
        client = await self._origin()
        async with client.get(target, headers) as reply:
            if reply.status not in (200, 206, 416):
                raise self._refusal(reply, about, client.has_token)
            yield reply

    async def _origin(self) -> OriginClient:
        if self._client is None:
            token = await asyncio.to_thread(self._token)
            if self._client is None:  # somebody else may have made it meanwhile
                self._client = OriginClient(
                    self._base, token=token, agent=AGENT, connect_s=min(10.0, self._timeout_s), stall_s=self._timeout_s
                )
        return self._client

    def _unavailable(self, error: TimeoutError | Unreachable) -> HubUnavailable:
        reason = "it did not answer in time" if isinstance(error, TimeoutError) else str(error)
        return HubUnavailable(f"The Hub at {self.name} cannot be reached: {reason}.")

    def _refusal(self, reply: Reply, about: str | None, has_token: bool) -> MLXManagerError:
        code = reply.headers.get("x-error-code", "")
        what = "it" if about is None else f"'{about}'"
        if reply.status in _TRANSIENT:
            retry_after_s = _seconds(reply.headers.get("retry-after"))
            if reply.status == 429:
                hint = "" if has_token else " A token (HF_TOKEN) allows more"
                return HubUnavailable(f"The Hub at {self.name} wants fewer requests.{hint}", retry_after_s=retry_after_s)
            return HubUnavailable(f"The Hub at {self.name} answered with status {reply.status}.", retry_after_s=retry_after_s)
        if reply.is_elsewhere:  # the next redirect leads to a fresh address
            return HubUnavailable(f"Where the Hub at {self.name} keeps its files, the answer was status {reply.status}.")
        page = self.endpoint if about is None else f"{self.endpoint}/{about}"
        if code == "GatedRepo" or (reply.status == 403 and code != "DisabledRepo"):
            then = "with the account of your token" if has_token else "and set HF_TOKEN to a token of that account"
            return HubRefused(f"The Hub gives {what} only to who has accepted its terms: accept them at {page}, {then}.")
        if code == "RevisionNotFound":
            return NotFound(f"The model {what} has no such revision on the Hub at {self.name}.", param="revision")
        if code == "EntryNotFound":
            return NotFound(f"The Hub at {self.name} no longer has a file of {what}.")
        if reply.status == 401 and has_token:
            return HubRefused(f"The Hub at {self.name} does not accept the token, or has no {what} for it: look at HF_TOKEN.")
        if reply.status in (401, 404):
            hint = "" if has_token else ", or it is private and needs a token (HF_TOKEN)"
            return NotFound(f"There is no {what} on the Hub at {self.name}{hint}.", param=None if about is None else "model")
        return HubUnavailable(f"The Hub at {self.name} answered with status {reply.status}.")


def check_repository(id: str) -> None:
    """Raises `InvalidField` for what is no name of a model on the Hub, and so no part of an address there."""
    if not is_valid_id(id) or id.count("/") != 1:
        raise InvalidField(f"'{id[:100]}' is not the name of a model on the Hub: organisation/name.", param="model")


def _resolve(repo: str, commit: str, path: str) -> str:
    return f"/{repo}/resolve/{commit}/{quote(path)}"


def _parsed(body: bytes, name: str) -> object:
    try:
        return cast(object, json.loads(body))
    except (ValueError, RecursionError) as error:
        raise HubUnavailable(f"What answers at {name} is not the Hub: its answer is not JSON.") from error


def _seconds(retry_after: str | None) -> float | None:
    """Of a `Retry-After`, which is a number or a date."""
    if retry_after is None:
        return None
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None

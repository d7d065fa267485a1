"""Models on the Hub: found at once with what its list says, and looked into beside that.

What a model is follows from the same files as for one that is here: its configuration, tokenizer configuration and chat template, and the
header or index of its weights. They are fetched a few at a time, once for each commit, and what was learnt is kept within a bound.
"""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from mlx_manager.core.errors import MLXManagerError
from mlx_manager.hub.characteristics import Abilities, Characteristics
from mlx_manager.hub.checkpoint import Unusable, chat_template, check_config, is_valid_id, num_parameters, read_traits
from mlx_manager.hub.client import Hub
from mlx_manager.hub.listing import Listing, RemoteFile, is_weights, read_listing, wanted, weight_bytes
from mlx_manager.hub.safetensors import BadHeader, Tensor, header_length, parse_header

T = TypeVar("T")
Sort = Literal["downloads", "likes", "updated", "trending"]

MAX_KEPT = 1000
AT_ONCE = 6
"""Models that are looked into at a time."""
_SORTS: Mapping[Sort, str] = {"downloads": "downloads", "likes": "likes", "updated": "lastModified", "trending": "trendingScore"}
_EXPANDED = ["downloads", "likes", "lastModified", "gated", "sha", "tags", "config"]
_MAX_FILE_BYTES = 8 << 20
_FIRST_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Query:
    """`organisation` None: all of them. `mlx_only`: what is marked as made for MLX."""

    text: str = ""
    organisation: str | None = "mlx-community"
    mlx_only: bool = True
    sort: Sort = "downloads"
    limit: int = 20
    cursor: str | None = None


@dataclass(frozen=True, slots=True)
class Listed:
    """What the list says of a model. `updated` is a Unix time; `is_gated`: its terms have to be accepted."""

    id: str
    downloads: int
    likes: int
    updated: int | None
    is_gated: bool
    architecture: str | None
    commit: str | None


@dataclass(frozen=True, slots=True)
class Page:
    """`cursor` leads to what follows; None at the end."""

    models: tuple[Listed, ...]
    cursor: str | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """Of one model: what it is, or why it cannot be used or looked into."""

    id: str
    told: Characteristics | None
    reason: str | None = None


class Search:
    """Owned by the event loop. `close` ends what it does beside everybody's waiting."""

    def __init__(self, hub: Hub, abilities: Abilities, *, max_kept: int = MAX_KEPT) -> None:
        self._hub = hub
        self._max_kept = max_kept
        self._abilities = abilities
        self._kept: OrderedDict[str, tuple[str, Inspection]] = OrderedDict()  # by model, with the commit
        self._commits: OrderedDict[str, str] = OrderedDict()  # as lists last said
        self._running: dict[str, asyncio.Task[Inspection]] = {}
        self._places = asyncio.Semaphore(AT_ONCE)

    async def find(self, query: Query) -> Page:
        """A page of the list; looking into what is on it begins. Raises what the Hub does."""
        asked: dict[str, str | list[str]] = {"sort": _SORTS[query.sort], "limit": str(query.limit), "expand": _EXPANDED}
        if query.text:
            asked["search"] = query.text
        if query.organisation is not None:
            asked["author"] = query.organisation
        if query.mlx_only:
            asked["filter"] = ["mlx"]
        if query.cursor is not None:
            asked["cursor"] = query.cursor
        told, cursor = await self._hub.models(asked)
        entries = cast(list[object], told) if isinstance(told, list) else []
        models = tuple(listed for entry in entries if (listed := _listed(entry)) is not None)
        for listed in models:
            if listed.commit is not None:
                self._keep(self._commits, listed.id, listed.commit)
            if not listed.is_gated:
                self._begin(listed.id)
        return Page(models, cursor)

    def known(self, id: str) -> Inspection | None:
        """What has been learnt of a model in the commit that lists last named."""
        commit, kept = self._kept.get(id, ("", None))
        return kept if self._commits.get(id, commit) == commit else None

    async def inspect(self, id: str) -> Inspection:
        """The same of a valid id, waited for. One that fails says why; it is tried again by the next who asks."""
        known = self.known(id)
        return known if known is not None else await asyncio.shield(self._begin(id))

    async def close(self) -> None:
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _begin(self, id: str) -> asyncio.Task[Inspection]:
        known = self.known(id)
        task = self._running.get(id)
        if task is None:
            task = asyncio.create_task(self._look_into(id) if known is None else _given(known))
            self._running[id] = task
            task.add_done_callback(lambda _: self._running.pop(id, None))
        return task

    def _keep(self, kept: OrderedDict[str, T], key: str, value: T) -> None:
        kept[key] = value
        kept.move_to_end(key)
        while len(kept) > self._max_kept:
            kept.popitem(last=False)

    async def _look_into(self, id: str) -> Inspection:
        async with self._places:
            try:
                listing = read_listing(await self._hub.describe(id, self._commits.get(id, "main")))
                try:
                    found = Inspection(id, await self._told(id, listing))
                except Unusable as error:
                    found = Inspection(id, None, f"It cannot be used: {error.reason}.")
            except Unusable as error:
                return Inspection(id, None, f"It cannot be used: {error.reason}.")
            except MLXManagerError as error:
                return Inspection(id, None, error.message)
        self._keep(self._kept, id, (listing.commit, found))
        return found

    async def _told(self, id: str, listing: Listing) -> Characteristics:
        """Raises Unusable and what the Hub does."""
        files = wanted(listing)
        names = ("config.json", "tokenizer_config.json", "chat_template.jinja", "modules.json")
        config_text, tokenizer_text, template, steps_text = await asyncio.gather(*(self._text(id, listing, name) for name in names))
        config = _object(_json(config_text))
        check_config(config)
        tokenizer_config, steps = _object(_json(tokenizer_text)), _json(steps_text)
        weights = [file for file in files if is_weights(file.path) and "/" not in file.path]
        tensor_names, parameters = await self._weights(id, listing, weights, config)
        traits = read_traits(config, tokenizer_config, tensor_names, cast(list[Any], steps) if isinstance(steps, list) else None)
        checkpoint = traits.checkpoint(
            id, Path(id), size_bytes=weight_bytes(weights), num_parameters=parameters, created=int(datetime.now(UTC).timestamp())
        )
        tools, thinking = self._abilities(config, chat_template(template, tokenizer_config))
        writes = traits.kind in ("text", "vision")
        contents = {file.etag: file.size for file in files}
        return Characteristics(checkpoint, tools and writes, thinking and writes, sum(contents.values()))

    async def _weights(
        self, id: str, listing: Listing, weights: Sequence[RemoteFile], config: Mapping[str, Any]
    ) -> tuple[frozenset[str], int]:
        """The names of its arrays, and how many parameters they have: from the header of the one file, or the index of several."""
        if len(weights) == 1:
            tensors = await self._header(id, listing.commit, weights[0])
            return frozenset(tensors), num_parameters(tensors, config)
        index = _object(_json(await self._text(id, listing, "model.safetensors.index.json")))
        total = _object(index.get("metadata")).get("total_parameters")
        if isinstance(total, bool) or not isinstance(total, int) or total <= 0:
            bits = _object(config.get("quantization")).get("bits")
            total = weight_bytes(weights) * 8 // (bits if isinstance(bits, int) and bits > 0 else 16)
        return frozenset(_object(index.get("weight_map"))), total

    async def _header(self, id: str, commit: str, file: RemoteFile) -> dict[str, Tensor]:
        beginning = await self._hub.beginning(id, commit, file.path, min(_FIRST_BYTES, file.size))
        try:
            length = header_length(beginning, file.size)
            if length > _MAX_FILE_BYTES:
                raise BadHeader("its header is too large to be looked into")
            if 8 + length > len(beginning):
                beginning = await self._hub.beginning(id, commit, file.path, 8 + length)
            return parse_header(beginning[8 : 8 + length], file.size)
        except BadHeader as error:
            raise Unusable(f"{file.path}: {error}") from error

    async def _text(self, id: str, listing: Listing, path: str) -> str | None:
        """A file of a repository; None if it has none of that name, or one that is far too large."""
        file = listing.get(path)
        if file is None or file.size > _MAX_FILE_BYTES:
            return None
        return (await self._hub.small_file(id, listing.commit, path, max_bytes=_MAX_FILE_BYTES)).decode("utf-8", "replace")


async def _given(known: Inspection) -> Inspection:
    return known


def _listed(entry: object) -> Listed | None:
    """None for what is not a model that could be asked for."""
    model = _object(entry)
    id = model.get("id", model.get("modelId"))
    if not isinstance(id, str) or not is_valid_id(id) or id.count("/") != 1:
        return None
    architecture = _object(model.get("config")).get("model_type")
    commit = model.get("sha")
    return Listed(
        id=id,
        downloads=_count(model.get("downloads")),
        likes=_count(model.get("likes")),
        updated=_unix_time(model.get("lastModified")),
        is_gated=model.get("gated") not in (None, False),
        architecture=architecture if isinstance(architecture, str) else None,
        commit=commit if isinstance(commit, str) and commit.isalnum() and len(commit) == 40 else None,
    )


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _unix_time(text: object) -> int | None:
    try:
        return int(datetime.fromisoformat(text).timestamp()) if isinstance(text, str) else None
    except ValueError:
        return None


def _json(text: str | None) -> object:
    """None for what is not there or no JSON."""
    try:
        return None if text is None else cast(object, json.loads(text))
    except (ValueError, RecursionError):
        return None


def _object(value: object) -> dict[str, Any]:
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}

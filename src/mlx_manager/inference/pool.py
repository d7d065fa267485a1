"""Which models there are and which are loaded: lend one, load it once."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from mlx_manager.core.errors import EngineFault, InvalidField, ModelLoadFailed, ModelNotFound
from mlx_manager.hub.checkpoint import Checkpoint
from mlx_manager.inference.dialect import Dialect
from mlx_manager.inference.embedder import LocalEmbedder
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.engine import CacheState, Engine
from mlx_manager.inference.loader import EngineLimits, SharedWeights, load_dialect, load_embedder, load_engine, load_text_reader
from mlx_manager.inference.local_model import LocalModel
from mlx_manager.inference.text_reader import TextReader

log = logging.getLogger(__name__)

State = Literal["cold", "loading", "ready", "failed"]
FindCheckpoints = Callable[[], list[Checkpoint]]


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """`error` says why the last load failed; `load_s` how long the last one took, in seconds."""

    checkpoint: Checkpoint
    state: State
    error: str | None = None
    load_s: float | None = None
    num_running: int = 0
    num_waiting: int = 0
    cache: CacheState | None = None


R = TypeVar("R")
M = TypeVar("M")


class _Entry(Generic[R, M]):
    """A model: how it reads, which is known before its weights are, and the model itself."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.reads_like: _Entry[R, M] = self  # a model with an adapter like the one without
        self.reading: asyncio.Task[R] | None = None
        self.loading: asyncio.Task[M] | None = None
        self.model: M | None = None
        self.error: str | None = None
        self.load_s: float | None = None

    @property
    def state(self) -> State:
        if self.model is not None:
            return "ready"
        if self.loading is not None:
            return "loading"
        return "failed" if self.error is not None else "cold"

    def read(self) -> R:
        """Any thread."""
        raise NotImplementedError

    def load(self, reader: R, device: Device, limits: EngineLimits, weights: SharedWeights) -> M:
        """On the device thread."""
        raise NotImplementedError


class _TextEntry(_Entry[Dialect, LocalModel]):
    """A model that writes; a vision model is shown pictures as well."""

    def read(self) -> Dialect:
        return load_dialect(self.checkpoint.path, self.checkpoint.context_length, sees=self.checkpoint.kind == "vision")

    def load(self, reader: Dialect, device: Device, limits: EngineLimits, weights: SharedWeights) -> LocalModel:
        return LocalModel(reader, load_engine(self.checkpoint, reader, device, limits, weights))


class _EmbeddingEntry(_Entry[TextReader, LocalEmbedder]):
    def read(self) -> TextReader:
        return load_text_reader(self.checkpoint)

    def load(self, reader: TextReader, device: Device, limits: EngineLimits, weights: SharedWeights) -> LocalEmbedder:
        return LocalEmbedder(reader, load_embedder(self.checkpoint, device, limits))


_AnyEntry = _TextEntry | _EmbeddingEntry
_ENTRIES: dict[str, type[_AnyEntry]] = {
    "text": _TextEntry,
    "embedding": _EmbeddingEntry,
    "reranker": _EmbeddingEntry,
    "vision": _TextEntry,
}


class Pool:
    """Owned by the event loop. A model is loaded by the first request for it and stays; nobody has to leave yet."""

    def __init__(self, device: Device, find_checkpoints: FindCheckpoints, limits: EngineLimits) -> None:
        self._device = device
        self._find = find_checkpoints
        self._limits = limits
        self._weights = SharedWeights()
        self._entries: dict[str, _AnyEntry] = {}
        self._waiting: set[asyncio.Future[str]] = set()  # one for each who waits for a load; its result ends the wait
        self._notice(find_checkpoints())

    async def refresh(self) -> None:
        """Looks again at what is on disk. Loaded models stay even if their folder went."""
        self._notice(await asyncio.to_thread(self._find))

    def _notice(self, checkpoints: list[Checkpoint]) -> None:
        found = {c.id: c for c in checkpoints if c.kind in _ENTRIES}
        for model_id, checkpoint in sorted(found.items(), key=lambda item: item[1].adapter is not None):  # bases first
            entry = self._entries.get(model_id)
            if entry is None or (entry.state in ("cold", "failed") and entry.checkpoint != checkpoint):
                self._entries[model_id] = self._new_entry(checkpoint)
        for model_id in [i for i, e in self._entries.items() if i not in found and e.state in ("cold", "failed")]:
            del self._entries[model_id]

    def _new_entry(self, checkpoint: Checkpoint) -> _AnyEntry:
        entry = _ENTRIES[checkpoint.kind](checkpoint)
        base = None if checkpoint.adapter is None else self._entries.get(checkpoint.base_id)
        if isinstance(entry, _TextEntry) and isinstance(base, _TextEntry):
            entry.reads_like = base
        return entry

    def statuses(self) -> list[ModelStatus]:
        """Every model, by id."""
        return [_status(entry) for _, entry in sorted(self._entries.items())]

    def engines(self) -> dict[str, Engine]:
        """Of the text models that are loaded."""
        return {i: e.model.engine for i, e in self._entries.items() if isinstance(e, _TextEntry) and e.model is not None}

    async def dialect(self, model_id: str) -> Dialect:
        """How a text model reads and writes; does not load its weights. Raises `ModelNotFound`, `ModelLoadFailed`, and `InvalidField` for a
        model of another kind."""
        return await self._read(await self._text(model_id))

    async def text_reader(self, model_id: str) -> TextReader:
        """The same of an embedding or reranking model."""
        return await self._read(await self._embedding(model_id))

    async def reader(self, model_id: str) -> Dialect | TextReader:
        """The same of a model of any of these kinds."""
        entry = await self._entry(model_id)
        return await self._read(entry) if isinstance(entry, _EmbeddingEntry) else await self.dialect(model_id)

    @asynccontextmanager
    async def lend(self, model_id: str) -> AsyncGenerator[LocalModel]:
        """The model, loaded if need be: once, however many wait, and to its end even if they go.
        Raises what `dialect` does; after a failure the next request tries again."""
        yield await self._loaded(await self._text(model_id))

    @asynccontextmanager
    async def lend_embedder(self, model_id: str) -> AsyncGenerator[LocalEmbedder]:
        """The same of an embedding or reranking model."""
        yield await self._loaded(await self._embedding(model_id))

    def abort(self, error: EngineFault) -> None:
        """Ends every reply under way with `error`, and every wait for a model; a load that has begun goes on."""
        for entry in self._entries.values():
            match entry:
                case _TextEntry(model=LocalModel(engine=engine)):
                    engine.abort(error)
                case _EmbeddingEntry(model=LocalEmbedder(embedder=embedder)):
                    embedder.abort(error)
                case _:
                    pass
        for ending in self._waiting:
            if not ending.done():
                ending.set_result(error.message)

    async def close(self) -> None:
        """What can be kept of the engines for the next start is kept. Nobody uses them any more."""
        for engine in self.engines().values():
            await self._device.run(engine.close)

    async def _unless_aborted(self, loading: asyncio.Task[Any]) -> None:
        """Waits for a load without cancelling it. Raises what it raises, or `EngineFault` if `abort` comes first."""
        ending: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.add(ending)
        try:
            await asyncio.wait({loading, ending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waiting.discard(ending)
        if ending.done():
            raise EngineFault(ending.result())
        loading.result()

    async def _read(self, entry: _Entry[R, Any]) -> R:
        model_id = entry.checkpoint.id
        holder = entry.reads_like
        if holder.reading is None:
            holder.reading = asyncio.create_task(asyncio.to_thread(holder.read))
            holder.reading.add_done_callback(_seen)
        reading = holder.reading
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if holder.reading is reading:  # another who waited for it may have begun anew
                holder.reading = None
            entry.error = f"its tokenizer or configuration could not be read ({type(error).__name__})"
            log.exception("model %s: the tokenizer or configuration could not be read", model_id)
            raise ModelLoadFailed(f"The model '{model_id}' could not be loaded: {entry.error}.") from error

    async def _loaded(self, entry: _Entry[Any, M]) -> M:
        if entry.model is None:
            if entry.loading is None:
                entry.loading = asyncio.create_task(self._load(entry))
                entry.loading.add_done_callback(_seen)
            await self._unless_aborted(entry.loading)
        assert entry.model is not None
        return entry.model

    async def _load(self, entry: _Entry[R, M]) -> M:
        model_id = entry.checkpoint.id
        started = time.monotonic()
        entry.error = None
        try:
            reader = await self._read(entry)
            entry.model = await self._device.run(lambda: entry.load(reader, self._device, self._limits, self._weights))
        except ModelLoadFailed:
            raise
        except Exception as error:
            entry.error = f"its weights could not be read ({error})"
            for path in (entry.checkpoint.path, *([entry.checkpoint.adapter.path] if entry.checkpoint.adapter else [])):
                entry.error = entry.error.replace(f"{path}/", "").replace(str(path), "its folder")
            log.exception("model %s could not be loaded", model_id)
            raise ModelLoadFailed(f"The model '{model_id}' could not be loaded: {entry.error}.") from error
        else:
            entry.load_s = time.monotonic() - started
            log.info("model %s is ready after %.1f s", model_id, entry.load_s)
            return entry.model
        finally:
            entry.loading = None

    async def _text(self, model_id: str) -> _TextEntry:
        entry = await self._entry(model_id)
        if isinstance(entry, _TextEntry):
            return entry
        does = {
            "embedding": "makes embeddings: use /v1/embeddings.",
            "reranker": "ranks documents: use /v1/rerank.",
        }
        raise InvalidField(f"The model '{model_id}' {does[entry.checkpoint.kind]}", param="model")

    async def _embedding(self, model_id: str) -> _EmbeddingEntry:
        entry = await self._entry(model_id)
        if isinstance(entry, _EmbeddingEntry):
            return entry
        raise InvalidField(f"The model '{model_id}' writes text and makes no embeddings: use /v1/chat/completions.", param="model")

    async def _entry(self, model_id: str) -> _AnyEntry:
        if model_id not in self._entries:
            await self.refresh()  # it may have been put there since
        entry = self._entries.get(model_id)
        if entry is None:
            raise ModelNotFound(model_id, sorted(self._entries))
        return entry


def _status(entry: _AnyEntry) -> ModelStatus:
    match entry:
        case _TextEntry(model=LocalModel(engine=engine)):
            num_running, num_waiting, cache = engine.num_running, engine.num_waiting, engine.cache_state
        case _EmbeddingEntry(model=LocalEmbedder(embedder=embedder)):
            num_running, num_waiting, cache = embedder.num_running, 0, None
        case _:
            num_running, num_waiting, cache = 0, 0, None
    return ModelStatus(
        checkpoint=entry.checkpoint,
        state=entry.state,
        error=entry.error,
        load_s=entry.load_s,
        num_running=num_running,
        num_waiting=num_waiting,
        cache=cache,
    )


def _seen(task: asyncio.Task[Any]) -> None:
    """Nobody may be left to hear of a failure; it has been logged."""
    if not task.cancelled():
        task.exception()

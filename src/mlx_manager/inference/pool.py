"""Which models there are and which are loaded: lend one, load it once."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

from mlx_manager.core.errors import EngineFault, ModelLoadFailed, ModelNotFound
from mlx_manager.hub.checkpoint import Checkpoint
from mlx_manager.inference.dialect import Dialect
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.engine import CacheState, Engine
from mlx_manager.inference.loader import EngineLimits, load_dialect, load_engine
from mlx_manager.inference.local_model import LocalModel

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


class _Entry:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.dialect: asyncio.Task[Dialect] | None = None
        self.loading: asyncio.Task[LocalModel] | None = None
        self.model: LocalModel | None = None
        self.error: str | None = None
        self.load_s: float | None = None

    @property
    def state(self) -> State:
        if self.model is not None:
            return "ready"
        if self.loading is not None:
            return "loading"
        return "failed" if self.error is not None else "cold"


class Pool:
    """Owned by the event loop. A model is loaded by the first request for it and stays; nobody has to leave yet."""

    def __init__(self, device: Device, find_checkpoints: FindCheckpoints, limits: EngineLimits) -> None:
        self._device = device
        self._find = find_checkpoints
        self._limits = limits
        self._entries: dict[str, _Entry] = {}
        self._waiting: set[asyncio.Future[str]] = set()  # one for each who waits for a load; its result ends the wait
        self._notice(find_checkpoints())

    async def refresh(self) -> None:
        """Looks again at what is on disk. Loaded models stay even if their folder went."""
        self._notice(await asyncio.to_thread(self._find))

    def _notice(self, checkpoints: list[Checkpoint]) -> None:
        found = {c.id: c for c in checkpoints if c.kind == "text"}
        for model_id, checkpoint in found.items():
            entry = self._entries.get(model_id)
            if entry is None or (entry.state in ("cold", "failed") and entry.checkpoint != checkpoint):
                self._entries[model_id] = _Entry(checkpoint)
        for model_id in [i for i, e in self._entries.items() if i not in found and e.state in ("cold", "failed")]:
            del self._entries[model_id]

    def statuses(self) -> list[ModelStatus]:
        """Every model, by id."""
        return [
            ModelStatus(
                checkpoint=e.checkpoint,
                state=e.state,
                error=e.error,
                load_s=e.load_s,
                num_running=e.model.engine.num_running if e.model else 0,
                num_waiting=e.model.engine.num_waiting if e.model else 0,
                cache=e.model.engine.cache_state if e.model else None,
            )
            for _, e in sorted(self._entries.items())
        ]

    def engines(self) -> dict[str, Engine]:
        return {i: e.model.engine for i, e in self._entries.items() if e.model is not None}

    async def dialect(self, model_id: str) -> Dialect:
        """How the model reads and writes; does not load its weights. Raises `ModelNotFound` and `ModelLoadFailed`."""
        entry = await self._entry(model_id)
        if entry.dialect is None:
            checkpoint = entry.checkpoint
            read = asyncio.to_thread(load_dialect, checkpoint.path, checkpoint.context_length)
            entry.dialect = asyncio.create_task(read)
            entry.dialect.add_done_callback(_seen)
        reading = entry.dialect
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if entry.dialect is reading:  # another who waited for it may have begun anew
                entry.dialect = None
            entry.error = f"its tokenizer or configuration could not be read ({type(error).__name__})"
            log.exception("model %s: the tokenizer or configuration could not be read", model_id)
            raise ModelLoadFailed(f"The model '{model_id}' could not be loaded: {entry.error}.") from error

    @asynccontextmanager
    async def lend(self, model_id: str) -> AsyncGenerator[LocalModel]:
        """The model, loaded if need be: once, however many wait, and to its end even if they go.
        Raises `ModelNotFound` and `ModelLoadFailed`; after a failure the next request tries again."""
        entry = await self._entry(model_id)
        if entry.model is None:
            if entry.loading is None:
                entry.loading = asyncio.create_task(self._load(entry))
                entry.loading.add_done_callback(_seen)
            await self._unless_aborted(entry.loading)
        assert entry.model is not None
        yield entry.model

    def abort(self, error: EngineFault) -> None:
        """Ends every reply under way with `error`, and every wait for a model; a load that has begun goes on."""
        for engine in self.engines().values():
            engine.abort(error)
        for ending in self._waiting:
            if not ending.done():
                ending.set_result(error.message)

    async def close(self) -> None:
        """What can be kept of the engines for the next start is kept. Nobody uses them any more."""
        for engine in self.engines().values():
            await self._device.run(engine.close)

    async def _unless_aborted(self, loading: asyncio.Task[LocalModel]) -> None:
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

    async def _load(self, entry: _Entry) -> LocalModel:
        model_id = entry.checkpoint.id
        started = time.monotonic()
        entry.error = None
        try:
            dialect = await self.dialect(model_id)
            path = entry.checkpoint.path
            engine = await self._device.run(lambda: load_engine(path, dialect, self._device, self._limits))
        except ModelLoadFailed:
            raise
        except Exception as error:
            entry.error = f"its weights could not be read ({error})".replace(f"{entry.checkpoint.path}/", "")
            log.exception("model %s could not be loaded", model_id)
            raise ModelLoadFailed(f"The model '{model_id}' could not be loaded: {entry.error}.") from error
        else:
            entry.load_s = time.monotonic() - started
            entry.model = LocalModel(dialect, engine)
            log.info("model %s is ready after %.1f s", model_id, entry.load_s)
            return entry.model
        finally:
            entry.loading = None

    async def _entry(self, model_id: str) -> _Entry:
        if model_id not in self._entries:
            await self.refresh()  # it may have been put there since
        entry = self._entries.get(model_id)
        if entry is None:
            raise ModelNotFound(model_id, sorted(self._entries))
        return entry


def _seen(task: asyncio.Task[Any]) -> None:
    """Nobody may be left to hear of a failure; it has been logged."""
    if not task.cancelled():
        task.exception()

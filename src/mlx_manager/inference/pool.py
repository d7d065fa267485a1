"""Which models there are and which are loaded: lend one, load it once, have others leave for it."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from mlx_manager.core.errors import (
    Conflict,
    EngineFault,
    InvalidField,
    MLXManagerError,
    ModelLoadFailed,
    ModelNotFound,
    ModelTooLarge,
    NotEnoughMemory,
    Overloaded,
    TimedOut,
    gigabytes,
)
from mlx_manager.core.requests import Priority
from mlx_manager.hub.checkpoint import Checkpoint
from mlx_manager.inference import memory
from mlx_manager.inference.dialect import Dialect
from mlx_manager.inference.embedder import Embedder, LocalEmbedder
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.disk_tier import DiskTier
from mlx_manager.inference.engine.engine import CacheState, Engine
from mlx_manager.inference.engine.sequence import URGENCY
from mlx_manager.inference.entry import ENTRIES, AnyEntry, EmbeddingEntry, Entry, Hot, Phase, State, TextEntry
from mlx_manager.inference.load_marks import LoadMarks
from mlx_manager.inference.loader import (
    EngineLimits,
    Progress,
    SharedWeights,
    Turns,
    Usage,
    free,
    let_be,
    machine_limit,
    memory_in_use,
)
from mlx_manager.inference.local_model import LocalModel
from mlx_manager.inference.memory import EvictionPolicy, Fit, MustLeave, Need, NoRoom, Reading, Relief, Resident
from mlx_manager.inference.text_reader import TextReader

log = logging.getLogger(__name__)

Reason = Literal["room", "idle", "pressure", "asked"]
WhenFull = Literal["queue", "refuse"]
FindCheckpoints = Callable[[], list[Checkpoint]]

CRASHED = "the server ended while it was being loaded"


@dataclass(frozen=True, slots=True)
class PoolPolicy:
    """`keep_alive_s`: a model that nobody has used for so long is unloaded; None: never. Who has to wait for memory does so for
    `memory_wait_s` at most, or not at all if `when_full` says so."""

    eviction: EvictionPolicy = "lru"
    when_full: WhenFull = "queue"
    keep_alive_s: float | None = None
    memory_wait_s: float = 120.0


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """`fit` says whether it would fit all by itself, None while the limit is not known. `error` says why the last load failed; `load_s` how
    long the last one took, in seconds. `phase` and `read_bytes` say how far a load
    is, and `no_room` why it waits. `need` is what it takes or will take, None while it takes nothing. `idle_s` is the time since its last
    use, and `expires_in_s` that until it is unloaded, in seconds."""

    checkpoint: Checkpoint
    state: State
    fit: Fit | None = None
    error: str | None = None
    load_s: float | None = None
    num_running: int = 0
    num_waiting: int = 0
    cache: CacheState | None = None
    phase: Phase | None = None
    read_bytes: int = 0
    no_room: NoRoom | None = None
    need: Need | None = None
    pinned: bool = False
    num_lent: int = 0
    num_uses: int = 0
    idle_s: float | None = None
    keep_alive_s: float | None = None
    expires_in_s: float | None = None


@dataclass(frozen=True, slots=True)
class MemoryStatus:
    """In bytes. `weights`, `adapters`, `kv` and `prefill` are what the models that are loaded may take, and are within `limit`; `in_use` is
    what is taken, `kv_in_use` of it by keys and values. None where it has not been measured yet."""

    limit: int | None
    weights: int
    adapters: int
    kv: int
    prefill: int
    kv_in_use: int
    in_use: int | None
    cached: int | None
    relief: tuple[Relief, ...]

    @property
    def taken(self) -> int:
        return self.weights + self.adapters + self.kv + self.prefill


@dataclass(slots=True)
class PoolCounters:
    """What has happened since the start: loads by how they ended, models that left by why."""

    loads: dict[str, int] = field(default_factory=lambda: {"ready": 0, "failed": 0})
    evictions: dict[Reason, int] = field(default_factory=lambda: {"room": 0, "idle": 0, "pressure": 0, "asked": 0})
    refusals: int = 0


R = TypeVar("R")
T = TypeVar("T")
M = TypeVar("M", bound=LocalModel | LocalEmbedder)


@dataclass(eq=False, slots=True)
class _Place:
    """Of a load in the queue for memory; the future's result says how much it may take."""

    entry: Entry[Any, Any]
    number: int
    room: "asyncio.Future[Need]"


class Pool:
    """Owned by the event loop. A model is loaded by the first request for it, under one limit of memory for all; whoever is in nobody's
    use leaves for it. Nothing of a load begins before there is room."""

    def __init__(
        self,
        device: Device,
        find_checkpoints: FindCheckpoints,
        limits: EngineLimits,
        policy: PoolPolicy = PoolPolicy(),
        *,
        limit: Callable[[], int] = machine_limit,
        in_use: Callable[[], Usage] = memory_in_use,
        clock: Callable[[], float] = time.monotonic,
        marks_folder: Path | None = None,
    ) -> None:
        """`limit` says how many bytes all models together may take, and `in_use` what is taken; both are asked on the device thread."""
        self._device = device
        self._find = find_checkpoints
        self._limits = limits
        self._policy = policy
        self._ask_limit = limit
        self._ask_in_use = in_use
        self._clock = clock
        self._marks = LoadMarks(marks_folder)
        self._weights = SharedWeights()
        self._at_work: asyncio.Task[Any] | None = None  # the load that has its turns on the device
        self._entries: dict[str, AnyEntry] = {}
        self._withheld: set[str] = set()  # nobody is to load these
        self._waiting: set[asyncio.Future[str]] = set()  # one for each who waits for a load; its result ends the wait
        self._places: list[_Place] = []
        self._numbers = count()
        self._limit: int | None = None
        self._reading: Reading | None = None
        self._relief: tuple[Relief, ...] = ()
        self.counters = PoolCounters()
        self.is_preloading = False
        self._notice(find_checkpoints())

    # ---- which models there are

    async def refresh(self) -> None:
        """Looks again at what is on disk. Loaded models stay even if their folder went."""
        self._notice(await asyncio.to_thread(self._find))

    def _notice(self, checkpoints: list[Checkpoint]) -> None:
        found = {c.id: c for c in checkpoints if c.kind in ENTRIES}
        for model_id, checkpoint in sorted(found.items(), key=lambda item: item[1].adapter is not None):  # bases first
            entry = self._entries.get(model_id)
            if entry is None or (entry.state in ("cold", "failed") and entry.checkpoint != checkpoint):
                self._entries[model_id] = self._new_entry(checkpoint, entry)
        for model_id in [i for i, e in self._entries.items() if i not in found and e.state in ("cold", "failed")]:
            del self._entries[model_id]

    def _new_entry(self, checkpoint: Checkpoint, old: AnyEntry | None) -> AnyEntry:
        entry = ENTRIES[checkpoint.kind](checkpoint)
        base = None if checkpoint.adapter is None else self._entries.get(checkpoint.base_id)
        if isinstance(entry, TextEntry) and isinstance(base, TextEntry):
            entry.reads_like = base
        if old is not None:
            entry.pinned, entry.keep_alive_s = old.pinned, old.keep_alive_s
        if checkpoint.id in self._marks.found:
            entry.error = CRASHED
        return entry

    def statuses(self) -> list[ModelStatus]:
        """Every model, by id."""
        return [self._status(entry) for _, entry in sorted(self._entries.items())]

    def status(self, model_id: str) -> ModelStatus:
        """Raises `ModelNotFound`."""
        if model_id not in self._entries:
            raise ModelNotFound(model_id, sorted(self._entries))
        return self._status(self._entries[model_id])

    def engines(self) -> dict[str, Engine]:
        """Of the text models that are loaded."""
        workers = {i: e.hot.worker() for i, e in self._entries.items() if e.hot is not None}
        return {i: worker for i, worker in workers.items() if isinstance(worker, Engine)}

    # ---- how they read

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
        return await self._read(entry) if isinstance(entry, EmbeddingEntry) else await self.dialect(model_id)

    # ---- lending

    @asynccontextmanager
    async def lend(self, model_id: str, *, priority: Priority = "normal", deadline: float | None = None) -> AsyncGenerator[LocalModel]:
        """The model, loaded if need be: once, however many wait, and to its end even if they go. It stays until it is given back.
        `deadline` is a `time.monotonic()`. Raises what `dialect` does, `NotEnoughMemory`, `ModelTooLarge` and `TimedOut`; after a failure
        the next request tries again."""
        entry = await self._text(model_id)
        hot = await self._borrow(entry, priority, deadline)
        assert hot.model is not None, "it stays while it is lent"
        try:
            yield hot.model
        finally:
            self._take_back(entry, hot)

    @asynccontextmanager
    async def lend_embedder(
        self, model_id: str, *, priority: Priority = "normal", deadline: float | None = None
    ) -> AsyncGenerator[LocalEmbedder]:
        """The same of an embedding or reranking model."""
        entry = await self._embedding(model_id)
        hot = await self._borrow(entry, priority, deadline)
        assert hot.model is not None, "it stays while it is lent"
        try:
            yield hot.model
        finally:
            self._take_back(entry, hot)

    async def _borrow(self, entry: Entry[Any, M], priority: Priority, deadline: float | None) -> Hot[M]:
        if "refuse" in self._relief and self._reading is not None:
            self.counters.refusals += 1
            used = gigabytes(self._reading.active + self._reading.cached)
            raise Overloaded(f"The models take {used} of {gigabytes(self._reading.limit)}. Please try again later.", retry_after_s=10)
        entry.num_uses += 1
        hot = entry.hot
        if hot is None:
            with self._wanted(entry, priority):
                hot = await self._loaded(entry, deadline)
        hot.num_lent += 1
        hot.idle.clear()
        return hot

    def _take_back(self, entry: Entry[Any, M], hot: Hot[M]) -> None:
        hot.num_lent -= 1
        entry.last_used = self._clock()
        if hot.num_lent == 0:
            hot.idle.set()
            if entry.hot is hot:
                self._expire(entry)
            self._admit()

    @contextmanager
    def _wanted(self, entry: Entry[Any, Any], priority: Priority) -> Generator[None]:
        """Keeps a model from leaving before those who waited for it have it. A load that waits for memory is given up with the last of
        them."""
        entry.num_wanting += 1
        entry.urgency = min(entry.urgency, URGENCY[priority])
        try:
            yield
        finally:
            entry.num_wanting -= 1
            if entry.num_wanting == 0:
                entry.urgency = URGENCY["low"]
                if entry.phase == "queued" and entry.loading is not None:
                    entry.loading.cancel()
                    entry.loading = entry.phase = entry.reserved = None

    # ---- asked for by hand

    async def load(self, model_id: str) -> None:
        """Loads a model, as a request for it would."""
        entry = await self._entry(model_id)
        if entry.hot is None:
            with self._wanted(entry, "normal"):
                await self._loaded(cast(Entry[Any, Any], entry), None)

    async def unload(self, model_id: str) -> None:
        """Waits for the replies that are under way, and returns when its memory is free. Whoever wants it meanwhile waits, and it is
        loaded anew. A load is waited for first. Raises `ModelNotFound`."""
        entry = await self._entry(model_id)
        if entry.loading is not None and entry.phase != "queued":
            await asyncio.wait({entry.loading})
        if entry.hot is not None:
            self._evict(entry, "asked")
        if entry.leaver is not None:
            await asyncio.wait({entry.leaver})

    @contextmanager
    def withheld(self, base_id: str) -> Generator[None]:
        """Nobody gets a model meanwhile, nor one with an adapter on it: its files are about to go. Raises `Conflict` if it is in memory, or
        on its way there."""
        for status in self.statuses():
            if status.checkpoint.base_id == base_id and status.state not in ("cold", "failed"):
                raise Conflict(
                    f"The model '{status.checkpoint.id}' is {status.state}: unload it first.", param="model", code="model_in_use"
                )
        self._withheld.add(base_id)
        try:
            yield
        finally:
            self._withheld.discard(base_id)

    async def configure(
        self, model_id: str, *, pinned: bool | None, keep_alive_s: float | Literal["default", "same"] | None = "same"
    ) -> None:
        """A pinned model leaves only when it is asked to. `keep_alive_s` None: it never expires. Raises `ModelNotFound`."""
        entry = await self._entry(model_id)
        if pinned is not None:
            entry.pinned = pinned
        if keep_alive_s != "same":
            entry.keep_alive_s = keep_alive_s
        log.info("model %s: pinned %s, kept alive for %s s", model_id, entry.pinned, self._keep_alive_s(entry))
        self._expire(entry)
        self._admit()

    async def preload(self, model_ids: Iterable[str]) -> None:
        """Pins these and loads them one after the other; one that ended the process while it was being loaded is left out."""
        self.is_preloading = True
        try:
            for model_id in model_ids:
                try:
                    entry = await self._entry(model_id)
                    entry.pinned = True
                    if model_id in self._marks.found:
                        log.error("model %s is not preloaded: %s", model_id, CRASHED)
                    else:
                        await self.load(model_id)
                except MLXManagerError as error:
                    log.error("model %s could not be preloaded: %s", model_id, error.message)
        finally:
            self.is_preloading = False

    # ---- memory

    async def limit(self) -> int:
        """What all models together may take, in bytes."""
        if self._limit is None:
            self._limit = await self._device.run(self._ask_limit)
        return self._limit

    def memory(self) -> MemoryStatus:
        needs = [resident.need for resident in self._residents()]
        caches = [status.cache for status in self.statuses() if status.cache is not None]
        return MemoryStatus(
            limit=self._limit,
            weights=sum({n.weights_key: n.weights for n in needs}.values()),
            adapters=sum(n.adapter for n in needs),
            kv=sum(n.kv for n in needs),
            prefill=sum(n.prefill for n in needs),
            kv_in_use=sum(c.allocated_bytes for c in caches),
            in_use=None if self._reading is None else self._reading.active,
            cached=None if self._reading is None else self._reading.cached,
            relief=self._relief,
        )

    async def watch(self, every_s: float = 1.0) -> None:
        """Until it is cancelled: has models leave whose time is over, and does what the memory asks for."""
        while True:
            try:
                await self.look()
            except EngineFault:
                return  # the device has stopped
            except Exception:
                log.exception("looking at the memory failed")
            await asyncio.sleep(every_s)

    async def look(self) -> None:
        """Once."""
        for entry in list(self._entries.values()):
            self._expire(entry)
        limit = await self.limit()
        usage = await self._device.run(self._ask_in_use)
        host_bytes = sum(s.cache.host_bytes for s in self.statuses() if s.cache is not None)
        self._reading = Reading(usage.active + host_bytes, usage.cached, limit, usage.available, usage.total)
        before, self._relief = self._relief, memory.relief(self._reading, self._relief)
        if before != self._relief:
            log.warning(
                "memory: %s of %s in use, %s of the machine's %s free: %s",
                gigabytes(self._reading.active + self._reading.cached),
                gigabytes(limit),
                gigabytes(usage.available),
                gigabytes(usage.total),
                ", ".join(self._relief) if self._relief else "all as usual",
            )
        await self._relieve(before)
        self._admit()

    async def _relieve(self, before: Sequence[Relief]) -> None:
        workers = [w for e in self._entries.values() if e.hot is not None and (w := e.hot.worker()) is not None]
        if ("smaller prefill" in self._relief) != ("smaller prefill" in before):
            for worker in workers:
                worker.limit_pass(self._pass_tokens)
        if "prefixes" in self._relief:
            for worker in workers:
                if isinstance(worker, Engine):
                    worker.drop_prefixes()
        if "smaller prefill" in self._relief:
            await self._device.run(free)
        if "idle models" in self._relief:
            idle = [r for r in self._residents() if not r.stays]
            for resident in memory.in_order(idle, self._policy.eviction)[:1]:
                self._evict(self._entries[resident.id], "pressure")

    @property
    def _pass_tokens(self) -> int:
        budget = self._limits.prefill_budget
        return max(_FEWEST_PASS_TOKENS, budget // 4) if "smaller prefill" in self._relief else budget

    # ---- the end

    def abort(self, error: EngineFault) -> None:
        """Ends every reply under way with `error`, and every wait for a model; a load that has begun goes on."""
        for entry in self._entries.values():
            for hot in (entry.hot, entry.leaving):
                if hot is not None and (worker := hot.worker()) is not None:
                    worker.abort(error)
        for ending in self._waiting:
            if not ending.done():
                ending.set_result(error.message)

    async def close(self) -> None:
        """What can be kept of the engines for the next start is kept. Nobody uses them any more."""
        for entry in self._entries.values():
            if entry.phase == "queued" and entry.loading is not None:
                entry.loading.cancel()
            for hot in (entry.hot, entry.leaving):
                if hot is not None:
                    worker, hot.model = [hot.worker()], None
                    await self._free(worker)
            entry.hot = entry.leaving = None

    # ---- inside: loads

    async def _unless_aborted(self, loading: asyncio.Task[None], timeout_s: float | None) -> None:
        """Waits for a load without cancelling it, for so long at most. Raises what it raises, or `EngineFault` if `abort` comes first."""
        ending: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.add(ending)
        try:
            await asyncio.wait({loading, ending}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waiting.discard(ending)
        if ending.done():
            raise EngineFault(ending.result())
        if loading.done():
            loading.result()

    async def _read(self, entry: Entry[R, Any]) -> R:
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

    async def _loaded(self, entry: Entry[Any, M], deadline: float | None) -> Hot[M]:
        queued_until = time.monotonic() + self._policy.memory_wait_s
        while entry.hot is None:
            if entry.loading is None:
                if entry.checkpoint.base_id in self._withheld:
                    raise Conflict(f"The model '{entry.checkpoint.id}' is being deleted.", param="model", code="model_in_use")
                entry.phase = "loading"
                entry.loading = asyncio.create_task(self._load(entry))
                entry.loading.add_done_callback(_seen)
            until = queued_until if deadline is None else min(queued_until, deadline)
            await self._unless_aborted(entry.loading, None if until == math.inf else max(0.0, until - time.monotonic()))
            now = time.monotonic()
            if entry.hot is None and deadline is not None and now >= deadline:
                raise TimedOut("The request took longer than it may.")
            if entry.hot is None and now >= queued_until:
                if entry.phase == "queued" and entry.no_room is not None:
                    raise self._refusal(entry, entry.no_room)
                queued_until = math.inf  # it is being loaded
        return entry.hot

    async def _load(self, entry: Entry[R, M]) -> None:
        model_id = entry.checkpoint.id
        started = self._clock()
        this = asyncio.current_task()
        entry.error = entry.no_room = None
        entry.progress = Progress()
        try:
            reader = await self._read(entry)
            need = await self._room_for(entry)
            limits = replace(self._limits, kv_bytes=need.kv, prefill_budget=self._pass_tokens, pass_bytes=need.prefill)
            entry.phase = "loading"
            model, weight_bytes = await self._in_turns(self._load_marked(entry, reader, limits))
        except (NotEnoughMemory, EngineFault):
            raise  # nothing is wrong with the model: there is no room for it, or the device has stopped
        except ModelLoadFailed as error:
            if entry.error is None:
                entry.error = error.message
            self.counters.loads["failed"] += 1
            raise
        except Exception as error:
            entry.error = f"its weights could not be read ({error})"
            for path in (entry.checkpoint.path, *([entry.checkpoint.adapter.path] if entry.checkpoint.adapter else [])):
                entry.error = entry.error.replace(f"{path}/", "").replace(str(path), "its folder")
            self.counters.loads["failed"] += 1
            log.exception("model %s could not be loaded", model_id)
            raise ModelLoadFailed(f"The model '{model_id}' could not be loaded: {entry.error}.") from error
        else:
            let_be()
            entry.load_s = self._clock() - started
            entry.last_used = self._clock()
            entry.hot = Hot(model, replace(need, weights=weight_bytes))
            self.counters.loads["ready"] += 1
            log.info("model %s is ready after %.1f s; %s", model_id, entry.load_s, _told(entry.hot.need))
        finally:
            entry.reserved = None
            if entry.loading is this:
                entry.loading = entry.phase = None
            self._admit()

    async def _in_turns(self, work: Turns[T]) -> T:
        """Has work done on the device thread between everybody else's. One load at a time: who shares weights is to find them there."""

        def go_on() -> tuple[T] | None:
            try:
                next(work)
            except StopIteration as end:
                return (end.value,)

        while self._at_work is not None:
            await asyncio.wait({self._at_work})
        self._at_work = asyncio.current_task()
        try:
            while (done := await self._device.run(go_on, after_turn=True)) is None:
                pass
        finally:
            self._at_work = None
        return done[0]

    def _load_marked(self, entry: Entry[R, M], reader: R, limits: EngineLimits) -> Turns[tuple[M, int]]:
        """What a failure leaves behind is freed. On the device thread."""
        with self._marks.marked(entry.checkpoint.id):
            try:
                return (yield from entry.load(reader, self._device, limits, self._weights))
            except Exception as error:
                _forget_frames(error)
                free()
                raise

    # ---- inside: who has room

    async def _room_for(self, entry: Entry[Any, Any]) -> Need:
        """Waits for its turn and until there is room, and has others leave. Raises `ModelTooLarge`, and `NotEnoughMemory` where nobody
        is to wait."""
        limit = await self.limit()
        least = self._need(entry, 0)
        if least.total > limit:
            raise ModelTooLarge(entry.checkpoint.id, needed=least.total, limit=limit)
        if entry.leaver is not None:
            await asyncio.wait({entry.leaver})
        place = _Place(entry, next(self._numbers), asyncio.get_running_loop().create_future())
        self._places.append(place)
        self._admit()
        if not place.room.done():
            entry.phase = "queued"
        try:
            need = await place.room
        finally:
            if place in self._places:
                self._places.remove(place)
        leavers = {e.leaver for e in self._entries.values() if e.leaver is not None and e.is_going}
        entry.phase = "evicting" if leavers else "loading"
        if leavers:
            await asyncio.wait(leavers)
        return need

    def _need(self, entry: Entry[Any, Any], available: int) -> Need:
        return memory.need(
            entry.checkpoint, available=available, kv_bytes=self._limits.kv_bytes, prefill_tokens=self._limits.prefill_budget
        )

    def _admit(self) -> None:
        """Gives room to who waits for it, the most urgent and of these the first; who comes later does not overtake. Nobody waits for what
        only an unpinning could bring."""
        if self._limit is None:
            return
        for place in sorted(self._places, key=lambda p: (p.entry.urgency, p.number)):
            verdict = self._verdict(place.entry)
            if isinstance(verdict, NoRoom):
                if self._policy.when_full == "queue" and not self._is_pinned_out(place.entry):
                    self._note_wait(place.entry, verdict)
                    return
                self._places.remove(place)
                if not place.room.done():
                    place.room.set_exception(self._refusal(place.entry, verdict))
                continue
            self._places.remove(place)
            if place.room.done():  # nobody waits any more
                continue
            for model_id in verdict.ids:
                self._evict(self._entries[model_id], "room")
            others = [r.need for r in self._residents()]
            wanted = self._need(place.entry, 0)
            shared = wanted.weights if any(n.weights_key == wanted.weights_key for n in others) else 0
            place.entry.reserved = self._need(place.entry, self._limit - memory.taken(others) + shared)
            place.room.set_result(place.entry.reserved)

    def _note_wait(self, entry: Entry[Any, Any], no_room: NoRoom) -> None:
        if entry.no_room is None:
            log.info("model %s waits: it needs %d bytes, and %d are free", entry.checkpoint.id, no_room.needed, no_room.available)
        entry.no_room = no_room

    def _is_pinned_out(self, entry: Entry[Any, Any]) -> bool:
        """Whether there would be no room even if everybody were done."""
        assert self._limit is not None
        calm = [replace(r, stays=self._entries[r.id].pinned) for r in self._residents()]
        verdict = memory.who_must_leave(calm, self._need(entry, 0), limit=self._limit, policy=self._policy.eviction)
        return isinstance(verdict, NoRoom)

    def _verdict(self, entry: Entry[Any, Any]) -> MustLeave | NoRoom:
        assert self._limit is not None
        wanted = self._need(entry, 0)
        if "loads wait" in self._relief and self._reading is not None:
            return NoRoom(wanted.total, max(0, min(self._reading.available, self._limit - self._reading.active)))
        return memory.who_must_leave(self._residents(), wanted, limit=self._limit, policy=self._policy.eviction)

    def _residents(self) -> list[Resident]:
        """All that take memory, or have been promised some."""
        return [
            Resident(
                id=model_id,
                need=need,
                stays=entry.pinned or not entry.is_idle,
                last_used=entry.last_used,
                num_uses=entry.num_uses,
            )
            for model_id, entry in self._entries.items()
            if (need := entry.held) is not None and not entry.is_going
        ]

    def _refusal(self, entry: Entry[Any, Any], no_room: NoRoom) -> NotEnoughMemory:
        self.counters.refusals += 1
        return NotEnoughMemory(f"The model '{entry.checkpoint.id}'", needed=no_room.needed, available=no_room.available)

    # ---- inside: who leaves

    def _keep_alive_s(self, entry: Entry[Any, Any]) -> float | None:
        return self._policy.keep_alive_s if entry.keep_alive_s == "default" else entry.keep_alive_s

    def _expires_in_s(self, entry: Entry[Any, Any]) -> float | None:
        keep_alive_s = self._keep_alive_s(entry)
        if keep_alive_s is None or entry.pinned or not entry.is_idle:
            return None
        return max(0.0, entry.last_used + keep_alive_s - self._clock())

    def _expire(self, entry: Entry[Any, Any]) -> None:
        if self._expires_in_s(entry) == 0.0:
            self._evict(entry, "idle")

    def _evict(self, entry: Entry[Any, Any], reason: Reason) -> None:
        """Has a model leave as soon as nobody has it any more."""
        hot, entry.hot = entry.hot, None
        assert hot is not None
        entry.leaving = hot
        self.counters.evictions[reason] += 1
        log.info("model %s leaves (%s); %s", entry.checkpoint.id, reason, _told(hot.need))
        entry.leaver = asyncio.create_task(self._let_go(entry, hot))
        entry.leaver.add_done_callback(_seen)

    async def _let_go(self, entry: Entry[Any, Any], hot: Hot[Any]) -> None:
        await hot.idle.wait()
        worker, hot.model = [hot.worker()], None  # the device thread is to have the last reference
        try:
            await self._free(worker)
        except EngineFault:
            pass  # the device has stopped, and everything goes with it
        finally:
            entry.leaving = entry.leaver = None
            self._admit()

    async def _free(self, worker: list[Engine | Embedder | None]) -> None:
        """Takes the only element of a list and ends it; what it kept is on the disk then, if there is one."""

        def end() -> DiskTier | None:
            one = worker.pop()
            disk = None
            if one is not None:
                self._device.detach(one)
                disk = one.close()
            del one
            free()
            return disk

        disk = await self._device.run(end)
        if disk is not None:
            await asyncio.to_thread(disk.stop)

    def _status(self, entry: AnyEntry) -> ModelStatus:
        match entry:
            case TextEntry(hot=Hot(model=LocalModel(engine=engine))):
                num_running, num_waiting, cache = engine.num_running, engine.num_waiting, engine.cache_state
            case EmbeddingEntry(hot=Hot(model=LocalEmbedder(embedder=embedder))):
                num_running, num_waiting, cache = embedder.num_running, 0, None
            case _:
                num_running, num_waiting, cache = 0, 0, None
        hot = entry.hot if entry.hot is not None else entry.leaving
        return ModelStatus(
            checkpoint=entry.checkpoint,
            state=entry.state,
            fit=None if self._limit is None else self._fit(entry, self._limit),
            error=entry.error,
            load_s=entry.load_s,
            num_running=num_running,
            num_waiting=num_waiting,
            cache=cache,
            phase=entry.phase,
            read_bytes=entry.progress.read_bytes,
            no_room=entry.no_room,
            need=entry.held,
            pinned=entry.pinned,
            num_lent=0 if hot is None else hot.num_lent,
            num_uses=entry.num_uses,
            idle_s=self._clock() - entry.last_used if entry.is_idle else None,
            keep_alive_s=self._keep_alive_s(entry),
            expires_in_s=self._expires_in_s(entry),
        )

    def _fit(self, entry: Entry[Any, Any], limit: int) -> Fit:
        return memory.fit_of(entry.checkpoint, limit=limit, kv_bytes=self._limits.kv_bytes, prefill_tokens=self._limits.prefill_budget)

    async def _text(self, model_id: str) -> TextEntry:
        entry = await self._entry(model_id)
        if isinstance(entry, TextEntry):
            return entry
        does = {
            "embedding": "makes embeddings: use /v1/embeddings.",
            "reranker": "ranks documents: use /v1/rerank.",
        }
        raise InvalidField(f"The model '{model_id}' {does[entry.checkpoint.kind]}", param="model")

    async def _embedding(self, model_id: str) -> EmbeddingEntry:
        entry = await self._entry(model_id)
        if isinstance(entry, EmbeddingEntry):
            return entry
        raise InvalidField(f"The model '{model_id}' writes text and makes no embeddings: use /v1/chat/completions.", param="model")

    async def _entry(self, model_id: str) -> AnyEntry:
        if model_id not in self._entries:
            await self.refresh()  # it may have been put there since
        entry = self._entries.get(model_id)
        if entry is None:
            raise ModelNotFound(model_id, sorted(self._entries))
        return entry


_FEWEST_PASS_TOKENS = 128


def _told(need: Need) -> str:
    parts: Mapping[str, int] = {"weights": need.weights, "adapter": need.adapter, "keys and values": need.kv, "prefill": need.prefill}
    return ", ".join(f"{name} {num_bytes} bytes" for name, num_bytes in parts.items() if num_bytes)


def _forget_frames(error: BaseException) -> None:
    """Of a failed load: what its frames hold would stay in memory for as long as anybody has the error."""
    trace = error.__traceback__
    while trace is not None:
        with suppress(RuntimeError):  # some still run
            trace.tb_frame.clear()
        trace = trace.tb_next


def _seen(task: asyncio.Task[Any]) -> None:
    """Nobody may be left to hear of a failure; it has been logged."""
    if not task.cancelled():
        task.exception()

"""Downloads as jobs of the server: queued, run a few at a time, paused, resumed, cancelled, and gone on with after a restart.

They belong to nobody who watches. What is wanted and how it stands is in the database; how far it is, the files say.
"""

import asyncio
import json
import logging
import re
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from mlx_manager.core.errors import Conflict, InvalidField, MLXManagerError, NotFound, NotSaved, StorageFull
from mlx_manager.hub.checkpoint import Unusable, read_traits
from mlx_manager.hub.client import Hub, check_repository
from mlx_manager.hub.listing import Listing, RemoteFile, dump, is_inside, load, read_listing, wanted
from mlx_manager.hub.repository import Repository, free_bytes
from mlx_manager.hub.store import DownloadRecord, DownloadStore
from mlx_manager.hub.transfer import PATIENT, Progress, Retries, Transfer, to_its_end

log = logging.getLogger(__name__)

State = Literal["queued", "downloading", "paused", "failed", "done"]

SPARE_BYTES = 256 << 20
"""What a download leaves free: a disk that is full to the last byte takes the database and other programs down with it."""
MAX_CONFIG_BYTES = 4 << 20
_STATES: dict[str, State] = {"queued": "queued", "downloading": "queued", "paused": "paused", "failed": "failed", "done": "done"}
"""What each becomes at a start."""
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,255}", re.ASCII)
_SPEED_WINDOW_S = 5.0
_TELL_EVERY_S = 0.25
_NUM_REMEMBERED = 1000


@dataclass(frozen=True, slots=True)
class Download:
    """How one stands. `speed` is in bytes a second over the last seconds, `eta_s` in seconds; both None while nothing can be said.
    `file` is what is being fetched now, and `is_checking` says that it is all here and its checksum is being computed. `error` says why
    it failed, or why it was paused by itself."""

    id: str
    model: str
    revision: str
    commit: str
    state: State
    error: str | None
    total_bytes: int
    done_bytes: int
    num_files: int
    file: str | None
    is_checking: bool
    speed: float | None
    eta_s: float | None
    created_ms: int


@dataclass(frozen=True, slots=True)
class Changes:
    """What a watcher missed. `is_whole`: these are all downloads, and any other is gone."""

    position: str
    is_whole: bool
    downloads: tuple[Download, ...]
    removed: tuple[str, ...]


@dataclass
class _Job:
    """Owned by `Downloads`. `version` is the number of its last change."""

    id: str
    model: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]
    state: State
    created_ms: int
    error: str | None = None
    part: str | None = None
    validator: str | None = None
    version: int = 0
    file: RemoteFile | None = None
    is_checking: bool = False
    here: dict[str, int] = field(default_factory=dict[str, int])
    """Bytes by etag: contents that several files share are fetched once."""
    samples: deque[tuple[float, int]] = field(default_factory=deque[tuple[float, int]])
    task: asyncio.Task[None] | None = None
    is_leaving: bool = False
    """It is being cancelled."""

    @property
    def contents(self) -> dict[str, RemoteFile]:
        return {file.etag: file for file in self.files}

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.contents.values())

    @property
    def done_bytes(self) -> int:
        return sum(self.here.values())

    @property
    def is_active(self) -> bool:
        return self.state in ("queued", "downloading")

    def record(self) -> DownloadRecord:
        return DownloadRecord(
            id=self.id,
            model=self.model,
            revision=self.revision,
            commit=self.commit,
            files=json.dumps(dump(self.files)),
            state=self.state,
            error=self.error,
            part=self.part,
            validator=self.validator,
            created_ms=self.created_ms,
        )


class Downloads:
    """Owned by the event loop. `at_once` run at a time, the others wait in the order in which they came.

    `on_done` is told the model when all of it is here. `free_bytes` says what room a folder's disk has.
    """

    def __init__(
        self,
        hub: Hub,
        store: DownloadStore,
        cache: Path,
        *,
        at_once: int,
        on_done: Callable[[str], Awaitable[None]],
        free_bytes: Callable[[Path], int] = free_bytes,
        retries: Retries = PATIENT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hub = hub
        self._store = store
        self._cache = cache
        self._at_once = at_once
        self._on_done = on_done
        self._free_bytes = free_bytes
        self._retries = retries
        self._clock = clock
        self._jobs: dict[str, _Job] = {}
        self._epoch = secrets.token_hex(4)
        self._version = 0
        self._removed: deque[tuple[int, str]] = deque()
        self._forgotten = 0  # the version up to which removals are no longer remembered
        self._changed = asyncio.Event()
        self._is_ending = False
        self._is_closing = False

    # ---- life

    async def open(self, *, goes_on: bool = True) -> None:
        """Goes on with what was under way when the process ended; otherwise that waits to be asked for."""
        for record in await self._store.all():
            try:
                files = load(json.loads(record.files))
                state = _STATES[record.state]
            except (ValueError, KeyError, Unusable):
                log.warning("the download of %s is forgotten: what was kept of it makes no sense", record.model)
                await self._store.remove(record.id)
                continue
            job = _Job(
                id=record.id,
                model=record.model,
                revision=record.revision,
                commit=record.commit,
                files=files,
                state=state if goes_on or state != "queued" else "paused",
                created_ms=record.created_ms,
                error=record.error,
                part=record.part,
                validator=record.validator,
            )
            if state == "done":
                job.here = {etag: file.size for etag, file in job.contents.items()}
            else:
                await self._look(job)
            self._jobs[job.id] = job
        self._schedule()

    def end_watching(self) -> None:
        """Every watcher's stream ends: the server is about to."""
        self._is_ending = True
        self._wake()

    async def close(self) -> None:
        """What is under way stops, and goes on at the next `open`."""
        self._is_closing = True
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # ---- what is asked

    def all(self) -> tuple[Download, ...]:
        """The oldest first."""
        return tuple(self._view(job) for job in self._jobs.values())

    def get(self, id: str) -> Download:
        """Raises `NotFound`."""
        return self._view(self._job(id))

    def of(self, model: str) -> Download | None:
        """The one of a model that is not done."""
        job = self._unfinished(model)
        return None if job is None else self._view(job)

    async def start(self, model: str, revision: str = "main") -> Download:
        """The download of a model; the one that there is already, gone on with. Raises what the Hub does, `InvalidField`, `Conflict` and
        `StorageFull`."""
        check_repository(model)
        if not _REVISION.fullmatch(revision) or not is_inside(revision):
            raise InvalidField(f"'{revision[:100]}' is not a revision: a branch, a tag or a commit.", param="revision")
        if (job := self._unfinished(model)) is not None:
            return await self._join(job, revision)
        files, commit = await self._ask(model, revision)
        job = _Job(secrets.token_hex(8), model, revision, commit, files, "queued", time.time_ns() // 1_000_000)
        await self._look(job)
        await self._check_room(job)
        if (other := self._unfinished(model)) is not None:  # somebody else asked meanwhile
            return await self._join(other, revision)
        self._jobs[job.id] = job
        try:
            await self._store.put(job.record())
            await self.forget(model)
        except BaseException:
            await self._stop(job)
            del self._jobs[job.id]
            raise
        self._tell(job)
        self._schedule()
        return self._view(job)

    async def pause(self, id: str) -> Download:
        """It stays where it is until it is resumed, over restarts too. Raises `NotFound` and `Conflict`."""
        job = self._job(id)
        if job.state in ("done", "failed"):
            raise Conflict(
                f"The download of '{job.model}' {'is complete' if job.state == 'done' else 'has failed'}: there is nothing to pause."
            )
        if job.is_active:
            job.error = None
            job.state = "paused"
            await self._stop(job)
            await self._settle(job)
        return self._view(job)

    async def resume(self, id: str) -> Download:
        """From the byte where it stopped. Raises `NotFound` and `StorageFull`."""
        job = self._job(id)
        if job.state in ("paused", "failed"):
            await self._look(job)
            await self._check_room(job)
            if job.state in ("paused", "failed"):
                job.state, job.error = "queued", None
                await self._settle(job)
        return self._view(job)

    async def cancel(self, id: str, *, keep: bool = False) -> None:
        """Ends it and forgets it. What came is removed unless `keep`; a model that is complete stays. Raises `NotFound`."""
        job = self._job(id)
        job.is_leaving = True
        try:
            await self._stop(job)
            if not keep and job.state != "done":
                try:
                    await to_its_end(asyncio.to_thread(self._repository(job).discard, job.files))
                except OSError as error:
                    log.warning("what had come of %s could not be removed: %s", job.model, error)
            await self._store.remove(id)
        finally:
            self._forget(job)
            self._schedule()

    async def forget(self, model: str) -> None:
        """The entry of a download that is done goes."""
        for job in [job for job in self._jobs.values() if job.model == model and job.state == "done"]:
            self._forget(job)
            await self._store.remove(job.id)

    # ---- who watches

    def changes(self, since: str | None) -> Changes:
        """All downloads or, if `since` is a position that this process gave, what is different from then."""
        position = f"{self._epoch}-{self._version}"
        epoch, _, number = (since or "").partition("-")
        if epoch != self._epoch or not number.isdecimal() or not self._forgotten <= int(number) <= self._version:
            return Changes(position, True, self.all(), ())
        after = int(number)
        changed = tuple(self._view(job) for job in self._jobs.values() if job.version > after)
        return Changes(position, False, changed, tuple(id for version, id in self._removed if version > after))

    async def watch(self, since: str | None = None) -> AsyncGenerator[Changes]:
        """The state first, then what changes. A watcher that is slow gets several changes as one."""
        changes = self.changes(since)
        yield changes
        while not self._is_ending:
            changed = self._changed
            if changes.position == f"{self._epoch}-{self._version}":
                await changed.wait()
                continue
            changes = self.changes(changes.position)
            yield changes

    # ---- inside

    def _repository(self, job: _Job) -> Repository:
        return Repository(self._cache, job.model)

    def _job(self, id: str) -> _Job:
        job = self._jobs.get(id)
        if job is None or job.is_leaving:
            raise NotFound(f"There is no download '{id[:100]}'.")
        return job

    async def _join(self, job: _Job, revision: str) -> Download:
        if job.is_leaving:
            raise Conflict(f"The download of '{job.model}' is just being cancelled: try again in a moment.")
        if job.revision != revision:
            raise Conflict(f"'{job.model}' is being downloaded in another revision ('{job.revision}'): cancel that first.")
        return await self.resume(job.id)

    def _unfinished(self, model: str) -> _Job | None:
        return next((job for job in self._jobs.values() if job.model == model and job.state != "done"), None)

    async def _ask(self, model: str, revision: str) -> tuple[tuple[RemoteFile, ...], str]:
        """What is to be fetched, and of which commit. Raises `InvalidField` for what could not be used once it is here."""
        try:
            listing = read_listing(await self._hub.describe(model, revision))
            files = wanted(listing)
            config = await self._json(model, listing, "config.json")
            if not isinstance(config, dict):
                raise Unusable("config.json is not an object")
            steps = await self._json(model, listing, "modules.json")
            # Only the names of its weights, which are not here, tell some vision models: the benefit of the doubt is theirs.
            traits = read_traits(cast(dict[str, Any], config), {}, ["vision"], cast(list[Any], steps) if isinstance(steps, list) else None)
            if traits.kind == "unsupported":
                raise Unusable(f"nothing here runs its architecture ({traits.architecture[:100]!r})")
        except Unusable as error:
            raise InvalidField(f"'{model}' is not downloaded: {error.reason}.", param="model", code="unusable_model") from error
        return files, listing.commit

    async def _json(self, model: str, listing: Listing, path: str) -> object:
        """What a file of a repository says; None if there is no such file or it is not JSON."""
        if listing.get(path) is None:
            return None
        try:
            return cast(object, json.loads(await self._hub.small_file(model, listing.commit, path, max_bytes=MAX_CONFIG_BYTES)))
        except (ValueError, RecursionError):
            return None

    async def _look(self, job: _Job) -> None:
        repository = self._repository(job)
        job.here = await asyncio.to_thread(lambda: {etag: repository.num_bytes_here(file) for etag, file in job.contents.items()})

    async def _check_room(self, job: _Job) -> None:
        """Raises `StorageFull` unless there is room for it beside all that is under way."""
        others = [other for other in self._jobs.values() if other is not job and other.is_active]
        needed = job.total_bytes - job.done_bytes
        promised = sum(other.total_bytes - other.done_bytes for other in others)
        free = await asyncio.to_thread(self._free_bytes, self._cache)
        if needed > 0 and needed + promised + SPARE_BYTES > free:
            beside = f" beside the {promised:,} that other downloads still need" if promised else ""
            raise StorageFull(
                f"The disk of the model cache has no room for '{job.model}': it needs {needed:,} bytes{beside}, {free:,} are free, and "
                f"{SPARE_BYTES:,} stay free."
            )

    def _schedule(self) -> None:
        if self._is_closing:
            return
        num_running = sum(1 for job in self._jobs.values() if job.task is not None)
        for job in sorted(self._jobs.values(), key=lambda job: job.created_ms):
            if num_running < self._at_once and job.state == "queued" and job.task is None and not job.is_leaving:
                num_running += 1
                job.state = "downloading"
                job.task = asyncio.create_task(self._run(job))
                job.task.add_done_callback(lambda task, job=job: self._end(job, task))
                self._tell(job)

    def _end(self, job: _Job, task: asyncio.Task[None]) -> None:
        """After its task, to the last of what that had to write down."""
        job.task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the download of %s failed in a way nobody expected", job.model, exc_info=error)
            job.state, job.error = "failed", "The server failed to download it."
            self._tell(job)
        self._schedule()

    async def _run(self, job: _Job) -> None:
        job.samples.clear()
        measuring = asyncio.create_task(self._measure(job))
        try:
            await self._save(job)
            await self._fetch(job)
            job.state, job.error = "done", None
        except asyncio.CancelledError:
            raise  # whoever cancelled it has said what it is now
        except StorageFull as error:
            job.state, job.error = "paused", error.message
        except MLXManagerError as error:
            job.state, job.error = "failed", error.message
        except Unusable as error:
            job.state, job.error = "failed", f"It cannot be put into the cache: {error.reason}."
        except OSError as error:
            job.state, job.error = "failed", f"It cannot be put into the cache: {error.strerror}."
        finally:
            measuring.cancel()
            job.file, job.is_checking = None, False
        if job.error is not None:
            log.warning("the download of %s is %s: %s", job.model, job.state, job.error)
        await self._settle(job)
        if job.state == "done":
            log.info("%s is here", job.model)
            await self._on_done(job.model)

    async def _fetch(self, job: _Job) -> None:
        repository = self._repository(job)
        await to_its_end(asyncio.to_thread(repository.prepare))
        for file in job.contents.values():
            job.file, job.is_checking = file, False

            def bytes_here(num_bytes: int, etag: str = file.etag) -> None:
                job.here[etag], job.is_checking = num_bytes, False

            def checking() -> None:
                job.is_checking = True
                self._tell(job)

            async def version(validator: str | None, etag: str = file.etag) -> None:
                job.part, job.validator = etag, validator
                await self._save(job)

            await Transfer(
                self._hub,
                repository,
                file,
                model=job.model,
                commit=job.commit,
                validator=job.validator if job.part == file.etag else None,
                progress=Progress(bytes_here, version, checking),
                retries=self._retries,
            ).run()
            job.here[file.etag] = file.size
        await to_its_end(asyncio.to_thread(repository.publish, job.revision, job.commit, job.files))

    async def _stop(self, job: _Job) -> None:
        """To the end of whatever it was doing."""
        task = job.task
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})

    async def _settle(self, job: _Job) -> None:
        """After its state changed."""
        await self._save(job)
        self._tell(job)
        self._schedule()

    async def _save(self, job: _Job) -> None:
        """A database that cannot be written, as on a full disk, loses how it stands over a restart, and nothing that came."""
        if job.is_leaving:
            return
        try:
            await to_its_end(self._store.put(job.record()))
        except NotSaved as error:
            log.warning("how the download of %s stands cannot be written down: %s", job.model, error.message)

    def _forget(self, job: _Job) -> None:
        del self._jobs[job.id]
        self._version += 1
        self._removed.append((self._version, job.id))
        if len(self._removed) > _NUM_REMEMBERED:
            self._forgotten = self._removed.popleft()[0]
        self._wake()

    async def _measure(self, job: _Job) -> None:
        """How far it is, a few times a second; also that nothing comes any more."""
        told: tuple[str | None, int, float | None] | None = None
        while True:
            now, done = self._clock(), job.done_bytes
            if job.samples and done < job.samples[-1][1]:  # it started over
                job.samples.clear()
            job.samples.append((now, done))
            while now - job.samples[0][0] > _SPEED_WINDOW_S:
                job.samples.popleft()
            state = (None if job.file is None else job.file.etag, done, _speed(job.samples))
            if state != told:
                told = state
                self._tell(job)
            await asyncio.sleep(_TELL_EVERY_S)

    def _tell(self, job: _Job) -> None:
        self._version += 1
        job.version = self._version
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _view(self, job: _Job) -> Download:
        speed = _speed(job.samples) if job.state == "downloading" else None
        left = job.total_bytes - job.done_bytes
        return Download(
            id=job.id,
            model=job.model,
            revision=job.revision,
            commit=job.commit,
            state=job.state,
            error=job.error,
            total_bytes=job.total_bytes,
            done_bytes=job.done_bytes,
            num_files=len(job.files),
            file=None if job.file is None else job.file.path,
            is_checking=job.is_checking,
            speed=speed,
            eta_s=left / speed if speed else None,
            created_ms=job.created_ms,
        )


def _speed(samples: Iterable[tuple[float, int]]) -> float | None:
    """Of the samples that there are; None before two that are apart."""
    told = list(samples)
    if len(told) < 2 or told[-1][0] - told[0][0] < _TELL_EVERY_S:
        return None
    return (told[-1][1] - told[0][1]) / (told[-1][0] - told[0][0])

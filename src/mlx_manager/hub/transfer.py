"""One file from the Hub into the cache: from the byte where it stopped, checked, and under its name only when it is right."""

import asyncio
import errno
import re
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import stamina

from mlx_manager.core.errors import HubUnavailable, MLXManagerError, StorageFull
from mlx_manager.http_client import Reply, Unreachable
from mlx_manager.hub.client import Hub
from mlx_manager.hub.listing import RemoteFile
from mlx_manager.hub.repository import Part, Repository

T = TypeVar("T")
WRITE_BYTES = 1 << 18
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


class BadFile(MLXManagerError):
    """What came is not what the Hub's list promised."""


@dataclass(frozen=True, slots=True)
class Retries:
    """How often, and for how long in seconds, a file is tried again before it fails. Whatever came of it starts the count anew."""

    attempts: int = 8
    timeout_s: float = 300.0
    wait_initial_s: float = 0.5
    wait_max_s: float = 30.0
    max_retry_after_s: float = 300.0
    """A host that wants to be left alone for longer fails the download, which can be resumed then."""

    def hook(self, error: Exception) -> bool | timedelta:
        if not isinstance(error, HubUnavailable) or error.is_offline:
            return False
        if error.retry_after_s is None:
            return True
        return error.retry_after_s <= self.max_retry_after_s and timedelta(seconds=error.retry_after_s)


PATIENT = Retries()


@dataclass(frozen=True, slots=True)
class Progress:
    """What a transfer tells: how many bytes of the file are here, what its host calls its version, and that it is being checked."""

    bytes_here: Callable[[int], None]
    version: Callable[[str | None], Awaitable[None]]
    checking: Callable[[], None]


class Transfer:
    """Of one file. `validator` is the version of what is here of it, if that is known."""

    POLL_S = 0.5

    def __init__(
        self,
        hub: Hub,
        repository: Repository,
        file: RemoteFile,
        *,
        model: str,
        commit: str,
        validator: str | None,
        progress: Progress,
        retries: Retries,
    ) -> None:
        self._hub = hub
        self._repository = repository
        self._file = file
        self._model = model
        self._commit = commit
        self._validator = validator
        self._progress = progress
        self._retries = retries

    async def run(self) -> None:
        """Raises what the Hub does, `BadFile`, `StorageFull` and `OSError`. What is here when it ends otherwise is kept."""
        part = Part(self._repository.part(self._file))
        try:
            while not self._repository.has(self._file):
                if await _in_thread(part.open):
                    await self._fill(part)
                    return
                await asyncio.sleep(self.POLL_S)  # another program fetches the same file into the same cache
        except OSError as error:
            if error.errno in _FULL:
                raise StorageFull(
                    f"The disk is full: {self._file.size - part.num_bytes:,} bytes of {self._file.path} are missing."
                ) from error
            raise
        finally:
            part.close()

    async def _fill(self, part: Part) -> None:
        was_here = part.num_bytes
        while True:
            if part.num_bytes > self._file.size:
                part.clear()
            self._progress.bytes_here(part.num_bytes)
            while part.num_bytes < self._file.size:
                await self._advance(part)
            self._progress.checking()
            if await _in_thread(lambda: part.has_content(self._file)):
                break
            if was_here == 0:
                part.remove()
                raise BadFile(f"What the Hub sent as {self._file.path} is not what it says the file holds: its checksum is another.")
            was_here = 0  # the beginning may have been of something else
            part.clear()
        await _in_thread(lambda: part.finish(self._repository.blob(self._file)))

    async def _advance(self, part: Part) -> None:
        """Some more of it; all, unless the connection breaks."""
        r = self._retries
        async for attempt in stamina.retry_context(
            on=r.hook,
            attempts=r.attempts,
            timeout=r.timeout_s,
            wait_initial=r.wait_initial_s,
            wait_max=r.wait_max_s,
            wait_jitter=r.wait_initial_s,
        ):
            with attempt:
                before = part.num_bytes
                try:
                    async with self._hub.file(self._model, self._commit, self._file.path, start=before, validator=self._validator) as reply:
                        await self._receive(reply, part, before)
                except HubUnavailable:
                    if part.num_bytes <= before:
                        raise

    async def _receive(self, reply: Reply, part: Part, start: int) -> None:
        version = reply.headers.get("etag")
        version = None if version is None or version.startswith("W/") else version
        if reply.status == 206 and start > 0:
            begins = _RANGE.fullmatch(reply.headers.get("content-range", ""))
            is_the_rest = begins is not None and (int(begins[1]), int(begins[2])) == (start, self._file.size)
            if not is_the_rest or (self._validator is not None and version != self._validator):
                self._validator = None
                await self._start_over(part)
                raise Unreachable("it has another version of the file now")
        elif start > 0:  # the host knows no ranges, or has another version
            await self._start_over(part)
        if reply.status == 416:
            raise Unreachable("it has another version of the file now")
        if version != self._validator:
            self._validator = version
            await self._progress.version(version)
        await self._write(reply, part)

    async def _start_over(self, part: Part) -> None:
        await _in_thread(part.clear)
        self._progress.bytes_here(0)

    async def _write(self, reply: Reply, part: Part) -> None:
        here = part.num_bytes
        waiting = bytearray()
        try:
            async for piece in reply.pieces():
                waiting += piece
                if here + len(waiting) > self._file.size:
                    await _in_thread(part.clear)
                    waiting.clear()
                    raise BadFile(f"What the Hub sent as {self._file.path} is longer than it says the file is.")
                if len(waiting) >= WRITE_BYTES:
                    data, waiting = bytes(waiting), bytearray()
                    await _in_thread(lambda data=data: part.append(data))
                    here += len(data)
                self._progress.bytes_here(here + len(waiting))
        finally:  # also of a connection that broke, and of a transfer that is paused, what came is kept
            if waiting:
                await _in_thread(lambda: part.append(bytes(waiting)))
        if part.num_bytes < self._file.size:
            raise Unreachable("it broke off its answer")


async def _in_thread(work: Callable[[], T]) -> T:
    """To its end: it uses a descriptor that is closed afterwards."""
    return await to_its_end(asyncio.to_thread(work))


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Does what must not be left half done: its end is waited for even if the task is cancelled meanwhile."""
    running = asyncio.create_task(work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise

"""Blocks of keys and values that left memory, in files: a prefix survives memory pressure and a restart. No MLX, and no opinion on
which blocks are worth keeping or fetching.

A file is `<folder>/<fingerprint>/<digest>.safetensors`; what it is about is in its header. It is a cache: whatever goes wrong
costs a block, never more.
"""

import errno
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import threading
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS, Digest

log = logging.getLogger(__name__)

Done = Callable[["StoredBlock | None"], None]

DIGEST_BYTES = 16
MAX_QUEUED_BYTES = 256 << 20
STOP_TIMEOUT_S = 5.0
WRITE_ERRORS_BEFORE_PAUSE = 3
PAUSE_S = 30.0
"""How long nothing is written after several errors in a row: a full disk is not asked again for every block."""

_FORMAT = "1"  # of what the header says; another one's files are not ours to judge
_MAX_HEADER_BYTES = 1 << 20  # 64 arrays take 6 kB
_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "float32": "F32", "float64": "F64",
}  # fmt: skip
_SUFFIX = ".safetensors"
_NAME = re.compile(rf"[0-9a-f]{{{2 * DIGEST_BYTES}}}{re.escape(_SUFFIX)}")
_TEMPORARY = re.compile(rf"[0-9a-f]{{{2 * DIGEST_BYTES}}}\.\w+\.tmp")
_FOLDER_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """`BLOCK_TOKENS` tokens after everything that `parent` stands for, and what the layers keep for them. The arrays are
    bfloat16 as uint16; their names and shapes are the caller's."""

    tokens: tuple[int, ...]
    parent: Digest
    arrays: Mapping[str, np.ndarray]

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


@dataclass(slots=True)
class DiskCounters:
    """What lies on the disk, and what has happened to blocks since the start. May be read anywhere."""

    blocks: int = 0
    bytes: int = 0
    """Of the files of `blocks`."""
    written: int = 0
    read: int = 0
    """From files; a block that was still to be written is not counted."""
    dropped: int = 0
    """Handed over and not written: the queue or the volume was full, writing failed or was paused, or the tier stopped."""
    corrupt: int = 0
    evicted: int = 0
    io_errors: int = 0


class DiskTier:
    """Owns the files under its fingerprint, and the one thread that touches them. `__contains__`, `put` and `fetch` may be called
    from any thread and never wait for the disk.

    Another process may use the same folder: files appear whole or not at all, and one that has gone is a miss. Each process counts
    only the files that it knows of, so together they may hold `max_bytes` each until one of them starts again.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fingerprint: str,
        max_bytes: int,
        min_free_bytes: int = 1 << 30,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`fingerprint` says with what blocks may be exchanged, and names a folder. `max_bytes` is for the files of this fingerprint,
        `min_free_bytes` stays free on the volume, `max_queued_bytes` bounds what waits in memory to be written. `clock` in seconds.
        Raises ValueError if the fingerprint cannot name a folder."""
        if not _FOLDER_NAME.fullmatch(fingerprint):
            raise ValueError("a fingerprint is made of letters, digits, '.', '_' and '-'")
        self._folder = folder
        self._home = folder / fingerprint
        self._fingerprint = fingerprint
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self._max_queued_bytes = max_queued_bytes
        self._max_file_bytes = max_queued_bytes + _MAX_HEADER_BYTES  # `put` takes nothing larger
        self._clock = clock
        self.counters = DiskCounters()
        self._thread = threading.Thread(target=self._run, name="kv-disk", daemon=True)
        self._listed = threading.Event()

        # Callers' threads and ours meet in what follows. The lock is held for moments, never over I/O or a callback.
        self._changed = threading.Condition()
        self._files: OrderedDict[Digest, int] = OrderedDict()  # to the size in bytes, the least recently used first
        self._reads: deque[tuple[Digest, Done]] = deque()
        self._writes: OrderedDict[Digest, StoredBlock] = OrderedDict()
        self._queued_bytes = 0
        self._paused_until: float | None = None
        self._stop_by: float | None = None

        self._write_errors_in_a_row = 0  # our thread's

    # ---- from any thread

    def start(self) -> None:
        """Makes the folder and begins with what is there, both on the tier's thread: until that is listed, nothing on the disk is found.
        A disk that cannot be used is logged and counted, not raised: everything is a miss then."""
        self._thread.start()

    def wait_until_listed(self, timeout_s: float) -> bool:
        """Whether all that is there can be found by now. 20,000 files take a tenth of a second."""
        return self._listed.wait(timeout_s)

    def stop(self) -> None:
        """Writes what is queued, for at most `STOP_TIMEOUT_S`, and ends the thread. Reads that have not begun are answered with
        None."""
        never_started = self._thread.ident is None
        with self._changed:
            if self._stop_by is None:
                self._stop_by = self._clock() + (0.0 if never_started else STOP_TIMEOUT_S)
            self._changed.notify()
        if never_started:
            self._run()  # somebody may wait for an answer
            return
        self._thread.join(2 * STOP_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning("the disk of evicted blocks does not answer; its thread is left behind")

    def __contains__(self, digest: Digest) -> bool:
        """Whether a fetch is worth while: the file may yet turn out to be gone or corrupt."""
        # In this order: a block enters the files before it leaves the queue.
        return digest in self._writes or digest in self._files

    def put(self, digest: Digest, block: StoredBlock) -> bool:
        """Queues a block to be written. Its arrays must not change any more, and must own their memory: they are freed on another
        thread. False if it is there already, and if it is dropped because of the queue, a pause or the end."""
        assert len(digest) == DIGEST_BYTES
        assert len(block.tokens) == BLOCK_TOKENS, "only full blocks are kept"
        num_bytes = block.num_bytes
        with self._changed:
            if digest in self._writes:
                return False
            if digest in self._files:
                self._files.move_to_end(digest)
                return False
            is_paused = self._paused_until is not None and self._clock() < self._paused_until
            if is_paused or self._stop_by is not None or self._queued_bytes + num_bytes > self._max_queued_bytes:
                self.counters.dropped += 1
                return False
            self._writes[digest] = block
            self._queued_bytes += num_bytes
            self._changed.notify()
        return True

    def fetch(self, digest: Digest, done: Done) -> None:
        """Queues a read, before all writes. `done` is called once, on the tier's thread (after `stop` on the caller's): with the block,
        which the caller compares with the tokens and shapes it wants, or with None. A block that is still to be written is
        answered as it is.

        Fetch the last block of a prefix first: the first ones, which the others are useless without, are then evicted last.
        """
        assert len(digest) == DIGEST_BYTES
        with self._changed:
            stopped = self._stop_by is not None
            if not stopped:
                self._reads.append((digest, done))
                self._changed.notify()
        if stopped:
            _guarded(partial(done, None))

    # ---- on the tier's thread

    def _run(self) -> None:
        if self._stop_by is None:
            _guarded(self._list_files)
        self._listed.set()
        while (work := self._next()) is not None:
            _guarded(work)

    def _next(self) -> Callable[[], None] | None:
        """Waits for work. None at the end, when nothing is queued any more."""
        with self._changed:
            while True:
                if self._reads:
                    digest, done = self._reads.popleft()
                    return partial(self._answer, digest, done) if self._stop_by is None else partial(done, None)
                if self._stop_by is not None and self._clock() >= self._stop_by:
                    self._drop_queued()
                if self._writes:
                    return partial(self._write, *next(iter(self._writes.items())))
                if self._stop_by is not None:
                    return None
                self._changed.wait()

    def _list_files(self) -> None:
        """Takes over what is there by name, size and time; a header is looked at when its block is wanted."""
        found: list[tuple[int, Digest, int]] = []
        try:
            self._make_home()
            with os.scandir(self._home) as entries:
                for entry in entries:
                    try:
                        self._take_over(entry, found)
                    except FileNotFoundError:
                        pass  # another process was faster
                    except OSError as error:
                        self._note_error("cannot take over an evicted block", error)
        except OSError as error:
            self._note_error("cannot list the evicted blocks", error)
        files = OrderedDict((digest, size) for _, digest, size in sorted(found))
        with self._changed:
            self._files = files
            self.counters.blocks = len(files)
            self.counters.bytes = sum(files.values())
        self._make_room(0)

    def _take_over(self, entry: os.DirEntry[str], found: list[tuple[int, Digest, int]]) -> None:
        if not entry.is_file(follow_symlinks=False):
            return
        if _TEMPORARY.fullmatch(entry.name):
            os.unlink(entry.path)  # of a crash; if another process is writing it, that one loses a block
        elif _NAME.fullmatch(entry.name):
            status = entry.stat(follow_symlinks=False)
            # Empty if its bytes did not reach the disk before the power went; too large, it would displace all others.
            if not 0 < status.st_size <= self._max_file_bytes:
                self.counters.corrupt += 1
                os.unlink(entry.path)
            else:
                found.append((status.st_mtime_ns, bytes.fromhex(entry.name.removesuffix(_SUFFIX)), status.st_size))

    def _answer(self, digest: Digest, done: Done) -> None:
        block = self._writes.get(digest)
        if block is None:
            try:
                block = self._read(digest)
            except Exception:
                log.exception("reading an evicted block failed")
        done(block)

    def _read(self, digest: Digest) -> StoredBlock | None:
        path = self._path(digest)
        try:
            content = _read_file(path, max_bytes=self._max_file_bytes)
            block = _decode(content, digest, self._fingerprint)
        except (FileNotFoundError, _Foreign):
            self._leave(digest)
            return None
        except _Corrupt as error:
            log.warning("an evicted block is corrupt and is deleted: %s", error)
            self.counters.corrupt += 1
            self._leave(digest)
            self._unlink(digest)
            return None
        except OSError as error:
            self._note_error("cannot read an evicted block", error)
            self._leave(digest)  # so that it is written again, rather than asked for again
            return None
        now = time.time_ns()
        with suppress(OSError):
            os.utime(path, ns=(now, now), follow_symlinks=False)
        with self._changed:
            self.counters.read += 1
            self._enter(digest, len(content))
        self._make_room(0)  # it may be another process's, and new to us
        return block

    def _write(self, digest: Digest, block: StoredBlock) -> None:
        size: int | None = None
        try:
            if digest not in self._files:  # it may have been queued before the files were listed
                size = self._save(digest, block)
        finally:
            with self._changed:
                if size is not None:
                    self._enter(digest, size)
                    self.counters.written += 1
                elif digest not in self._files:
                    self.counters.dropped += 1
                del self._writes[digest]
                self._queued_bytes -= block.num_bytes
        if self._write_errors_in_a_row >= WRITE_ERRORS_BEFORE_PAUSE:
            self._pause()

    def _pause(self) -> None:
        log.warning("evicted blocks are not written for the next %d s", PAUSE_S)
        self._write_errors_in_a_row -= 1  # the first error after the pause begins the next one
        with self._changed:
            self._paused_until = self._clock() + PAUSE_S
            self._drop_queued()

    def _save(self, digest: Digest, block: StoredBlock) -> int | None:
        """The size of the file in bytes; None if it was not written."""
        header, data = _encode(block, digest, self._fingerprint)
        size = len(header) + len(data)
        if size > self._max_bytes:
            return None
        try:
            self._make_home()
            if shutil.disk_usage(self._home).free - size < self._min_free_bytes:
                return None
            self._make_room(size)
            _write_file(self._path(digest), header, data)
        except OSError as error:
            self._note_error("cannot write an evicted block", error)
            self._write_errors_in_a_row += 1
            return None
        self._write_errors_in_a_row = 0
        return size

    def _make_home(self) -> None:
        """Raises OSError. Also before every write: somebody may have emptied the cache folder."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._home.mkdir(mode=0o700, exist_ok=True)
        if not stat.S_ISDIR(os.lstat(self._home).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "a link where a folder of ours should be", str(self._home))

    def _make_room(self, num_bytes: int) -> None:
        """Deletes the least recently used files until this many more bytes may be kept."""
        victims: list[Digest] = []
        with self._changed:
            while self._files and self.counters.bytes + num_bytes > self._max_bytes:
                victim = next(iter(self._files))
                self._forget(victim)
                victims.append(victim)
            self.counters.evicted += len(victims)
        for victim in victims:
            self._unlink(victim)

    def _unlink(self, digest: Digest) -> None:
        try:
            self._path(digest).unlink(missing_ok=True)
        except OSError as error:
            self._note_error("cannot delete an evicted block", error)

    def _path(self, digest: Digest) -> Path:
        return self._home / f"{digest.hex()}{_SUFFIX}"

    def _note_error(self, what: str, error: OSError) -> None:
        log.warning("%s: %s", what, error.strerror)
        self.counters.io_errors += 1

    # ---- what lies on the disk. Under the lock, except `_leave`, which takes it

    def _enter(self, digest: Digest, size: int) -> None:
        """A file of this many bytes has been used."""
        self.counters.blocks += digest not in self._files
        self.counters.bytes += size - self._files.get(digest, 0)
        self._files[digest] = size
        self._files.move_to_end(digest)

    def _forget(self, digest: Digest) -> None:
        size = self._files.pop(digest, None)
        if size is not None:
            self.counters.blocks -= 1
            self.counters.bytes -= size

    def _leave(self, digest: Digest) -> None:
        with self._changed:
            self._forget(digest)

    def _drop_queued(self) -> None:
        self.counters.dropped += len(self._writes)
        self._writes.clear()
        self._queued_bytes = 0


class _Foreign(Exception):
    """A file that is not ours to delete: of another format or fingerprint, or no file at all."""


class _Corrupt(Exception):
    """A file of ours that is not what it was when it was written."""


def _encode(block: StoredBlock, digest: Digest, fingerprint: str) -> tuple[bytes, bytes]:
    """The header and the data of a block's file. Raises ValueError for arrays of a type that is not stored.

    Laid out here: the library's `save` copies the data with the interpreter locked, and no other thread could queue a step meanwhile.
    """
    header: dict[str, Any] = {}
    parts: list[memoryview] = []
    end = 0
    for name, array in sorted(block.arrays.items()):
        if array.dtype.name not in _DTYPES:
            raise ValueError(f"arrays of {array.dtype.name} are not stored")
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": [begin, end]}
        parts.append(np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C").data)
    data = b"".join(parts)
    metadata = header["__metadata__"] = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "digest": digest.hex(),
        "parent": block.parent.hex(),
        "tokens": " ".join(map(str, block.tokens)),
    }
    metadata["checksum"] = _checksum(header, data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, data


def _decode(content: bytes, digest: Digest, fingerprint: str) -> StoredBlock:
    """Raises `_Foreign` or `_Corrupt` unless `content` is what `_encode` made of the block with this digest."""
    header_bytes = int.from_bytes(content[:8], "little")
    if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, len(content) - 8):
        raise _Corrupt("its header has an impossible length")
    try:
        header: dict[str, Any] = json.loads(content[8 : 8 + header_bytes])
        metadata = dict(header.get("__metadata__", {}))
        if metadata.get("format") != _FORMAT or metadata.get("fingerprint") != fingerprint:
            raise _Foreign
        arrays = load(content)  # which checks that types, shapes and offsets make up the length of the data
        checksum = metadata.pop("checksum")
        if checksum != _checksum(header | {"__metadata__": metadata}, memoryview(content)[8 + header_bytes :]):
            raise _Corrupt("its content does not match its checksum")
        if metadata["digest"] != digest.hex():
            raise _Corrupt("it has the name of another block")
        tokens = tuple(int(token) for token in metadata["tokens"].split(" "))
        if len(tokens) != BLOCK_TOKENS:
            raise _Corrupt("it does not hold the tokens of one block")
        return StoredBlock(tokens, bytes.fromhex(metadata["parent"]), arrays)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _Corrupt("it is not in our format") from error


def _checksum(header: Mapping[str, Any], data: bytes | memoryview) -> str:
    """Over all that a file says, without the checksum. Against accidents: who can write these files can do anything as this user."""
    return f"{zlib.crc32(data, zlib.crc32(json.dumps(header, sort_keys=True).encode())):08x}"


def _read_file(path: Path, *, max_bytes: int) -> bytes:
    """Raises OSError, `_Foreign` if it is not a regular file, `_Corrupt` if it is larger than anything that we write."""
    if path.is_symlink():
        raise _Foreign
    # Not blocked by a pipe, and not led elsewhere by a link that has come since.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _Foreign
        if status.st_size > max_bytes:
            raise _Corrupt("it is larger than any block")
        return file.read(status.st_size)


def _write_file(path: Path, *parts: bytes) -> None:
    """All of it under this name, or nothing: raises OSError.

    Nothing is forced to the disk. What a power cut tears is told by its checksum and costs a block; waiting for the disk at each
    block would cost more.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f"{path.stem}.", suffix=".tmp", dir=path.parent)  # mode 0600
    try:
        try:
            for part in parts:
                rest = memoryview(part)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            now = time.time_ns()  # finer than the time that the file system takes
            os.utime(descriptor, ns=(now, now))
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _guarded(work: Callable[[], None]) -> None:
    """Nothing that one block does may end the thread that the others need."""
    try:
        work()
    except Exception:
        log.exception("work on an evicted block failed")

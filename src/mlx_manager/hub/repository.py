"""A model's folder in the Hugging Face cache, laid out as its tools have it, so that they and we share what is there.

    models--organisation--name/
    ├── blobs/<etag>             contents; ours in the making are <etag>.part
    ├── snapshots/<commit>/…     names: links to blobs
    └── refs/main                the commit that a name stands for

A snapshot gets its name when all of it is there. Nothing is written through a link that leads out of the cache.
"""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from mlx_manager.hub.checkpoint import Unusable
from mlx_manager.hub.listing import RemoteFile

_UNFINISHED = "snapshots.part"


class Repository:
    def __init__(self, cache: Path, repo: str) -> None:
        """`repo` is a valid id: its parts become a folder's name."""
        self.folder = cache / f"models--{repo.replace('/', '--')}"
        self._cache = cache
        self._blobs = self.folder / "blobs"
        self._snapshots = self.folder / "snapshots"

    def blob(self, file: RemoteFile) -> Path:
        return self._blobs / file.etag

    def part(self, file: RemoteFile) -> Path:
        return self._blobs / f"{file.etag}.part"

    def has(self, file: RemoteFile) -> bool:
        try:
            return self.blob(file).stat().st_size == file.size
        except OSError:
            return False

    def num_bytes_here(self, file: RemoteFile) -> int:
        """Of a file, whole or in part."""
        if self.has(file):
            return file.size
        try:
            return min(self.part(file).lstat().st_size, file.size)
        except OSError:
            return 0

    def prepare(self) -> None:
        """Makes the folders. Raises `OSError`, and Unusable if one of them is a link that leads elsewhere."""
        self._snapshots.mkdir(parents=True, exist_ok=True)  # without this one, other tools take the folder for a broken one
        self._blobs.mkdir(exist_ok=True)
        root = self._cache.resolve()
        for folder in (self.folder, self._blobs, self._snapshots):
            if folder.resolve() != root / folder.relative_to(self._cache):
                raise Unusable(f"{folder.name} in the cache is a link that leads elsewhere")

    def has_snapshot(self, commit: str, files: Iterable[RemoteFile]) -> bool:
        return all((self._snapshots / commit / file.path).exists() for file in files)

    def publish(self, revision: str, commit: str, files: Sequence[RemoteFile]) -> None:
        """The snapshot, once all blobs are there: nobody sees a part of it. Raises `OSError`."""
        target = self._snapshots / commit
        if target.is_dir() and not target.is_symlink():
            self._link(target, files)  # another tool has fetched some of it; what makes it a model comes last
        else:
            unfinished = self.folder / _UNFINISHED / commit
            shutil.rmtree(unfinished, ignore_errors=True)
            self._link(unfinished, files)
            unfinished.rename(target)
            shutil.rmtree(unfinished.parent, ignore_errors=True)
        if revision != commit:
            ref = self.folder / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            new = ref.with_name(f"{ref.name}.part")
            new.write_text(commit)
            new.replace(ref)
        sync(self._snapshots)

    def _link(self, folder: Path, files: Sequence[RemoteFile]) -> None:
        for file in sorted(files, key=lambda file: file.path == "config.json"):
            name = folder / file.path
            name.parent.mkdir(parents=True, exist_ok=True)
            if not name.exists():
                name.unlink(missing_ok=True)
                name.symlink_to(os.path.relpath(self._blobs / file.etag, name.parent))

    def discard(self, files: Iterable[RemoteFile]) -> None:
        """Removes what was fetched of these files and is part of no snapshot. Raises `OSError`."""
        linked = self._linked()
        for file in files:
            self.part(file).unlink(missing_ok=True)
            if file.etag not in linked:
                self.blob(file).unlink(missing_ok=True)
        shutil.rmtree(self.folder / _UNFINISHED, ignore_errors=True)
        for folder in (self._blobs, self._snapshots, self.folder):
            try:
                folder.rmdir()
            except OSError:  # something is left in it that is not ours
                return

    def _linked(self) -> set[str]:
        """The names of the blobs that snapshots need."""
        return {Path(os.readlink(path)).name for path in self._snapshots.rglob("*") if path.is_symlink()}


class Part:
    """A file in the making, which nobody else writes to while it is held. Blocking; one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def open(self) -> bool:
        """False if another program is at it. Raises `OSError`."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
        try:
            _lock(descriptor)
            if os.fstat(descriptor).st_ino != self._path.lstat().st_ino:
                raise BlockingIOError  # it was finished by another between the two lines above
        except (BlockingIOError, FileNotFoundError):
            os.close(descriptor)
            return False
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    @property
    def num_bytes(self) -> int:
        return os.fstat(self._descriptor).st_size

    def append(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def clear(self) -> None:
        os.ftruncate(self._descriptor, 0)

    def has_content(self, file: RemoteFile) -> bool:
        """Whether it is what its etag says. Reads all of it."""
        digest = hashlib.sha256() if len(file.etag) == 64 else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        with open(os.dup(self._descriptor), "rb") as content:
            content.seek(0)
            while piece := content.read(1 << 20):
                digest.update(piece)
        return digest.hexdigest() == file.etag

    def finish(self, blob: Path) -> None:
        """It becomes the blob, durably."""
        os.fsync(self._descriptor)
        self._path.replace(blob)
        sync(blob.parent)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Also of one that was not opened."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _lock(descriptor: int) -> None:
    """Raises `BlockingIOError` if another has it. A file system that knows no locks goes without."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise


def sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Of the disk where a folder is or would be. Raises `OSError`."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free

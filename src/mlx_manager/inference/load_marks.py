"""Which model was being loaded when the process ended: a file for each, written before and removed after."""

import hashlib
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

_MAX_BYTES = 1024


class LoadMarks:
    """`found`: those that no load has come to an end of since. Without a folder, or with one that cannot be written, nothing is
    remembered. Marks are made on the device thread, one at a time."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.found: set[str] = set() if folder is None else set(_read(folder))

    @contextmanager
    def marked(self, model_id: str) -> Generator[None]:
        """Around a load, however it ends."""
        path = None if self._folder is None else self._folder / hashlib.blake2b(model_id.encode(), digest_size=16).hexdigest()
        if path is not None:
            try:
                _write(path, model_id)
            except OSError as error:
                log.warning("that %s is being loaded could not be written down: %s", model_id, error.strerror)
        try:
            yield
        finally:
            self.found.discard(model_id)
            if path is not None:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    log.warning("the mark of loading %s could not be removed: %s", model_id, error.strerror)


def _write(path: Path, model_id: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(model_id.encode())
        file.flush()
        os.fsync(file.fileno())


def _read(folder: Path) -> list[str]:
    found: list[str] = []
    try:
        for path in sorted(folder.iterdir()):
            with path.open("rb") as file:
                found.append(file.read(_MAX_BYTES).decode(errors="replace"))
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("which models were being loaded at the end could not be read: %s", error.strerror)
    return [model_id for model_id in found if model_id]
